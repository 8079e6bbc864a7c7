import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from capjax import cli
from capjax.data.records import ArrayRecordSource, Caption, Example, write_shards
from capjax.data.stats import measure, quantiles, shared
from capjax.data.stats_page import histogram, html_page, text_report, warnings
from capjax.data.tokenizer import Tokenizer
from capjax.errors import UserError


def picture(seed: int, width=12, height=9, format="PNG", **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def turned(seed: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(seed, 20, 10, "JPEG", exif=exif)


@pytest.fixture
def source(tmp_path):
    """Five examples, of which one is no image and one repeats another's image and key."""
    examples = [
        Example("a", picture(0), (Caption("A red  Cat", "alt"), Caption("a red cat", "alt"))),
        Example("b", turned(1), (Caption("ein <b>Hund</b>", "alt", "de"),)),
        Example("a", picture(0), (Caption("a dog", "tts"),)),
        Example("c", b"no image", ()),
        Example("d", picture(3, 30, 40, "WEBP"), (Caption("a dog", "tts"),)),
    ]
    return ArrayRecordSource(write_shards(examples, tmp_path / "one", "x", 10))


def test_everything_is_counted(source):
    stats = measure(source, "one")
    assert (stats.num_examples, stats.num_read) == (5, 5)
    assert stats.bad == {"not an image": 1}
    assert stats.captions_per_image.tolist() == [2, 1, 1, 0, 1]
    assert stats.words.tolist() == [3, 3, 2, 2, 2]
    assert stats.widths.tolist() == [12, 10, 12, 30]  # the second is shown upright
    assert stats.heights.tolist() == [9, 20, 9, 40]
    assert stats.formats == {"PNG": 2, "JPEG": 1, "WEBP": 1}
    assert stats.languages == {"en": 4, "de": 1}
    assert stats.caption_sources == {"alt": 3, "tts": 2}
    assert (stats.repeated_images, stats.repeated_keys) == (1, 1)
    assert stats.repeated_captions.count == 2
    assert stats.repeated_captions.commonest == [("a red cat", 2), ("a dog", 2)]
    as_written = measure(source, "one", lower=False).repeated_captions
    assert (as_written.count, as_written.commonest) == (1, [("a dog", 2)])


def test_tokens_are_those_of_training(source):
    tokenizer = Tokenizer.train(["a red cat", "a dog"] * 3, 400)
    tokens = measure(source, "one", tokenizer=tokenizer, text_length=4).tokens
    texts = ["a red cat", "a red cat", "ein <b>hund</b>", "a dog", "a dog"]
    assert tokens.lengths.tolist() == [tokenizer.count(text) for text in texts]
    assert tokens.truncated == sum(tokenizer.count(text) > 4 for text in texts)
    assert tokens.byte_pieces > 0
    assert tokens.unknown_pieces == 0


def test_leaks_between_sources_are_found(source, tmp_path):
    examples = [
        Example("x", turned(1), (Caption("a"),)),
        Example("d", picture(9), (Caption("a"),)),
        Example("y", picture(8), (Caption("a"),)),
    ]
    other = ArrayRecordSource(write_shards(examples, tmp_path / "two", "x", 10))
    leak = shared(measure(source, "one"), measure(other, "two"), other)
    assert (leak.images, leak.keys, leak.some) == (1, 1, ["x"])
    (line,) = warnings([leak])
    assert line == "warning: 1 images and 1 keys of two are in one too, as x"
    assert warnings([shared(measure(source, "one"), measure(source, "one"), source)])
    alone = ArrayRecordSource(write_shards(examples[2:], tmp_path / "three", "x", 10))
    assert not warnings([shared(measure(source, "one"), measure(alone, "three"), alone)])


def test_unreadable_records_are_counted(source):
    class Damaged:
        def __len__(self):
            return 10

        def __getitem__(self, index):
            from capjax.data.records import CorruptRecord

            if index % 2:
                raise CorruptRecord("file", index, "why")
            return source[0]

    stats = measure(Damaged(), "bad")
    assert stats.bad == {"unreadable record": 5}
    assert len(stats.captions_per_image) == 5


def test_a_share_of_the_examples_is_spread_evenly(source):
    stats = measure(source, "one", max_examples=2)
    assert stats.indices.tolist() == [0, 2]
    assert "5, 2 of them looked at" in text_report(stats)


def test_an_empty_source_is_refused():
    class Empty:
        def __len__(self):
            return 0

        def __getitem__(self, index):
            raise IndexError

    with pytest.raises(UserError, match="0 examples"):
        measure(Empty(), "none")


def test_histograms_count_everything():
    values = np.array([1] * 50 + [7, 8, 1000])
    bars = histogram(values)
    assert len(bars) <= 24
    assert sum(count for _, count in bars) == len(values)
    assert histogram(np.array([3, 3])) == [("3", 2)]
    assert sum(count for _, count in histogram(np.array([0.5, 0.5, 2.0]))) == 3
    assert quantiles(np.array([])) == []
    assert quantiles(np.array([3, 1, 2])) == [1, 1, 2, 3, 3]


def test_the_page_is_sound_and_escaped(source):
    stats = measure(source, "a<b>", tokenizer=Tokenizer.train(["a red cat"], 300))
    page = html_page([stats, stats], [shared(stats, stats, source)])

    class Tags(HTMLParser):
        counts: dict[str, int] = {}  # noqa: RUF012

        def handle_starttag(self, tag, attrs):
            self.counts[tag] = self.counts.get(tag, 0) + 1
            assert not {"src", "href"} & dict(attrs).keys()

    tags = Tags()
    tags.feed(page)
    assert tags.counts["svg"] == 2 * 6
    assert "least: 0, 1 %: 0, median: 1, 99 %: 2, most: 2" in page  # captions an image
    assert "b" not in tags.counts
    assert "script" not in tags.counts
    assert page.count("warning: ") == 1


def test_a_distribution_of_one_number_is_said_and_not_drawn(tmp_path):
    files = {"a": picture(0), "b": picture(0, format="JPEG")}
    examples = [Example(name, data, (Caption("a dog"),)) for name, data in files.items()]
    stats = measure(ArrayRecordSource(write_shards(examples, tmp_path, "x", 10)), "alike")
    page = html_page([stats], [])
    assert page.count("<svg") == page.count("<figure>") - 4 == 1  # bytes an image
    assert page.count("all 9<") == 1
    assert re.findall(r'height="([\d.]+)"', page)[0] == "120.0"


def test_the_command_prints_and_writes(source, tmp_path, capsys):
    page = tmp_path / "page.html"
    one = str(tmp_path / "one")
    assert cli.main(["data", "stats", one, one, f"--output={page}"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ +examples +5$", out, re.MULTILINE)
    assert "warning: " in out
    assert page.read_text("utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "SOURCE"),
        (["/missing/folder"], "no source '/missing/folder'"),
        (["emoji:val", "--max_examples=0"], "--max_examples=0"),
        (["emoji:val", "--text_length=0"], "--text_length=0"),
        (["emoji:val", "--tokenizer=/missing.model"], "tokenizer '/missing.model'"),
        (["emoji:val", "--output=/missing/a.html"], "--output=/missing/a.html"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, capsys):
    assert cli.main(["data", "stats", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert message in err
