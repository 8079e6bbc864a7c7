"""Large reads of remote files: blocks of bytes, the last of them kept in memory."""

import threading
from collections import OrderedDict

from capjax.data.files import read_whole


class _Block:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.data: bytes | None = None


class BlockCache:
    """The blocks read last, up to `limit` bytes. Threads share it; each block is read by one.

    `reads` counts the reads of files. Pickles to an empty one.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.reads = 0
        self._kept: OrderedDict[tuple[str, int, int], _Block] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    def read(self, path: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of a file. Raises `OSError`, for fewer bytes too."""
        name = path, start, stop
        with self._lock:
            block = self._kept.setdefault(name, _Block())
            self._kept.move_to_end(name)
        with block.lock:
            if block.data is None:
                block.data = read_whole(path, start, stop)
                self._hold(name, len(block.data))
            return block.data

    def _hold(self, name: tuple[str, int, int], size: int) -> None:
        with self._lock:
            self.reads += 1
            self._held += size
            for other, block in list(self._kept.items()):
                if self._held <= self.limit:
                    break
                if other != name and block.data is not None:
                    self._held -= len(block.data)
                    del self._kept[other]

    def __getstate__(self) -> int:
        return self.limit

    def __setstate__(self, limit: int) -> None:
        self.__init__(limit)
