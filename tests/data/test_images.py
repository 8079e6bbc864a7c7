"""Images: what decodes decodes right, what does not raises ImageError, and geometry is exact."""

import dataclasses
import io
import json
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from capjax.data import images
from capjax.data.decode import ImageError, decode_image
from capjax.data.images import ImagePreprocessing
from capjax.data.resize import resize
from capjax.errors import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures"


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(height: int = 20, width: int = 30) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 8, columns * 8, rows + columns], -1).astype(np.uint8)


def smooth(size: int) -> np.ndarray:
    waves = 127 + 120 * np.sin(np.arange(size) / 9)
    return np.repeat((waves[:, None] / 2 + waves / 2)[..., None], 3, -1).astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_back_the_pixels(kind):
    np.testing.assert_array_equal(
        decode_image(encode(Image.fromarray(gradient()), kind)), gradient()
    )


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats_are_close(kind):
    decoded = decode_image(encode(Image.fromarray(smooth(32)), kind, quality=95))
    assert np.abs(decoded.astype(int) - smooth(32)).mean() < 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_composited_on_white(mode):
    image = Image.new("RGBA", (3, 1))
    image.putdata([(0, 0, 0, 0), (0, 0, 0, 255), (0, 0, 0, 51)])
    if mode == "PA":
        image = image.quantize(8)
        assert image.mode == "P"
    else:
        image = image.convert(mode)
    decoded = decode_image(encode(image))
    np.testing.assert_allclose(decoded[0, :, 0], [255, 0, 204], atol=1)


def test_a_transparent_palette_colour_becomes_white():
    image = Image.fromarray(np.array([[0, 1]], np.uint8))
    image.putpalette([10, 20, 30, 40, 50, 60])
    decoded = decode_image(encode(image, transparency=0))
    np.testing.assert_array_equal(decoded[0], [[255, 255, 255], [40, 50, 60]])


def test_grey_and_bilevel_become_rgb():
    grey = np.array([[0, 100, 255]], np.uint8)
    decoded = decode_image(encode(Image.fromarray(grey)))
    np.testing.assert_array_equal(decoded, np.repeat(grey[..., None], 3, -1))
    assert decode_image(encode(Image.new("1", (4, 4), 1))).min() == 255


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 256, 32768, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        decoded = decode_image(encode(Image.fromarray(values), kind))
        np.testing.assert_array_equal(decoded[0, :, 0], [0, 1, 128, 255])


def test_cmyk_becomes_rgb():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    np.testing.assert_allclose(decode_image(encode(red, "JPEG"))[4, 4], [255, 0, 0], atol=8)


def test_float_images_are_refused():
    with pytest.raises(ImageError, match="floating-point"):
        decode_image(encode(Image.new("F", (4, 4)), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_the_first_frame_of_an_animation_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    np.testing.assert_allclose(decode_image(data)[4, 4], [255, 0, 0], atol=6)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    # The stored picture is the upright one under the inverse of what the orientation asks for.
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255  # a white block top left
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    decoded = decode_image(data)
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).mean() < 5


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8_200, 11_000, 50_000, 2_000_000])
def test_a_decompression_bomb_is_refused_from_its_header(side):
    with pytest.raises(ImageError, match="too many pixels"):
        decode_image(png_header(side, side))


def test_the_pixel_limit_is_exact():
    data = encode(Image.new("RGB", (20, 10)))
    assert decode_image(data, max_pixels=200).shape == (10, 20, 3)
    with pytest.raises(ImageError, match="too many pixels: 20x10"):
        decode_image(data, max_pixels=199)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"hello", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (encode(Image.fromarray(gradient(64, 64)), "JPEG")[:-200], "truncated image"),
        (encode(Image.fromarray(gradient(64, 64)))[:60], "truncated image"),
    ],
)
def test_bad_bytes_give_a_short_reason(data, reason):
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert caught.value.reason == reason


ENCODED = [
    encode(Image.fromarray(smooth(24)), kind)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
] + [encode(Image.fromarray(smooth(24)).convert("CMYK"), "JPEG")]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(ENCODED), st.data())
def test_mutated_bytes_decode_or_raise_image_error(data, draw):
    changed = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        changed[draw.draw(st.integers(0, len(changed) - 1))] = draw.draw(st.integers(0, 255))
    changed = (
        changed[: draw.draw(st.integers(0, len(changed)))] if draw.draw(st.booleans()) else changed
    )
    try:
        decoded = decode_image(bytes(changed))
    except ImageError as error:
        assert error.reason in {
            *("not an image", "truncated image", "damaged image", "too many pixels"),
            *("empty image", "floating-point image"),
        }
    else:
        assert decoded.dtype == np.uint8
        assert decoded.ndim == 3
        assert decoded.shape[2] == 3
        assert decoded.size > 0


