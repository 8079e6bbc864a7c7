"""What training could not use: `bad_records.jsonl` of a workdir, and the number of such records.

One file for each process that reads: `bad_records.jsonl`, `bad_records-1.jsonl`, … All is by the
position in the stream: a resume drops the lines from its position on, which will come again, and
the counts are those of the records before a position, whatever the processes and restarts.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from capjax.data.batches import BadRecord, check_budget
from capjax.training.storage import exists, is_remote, read_bytes
from capjax.training.workdir import write_atomic

_NAME = "bad_records"
_COUNTS_BYTES = 4096  # of the few reasons that there are, as JSON


class BadRecords:
    """The bad records of a run that goes on at position `start`.

    `process_index` and `process_count` are JAX's unless given. A process keeps the file of its
    number; the first also those of processes that are no more.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        start: int,
        bad_budget: float = 1.0,
        *,
        process_index: int | None = None,
        process_count: int | None = None,
    ) -> None:
        index = jax.process_index() if process_index is None else process_index
        self._process_count = jax.process_count() if process_count is None else process_count
        self._root, self._budget = epath.Path(workdir), bad_budget
        self._path = self._root / f"{_NAME}{f'-{index}' if index else ''}.jsonl"
        self._before: Counter[str] = Counter()
        self._ahead: list[BadRecord] = []
        for path in sorted(self._root.glob(f"{_NAME}*.jsonl")):
            match = re.fullmatch(rf"{_NAME}(?:-(\d+))?", path.stem)
            if match is None:  # a copy that somebody made
                continue
            number = int(match[1] or 0)
            if number == index or (index == 0 and number >= self._process_count):
                self._before.update(_trim(path, start))

    def add(self, records: Sequence[BadRecord]) -> None:
        """Adds those of this process to its file."""
        if not records:
            return
        self._ahead += records
        lines = "".join(json.dumps(record._asdict()) + "\n" for record in records)
        if is_remote(self._path):  # it cannot append; there are few such records, or the run stops
            kept = read_bytes(self._path).decode() if exists(self._path) else ""
            write_atomic(self._path, kept + lines)
            return
        with self._path.open("a") as file:
            file.write(lines)

    def count(self, position: int) -> Counter[str]:
        """Reason -> number of records before a position of the stream, over all processes.

        Every process must ask, for the same position, and for none before the last.
        """
        self._before.update(record.reason for record in self._ahead if record.position < position)
        self._ahead = [record for record in self._ahead if record.position >= position]
        return _summed(self._before) if self._process_count > 1 else Counter(self._before)

    def metrics(self, position: int) -> dict[str, int]:
        """The same by name of a metric ("bad/no_caption"). Raises `DataError` beyond the budget."""
        counts = self.count(position)
        named = f"they are named in {self._root / _NAME}*.jsonl"
        check_budget(counts, position, self._budget, named)
        return {f"bad/{reason.replace(' ', '_')}": count for reason, count in counts.items()}


def _summed(counts: Counter[str]) -> Counter[str]:
    text = json.dumps(counts).encode().ljust(_COUNTS_BYTES)
    with jax.transfer_guard("allow"):
        rows = multihost_utils.process_allgather(np.frombuffer(text, np.uint8))
    return sum((Counter(json.loads(row.tobytes())) for row in rows), Counter())


def _trim(path: epath.Path, start: int) -> Counter[str]:
    """Leaves the lines of positions before `start`, and counts them by reason."""
    kept, counts = [], Counter[str]()
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
            is_before, reason = record["position"] < start, str(record["reason"])
        except (ValueError, KeyError, TypeError):  # torn by a kill
            continue
        if is_before:
            kept.append(line + "\n")
            counts[reason] += 1
    write_atomic(path, "".join(kept))
    return counts
