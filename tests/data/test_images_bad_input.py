"""Every row of the table in `capjax.data.decode`: right pixels, or the stated reason."""

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from capjax.data import decode
from capjax.data.decode import ImageError, decode_image
from capjax.data.images import ImagePreprocessing


def photo(height: int = 48, width: int = 64) -> Image.Image:
    """Slow waves with noise, as photos have."""
    rows, columns = np.indices((height, width))[..., None]
    waves = 128 + 80 * np.sin(rows / 6) * np.cos(columns / 9 + np.arange(3))
    noise = np.random.default_rng(0).normal(0, 12, (height, width, 3))
    return Image.fromarray(np.clip(waves + noise, 0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def reason(data: bytes, **options) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(data, **options)
    return caught.value.reason


FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (64, 48), "blue")] * 2}
WHOLE = {
    "JPEG": encode(photo(), "JPEG"),
    "progressive JPEG": encode(photo(), "JPEG", progressive=True),
    "4:4:4 JPEG": encode(photo(), "JPEG", subsampling=0),
    "RGB JPEG": encode(photo(), "JPEG", keep_rgb=True),
    "odd JPEG": encode(photo(31, 45), "JPEG"),
    "grey JPEG": encode(photo().convert("L"), "JPEG"),
    "CMYK JPEG": encode(photo().convert("CMYK"), "JPEG"),
    "PNG": encode(photo(), "PNG"),
    "palette PNG": encode(photo().quantize(64), "PNG"),
    "WebP": encode(photo(), "WEBP"),
    "lossless WebP": encode(photo(), "WEBP", lossless=True),
    "GIF": encode(photo(), "GIF"),
    "BMP": encode(photo(), "BMP"),
    "TIFF": encode(photo(), "TIFF"),
    "LZW TIFF": encode(photo(), "TIFF", compression="tiff_lzw"),
    "PPM": encode(photo(), "PPM"),
    "animated GIF": encode(photo(), "GIF", **FRAMES),
    "animated WebP": encode(photo(), "WEBP", **FRAMES),
    "APNG": encode(photo(), "PNG", **FRAMES),
    "MPO": encode(photo(), "MPO", **FRAMES),
}


@pytest.fixture(params=["simplejpeg", "pillow"])
def decoder(request, monkeypatch):
    """Both decoders of JPEGs, where both are there."""
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(decode, "_simplejpeg", None)
    return request.param


@pytest.mark.parametrize("kind", WHOLE)
def test_the_pixels_are_pillows(kind, decoder):
    np.testing.assert_array_equal(decode_image(WHOLE[kind]), pillow(WHOLE[kind]))