def test_image_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ImageError("a", "b")))
    assert (error.reason, error.detail, str(error)) == ("a", "b", "a: b")


def test_antialiased_resize_of_a_whole_factor_is_close_to_the_mean_of_blocks():
    image = smooth(64)
    blocks = image.reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(resize(image, 16)[1:-1, 1:-1] - blocks[1:-1, 1:-1]).max() < 4


def test_aliased_resize_samples_between_two_pixels():
    image = np.repeat(np.array([[0, 10, 20, 30]], np.uint8)[..., None], 3, -1)
    # Half-pixel centres: output 0 of 2 lies at 0.5 between pixels 0 and 1.
    resized = resize(image, (1, 2), antialias=False)
    np.testing.assert_array_equal(resized[0, :, 0], [5, 25])
    checkers = np.indices((64, 64)).sum(0)[..., None].repeat(3, -1) % 2 * 255
    checkers = checkers.astype(np.uint8)
    assert resize(checkers, 21, antialias=True).std() < 15
    assert resize(checkers, 21, antialias=False).std() > 35


def test_aliased_resize_is_tensorflows_to_the_bit():
    """`tests/fixtures/tensorflow_resize.npz`: tf.image.resize of random images, cast to uint8."""
    with np.load(FIXTURES / "tensorflow_resize.npz") as file:
        cases = sorted({name.split("/")[0] for name in file.files} - {"tensorflow"})
        assert len(cases) == 6
        for case in cases:
            want = file[f"{case}/out"]
            found = resize(file[f"{case}/in"], want.shape[:2], antialias=False)
            np.testing.assert_array_equal(found, want)


def test_bicubic_keeps_what_bilinear_blurs():
    step = np.repeat(np.where(np.arange(32) < 13, 40, 200)[None], 32, 0)
    step = np.repeat(step[..., None], 3, -1).astype(np.uint8)
    sharp, soft = (resize(step, 12, resample=kind) for kind in ("bicubic", "bilinear"))
    assert soft.min() == 40
    assert soft.max() == 200
    assert sharp.min() < 40  # the bicubic filter overshoots at an edge
    assert sharp.max() > 200


def test_upscaling_agrees_with_and_without_antialiasing():
    image = smooth(16)
    pair = [resize(image, 40, antialias).astype(int) for antialias in (True, False)]
    assert np.abs(pair[0] - pair[1]).max() <= 1


def test_random_resized_crop_shows_what_its_box_holds():
    rng = np.random.default_rng(0)
    image = gradient(32, 32)
    for _ in range(50):
        crop = images.random_resized_crop(image, 16, rng, (0.2, 0.6))
        assert crop.shape == (16, 16, 3)
        # Columns grow to the right and rows downwards: never mirrored, turned or out of range.
        assert (np.diff(crop[..., 0].astype(int), axis=0) >= 0).all()
        assert (np.diff(crop[..., 1].astype(int), axis=1) >= 0).all()
        extent = np.ptp(crop[..., 0]) / 8 * (np.ptp(crop[..., 1]) / 8)
        assert 0.1 * 31**2 < extent < 0.7 * 31**2
    full = images.random_resized_crop(image, 32, rng, (1.0, 1.0), (1.0, 1.0))
    np.testing.assert_array_equal(full, image)


def test_crops_cover_the_image_evenly():
    rng = np.random.default_rng(1)
    image = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) // 64 * 4
    image = np.repeat(image.astype(np.uint8)[..., None], 3, -1)
    means = [
        images.random_resized_crop(image, 8, rng, (0.25, 0.25), (1.0, 1.0)).mean()
        for _ in range(400)
    ]
    assert abs(np.mean(means) - image.mean()) < 5
    assert min(means) < 70
    assert max(means) > 180


