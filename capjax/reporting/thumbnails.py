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
        self._numbers: dict[tuple[str, int], int] = {}
        self._sources: dict[str, Source | None] = {}

    def number(self, record: dict[str, Any], *, extra: bool = False) -> int:
        """The number of the picture at a record's `source` and `index`; `NONE` if unreadable.

        extra: the picture is `NONE` where it is not there yet and no more extra ones may be made.
        """
        name, index = record.get("source"), record.get("index")
        if not isinstance(name, str) or not isinstance(index, int):
            return NONE
        if (name, index) not in self._numbers:
            if extra and self._extra_left < 1:
                return NONE
            self._extra_left -= extra
            self._numbers[name, index] = self._make(name, index)
        return self._numbers[name, index]

    def _make(self, name: str, index: int) -> int:
        if name not in self._sources:
            try:
                self._sources[name] = open_source(name)
            except UserError:  # the data are gone: captions are shown without pictures
                self._sources[name] = None
        source = self._sources[name]
        if source is None or not 0 <= index < len(source):
            return NONE
        try:
            image = Image.fromarray(decode_image(source[index].image))
        except (ImageError, CorruptRecord):
            return NONE
        image.thumbnail((PIXELS, PIXELS))
        file = io.BytesIO()
        image.save(file, "WEBP", quality=QUALITY, method=4)
        self.images.append(base64.b64encode(file.getvalue()).decode())
        return len(self.images) - 1
