"""Whether Parquet files have the columns that are asked for, and row groups of a size to read."""

from collections.abc import Sequence
from typing import Any

from capjax.data.readers.columns import Columns
from capjax.data.readers.row_groups import RowGroups
from capjax.errors import UserError

_EXPECTED = {
    "bytes": "bytes, or structs with `bytes`",
    "text": "texts",
    "texts": "lists of texts",
    "number": "whole numbers",
}


def kind_of(arrow_type: Any) -> str:
    """`bytes` (in a struct too), `text`, `texts` (a list), `number` (whole) or `other`."""
    from pyarrow import types

    if types.is_dictionary(arrow_type):
        return kind_of(arrow_type.value_type)
    if types.is_struct(arrow_type):
        index = arrow_type.get_field_index("bytes")
        inside = kind_of(arrow_type.field(index).type) if index >= 0 else "other"
        return inside if inside == "bytes" else "other"
    if types.is_list(arrow_type) or types.is_large_list(arrow_type):
        return "texts" if kind_of(arrow_type.value_type) == "text" else "other"
    tests = {
        "bytes": (types.is_binary, types.is_large_binary, types.is_binary_view),
        "text": (types.is_string, types.is_large_string, types.is_string_view),
        "number": (types.is_integer,),
    }
    found = (kind for kind, ones in tests.items() if any(test(arrow_type) for test in ones))
    return next(found, "other")


def check_types(path: str, schema: Any, columns: Columns) -> None:
    """Raises `UserError` for a column that the file lacks or that is of a wrong type."""
    wanted = dict.fromkeys(columns.captions, ("text", "texts"))
    wanted[columns.image] = ("bytes", "text")
    if columns.key is not None and columns.key != columns.image:
        wanted[columns.key] = ("text", "number")
    for name, kinds in wanted.items():
        if name not in schema.names:
            have = ", ".join(map(repr, schema.names))
            raise UserError(f"{path}: no column {name!r}, which other files have; it has {have}")
        arrow_type = schema.field(name).type
        if kind_of(arrow_type) not in kinds:
            expected = " or ".join(_EXPECTED[kind] for kind in kinds)
            raise UserError(
                f"{path}: the column {name!r} is of type {arrow_type}; expected {expected}; name "
                "another column in the source's options"
            )


def check_sizes(paths: Sequence[str], found: Sequence[RowGroups], limit: int) -> None:
    """Raises `UserError` for a row group of over `limit` bytes: each row would read it anew."""
    for path, groups in zip(paths, found, strict=True):
        for number, (rows, size) in enumerate(zip(groups.rows, groups.sizes, strict=True)):
            if size > limit:
                raise UserError(
                    f"{path}: row group {number} has {rows} rows of {size >> 20} MiB together, and "
                    f"one row cannot be read without the others; expected at most {limit >> 20} "
                    "MiB: write it again with row_group_size=100, or raise ?cache_megabytes="
                )