@pytest.mark.parametrize("fill", ["white", "edge"])
def test_shift_moves_and_fills(fill):
    image = gradient(12, 10)
    seen = set()
    for seed in range(200):
        shifted = images.random_shift(image, 2, np.random.default_rng(seed), fill)
        draws = np.random.default_rng(seed).integers(-2, 3, size=2)
        down, right = int(draws[0]), int(draws[1])
        seen.add((down, right))
        for row in range(12):
            for column in range(10):
                y, x = row - down, column - right
                inside = 0 <= y < 12 and 0 <= x < 10
                if inside or fill == "edge":
                    expected = image[np.clip(y, 0, 11), np.clip(x, 0, 9)]
                else:
                    expected = np.full(3, 255)
                assert (shifted[row, column] == expected).all()
        if len(seen) == 25:
            break
    assert len(seen) == 25


def test_a_shift_beyond_the_image_is_all_white():
    shifted = images.random_shift(np.zeros((4, 4, 3), np.uint8), 400, np.random.default_rng(0))
    assert shifted.min() == 255


def test_color_jitter_of_zero_is_the_identity_and_grey_stays_grey():
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(images.color_jitter(gradient(), 0.0, rng), gradient())
    jittered = images.color_jitter(smooth(16), 0.5, rng)
    assert (jittered == jittered[..., :1]).all()
    assert (jittered != smooth(16)).any()


def test_preprocessing_modes():
    image = np.zeros((10, 20, 3), np.uint8)
    image[:, :5], image[:, 15:] = 200, 100
    stretched = ImagePreprocessing(10).preprocess(image)
    assert stretched.shape == (10, 10, 3)
    assert stretched[0, 0, 0] == 200
    assert stretched[0, -1, 0] == 100
    np.testing.assert_array_equal(ImagePreprocessing(10, mode="crop").preprocess(image), 0)
    padded = ImagePreprocessing(20, mode="pad").preprocess(image)
    np.testing.assert_array_equal(padded[5:15], image)
    assert padded[:5].min() == padded[15:].min() == 255
    tall = ImagePreprocessing(20, mode="pad").preprocess(image.transpose(1, 0, 2))
    np.testing.assert_array_equal(tall, padded.transpose(1, 0, 2))


@pytest.mark.parametrize("antialias", [True, False])
def test_crop_is_the_centre_of_the_whole_image_resized(antialias):
    image = np.random.default_rng(0).integers(0, 256, (31, 77, 3)).astype(np.uint8)
    whole = resize(image, (20, 49), antialias)  # 20 * 77 / 31 = 49.7 columns
    crop = ImagePreprocessing(20, antialias, "crop")
    np.testing.assert_array_equal(crop.preprocess(image), whole[:, 14:34])
    np.testing.assert_array_equal(
        crop.preprocess(image.transpose(1, 0, 2)),
        resize(image.transpose(1, 0, 2), (49, 20), antialias)[14:34],
    )
    # 17 columns for 8: an odd rest of 9, whose lesser half lies left.
    plain = np.arange(8 * 17 * 3, dtype=np.uint8).reshape(8, 17, 3)
    np.testing.assert_array_equal(
        ImagePreprocessing(8, antialias, "crop").preprocess(plain), plain[:, 4:12]
    )


@pytest.mark.parametrize("mode", ["stretch", "crop", "pad"])
def test_what_patches_do_not_fill_is_dropped(mode):
    whole = ImagePreprocessing(31, mode=mode).preprocess(gradient(40, 90))
    part = ImagePreprocessing(28, mode=mode, resize_to=31).preprocess(gradient(40, 90))
    np.testing.assert_array_equal(part, whole[:28, :28])


def test_preprocessing_travels_as_json():
    preprocessing = ImagePreprocessing(48, mode="pad", resample="bicubic")
    text = json.dumps(dataclasses.asdict(preprocessing))
    assert ImagePreprocessing(**json.loads(text)) == preprocessing
    data = encode(Image.fromarray(gradient()))
    expected = preprocessing.preprocess(gradient())
    np.testing.assert_array_equal(preprocessing.preprocess_bytes(data), expected)


def test_impossible_preprocessing_is_refused():
    with pytest.raises(UserError, match="image_size=0: expected at least 1"):
        ImagePreprocessing(0)
    with pytest.raises(Exception, match="mode"):  # the annotation check of the tests comes first
        ImagePreprocessing(8, mode="fit")
    with pytest.raises(UserError, match="resize_to=7: expected 0, or image_size=8 or more"):
        ImagePreprocessing(8, resize_to=7)
    with pytest.raises(UserError, match="resample='bicubic': expected 'bilinear' without"):
        ImagePreprocessing(8, antialias=False, resample="bicubic")
