"""The rules of tests of composition, their figures, and the scores behind them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.data.compositional import DIAGONAL, Item, Picture
from capjax.decoding.score import score_tokens
from capjax.evaluation.compositional import (
    MACROS,
    Macro,
    judge,
    macro,
    measure_items,
    score_rows,
    score_without_image,
    token_confidence,
)
from capjax.models.coca import CoCa, CoCaConfig

WINOGROUND = np.array(DIAGONAL)


def item(key="a", kind="", truth=DIAGONAL):
    pictures = (Picture((b"",)),) * len(truth)
    return Item(key, kind, pictures, ("",) * len(truth[0]), truth)


@pytest.mark.parametrize(
    ("scores", "want"),
    [
        ([[0.9, 0.8], [0.85, 0.87]], (1, 1, 1)),  # the example of the published rules
        ([[0.5, 0.5], [0.5, 0.5]], (0, 0, 0)),  # ties are wrong
        ([[0.9, 0.8], [0.95, 0.97]], (1, 0, 0)),  # the second image scores more by any caption
        ([[0.9, 0.95], [0.8, 0.97]], (0, 1, 0)),  # the second caption scores more of any image
        ([[0.9, 0.9], [0.8, 0.97]], (0, 1, 0)),
        ([[0.8, 0.9], [0.9, 0.8]], (0, 0, 0)),
    ],
)
def test_two_images_and_their_captions(scores, want):
    assert judge(np.array(scores), WINOGROUND) == want
    # Written out as it was published.
    s = dict(
        zip([(0, 0), (1, 0), (0, 1), (1, 1)], np.ravel(scores), strict=True)
    )  # (caption, image)
    text = s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1]
    image = s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0]
    assert judge(np.array(scores), WINOGROUND) == (text, image, text and image)


def test_chances_of_scores_that_know_nothing():
    rng = np.random.default_rng(0)
    judged = np.array([judge(rng.normal(size=(2, 2)), WINOGROUND) for _ in range(4_000)])
    np.testing.assert_allclose(judged.mean(0), [1 / 4, 1 / 4, 1 / 6], atol=0.03)
    order = np.array([[True, False, False, False, False]])
    judged = [judge(rng.normal(size=(1, 5)), order)[0] for _ in range(4_000)]
    assert np.mean(judged) == pytest.approx(1 / 5, abs=0.03)


def test_questions_that_are_not_asked():
    choice = np.array([[True, False]])
    np.testing.assert_equal(judge(np.array([[2.0, 1.0]]), choice), (1, np.nan, np.nan))
    consistent = np.array([[True], [False], [True]])
    found = judge(np.array([[3.0], [1.0], [2.0]]), consistent)
    np.testing.assert_equal(found, (np.nan, 1, np.nan))
    found = judge(np.array([[3.0], [2.0], [2.0]]), consistent)
    np.testing.assert_equal(found, (np.nan, 0, np.nan))
    np.testing.assert_equal(judge(np.array([[1.0]]), np.array([[True]])), (np.nan,) * 3)
    assert judge(np.full((2, 2), np.nan), WINOGROUND) == (0, 0, 0)  # no score is no answer


def test_the_prior_turns_a_choice():
    likelihood, prior = np.array([[-10.0, -12.0]]), np.array([[-8.0, -14.0]])
    choose_second = np.array([[False, True]])
    chosen = [judge(likelihood - alpha * prior, choose_second)[0] for alpha in (0, 0.5, 1)]
    assert chosen == [0, 1, 1]


def test_figures_by_scorer_and_kind():
    items = [item("a", "Swap-Att"), item("b", "obj"), item("c", "obj")]
    right, wrong = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[0.0, 1.0], [1.0, 0.0]])
    found = measure_items(
        "w", items, {"likelihood": [right, right, wrong], "null_image": [wrong, wrong, right * 0]}
    )
    assert found.keys == ("a", "b", "c")
    assert found.metrics["w_text"] == pytest.approx(2 / 3)
    assert found.metrics["w_swap_att_group"] == 1.0
    assert found.metrics["w_obj_image"] == 0.5
    assert found.metrics["w_text_null_image"] == 0.0
    np.testing.assert_equal(found.items["w_obj_text"], [np.nan, 1, 0])
    for name, value in found.metrics.items():
        assert np.nanmean(found.items[name]) == pytest.approx(value)


def test_one_image_asks_of_text_alone():
    found = measure_items("s", [item(truth=((True, False),))], {"towers": [np.array([[0.2, 0.1]])]})
    assert found.metrics == {"s_text_towers": 1.0}


def test_the_mean_over_kinds():
    kinds = ["on"] * 3 + ["under"] + ["near"] * 4
    passed = np.array([1, 1, 0, 0, 0, 0, 0, 0], float)
    assert macro(passed, kinds, Macro()) == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert macro(passed, kinds, Macro(frozenset({"near"}))) == pytest.approx((2 / 3 + 0) / 2)
    assert macro(passed, kinds, Macro(frozenset({"near"}), 2)) == pytest.approx(2 / 3)
    assert np.isnan(macro(passed, kinds, Macro(min_items=5)))

    choice = ((True, False),)
    relations = [item(str(i), kind, choice) for i, kind in enumerate(kinds)]
    scores = [np.array([[score, 0.5]]) for score in passed]
    found = measure_items("aro_relation", relations, {"likelihood": scores})
    assert "near" in MACROS["aro_relation"].dropped
    assert "eating from" in MACROS["aro_relation"].dropped
    assert found.metrics["aro_relation_macro_text"] == pytest.approx((2 / 3 + 0) / 2)
    assert found.metrics["aro_relation_text"] == pytest.approx(2 / 8)
    pairs = [item(str(i), "round_red" if i < 25 else "tall_old", choice) for i in range(49)]
    scores = [np.array([[i % 5, 0.5]]) for i in range(49)]
    found = measure_items("aro_attribution", pairs, {"likelihood": scores})
    assert found.metrics["aro_attribution_macro_text"] == pytest.approx(20 / 25)


def test_scores_of_rows():
    model = CoCa(
        CoCaConfig(
            image_size=8,
            patch_size=4,
            width=16,
            depth=1,
            num_heads=2,
            mlp_dim=16,
            decoder_depth=2,
            caption_queries=5,
            vocab_size=21,
            text_length=5,
        )
    )
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), model.abstract_params()
    )
    images = jnp.asarray(rng.integers(0, 256, (2, 8, 8, 3)), jnp.uint8)
    labels = np.zeros((2, 3, 5), np.int32)
    labels[0] = [[5, 6, 7, 1, 0], [9, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    labels[1] = [[4, 4, 4, 4, 1], [8, 7, 1, 0, 0], [3, 1, 0, 0, 0]]
    batch = {"image": images, "labels": jnp.asarray(labels), "texts": jnp.asarray(labels)}
    found = {name: np.asarray(x) for name, x in score_rows(model, model, params, batch).items()}
    assert set(found) == {"likelihood", "confidence", "towers"}

    logprobs = np.asarray(score_tokens(model, params, images, jnp.asarray(labels)))
    np.testing.assert_allclose(found["likelihood"], logprobs.sum(-1), rtol=1e-5)
    assert found["confidence"][0, 2] == 0.0  # no caption
    for row, caption, length in ((0, 0, 4), (0, 1, 2), (1, 0, 5)):
        want = np.exp(logprobs[row, caption, :length]).mean()
        assert found["confidence"][row, caption] == pytest.approx(want, rel=1e-5)
    image = jax.jit(lambda p, x: model.embed_image(p, model.encode(p, x)))(params, images)
    text = jax.jit(model.embed_text)(params, jnp.asarray(labels.reshape(6, 5)))
    want = np.einsum("bd,bsd->bs", image, np.reshape(text, (2, 3, -1)))
    np.testing.assert_allclose(found["towers"], want, rtol=1e-5, atol=1e-6)

    alone = score_without_image(model, params, jnp.asarray(labels))
    null = score_tokens(model, params, None, jnp.asarray(labels))
    np.testing.assert_allclose(alone, np.asarray(null).sum(-1), rtol=1e-5)
    assert np.abs(alone[0, 0] - found["likelihood"][0, 0]) > 1e-3


def test_confidence_of_tokens():
    """The published example: three tokens of probability .9, .2 and .8."""
    found = token_confidence(jnp.log(jnp.array([0.9, 0.2, 0.8])), jnp.array([5, 6, 7]))
    assert float(found) == pytest.approx(0.6333, abs=1e-4)
