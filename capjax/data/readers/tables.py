"""Tables of image paths and captions: CSV, TSV, JSON (an object a line, or a list), bare paths."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from capjax.data.readers.columns import choose_columns, row_of
from capjax.data.readers.indexed_files import (
    IndexedFiles,
    beside,
    given_images,
    indexed_files,
)
from capjax.data.readers.packed_rows import Damaged, Row
from capjax.data.readers.streams import opened
from capjax.errors import UserError

_FIELD_LIMIT = 16 << 20  # characters: an unclosed quote ends here, not at the end of memory
_LINE_LIMIT = 64 << 20  # bytes
_PEEKED = 100  # objects whose names tell the columns of a JSON table


def open_csv(
    path: str,
    *,
    image: str | None = None,
    caption: str | None = None,
    images: str | None = None,
    key: str | None = None,
    delimiter: str | None = None,
) -> IndexedFiles:
    """A table with a header line, fields apart by commas, or tabs in a `.tsv` (RFC 4180).

    `image`, `caption` (several with commas between), `key`: columns; `images`: the directory that
    image paths are relative to, the table's own by default; `delimiter`: one character or `tab`.
    A caption may be a JSON list of texts. Neighbouring rows of one key and image are one example
    with the captions of all. UTF-8; a row that is not, or has other fields than the header, is
    damaged. Raises `UserError` as `indexed_files` does, for a missing or doubled column, and for
    a quote that is never closed.
    """
    tabs = path.lower().removesuffix(".gz").endswith(".tsv")
    delimiter = "\t" if delimiter == "tab" else delimiter or ("\t" if tabs else ",")
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise UserError(f"delimiter={delimiter!r} of {path}: expected one character, or tab")
    # Bytes that are not UTF-8 become surrogates, which are refused where a row is packed.
    form = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
    with opened(path) as file, io.TextIOWrapper(file, **form) as text:
        records = _csv_records(path, text, delimiter)
        header = next(records, None)
        if header is None or isinstance(header, Damaged):
            reason = f" ({header.reason})" if header else ""
            raise UserError(f"csv {path}: expected a header line that names the columns{reason}")
        names = _unlike(path, header[1])
        columns = choose_columns(f"csv {path}", names, image, caption, key)

        def rows() -> Iterator[Row | Damaged]:
            for record in records:
                if isinstance(record, Damaged):
                    yield record
                    continue
                line, fields = record
                if len(fields) != len(names):
                    reason = f"{len(fields)} fields where the header has {len(names)}"
                    yield Damaged(f"line {line}: {reason}")
                else:
                    yield row_of(dict(zip(names, fields, strict=True)), columns, ("line", line))

        return _table("csv", path, rows(), images)


def open_jsonl(
    path: str,
    *,
    image: str | None = None,
    caption: str | None = None,
    images: str | None = None,
    key: str | None = None,
) -> IndexedFiles:
    """A JSON object a line (https://jsonlines.org), or one list of objects in a `.json` file.

    Options, and what is raised, as in `open_csv`. A line that is no object is damaged; blank lines
    are skipped. Columns are those of the first objects, of which later ones may lack some.
    """
    with opened(path) as file:
        records = _json_records(path, file)
        head = list(islice(records, _PEEKED))
        names = list(dict.fromkeys(name for _, item in head if type(item) is dict for name in item))
        if head and not names:
            raise UserError(f"jsonl {path}: expected JSON objects, got {str(head[0][1])!r:.200}")
        columns = choose_columns(f"jsonl {path}", names, image, caption, key) if head else None

        def rows() -> Iterator[Row | Damaged]:
            for where, item in chain(head, records):
                if type(item) is dict and columns:
                    yield row_of(item, columns, where)
                else:
                    reason = item.reason if isinstance(item, Damaged) else "not an object"
                    yield Damaged(f"{where[0]} {where[1]}: {reason}")

        return _table("jsonl", path, rows(), images)


def open_list(path: str, *, images: str | None = None) -> IndexedFiles:
    """A text file of image paths, one a line, which are the keys; blank lines are skipped.

    Neighbouring lines that are equal give one example, and nothing says so; equal lines elsewhere
    are refused.
    `images`: as in `open_csv`. A line that is not UTF-8 is damaged. Raises `UserError` as
    `indexed_files` does.
    """

    def rows() -> Iterator[Row | Damaged]:
        with opened(path) as file:
            for number, line in enumerate(file, 1):
                try:
                    name = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    yield Damaged(f"line {number}: not UTF-8: {error}")
                    continue
                if name.strip():
                    yield Row(name, name)

    return _table("list", path, rows(), images)


def _table(
    layout: str, path: str, rows: Iterable[Row | Damaged], images: str | None
) -> IndexedFiles:
    directories = beside(path, "")[:1] if images is None else given_images(path, images)
    return indexed_files(layout, path, _joined(rows), directories)


def _joined(rows: Iterable[Row | Damaged]) -> Iterator[Row | Damaged]:
    """One row for neighbours of one key and image, with the metadata of the first."""
    last: Row | Damaged | None = None
    for row in rows:
        if (
            isinstance(row, Row)
            and isinstance(last, Row)
            and row.key == last.key
            and row.image == last.image
        ):
            last = last._replace(captions=[*last.captions, *row.captions])
            continue
        if last is not None:
            yield last
        last = row
    if last is not None:
        yield last


def _csv_records(
    path: str, text: io.TextIOWrapper, delimiter: str
) -> Iterator[tuple[int, list[str]] | Damaged]:
    """(line, fields) of each record."""
    csv.field_size_limit(max(csv.field_size_limit(), _FIELD_LIMIT))  # of the process; only raised
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "field larger" in str(error) or "unexpected end" in str(error):
                raise UserError(
                    f"csv {path}: a quote opened in the record at line {line} is not closed "
                    f"({error}); close it, or double the quotes within a field"
                ) from error
            yield Damaged(f"line {line}: {error}")
            continue
        if fields:
            yield line, fields


def _unlike(path: str, names: Sequence[str]) -> Sequence[str]:
    """The header's names, which must be text, each once; one without a name is left out later."""
    for name in names:
        if name and names.count(name) > 1:
            raise UserError(f"csv {path}: the column {name!r} is there twice; rename one")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"csv {path}: the header is not UTF-8: {name!r}; save the table as UTF-8"
            ) from error
    return names


def _json_records(path: str, file: io.BufferedReader) -> Iterator[tuple[tuple[str, int], Any]]:
    """(where, value) of each line or list item; `Damaged` where it is not JSON."""
    if path.lower().removesuffix(".gz").endswith(".json"):
        items = _json_list(path, file)
        yield from ((("item", number), item) for number, item in enumerate(items))
        return
    number, decode = 0, json.JSONDecoder().decode  # which `json.loads` calls, behind checks
    while line := file.readline(_LINE_LIMIT):
        number += 1
        if len(line) == _LINE_LIMIT:
            raise UserError(
                f"jsonl {path}: line {number} has over {_LINE_LIMIT >> 20} MiB; expected an "
                "object a line (one list of all: name the file .json)"
            )
        if line.strip():
            try:
                value = decode(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                value = Damaged(f"not JSON: {error}")
            yield ("line", number), value


def _json_list(path: str, file: io.BufferedReader) -> list[Any]:
    try:
        items = json.loads(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"jsonl {path}: not JSON ({error}); expected a list of objects") from error
    if type(items) is not list:
        raise UserError(f"jsonl {path}: expected a list of objects, got a {type(items).__name__}")
    return items
