"""Zero-shot: every prompt scored plainly, one after the other, gives the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.data.tokenizer import PAD_ID
from capjax.decoding.score import score, score_tokens
from capjax.errors import UserError
from capjax.evaluation.zeroshot import class_embeddings, likelihoods, prompts
from capjax.mesh import place_tree
from tests.evaluation.tiny import (
    ONE,
    PREPROCESSING,
    LabelledImages,
    params,
    readable,
    tokenizer,
    towers,
)

COUNT, LENGTH = 13, 8
CLASSES = ["dark", ["grey", "a grey"], "bright"]
TEXTS = prompts(CLASSES, ("{}", "a {} thing"))
TOKENS_TL = tokenizer().encode_batch(TEXTS.texts, LENGTH)
MODEL = towers().coca


def placed():
    return place_tree(ONE, params(), towers().param_specs())


def test_prompts():
    assert TEXTS.texts == (
        *("dark", "a dark thing"),
        *("grey", "a grey thing", "a grey", "a a grey thing"),
        *("bright", "a bright thing"),
    )
    np.testing.assert_array_equal(TEXTS.class_T, [0, 0, 1, 1, 1, 1, 2, 2])
    assert prompts(["cat"], ("{}", "{}")).texts == ("cat",)
    with pytest.raises(UserError, match="for the name of the class"):
        prompts(["cat"], ("a photo",))
    for nothing in (([],), ([[]],), (["cat"], ())):
        with pytest.raises(UserError, match="class"):
            prompts(*nothing)


def test_likelihoods_of_every_prompt_plainly():
    examples = [LabelledImages(COUNT)[index] for index in readable(COUNT)]
    images = np.stack([PREPROCESSING.preprocess_bytes(x.image) for x in examples])
    rows, priors_C = likelihoods(
        MODEL,
        placed(),
        LabelledImages(COUNT),
        PREPROCESSING,
        TOKENS_TL,
        TEXTS.class_T,
        mesh=ONE,
        batch_size=8,
    )
    scores, priors = [], []
    for labels_L in TOKENS_TL:
        labels_BL = jnp.asarray(np.tile(labels_L[None], (len(images), 1)))
        scores.append(np.asarray(score(MODEL, params(), jnp.asarray(images), labels_BL)))
        alone = np.asarray(score_tokens(MODEL, params(), None, labels_BL[:1, None]))
        priors.append(alone[0, 0, labels_L != PAD_ID].sum())
    scores_NT, priors_T = np.stack(scores, 1).astype(np.float64), np.array(priors, np.float64)

    def joined(x_NT):
        return np.stack([np.log(np.exp(x_NT[:, TEXTS.class_T == c]).sum(1)) for c in range(3)], 1)

    np.testing.assert_allclose(rows.values[:, 0], joined(scores_NT), rtol=1e-4)
    np.testing.assert_allclose(rows.values[:, 1], joined(scores_NT - priors_T), atol=1e-3)
    np.testing.assert_allclose(priors_C, joined(priors_T[None])[0], rtol=1e-4)
    assert rows.keys == tuple(example.key for example in examples)


def test_class_embeddings_are_means_of_length_one():
    found = class_embeddings(MODEL, placed(), TOKENS_TL, TEXTS.class_T, mesh=ONE)
    embedded_TD = np.asarray(jax.jit(MODEL.embed_text)(params(), jnp.asarray(TOKENS_TL)))
    np.testing.assert_allclose(np.linalg.norm(embedded_TD, axis=1), 1, rtol=1e-5)
    for number, class_D in enumerate(found):
        mean_D = embedded_TD[TEXTS.class_T == number].mean(0)
        np.testing.assert_allclose(class_D, mean_D / np.linalg.norm(mean_D), atol=1e-5)
