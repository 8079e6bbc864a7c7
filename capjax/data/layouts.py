"""The address of a source, `[LAYOUT:]PATH[?OPTION=VALUE&…]`, and which reader opens it.

`webdataset:shards/{000..099}.tar`, `coco:annotations/captions_train2017.json?images=train2017`,
`pairs.csv?image=file&caption=text`. Without a layout the end of the path tells it; other remote
addresses are of shards.
"""

import difflib
import importlib
import re
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl

from capjax.data.files import is_remote
from capjax.errors import UserError

if TYPE_CHECKING:
    from capjax.data.sources import Source


class Layout(NamedTuple):
    """How sources of one layout are opened.

    `opener` is "module:function", imported when first used, and called with the path and the
    options as keyword arguments (strings); `suffixes` are the ends of paths that are this layout
    where none is named.
    """

    opener: str
    options: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()


LAYOUTS: dict[str, Layout] = {
    "shards": Layout("capjax.data.readers.remote_shards:open_shards", ("cache", "cache_gb")),
    "webdataset": Layout(
        "capjax.data.readers.webdataset:open_webdataset", ("captions", "cache", "block"), (".tar",)
    ),
    "tfds": Layout(
        "capjax.data.readers.tfds_source:open_tfds", ("split", "data_dir", "image", "captions")
    ),
    "csv": Layout(
        "capjax.data.readers.tables:open_csv",
        ("image", "caption", "images", "key", "delimiter"),
        (".csv", ".tsv", ".csv.gz", ".tsv.gz"),
    ),
    "jsonl": Layout(
        "capjax.data.readers.tables:open_jsonl",
        ("image", "caption", "images", "key"),
        (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"),
    ),
    "list": Layout("capjax.data.readers.tables:open_list", ("images",), (".txt",)),
    "parquet": Layout(
        "capjax.data.readers.parquet:open_parquet",
        ("image", "caption", "key", "images", "cache_megabytes"),
        (".parquet",),
    ),
    "coco": Layout("capjax.data.readers.coco:open_coco", ("images",)),
    "karpathy": Layout("capjax.data.readers.coco:open_karpathy", ("split", "images")),
    "nocaps": Layout("capjax.data.readers.coco:open_nocaps", ("images",)),
    "textcaps": Layout("capjax.data.readers.coco:open_textcaps", ("images",)),
    "vizwiz": Layout("capjax.data.readers.coco:open_vizwiz", ("images",)),
    "conceptual": Layout("capjax.data.readers.web_lists:open_conceptual", ("images", "name")),
    "redcaps": Layout("capjax.data.readers.web_lists:open_redcaps", ("images",)),
}


class Address(NamedTuple):
    """A source's name in its parts."""

    layout: str
    path: str
    options: dict[str, str]


def parse_address(name: str) -> Address | None:
    """The parts of a name that a layout, named or told by its suffix, opens; else None.

    Raises `UserError` for an option that the layout does not have.
    """
    match = re.match(r"([a-z0-9_]+):(?!//)", name)
    named = match[1] if match and match[1] in LAYOUTS else None
    path = name[match.end() :] if match and named else name
    path, mark, query = path.rpartition("?") if "=" in path.rpartition("?")[2] else (path, "", "")
    layout = named or _layout_of(path)
    if layout is None:
        return None
    # A plus is a plus (as in `split=train+restval`), not the blank of web forms.
    query = query.replace("+", "%2B")
    options = dict(parse_qsl(query, keep_blank_values=True)) if mark else {}
    known = LAYOUTS[layout].options
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(
                f"source {name!r}: the layout {layout!r} has no option {option!r}, but "
                f"{', '.join(known) or 'none at all'}{hint}"
            )
    if not path:
        raise UserError(f"source {name!r}: expected a path behind {layout}:")
    return Address(layout, path, options)


def without_caches(name: Any) -> Any:
    """The address without what says how it is cached, which no example depends on.

    Anything else is returned as it is.
    """
    try:
        address = parse_address(name) if isinstance(name, str) else None
    except UserError:
        return name
    if address is None:
        return name
    caches = ("cache", "cache_gb", "cache_megabytes")
    kept = {option: value for option, value in address.options.items() if option not in caches}
    return address._replace(options=kept)


def open_address(address: Address) -> "Source":
    """The source at an address. Raises `UserError` as its reader does."""
    module, _, function = LAYOUTS[address.layout].opener.partition(":")
    return getattr(importlib.import_module(module), function)(address.path, **address.options)


def _layout_of(path: str) -> str | None:
    for name, layout in LAYOUTS.items():
        if layout.suffixes and path.lower().endswith(layout.suffixes):
            return name
    return "shards" if is_remote(path) else None
