"""Captions behind a token that tells how well they fit: what decoding gives, training has read."""

import pytest

from capjax.commands import build, settings
from capjax.data.captions import caption_texts, reference_texts
from capjax.data.tokenizer import EOS_ID, Tokenizer


@pytest.mark.parametrize("score_edges", [(1.0,), (0.5, 1.0)])
def test_the_prefix_is_what_training_has_read(score_edges):
    """Where no piece spans a space, the bin's tokens are the same before any caption."""
    config = settings.load_config("emoji_vague")
    with config.unlocked():
        config.data.source = "emoji:val?vague=0.7"
        config.captions.update(
            templates=("{bin} {caption}",), score="said", score_edges=score_edges
        )
    data, source = build.build_data(config), build.build_source(config)
    examples = [source[i] for i in range(len(source))]
    texts = [text for example in examples for text in caption_texts(example, data.captions)]
    bins = range(len(score_edges) + 1)
    assert {text[:2] for text in texts} == {f"{number} " for number in bins}
    for example, text in zip(examples, texts, strict=True):
        # In the last bin stand the captions that say all, and references have no bin at all.
        full = reference_texts(example, data.references)
        assert (text[0] == str(bins[-1])) == ([text[2:]] == full)
    tokenizer = Tokenizer.train(texts, 400, split_by_whitespace=True)
    for text in texts:
        ids = list(tokenizer.encode(text[0], 8))
        prefix = ids[: ids.index(EOS_ID)]
        assert list(tokenizer.encode(text, 40)[: len(prefix)]) == prefix
