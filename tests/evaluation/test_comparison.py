"""Two systems on the same images."""

import numpy as np
import pytest

from capjax.errors import UserError
from capjax.evaluation.agreement import measure_captions
from capjax.evaluation.caption_files import CaptionSet
from capjax.evaluation.comparison import compare_captions, compare_measured
from capjax.evaluation.measured import Measured


def caption_set(fakecap, words, places):
    items = [fakecap["items"][place] for place in places]
    return CaptionSet(
        tuple(str(item["image_id"]) for item in items),
        [[" ".join(item["cand"].split()[:words])] for item in items],
        [item["refs"] for item in items],
        {},
    )


def test_captions_of_the_images_that_both_have(fakecap):
    first = caption_set(fakecap, 6, range(60))
    second = caption_set(fakecap, 50, range(79, 19, -1))
    compared = compare_captions(first, second, tokenizer="none", java=False)
    assert compared.num_items == 40
    found = {row.metric: row for row in compared.rows}
    both = [caption_set(fakecap, words, range(20, 60)) for words in (6, 50)]
    for row, captions in zip(("first", "second"), both, strict=True):
        alone = measure_captions(
            captions.candidates, captions.references, captions.keys, tokenizer="none", java=False
        )
        for name in ("bleu_4", "cider_d", "vocabulary_size"):
            assert getattr(found[name], row) == pytest.approx(alone.metrics[name])
    change = found["num_words"].difference
    assert change is not None
    assert change.value > 0
    assert change.p_value == pytest.approx(1 / 1001)
    assert found["vocabulary_size"].difference is None
    same = compare_captions(first, first, tokenizer="none", java=False)
    assert all(row.difference is None or row.difference.p_value == 1 for row in same.rows)


def test_references_that_differ_are_an_error(fakecap):
    first = caption_set(fakecap, 9, range(3))
    assert first.references is not None
    second = first._replace(references=[refs[::-1] for refs in first.references])
    compare_captions(first, second, tokenizer="none", java=False)  # another order is the same
    second = first._replace(references=[["other"]] * 3)
    with pytest.raises(UserError, match="references differ between the two"):
        compare_captions(first, second, tokenizer="none", java=False)
    with pytest.raises(UserError, match="no image in common: keys such as"):
        compare_captions(first, caption_set(fakecap, 9, range(5, 8)))


def test_results_are_tested_where_they_are_of_items():
    def measured(shift, keys):
        rank = np.array([1.0, 2, 1, 7, 1, 1]) + shift
        return Measured(
            metrics={
                "score": float(np.nanmean([1.0, 2, 3, np.nan, 5, 6])) + shift,
                "caption_to_image_r1": float((rank <= 1).mean()),
                "perplexity": 4.0 + shift,
                "corpus": 0.5,
                **({"mine": 1.0} if shift else {}),
            },
            items={
                "score": np.array([1.0, 2, 3, np.nan, 5, 6]) + shift,
                "caption_to_image_rank": rank,
                "corpus": np.arange(6.0),  # not its mean
                "nearest_key": np.array(list("abcdef")),
            },
            keys=keys,
            intervals={"perplexity": (3.0, 5.0)},
        )

    compared = compare_measured(measured(0, tuple("abcdef")), measured(1, tuple("abcdef")))
    found = {row.metric: row for row in compared.rows}
    assert set(found) == {"score", "caption_to_image_r1", "perplexity", "corpus"}
    assert found["score"].difference.value == pytest.approx(1.0)
    assert found["caption_to_image_r1"].difference.value == pytest.approx(-4 / 6)
    assert found["perplexity"] == ("perplexity", 4.0, 5.0, (3.0, 5.0), (3.0, 5.0), None)
    assert found["corpus"].difference is None
    # Other images: of those in common.
    compared = compare_measured(measured(0, tuple("abcdef")), measured(1, tuple("abcxyz")))
    assert compared.num_items == 3
    found = {row.metric: row for row in compared.rows}
    assert found["score"][1:3] == (2.0, 3.0)
