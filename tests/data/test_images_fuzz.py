"""2,000 mutated images: pixels or `ImageError`, whatever becomes of a file."""

import subprocess
import sys

SCRIPT = """
import collections, io, warnings
import numpy as np
from PIL import Image
from capjax.data import decode
from capjax.data.decode import ImageError, decode_image
from capjax.data.images import ImagePreprocessing

REASONS = {
    "not an image", "unsupported format", "truncated image", "damaged image", "too many pixels",
    "empty image", "floating-point image",
}
MAX_PIXELS = 1 << 20  # what bounds the time of each
rng = np.random.default_rng(0)
rows, columns = np.indices((40, 56))[..., None]
waves = 128 + 80 * np.sin(rows / 6) * np.cos(columns / 9 + np.arange(3))
image = Image.fromarray(np.clip(waves + rng.normal(0, 12, (40, 56, 3)), 0, 255).astype(np.uint8))

def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()

frames = {"save_all": True, "append_images": [image.rotate(90)] * 2}
exif = Image.Exif()
exif[0x0112] = 6
files = [
    encode(image, "JPEG"),
    encode(image, "JPEG", progressive=True, exif=exif),
    encode(image, "JPEG", subsampling=0, restart_marker_rows=1),
    encode(image.convert("L"), "JPEG"),
    encode(image.convert("CMYK"), "JPEG"),
    encode(image, "PNG", exif=exif),
    encode(image.quantize(32), "PNG", transparency=3),
    encode(image, "WEBP"),
    encode(image, "WEBP", lossless=True, **frames),
    encode(image, "GIF", **frames),
]

def mutated():
    data = bytearray(files[rng.integers(len(files))])
    head = rng.random() < 0.5  # half of the changes in the header, where most of the rules are
    for _ in range(rng.integers(1, 5)):
        end = max(min(len(data), 200) if head else len(data), 1)
        place = int(rng.integers(end))
        kind = rng.integers(4)
        if kind == 0 and data:
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == 1 and data:
            data[place] = int(rng.choice([0, 1, 127, 128, 255]))
        elif kind == 2:
            other = files[rng.integers(len(files))]
            start = int(rng.integers(len(other)))
            data[place : place + int(rng.integers(64))] = other[start : start + 64]
        elif rng.random() < 0.3:
            del data[max(place, 4):]
    return bytes(data)

found = collections.Counter()
preprocessing = ImagePreprocessing(16)
for number in range(2000):
    data = mutated()
    outcomes = []
    for simplejpeg in (decode._simplejpeg, None):
        kept, decode._simplejpeg = decode._simplejpeg, simplejpeg
        try:
            pixels = decode_image(data, MAX_PIXELS)
        except ImageError as error:
            assert error.reason in REASONS, error
            outcomes.append(error.reason)
        else:
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
            assert 0 < pixels.size <= 3 * MAX_PIXELS
            assert preprocessing.preprocess(pixels).shape == (16, 16, 3)
            outcomes.append(pixels)
        decode._simplejpeg = kept
    found[outcomes[0] if isinstance(outcomes[0], str) else "pixels"] += 1
    if isinstance(outcomes[0], str):  # the one thing that only simplejpeg sees
        assert isinstance(outcomes[1], str) or outcomes[0] == "truncated image", (number, outcomes)
    else:
        assert not isinstance(outcomes[1], str), (number, outcomes[1])
        np.testing.assert_array_equal(outcomes[0], outcomes[1])
assert min(found["pixels"], found["truncated image"], found["damaged image"]) > 100, found
assert found["too many pixels"] > 10, found
print(dict(found))
"""


def test_mutated_images_give_pixels_or_an_image_error():
    """In a process of its own, for a decoder's crash; every warning is an error there."""
    for filters in ("error", "always"):
        done = subprocess.run(
            [sys.executable, "-W", filters, "-c", SCRIPT], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert not done.stderr, done.stderr[-3000:]
