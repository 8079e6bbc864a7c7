"""Parquet files with the images in them, as Hugging Face and img2dataset write, or with paths."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any, SupportsIndex

import numpy as np

from capjax.data import files
from capjax.data.readers.columns import (
    IMAGE_COLUMNS,
    Columns,
    choose_columns,
    row_of,
    take_captions,
)
from capjax.data.readers.indexed_files import beside, given_images, indexed_files
from capjax.data.readers.packed_rows import Damaged, Row
from capjax.data.readers.parquet_checks import check_sizes, check_types, kind_of
from capjax.data.readers.row_groups import (
    GroupCache,
    RowGroups,
    import_parquet,
    parquet_file,
    row_groups,
)
from capjax.data.records import Caption, CorruptRecord, Example, checked_index
from capjax.data.sources import Source
from capjax.errors import UserError

_BYTES_COLUMNS = ("jpg", "jpeg", "png", "webp")  # img2dataset names it for the encoding
_CACHE_MEGABYTES = 512
_OPENERS = 16


def open_parquet(
    path: str,
    *,
    image: str | None = None,
    caption: str | None = None,
    key: str | None = None,
    images: str | None = None,
    cache_megabytes: str | None = None,
) -> Source:
    """The rows of one Parquet file, of a glob's or a range's, or of all below a directory.

    `image`: a column of bytes, of structs {bytes, path} (Hugging Face), or of paths relative to
    `images` (see `capjax.data.readers.tables.open_csv`); by default `jpg`, `jpeg`, `png`, `webp`
    or one named as in a table. `caption`: as in a table. `key`: a column; by default `key`, else
    FILE:ROW, or the path. Where there is a `status` column (img2dataset) only rows with `success`
    count. `cache_megabytes` bounds the row groups kept in memory. Raises `UserError` for a file
    that is none, missing columns or ones of other types, keys that occur twice, no rows, a row
    group larger than the cache, and without pyarrow.
    """
    import_parquet()
    paths = _expand(path)
    limit = _CACHE_MEGABYTES if cache_megabytes is None else cache_megabytes
    if not str(limit).isdecimal():
        raise UserError(f"cache_megabytes={limit!r} of {path}: expected a whole number of MiB")
    with ThreadPoolExecutor(min(_OPENERS, len(paths))) as pool:
        found = list(pool.map(lambda file: row_groups(file, ["status", key or "key"]), paths))
    names = found[0].schema.names
    usual = (*_BYTES_COLUMNS, *IMAGE_COLUMNS)
    columns = choose_columns(f"parquet {path}", names, image, caption, key, usual)
    if columns.key is None and "key" in names:
        columns = columns._replace(key="key")
    for file, groups in zip(paths, found, strict=True):
        check_types(file, groups.schema, columns)
    kinds = {kind_of(groups.schema.field(columns.image).type) for groups in found}
    if len(kinds) > 1:
        raise UserError(
            f"parquet {path}: the column {columns.image!r} has bytes in some files and paths in "
            "others; read them as two sources"
        )
    if kinds == {"text"}:
        directories = beside(paths[0], "")[:1] if images is None else given_images(paths[0], images)
        return indexed_files("parquet", path, _path_rows(paths, columns), directories)
    check_sizes(paths, found, int(limit) << 20)
    return ParquetRows(path, paths, found, columns, int(limit) << 20)


class ParquetRows:
    """Random access to rows that hold images. Threads may share it; it pickles without its cache.

    One row is read with its whole row group, so `block_size`, the rows of a group, is how many
    neighbours an order that reads blocks should take together. A row or group that cannot be read
    raises CorruptRecord when asked for.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[str],
        found: Sequence[RowGroups],
        columns: Columns,
        cache_bytes: int,
    ) -> None:
        self.name = name
        self.paths = tuple(paths)
        self.columns = columns
        per_file = [len(groups.rows) for groups in found]
        files_of_groups = np.repeat(np.arange(len(found)), per_file)
        within = np.concatenate([np.arange(count) for count in per_file])
        self._groups = np.stack([files_of_groups, within], axis=1)
        self._starts = _starts(count for groups in found for count in groups.rows)
        self._file_starts = _starts(sum(groups.rows) for groups in found)
        self._rows = _usable_rows(name, found, columns.key)
        # Below one directory, so that a copy elsewhere has the same keys.
        folder = os.path.commonpath([path.rpartition("/")[0] for path in paths])
        self._names = [path[len(folder) :].lstrip("/") for path in paths]
        self._cache = GroupCache(self.paths, cache_bytes)
        self.block_size = max(1, round(len(self) / max(1, len(self._groups))))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: SupportsIndex) -> Example:
        i = checked_index(index, self, "row")
        row = int(self._rows[i])
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        file, group = map(int, self._groups[number])
        row_of_file = row - int(self._file_starts[file])
        try:
            table = self._cache.read(file, group)
            record = table.slice(row - int(self._starts[number]), 1).to_pylist()[0]
            return _example(record, self.columns, f"{self._names[file]}:{row_of_file}")
        # IndexError: the file changed since it was counted.
        except (OSError, ValueError, NotImplementedError, IndexError) as error:
            raise CorruptRecord(self.paths[file], row_of_file, str(error)) from error

    def __repr__(self) -> str:
        left_out = int(self._starts[-1]) - len(self)
        more = f", {left_out} rows without status success" if left_out else ""
        return f"parquet({self.name!r}; {len(self)} images in {len(self.paths)} files{more})"


