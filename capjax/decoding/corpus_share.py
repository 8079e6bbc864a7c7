"""How processes that do not know of one another divide a corpus between them."""

from typing import NamedTuple


class Share(NamedTuple):
    """Which of several processes this is: it makes the shards of its number modulo theirs."""

    process_id: int = 0
    num_processes: int = 1

    def of(self, num_shards: int) -> range:
        """The numbers of its shards."""
        return range(self.process_id, num_shards, self.num_processes)
