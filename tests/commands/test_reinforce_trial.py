"""What `capjax reinforce` tries before anything compiles: a prefix, and functions of the user's."""

import contextlib
import io
import threading

import numpy as np
import pytest
from PIL import Image

from capjax.commands.reinforce_config import reinforce_config
from capjax.commands.reinforce_data import load_function
from capjax.commands.reinforce_trial import open_prefix, try_functions
from capjax.data.captions import CaptionChoice
from capjax.data.records import Caption, CorruptRecord, Example
from capjax.data.tokenizer import Tokenizer
from capjax.decoding.loaded_model import LoadedModel
from capjax.errors import UserError
from capjax.rl import host
from capjax.rl.step import Sampling
from tests.evaluation.tiny import PREPROCESSING, params, towers

TEXTS = ["a dark thing", "a grey thing", "tone in tone"] * 4
BINS = [f"{number} {text}" for text in TEXTS for number in (1, 2)]
OWN_WORDS = Tokenizer.train(BINS, 300)
TONES = [f"{who}: {tone} skin tone" for who in ("cook", "pilot") for tone in ("dark", "light")]
PHRASES = Tokenizer.train(TONES * 5, 330, split_by_whitespace=False)


class Pictures:
    """Of the first there is nothing, of the second no caption, and the third is broken."""

    def __len__(self) -> int:
        return len(TEXTS)

    def __getitem__(self, index) -> Example:
        if index == 0:
            raise CorruptRecord("here", 0, "lost")
        content = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(content, "PNG")
        image = b"none" if index == 2 else content.getvalue()
        texts = [] if index == 1 else [TEXTS[index], f"{TEXTS[index]} again"]
        return Example(str(index), image, tuple(Caption(text, "human") for text in texts))


def loaded(tokenizer=OWN_WORDS, **config):
    return LoadedModel(towers(), params(), tokenizer, PREPROCESSING, config, step=3)


def opened(base, sampling, **fields):
    config = reinforce_config()
    config.policy.likelihood_weight = fields.get("likelihood_weight")
    return open_prefix(config, base, sampling, Pictures(), CaptionChoice())


def test_a_prefix_is_what_stands_before_every_caption():
    found = opened(loaded(), Sampling(prefix=" 2 "))
    assert found.text == "2" and found.is_apart
    whole = OWN_WORDS.encode("2 a dark thing", 20).tolist()
    assert whole == [*found.ids, *OWN_WORDS.encode("a dark thing", 20 - len(found.ids)).tolist()]
    assert opened(loaded(), Sampling(max_length=8)).ids == ()
    assert opened(loaded(), Sampling(prefix="2", max_length=8 - len(found.ids)))


@pytest.mark.parametrize(
    ("tokenizer", "sampling", "fields", "words"),
    [
        (OWN_WORDS, Sampling(max_length=9), {}, "sampling.max_length=9: expected at most 8"),
        (OWN_WORDS, Sampling(prefix="2", max_length=8), {}, "shorten one of them"),
        (OWN_WORDS, Sampling(prefix="a dark thing of words"), {}, "leave 0 of the 8"),
        (PHRASES, Sampling(prefix="skin"), {}, "a token for the end of it"),
        (OWN_WORDS, Sampling(prefix="2"), {"likelihood_weight": 0.1}, r"'2 \{caption\}'"),
    ],
)
def test_a_prefix_that_cannot_be_one_is_refused(tokenizer, sampling, fields, words):
    with pytest.raises(UserError, match=words):
        opened(loaded(tokenizer), sampling, **fields)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"captions": {"templates": ["{bin} {caption}"]}}, "behind '{bin}'"),
        ({"sampling": {"prefix": "2"}}, "behind '2'"),
        ({"captions": {"templates": ["{bin} {caption}", "{caption} by {source}"]}}, ""),
        ({}, ""),
    ],
)
def test_what_a_checkpoint_was_trained_behind_is_said(capsys, config, words):
    opened(loaded(**config), Sampling())
    said = capsys.readouterr().err
    assert words in said and bool(said) == bool(words)
    opened(loaded(**config), Sampling(prefix="2"))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("[[len(t) + x.mean() for t in ts] for ts, x in zip(captions, images)]", ""),
        ("[[len(r) for r in rs] for rs in references]", "raised ValueError"),
        ("[len(ts) for ts in captions]", r"shape \(2,\), expected .* \(2, 3\)"),
        ("[[1.0, 2.0, float('nan')]] * 2", "expected finite numbers"),
        ("[['good'] * 3] * 2", "raised ValueError"),
        ("images @ missing", "raised NameError"),
        ("exit()", "raised SystemExit"),
    ],
)
def test_a_function_is_called_with_two_images_of_the_source(tmp_path, returned, words):
    file = tmp_path / "reward.py"
    file.write_text(
        "def reward(images, captions, references):\n"
        "    assert images.shape == (2, 8, 8, 3) and images.dtype == 'uint8'\n"
        "    assert images[0].max() == 1 and images[1].max() == 3\n"
        "    assert captions[1] == ['a dark thing', 'a dark thing again', 'a dark thing']\n"
        "    assert references == [[], captions[1][:2]]\n"
        f"    return {returned}\n"
    )
    functions = {"own": load_function("own", str(file))}
    refused = pytest.raises(UserError, match=rf"rewards\.functions\.own .*{words}")
    with refused if words else contextlib.nullcontext():
        try_functions(functions, loaded(), Pictures(), CaptionChoice(), 3)


def test_a_function_that_hangs_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(host, "GRACE_S", 0.01)
    let_go = threading.Event()
    rows = {"index": np.arange(2)}
    step = host.HostStep(lambda rows, tokens: rows, lambda rows: rows)
    step._scores = host.in_background(lambda: rows if let_go.wait() else {})
    step.close()
    assert not step._scores.done()
    # Those that are no daemons are what the end of a process waits for.
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "rewards")
    let_go.set()
    assert step._scores.result() is rows
    with pytest.raises(ZeroDivisionError):
        host.in_background(lambda: {"": 1 / 0}).result()
