"""Lists of images found on the web, whose downloads are never complete.

The directory of the images is listed once; rows without a file are left out and counted, so that
they do not use up the share of bad records that a run allows.
"""

import posixpath
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from capjax.data import files
from capjax.data.readers.indexed_files import (
    IndexedFiles,
    beside,
    given_images,
    indexed_files,
    present,
)
from capjax.data.readers.packed_rows import Damaged, Row
from capjax.data.readers.streams import load_json, opened
from capjax.errors import UserError

_REDCAPS_LEFT = ("image_id", "caption")
_GONE = "images not on disk"


def open_conceptual(path: str, *, images: str | None = None, name: str = "{row}") -> IndexedFiles:
    """Conceptual Captions: CC3M (https://aclanthology.org/P18-1238) and CC12M
    (https://arxiv.org/abs/2102.08981).

    `path`: `Train_GCC-training.tsv` (caption, URL) or `cc12m.tsv` (URL, caption), no header;
    `images`: the directory of what was downloaded (by default `images` beside the list);
    `name`: how its files are named, from `{row}` (the line, counted from 0; `{row:08d}` with
    zeros) and `{crc32}` (of the URL), with any suffix. Keys are the images' paths. Raises
    `UserError` for another file, another field in `name`, and where no image is found.
    """
    _image_name(name, 0, "")
    directory, found = present(_places(path, images))
    stems = {posixpath.splitext(file)[0]: file for file in found}
    counts = Counter[str]()

    def rows() -> Iterator[Row | Damaged]:
        url_first = False
        with opened(path) as file:
            for row, line in enumerate(file):
                fields = line.decode("utf-8", "surrogateescape").rstrip("\r\n").split("\t")
                if row == 0:
                    url_first = _url_first(path, fields)
                if len(fields) != 2:
                    yield Damaged(f"line {row + 1}: expected 2 fields, got {len(fields)}")
                    continue
                url, caption = fields if url_first else fields[::-1]
                stem = _image_name(name, row, url)
                image = stem if stem in found else stems.get(stem)
                if image is None:
                    counts[_GONE] += 1
                    continue
                captions = [("caption", text)] if (text := caption.strip()) else []
                yield Row(image, image, captions, {"url": url})

    return indexed_files("conceptual", path, rows(), [directory], counts)


def open_redcaps(path: str, *, images: str | None = None) -> IndexedFiles:
    """RedCaps (https://arxiv.org/abs/2111.11431), as its downloader leaves it.

    `path`: `annotations/*.json`, a glob or one file; `images`: the directory of
    `SUBREDDIT/IMAGE_ID.jpg` (by default `images` beside `annotations`). Keys are image ids; the
    cleaned `caption` is the caption, `raw_caption`, `subreddit`, `score` and others are metadata.
    """
    lists = files.expand(path)
    directory, found = present(_places(lists[0], images))
    counts = Counter[str]()

    def rows() -> Iterator[Row | Damaged]:
        for item in (item for file in lists for item in _annotations(file)):
            key, folder, caption = (item.get(f) for f in ("image_id", "subreddit", "caption"))
            if not (type(key) is str and type(folder) is str and type(caption) is str):
                yield Damaged(f"no image_id, subreddit and caption in {item!r:.200}")
                continue
            image = f"{folder}/{key}.jpg"
            if image not in found:
                counts[_GONE] += 1
                continue
            metadata = {field: item[field] for field in item if field not in _REDCAPS_LEFT}
            captions = [("caption", text)] if (text := caption.strip()) else []
            yield Row(key, image, captions, metadata)

    return indexed_files("redcaps", path, rows(), [directory], counts)


def _places(path: str, images: str | None) -> list[str]:
    return beside(path, "images") if images is None else given_images(path, images)


def _image_name(template: str, row: int, url: str) -> str:
    crc32 = zlib.crc32(url.encode("utf-8", "surrogateescape"))
    try:
        return template.format(row=row, crc32=crc32)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise UserError(
            f"name={template!r}: expected the names of image files made of {{row}} and {{crc32}}, "
            "such as {row:08d}"
        ) from error


def _url_first(path: str, fields: list[str]) -> bool:
    urls = ["://" in field for field in fields]
    if urls not in ([True, False], [False, True]):
        raise UserError(
            f"conceptual {path}: expected lines of a caption and a URL with a tab between, without "
            f"a header; the first is {fields!r:.200}"
        )
    return urls[0]


def _annotations(path: str) -> list[dict[str, Any]]:
    items = load_json(path).get("annotations")
    if type(items) is not list or not all(type(item) is dict for item in items):
        raise UserError(f"redcaps {path}: expected a list of objects as 'annotations'")
    return items