@pytest.mark.parametrize("kind", WHOLE)
def test_a_file_cut_anywhere_is_refused_or_whole(kind, decoder):
    """Never a picture that is grey from some row on."""
    data = WHOLE[kind]
    whole = decode_image(data)
    ends = {*range(0, len(data), max(1, len(data) // 60)), *range(len(data) - 12, len(data))}
    for end in ends:
        try:
            found = decode_image(data[:end])
        except ImageError as error:
            assert error.reason in ("truncated image", "damaged image", "not an image")
        else:  # what was cut off were later frames or closing marks
            np.testing.assert_array_equal(found, whole)
            assert kind not in ("JPEG", "progressive JPEG", "WebP", "BMP")
    if "JPEG" in kind or "WebP" in kind or kind == "PNG":
        assert reason(data[: len(data) * 2 // 3]) == "truncated image"


@pytest.mark.parametrize("kind", ["JPEG", "4:4:4 JPEG", "grey JPEG"])
def test_an_end_marker_does_not_hide_missing_data(kind):
    pytest.importorskip("simplejpeg")
    data = WHOLE[kind]
    assert reason(data[: len(data) * 2 // 3] + b"\xff\xd9") == "truncated image"
    frame = data.index(b"\xff\xc0")
    taller = data[: frame + 5] + struct.pack(">H", 480) + data[frame + 7 :]
    assert reason(taller) == "truncated image"


def test_stray_bytes_are_passed_over(decoder):
    data = WHOLE["JPEG"]
    np.testing.assert_array_equal(decode_image(data + b"\0" * 100), decode_image(data))
    np.testing.assert_array_equal(decode_image(data + data), decode_image(data))


def test_adobes_inverted_ycck_becomes_rgb():
    """Inks (C, M, Y, K) of pure red, as YCbCr of their complement under Adobe's transform 2."""
    cyan = Image.new("RGB", (1, 1), (0, 255, 255)).convert("YCbCr").getpixel((0, 0))
    stored = tuple(255 - value for value in (*cyan, 255))  # Pillow inverts as it writes
    data = encode(Image.new("CMYK", (16, 16), stored), "JPEG", quality=95)
    adobe = data.index(b"Adobe")
    data = data[: adobe + 11] + b"\2" + data[adobe + 12 :]
    np.testing.assert_allclose(decode_image(data)[8, 8], [255, 0, 0], atol=6)


def png(width: int, height: int, kind: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A 16-bit PNG of colour type `kind`."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)),
        *chunks,
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    body = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_sixteen_bit_colours_keep_their_high_byte():
    rgb = png(2, 1, 2, b"\0" + struct.pack(">6H", 0, 256, 65535, 32768, 511, 512))
    np.testing.assert_array_equal(decode_image(rgb)[0], [[0, 1, 255], [128, 1, 2]])
    grey_alpha = png(3, 1, 4, b"\0" + struct.pack(">6H", 0, 0, 0, 65535, 0, 0x3333))
    np.testing.assert_allclose(decode_image(grey_alpha)[0, :, 1], [255, 0, 204], atol=1)
    rgba = png(2, 1, 6, b"\0" + struct.pack(">8H", *[0, 0, 0, 0], *[65535, 0, 0, 65535]))
    np.testing.assert_array_equal(decode_image(rgba)[0], [[255, 255, 255], [255, 0, 0]])


def test_palettes_with_partial_alpha():
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putpalette([0, 0, 0, 0, 0, 0, 9, 8, 7])
    found = decode_image(encode(image, "PNG", transparency=b"\0\x33\xff"))
    np.testing.assert_allclose(found[0], [[255] * 3, [204] * 3, [9, 8, 7]], atol=1)


def test_a_broken_exif_block_is_passed_over(decoder):
    for block in (b"Exif\0\0", b"Exif\0\0garbage!", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        data = encode(photo(), "JPEG", exif=block)
        np.testing.assert_array_equal(decode_image(data), pillow(WHOLE["JPEG"]))


@pytest.mark.parametrize("shape", [(1, 1), (20_000, 1), (1, 20_000)])
def test_extreme_shapes(shape, decoder):
    image = photo(*shape)
    found = decode_image(encode(image, "PNG"))
    np.testing.assert_array_equal(found, np.asarray(image))
    jpeg = encode(image, "JPEG")
    np.testing.assert_array_equal(decode_image(jpeg), pillow(jpeg))
    for mode in ("stretch", "pad"):
        assert ImagePreprocessing(32, mode=mode).preprocess(found).shape == (32, 32, 3)
    crop = ImagePreprocessing(224, mode="crop")
    if shape == (1, 1):
        assert crop.preprocess(found).shape == (224, 224, 3)
    else:  # its centre is one pixel, of an image that was 3 GB
        with pytest.raises(ImageError, match="too many pixels"):
            crop.preprocess(found)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "not an image"),
        (b"\0" * 1000, "not an image"),
        (b"a caption, not a picture", "not an image"),
        (b"<!DOCTYPE html><html><body><svg></svg>404</body></html>", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "unsupported format"),
        (b"<?xml version='1.0'?>\n<svg></svg>", "unsupported format"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 99, "unsupported format"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0" * 99, "unsupported format"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0" * 99, "unsupported format"),
        (b"%PDF-1.7\n", "unsupported format"),
        (b"\xff\xd8\xff", "damaged image"),
        (WHOLE["PNG"][:20], "truncated image"),
        (WHOLE["PNG"][:9], "damaged image"),
        (WHOLE["PNG"][:60] + bytes([WHOLE["PNG"][60] ^ 1]) + WHOLE["PNG"][61:], "damaged image"),
    ],
)
def test_what_is_no_image_says_what_it_is(data, expected):
    assert reason(data) == expected


def test_avif_is_decoded_or_named(monkeypatch):
    if "AVIF" in decode._formats():
        data = encode(photo(), "AVIF", quality=95)
        assert np.abs(decode_image(data).astype(int) - np.asarray(photo())).mean() < 8
    else:
        data = b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf"
    monkeypatch.setattr(decode, "_formats", lambda: ("JPEG", "PNG"))
    assert reason(data) == "unsupported format"


def jpeg_of(width: int, height: int) -> bytes:
    data = bytearray(WHOLE["JPEG"])
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def gif_of(width: int, height: int) -> bytes:
    return WHOLE["GIF"][:6] + struct.pack("<HH", width, height) + WHOLE["GIF"][10:]


def webp_of(width: int, height: int) -> bytes:
    data = bytearray(WHOLE["lossless WebP"])
    data[21:25] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    return bytes(data)


BOMBS = {
    "png": png(50_000, 50_000, 2, b"\0" * 100),
    "jpeg": jpeg_of(30_000, 30_000),
    "gif": gif_of(60_000, 60_000),
    "webp": webp_of(16_383, 16_383),
    "webp, lossy": WHOLE["WebP"][:26] + struct.pack("<HH", 16_383, 16_383) + WHOLE["WebP"][30:],
    "webp, animated": WHOLE["animated WebP"][:24] + b"\xff\x7f\0" * 2 + WHOLE["animated WebP"][30:],
    "tiff": encode(Image.new("1", (9_000, 9_000)), "TIFF", compression="group4"),
    "scans": b"".join(
        [jpeg_of(8_192, 8_192).replace(b"\xff\xc0", b"\xff\xc2")[:-2], b"\xff\xda\0\2" * 40]
    ),
}


def inflating() -> list[bytes]:
    """Small PNGs, one part of each unpacks to 100 MB."""
    zeros, rows = zlib.compress(bytes(100 << 20), 1), (b"\0" + b"\7" * 8 * 6) * 8
    parts = [
        (b"IDAT", zeros),
        (b"zTXt", b"a\0\0" + zeros),
        (b"iTXt", b"a\0\1\0\0\0" + zeros),
        (b"iCCP", b"a\0\0" + zeros),
    ]
    return [png(8, 8, 2, rows, part) for part in parts]


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_by_its_declared_size(kind):
    assert reason(BOMBS[kind]) == "too many pixels"


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own address space")
def test_a_bomb_takes_no_memory(tmp_path):
    paths = []
    for number, data in enumerate([*BOMBS.values(), *inflating()]):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(data)
    script = """
import pathlib, resource, sys
from capjax.data.decode import ImageError, decode_image, _formats
_formats()
pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (32 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
num_bombs, *paths = sys.argv[1:]
for number, path in enumerate(paths):
    try:
        pixels = decode_image(pathlib.Path(path).read_bytes())
    except ImageError as error:
        assert number >= int(num_bombs) or error.reason == "too many pixels", error
    else:
        assert number >= int(num_bombs) and pixels.shape == (8, 8, 3), path
"""
    arguments = [str(len(BOMBS)), *map(str, paths)]
    command = [sys.executable, "-W", "error", "-c", script, *arguments]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
