import io
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from capjax.data.decode import decode_image
from capjax.data.prepare_example import (
    Dropped,
    PrepareSettings,
    clean_caption,
    prepare_example,
    target_size,
)
from capjax.data.records import Caption, Example
from capjax.errors import UserError


def picture(width=40, height=30, format="PNG", **options) -> bytes:
    rng = np.random.default_rng(width * height)
    buffer = io.BytesIO()
    pixels = rng.integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def prepared(image, texts=("a cat",), **settings):
    captions = tuple(Caption(text, "alt") for text in texts)
    return prepare_example(Example("k", image, captions), PrepareSettings(**settings))


@given(st.text(st.characters()) | st.text(" \t\n\x00\x85\ufeff\ud83d\ude00\u0301aé", max_size=12))
@example("e\ufeff\u0301")
@example("\ud83d\ude00")
@example("\ude00\ud83d")
def test_a_clean_caption_is_one_line_of_sound_text_and_stays_as_it_is(text):
    clean = clean_caption(text)
    clean.encode()  # no surrogates
    assert clean == " ".join(clean.split())
    assert not any(unicodedata.category(c) == "Cc" or c == "\ufeff" for c in clean)
    assert unicodedata.is_normalized("NFC", clean)
    assert clean_caption(clean) == clean


@given(
    st.lists(st.sampled_from(["a", "Žluťoučký", "👩🏽‍🚒", "नमस्ते", "x<y>", "中文。"]), min_size=1)
)
def test_a_sound_caption_is_not_changed(words):
    text = " ".join(words)
    assert clean_caption(text) == text


def test_what_cleaning_does():
    assert clean_caption("\ufeff a\x00b\tc\r\n ") == "a b c"
    assert clean_caption("cafe\u0301") == "café"
    assert clean_caption("\ud83d\ude00 \ud83d") == "😀 \ufffd"


@pytest.mark.parametrize(
    ("image", "texts", "settings", "reason", "detail"),
    [
        (b"no image", ["a"], {}, "not an image", "8 bytes"),
        (picture()[:500], ["a"], {}, "truncated image", ""),
        (picture(), [], {}, "no caption", "it has none"),
        (picture(), ["", "\x00 "], {}, "no caption", "2 captions, all empty or too long"),
        (picture(), ["abcd"], {"max_caption_length": 3}, "no caption", "1 captions"),
        (picture(), ["a"], {"min_size": 31}, "too small", "40x30 pixels"),
    ],
)
def test_drop_reasons(image, texts, settings, reason, detail):
    found = prepared(image, texts, **settings)
    assert isinstance(found, Dropped)
    assert (found.key, found.reason) == ("k", reason)
    assert detail in found.detail


def test_everything_else_of_an_example_stays():
    before = Example(
        "k", picture(), (Caption("a ", "alt", "de"), Caption("")), 3, ((1, 2, 3, 4),), {"a": [1]}
    )
    kept = prepare_example(before, PrepareSettings())
    assert kept.example == before._replace(captions=(Caption("a", "alt", "de"),))
    assert kept.num_captions_dropped == 1


def test_an_image_that_fits_stays_byte_for_byte():
    jpeg = picture(format="JPEG")
    assert prepared(jpeg).example.image == jpeg
    assert prepared(jpeg, format="jpeg", quality=5, resize=30).example.image == jpeg
    assert prepared(picture(), resize=100).example.image == picture()  # never enlarged


@pytest.mark.parametrize(
    ("before", "wanted", "after"),
    [
        ("PNG", "keep", "PNG"),
        ("GIF", "keep", "PNG"),
        ("JPEG", "keep", "JPEG"),
        ("WEBP", "keep", "WEBP"),
        ("PNG", "jpeg", "JPEG"),
        ("JPEG", "webp", "WEBP"),
    ],
)
def test_a_shrunk_image_has_the_wanted_format_and_size(before, wanted, after):
    kept = prepared(picture(60, 40, before), resize=20, format=wanted)
    with Image.open(io.BytesIO(kept.example.image)) as image:
        assert (image.format, image.size) == (after, (30, 20))
    assert kept.content == prepared(picture(60, 40, before)).content  # of the source's bytes


def test_a_turned_image_and_its_boxes_shrink_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = picture(60, 40, "JPEG", exif=exif)
    assert decode_image(data).shape == (60, 40, 3)
    found = prepare_example(
        Example("k", data, (Caption("a"),), boxes=((4.0, 6.0, 8.0, 12.0),)),
        PrepareSettings(resize=20),
    )
    assert decode_image(found.example.image).shape == (30, 20, 3)
    assert found.example.boxes == ((2.0, 3.0, 4.0, 6.0),)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 3000))
def test_sizes_never_grow_and_keep_to_the_limit(height, width, limit):
    by_side = target_size(height, width, PrepareSettings(resize=limit))
    assert min(by_side) == min(height, width, limit)
    by_pixels = target_size(height, width, PrepareSettings(max_pixels=limit * limit))
    assert by_pixels[0] * by_pixels[1] <= max(limit * limit, max(by_pixels))
    for new_height, new_width in (by_side, by_pixels):
        assert new_height <= height
        assert new_width <= width


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "a/b"}, "split='a/b'"),
        ({"shard_size": 0}, "shard_size=0: expected at least 1"),
        ({"resize": 2, "max_pixels": 2}, "give one of them"),
        ({"format": "gif"}, "format='gif'"),
        ({"quality": 101}, "quality=101"),
        ({"dedupe": ("phash",)}, "dedupe=phash: expected some of key, content"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        PrepareSettings(**settings)