def _starts(counts: Iterable[int]) -> np.ndarray:
    return np.array([0, *accumulate(counts)], np.int64)


def _example(record: dict[str, Any], columns: Columns, place: str) -> Example:
    image = record.pop(columns.image)
    if isinstance(image, dict):
        image = image.get("bytes")
    if not image:
        raise ValueError(f"no image bytes in {columns.image!r}")
    key = place if columns.key is None else record.pop(columns.key)
    if key is None or key == "":
        raise ValueError(f"no key in {columns.key!r}")
    captions = tuple(Caption(text, name) for name, text in take_captions(record, columns))
    return Example(str(key), image, captions, metadata=_plain(record))


def _plain(value: Any) -> Any:
    """The value in the types of a record; others (times, decimals) as text."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, None | str | int | float | bytes) else str(value)


def _expand(path: str) -> list[str]:
    try:
        return files.expand(path)
    except UserError as error:  # a directory; some writers end its name in .parquet too
        with contextlib.suppress(UserError):
            return files.expand(f"{path.rstrip('/')}/**/*.parquet")
        raise error


def _usable_rows(name: str, found: Sequence[RowGroups], key: str | None) -> np.ndarray:
    """The numbers of the rows that count. Raises `UserError` for none, or a key of two of them."""
    import pyarrow
    from pyarrow import compute

    arrow: Any = compute  # its functions are made when it is imported
    masks = []
    for groups in found:
        mask = np.ones(sum(groups.rows), bool)
        if "status" in groups.schema.names:
            success = arrow.equal(groups.table["status"].cast("string"), "success")
            mask = arrow.fill_null(success, False).to_numpy()
        masks.append(mask)
    rows = np.flatnonzero(np.concatenate(masks)).astype(np.int64)
    if not len(rows):
        raise UserError(
            f"parquet {name}: none of its {sum(map(len, masks))} rows counts; expected rows, and "
            "where there is a `status` column, some with success"
        )
    if key is not None:
        # Of any type of text or number in each file; large: over 2 GiB together.
        columns = [groups.table[key].cast("large_string") for groups in found]
        kept = [column.filter(mask) for column, mask in zip(columns, masks, strict=True)]
        keys = pyarrow.chunked_array([c for column in kept for c in column.chunks]).drop_null()
        if arrow.count_distinct(keys).as_py() < len(keys):
            counted = arrow.value_counts(keys).to_pylist()
            twice = next(pair["values"] for pair in counted if pair["counts"] > 1)
            raise UserError(
                f"parquet {name}: the {key!r} {twice!r} is that of two rows; keys must be unique: "
                "drop one of the rows, or name another column as ?key=COLUMN"
            )
    return rows


def _path_rows(paths: Sequence[str], columns: Columns) -> Iterator[Row | Damaged]:
    for path in paths:
        with parquet_file(path) as parquet:
            records = (item for batch in parquet.iter_batches() for item in batch.to_pylist())
            for number, record in enumerate(records):
                if record.get("status", "success") == "success":
                    plain = _plain(record)
                    yield row_of(plain, columns, (f"{path}: row", number))
