"""`capjax data` from the command line: what it prints and writes, and its one-line errors."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from capjax import cli
from capjax.data.augmentation import Augment
from capjax.data.captions import CaptionChoice
from capjax.data.images import ImagePreprocessing
from capjax.data.inspection import first_pairs, length_table
from capjax.data.pipeline import Reading, train_batches
from capjax.data.records import ArrayRecordSource, Caption, Example, write_shards
from capjax.data.sources import ImageDirectory
from capjax.data.tokenizer import Tokenizer

CAPTIONS = ["A red square", "a BLUE square <b>", "a green & white square", "left half"]


@pytest.fixture
def pictures(tmp_path):
    """A folder of four captioned images and a broken one."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, caption in enumerate(CAPTIONS):
        Image.fromarray(rng.integers(0, 255, (9, 12, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "broken.txt").write_text("a broken one")
    return folder


class Tags(HTMLParser):
    """Counts tags and gathers what an element refers to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.counts, self.references = {}, []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.references += [value for name, value in attrs if name in ("src", "href")]


def test_inspect_prints_the_pairs_and_draws_the_sheet(pictures, tmp_path, capsys):
    page = tmp_path / "page.html"
    command = ["data", "inspect", str(pictures), "--num=5", "--image_size=16", f"--output={page}"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    for i, caption in enumerate(CAPTIONS):
        assert re.search(rf"^{i}\.png +\d+  {re.escape(caption.lower())}$", out, re.MULTILINE)
    assert re.search(r"^broken\.png +0  cannot be used: not an image", out, re.MULTILINE)
    assert "tokens of 5 captions" in out
    tags = Tags(page.read_text("utf-8"))
    assert tags.counts["figure"] == 5
    assert tags.counts["img"] == 4
    assert tags.counts.get("b", 0) == 0  # captions are escaped
    assert all(reference.startswith("data:image/png;base64,") for reference in tags.references)


def test_what_inspect_shows_is_what_training_gets(tmp_path, pictures):
    folder = ImageDirectory(pictures, [f"{i}.png" for i in range(4)])
    source = ArrayRecordSource(write_shards(list(folder), tmp_path, "x", 10))
    tokenizer = Tokenizer.train(CAPTIONS, 300)
    shared = {
        "preprocessing": ImagePreprocessing(8),
        "augment": Augment(crop_scale=(0.5, 1.0), shift_pixels=1, flip=True, color_jitter=0.1),
        "seed": 5,
    }
    pairs = first_pairs(source, tokenizer, 8, choice=CaptionChoice(), **shared)
    with train_batches(
        source, tokenizer, text_length=16, batch_size=8, reading=Reading(0), **shared
    ) as batches:
        batch = next(batches)
    for row, pair in enumerate(pairs):
        np.testing.assert_array_equal(pair.image, batch["image"][row])
        assert pair.text == tokenizer.decode(batch["tokens"][row])
        assert pair.num_tokens == np.count_nonzero(batch["tokens"][row])


def test_tokenizer_is_trained_on_the_chosen_captions(tmp_path, capsys):
    captions = (Caption("Seven SWANS", "tts"), Caption("zebra", "keyword"))
    write_shards([Example(str(i), b"x", captions) for i in range(3)], tmp_path, "x", 5)
    path = tmp_path / "a.model"
    command = ["data", "tokenizer", str(tmp_path), "--vocab_size=400", f"--output={path}"]
    assert cli.main([*command, "--caption_sources=tts"]) == 0
    tokenizer = Tokenizer.from_file(path)
    assert tokenizer == Tokenizer.train(["seven swans"] * 3, 400)
    out = capsys.readouterr().out
    assert tokenizer.fingerprint in out
    assert "(the captions hold no more)" in out
    assert cli.main([*command, "--no-lower"]) == 0
    expected = Tokenizer.train(["Seven SWANS", "zebra"] * 3, 400)
    assert Tokenizer.from_file(path) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "data_command|COMMAND"),
        (["inspect"], "SOURCE"),
        (["inspect", "/missing/folder"], "no source '/missing/folder'"),
        (["inspect", "{pictures}", "--num=0"], "--num=0: expected at least 1"),
        (
            ["inspect", "{pictures}", "--caption_sources=alt"],
            "no caption of the sources alt.*sidecar",
        ),
        (["inspect", "{pictures}", "--tokenizer=/missing.model"], "tokenizer '/missing.model'"),
        (["inspect", "{pictures}", "--output=/missing/a.html"], "--output=/missing/a.html"),
        (["inspect", "{pictures}", "--crop_scale=2"], r"augment\.crop_scale=\(2\.0, 1\.0\)"),
        (["tokenizer", "{pictures}"], "--output"),
        (["tokenizer", "{pictures}", "--vocab_size=9", "--output=a"], "vocab_size=9"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, pictures, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled = [argument.format(pictures=pictures) for argument in arguments]
    assert cli.main(["data", *filled]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert re.search(message, err)


def test_length_table_counts_every_caption_once():
    table = length_table([1, 2, 2, 3, 90])
    assert "tokens of 5 captions" in table
    rows = re.findall(r"^ *(\d+)-(\d+) +(\d+)", table, re.MULTILINE)
    assert sum(int(count) for *_, count in rows) == 5
    assert rows[0] == ("1", "5", "4")
    assert rows[-1] == ("86", "90", "1")
    assert "90 holds 90 %, 90 holds 99 %, 90 holds 100 %" in table
