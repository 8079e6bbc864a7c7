"""Small pictures of examples as base64 WebP, each made once."""

import base64
import io
from typing import Any

from PIL import Image

from capjax.data.decode import ImageError, decode_image
from capjax.data.records import CorruptRecord
from capjax.data.sources import Source, open_source
from capjax.errors import UserError

PIXELS = 160  # of the longer side
QUALITY = 75
NONE = -1


class Thumbnails:
    """Pictures by number: `images[n]` is the base64 text of a WebP file.

    max_extra: of pictures that are made only if there is room for them.
    """

    def __init__(self, max_extra: int = 0) -> None:
        self._extra_left = max_extra
        self.images: list[str] = []
        self.moved = 0  # records at whose place in the data is something else now
        self._numbers: dict[tuple[str, int, str], int] = {}
        self._sources: dict[str, Source | None] = {}

    def number(self, record: dict[str, Any], *, extra: bool = False) -> int:
        """The number of the picture at a record's `source` and `index`.

        `NONE` if it is unreadable, or of another key than the record's (the data have changed).

        extra: the picture is `NONE` where it is not there yet and no more extra ones may be made.
        """
        name, index, key = (record.get(field) for field in ("source", "index", "key"))
        if not isinstance(name, str) or not isinstance(index, int) or not isinstance(key, str):
            return NONE
        if (name, index, key) not in self._numbers:
            if extra and self._extra_left < 1:
                return NONE
            self._extra_left -= extra
            self._numbers[name, index, key] = self._make(name, index, key)
        return self._numbers[name, index, key]

    def _make(self, name: str, index: int, key: str) -> int:
        if name not in self._sources:
            try:
                self._sources[name] = open_source(name)
            except UserError:  # the data are gone: captions are shown without pictures
                self._sources[name] = None
        source = self._sources[name]
        if source is None:
            return NONE
        try:
            example = source[index] if 0 <= index < len(source) else None
            # A key that its source repeats is followed by the index in the record.
            if example is None or key not in (example.key, f"{example.key}#{index}"):
                self.moved += 1
                return NONE
            image = Image.fromarray(decode_image(example.image))
        except (ImageError, CorruptRecord):
            return NONE
        image.thumbnail((PIXELS, PIXELS))
        file = io.BytesIO()
        image.save(file, "WEBP", quality=QUALITY, method=4)
        self.images.append(base64.b64encode(file.getvalue()).decode())
        return len(self.images) - 1
