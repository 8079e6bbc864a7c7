"""Row groups of Parquet files: where they are, and the last ones read, up to a number of bytes."""

import contextlib
import io
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from capjax.data import files
from capjax.errors import UserError

_READ_BYTES = 4 << 20  # of a remote file at once, so that small columns come together


class RowGroups(NamedTuple):
    """What the footer of one file tells: `rows` and uncompressed `sizes` (bytes) of its groups,
    the Arrow schema, and the table of the columns asked for."""

    rows: list[int]
    sizes: list[int]
    schema: Any
    table: Any


class GroupCache:
    """Row groups by (file, group). Threads share it, one reads each group; pickles to empty.

    Holds `limit` bytes and the group read last; a reading thread may hold another.
    """

    def __init__(self, paths: Sequence[str], limit: int) -> None:
        self.paths = paths
        self.limit = limit
        self._forget()

    def read(self, file: int, group: int) -> Any:
        """The group as an Arrow table. Raises what pyarrow and the file system raise."""
        with self._lock:
            slot = self._slots.setdefault((file, group), _Slot())
            self._slots.move_to_end((file, group))
        with slot.lock:
            table = slot.table
            if table is None:
                with parquet_file(self.paths[file]) as parquet:
                    # Other threads read other groups meanwhile: more threads here gain nothing.
                    table = slot.table = parquet.read_row_group(group, use_threads=False)
                self._hold(slot, table.nbytes)
        return table

    def _hold(self, new: "_Slot", size: int) -> None:
        with self._lock:
            new.size = size
            self._held += size
            for name, slot in list(self._slots.items()):
                if self._held <= self.limit:
                    break
                if slot is not new and slot.size:
                    self._held -= slot.size
                    del self._slots[name]

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._slots: OrderedDict[tuple[int, int], _Slot] = OrderedDict()
        self._held = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "limit": self.limit}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


class _Slot:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.table: Any = None
        self.size = 0


@contextlib.contextmanager
def parquet_file(path: str) -> Iterator[Any]:
    """The file as a `pyarrow.parquet.ParquetFile`. Raises `UserError` without pyarrow."""
    parquet = import_parquet()
    with contextlib.ExitStack() as stack:
        where: Any = path
        if files.is_remote(path):
            remote = io.BufferedReader(files.RemoteFile(path), _READ_BYTES)
            where = stack.enter_context(remote)
        yield stack.enter_context(parquet.ParquetFile(where))


def import_parquet() -> Any:
    """`pyarrow.parquet`. Raises `UserError` where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "Parquet files are read by pyarrow, which is not installed: "
            "pip install 'capjax[parquet]'"
        ) from error
    return pyarrow.parquet


def row_groups(path: str, columns: Sequence[str] = ()) -> RowGroups:
    """The groups of a file, and those of `columns` that it has. Raises `UserError`."""
    try:
        with parquet_file(path) as parquet:
            groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
            schema = parquet.schema_arrow
            wanted = [name for name in columns if name in schema.names]
            table = parquet.read(columns=wanted) if wanted else None
    except (OSError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"{path} is not a readable Parquet file ({str(error).splitlines()[0]}): it is "
            "truncated, damaged or of another format; write or copy it again"
        ) from error
    rows = [group.num_rows for group in groups]
    return RowGroups(rows, [group.total_byte_size for group in groups], schema, table)
