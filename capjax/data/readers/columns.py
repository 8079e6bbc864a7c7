"""Which columns of a table are the image, the captions and the key; values of any make."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

from capjax.data.readers.packed_rows import Damaged, Row
from capjax.errors import UserError, did_you_mean

IMAGE_COLUMNS = ("image", "filename", "file_name", "filepath", "path", "image_path")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "alt_text")


class Columns(NamedTuple):
    """Names of columns, each in one part only; `key` None: the image's path is the key."""

    image: str
    captions: tuple[str, ...]
    key: str | None


def choose_columns(
    where: str,
    present: Sequence[str],
    image: str | None,
    caption: str | None,
    key: str | None,
    image_columns: Sequence[str] = IMAGE_COLUMNS,
) -> Columns:
    """The columns that the options name, or the first of the usual names that is present.

    `caption` is one name or several separated by commas; empty: no captions. Raises `UserError`
    naming the option and the columns that there are.
    """
    first = image or next((name for name in image_columns if name in present), None)
    usual = [name for name in CAPTION_COLUMNS if name in present and name != first][:1]
    captions = usual if caption is None else [name for name in caption.split(",") if name]
    have = f"the columns are {', '.join(map(repr, present))}"
    if first is None:
        raise UserError(f"{where}: which column is the image? {have}; name one as ?image=COLUMN")
    if caption is None and not captions:
        raise UserError(
            f"{where}: which column is the caption? {have}; name one or more as ?caption=COLUMN, "
            "or none as ?caption="
        )
    named = [("image", first), *(("caption", name) for name in captions)]
    for option, name in [*named, *([("key", key)] if key else [])]:
        if name not in present:
            raise UserError(
                f"{where}: {option}={name!r} is no column; {have}{did_you_mean(name, present)}"
            )
    parts = [first, *captions, *([key] if key and key != first else [])]
    if len(set(parts)) < len(parts):
        raise UserError(f"{where}: one column is two things in {parts}; name others")
    return Columns(first, tuple(captions), key or None)


def row_of(record: dict[str, Any], columns: Columns, where: tuple[str, int]) -> Row | Damaged:
    """A record of a table as a row: its captions, and what is left of it as metadata."""
    image = record.pop(columns.image, None)
    if type(image) is not str or not image:
        return _lacking("image path", columns.image, image, where)
    key: Any = image
    if columns.key is not None and columns.key != columns.image:
        key = record.pop(columns.key, None)
        if type(key) is int:
            key = str(key)
        if type(key) is not str or not key:
            return _lacking("key", columns.key, key, where)
    return Row(key, image, take_captions(record, columns), record)


def take_captions(record: dict[str, Any], columns: Columns) -> list[tuple[str, str]]:
    """(column, text) of each caption of a record, which is left with the columns for metadata."""
    record.pop("", None)  # pandas writes its index under no name
    return [
        (name, text) for name in columns.captions for text in caption_texts(record.pop(name, None))
    ]


def caption_texts(value: object) -> list[str]:
    """The captions in a value: a text, a list of texts, or such a list written in JSON."""
    if isinstance(value, str):
        if not (value.startswith("[") and value.endswith("]")):
            return [text] if (text := value.strip()) else []
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = None
        # Else a caption that happens to be in brackets.
        value = parsed if _are_texts(parsed) else value
    texts = value if _are_texts(value) else [value]
    return [text for item in texts if isinstance(item, str) and (text := item.strip())]


def _lacking(what: str, column: str, value: object, where: tuple[str, int]) -> Damaged:
    return Damaged(f"{where[0]} {where[1]}: no {what} in {column!r}, but {value!r:.80}")


def _are_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
