"""Retrieval by hand: equal captions, ties, rows that do not count, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.errors import UserError
from capjax.evaluation import ranking
from capjax.evaluation.retrieval import (
    evaluate_retrieval,
    measure_retrieval,
    nearest_wrong,
    precision_at_r,
)
from capjax.mesh import MeshShape, make_mesh, place_tree
from capjax.models.two_towers import TwoTowers, TwoTowersConfig
from capjax.objectives.contrastive import sigmoid_loss, softmax_loss

NUM_ROWS, LENGTH, VOCAB_SIZE, END = 13, 5, 40, 1
TOWERS = TwoTowers(
    TwoTowersConfig(
        image_size=8,
        patch_size=4,
        width=16,
        depth=1,
        num_heads=2,
        mlp_dim=32,
        pool="gap",
        vocab_size=VOCAB_SIZE,
        text_length=LENGTH,
    )
)
ONE = make_mesh(MeshShape(), devices=jax.devices()[:1])


@functools.cache
def params():
    return TOWERS.init(jax.random.key(0))


@functools.cache
def rows():
    """Row 3 has the caption of row 0, row 5 has none."""
    rng = np.random.default_rng(0)
    tokens_BL = rng.integers(2, VOCAB_SIZE, (NUM_ROWS, LENGTH), np.int32)
    lengths_B = 1 + np.arange(NUM_ROWS) % (LENGTH - 1)
    column_L = np.arange(LENGTH)[None]
    tokens_BL = np.where(column_L < lengths_B[:, None], tokens_BL, 0)
    tokens_BL = np.where(column_L == lengths_B[:, None], END, tokens_BL).astype(np.int32)
    tokens_BL[3], tokens_BL[5] = tokens_BL[0], [END, 0, 0, 0, 0]
    return {
        "image": rng.integers(0, 256, (NUM_ROWS, 8, 8, 3), np.uint8),
        "tokens": tokens_BL,
        "index": np.arange(NUM_ROWS, dtype=np.int32),
    }


def batches(batch_size):
    """The rows in batches; the last is filled up with masked rows, which repeat the second one."""
    for start in range(0, NUM_ROWS, batch_size):
        index = start + np.arange(batch_size)
        batch = {name: x[np.where(index < NUM_ROWS, index, 1)] for name, x in rows().items()}
        yield batch | {"mask": index < NUM_ROWS}


@functools.cache
def evaluate(batch_size, mesh=ONE, **options):
    placed = place_tree(mesh, params(), TOWERS.param_specs())
    return evaluate_retrieval(TOWERS, placed, batches(batch_size), mesh, **options).metrics


@functools.cache
def embeddings():
    """Of the rows that have a caption."""
    kept = np.arange(NUM_ROWS) != 5
    images, tokens = jnp.asarray(rows()["image"][kept]), jnp.asarray(rows()["tokens"][kept])
    image_ND = TOWERS.embed_image(params(), TOWERS.encode(params(), images))
    return image_ND, TOWERS.embed_text(params(), tokens)


def ranks(image_ND, text_MD, caption_N, mesh=None):
    """Of the images, and of the captions, whose images are then what they ask for."""
    sides = (image_ND, np.arange(len(image_ND))), (text_MD, np.asarray(caption_N))
    for (queries, query_E), (targets, target_E) in (sides, sides[::-1]):
        found = measure_retrieval(queries, targets, query_E, target_E, keys=(), mesh=mesh)
        yield found.items["image_to_text_rank"]


def ranks_one_by_one(image_ND, text_MD, caption_N):
    similarity_NM = np.asarray(image_ND, np.float64) @ np.asarray(text_MD, np.float64).T
    similarity_NM = similarity_NM.astype(np.float32)
    image_rank_N, text_rank_M = [], []
    for similarity_M, own in zip(similarity_NM, caption_N, strict=True):
        others = np.delete(similarity_M, own)
        image_rank_N.append(1 + (others >= similarity_M[own]).sum())
    for m, similarity_N in enumerate(similarity_NM.T):
        own_N = np.asarray(caption_N) == m
        text_rank_M.append(1 + (similarity_N[~own_N] >= similarity_N[own_N].max()).sum())
    return image_rank_N, text_rank_M


def test_ranks_of_a_written_matrix():
    # Similarities are the images' coordinates, as the captions are the axes.
    image_ND = np.array([[0.9, 0.8, 0.1], [0.5, 0.5, 0.2], [0.3, 0.6, 0.1], [0.0, 0.7, 0.9]])
    caption_N = np.array([0, 1, 1, 2])
    image_rank_N, text_rank_M = ranks(image_ND, np.eye(3), caption_N)
    np.testing.assert_array_equal(image_rank_N, [1, 2, 1, 1])  # the second ties with another
    # Caption 1 finds its own at 0.6, behind two images of others; 0.5 is no other's.
    np.testing.assert_array_equal(text_rank_M, [1, 3, 1])


def test_ranks_one_by_one(monkeypatch):
    rng = np.random.default_rng(1)
    image_ND = rng.choice([-1.0, 0.0, 1.0], (30, 4)).astype(np.float32)  # many ties
    text_MD = rng.choice([-1.0, 0.0, 1.0], (12, 4)).astype(np.float32)
    caption_N = np.concatenate([np.arange(12), rng.integers(0, 12, 18)])
    expected = ranks_one_by_one(image_ND, text_MD, caption_N)
    for block in (7, 1024):
        monkeypatch.setattr(ranking, "TARGETS", block)
        for mesh in (None, make_mesh(MeshShape(data=8))):
            found = list(ranks(image_ND, text_MD, caption_N, mesh))
            np.testing.assert_array_equal(found[0], expected[0])
            np.testing.assert_array_equal(found[1], expected[1])


def test_precision_among_the_first_r():
    """R = 3 with hits at the places 1 and 3: and the third one of its own behind ten others."""
    precision, average = precision_at_r(np.array([1, 10, 0]), np.zeros(3, int), 1)
    np.testing.assert_allclose(average, [5 / 9])
    np.testing.assert_allclose(precision, [2 / 3])
    # Two queries in any order, the second with all of its own in front.
    precision, average = precision_at_r(np.array([0, 1, 0, 10, 0]), np.array([1, 0, 0, 0, 1]), 2)
    np.testing.assert_allclose(average, [5 / 9, 1])
    np.testing.assert_allclose(precision, [2 / 3, 1])


def test_several_captions_an_image():
    """Three images, five texts; similarities are the images' coordinates."""
    image_ND = np.array(
        [[0.1, 0.9, 0.2, 0.3, 0.0], [0.5, 0.0, 0.7, 0.5, 0.6], [0.2, 0.0, 0.1, 0.0, 0.6]]
    )
    image_E, text_E = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 2, 3, 4])
    found = measure_retrieval(image_ND, np.eye(5), image_E, text_E, keys="xyz", texts=list("abcde"))
    # Any of its own will do: 0.9 finds image 0, 0.7 image 1, 0.6 image 2.
    assert [found.metrics[f"image_to_text_r{k}"] for k in (1, 5, 10)] == [1, 1, 1]
    # Text a is image 1's first, before image 2 and its own; e ties between the images 1 and 2.
    assert found.metrics["text_to_image_r1"] == 3 / 5
    assert found.metrics["text_to_image_r1_ties_as_hits"] == 4 / 5
    assert found.metrics["text_to_image_tie_rate"] == 1 / 5
    assert found.metrics["image_to_text_tie_rate"] == 0
    # Image 0: places 1 and 5 (a is last but one: d and c are more similar); image 1: 1, then d
    # ties with a and is behind e, so at place 4; image 2: its only one is first.
    np.testing.assert_allclose(found.metrics["image_to_text_r_precision"], (0.5 + 0.5 + 1) / 3)
    np.testing.assert_allclose(found.metrics["image_to_text_map_at_r"], (0.5 + 0.5 + 1) / 3)
    np.testing.assert_array_equal(found.items["image_to_text_rank"], [1, 1, 1])
    assert found.intervals.keys() == found.metrics.keys()
    assert found.intervals["image_to_text_r1"] == (1, 1)
    # Of five texts, not of three images.
    hits = np.random.default_rng(0).binomial(5, 3 / 5, 100_000) / 5
    assert found.intervals["text_to_image_r1"] == tuple(np.quantile(hits, [0.025, 0.975]))
    assert found.items["image_to_text_nearest"].tolist() == ["d", "e", "a"]
    assert found.keys == ("x", "y", "z")


def test_what_is_most_alike_and_wrong():
    same = np.ones((3, 2))
    pairs = np.divmod(np.arange(9), 3)
    np.testing.assert_array_equal(nearest_wrong(same, same, *pairs), [-1, -1, -1])
    np.testing.assert_array_equal(nearest_wrong(same, same, np.arange(3), np.arange(3)), [1, 0, 0])


def test_equal_embeddings_find_nothing():
    same = np.full((6, 4), 0.5, np.float32)
    image_rank_N, text_rank_M = ranks(same, same, np.arange(6))
    assert (image_rank_N == 6).all() and (text_rank_M == 6).all()


def test_metrics_by_hand_whatever_the_batch():
    image_ND, text_ND = embeddings()
    caption_N = np.array([0, 1, 2, 0, 3, 4, 5, 6, 7, 8, 9, 10])
    text_MD = np.delete(np.asarray(text_ND), 3, 0)
    image_rank_N, text_rank_M = ranks_one_by_one(image_ND, text_MD, caption_N)
    for batch_size in (4, 8):
        metrics = evaluate(batch_size)
        for k in (1, 5, 10):
            assert metrics[f"image_to_text_r{k}"] == np.mean(np.array(image_rank_N) <= k)
            assert metrics[f"text_to_image_r{k}"] == np.mean(np.array(text_rank_M) <= k)
        assert metrics["retrieval_images"] == 12 and metrics["retrieval_captions"] == 11
    assert 0 < metrics["image_to_text_r5"] < metrics["image_to_text_r10"]


def more_captions(index):
    """Row 5 has those of rows 6 and 7, and one that is none; row 8 its own again and that of 0."""
    tokens_BL = rows()["tokens"]
    return tokens_BL[{5: [6, 7, 5], 8: [8, 0]}.get(index, [])]


def test_every_caption_of_an_image_counts():
    own = {5: [6, 7], 8: [8, 0]}
    tokens_BL = rows()["tokens"]
    text_ML = np.unique(np.delete(tokens_BL, 5, 0), axis=0)
    has = lambda row: (text_ML[:, None] == tokens_BL[own.get(row, [row])]).all(-1).any(1)  # noqa: E731
    own_NM = np.array([has(row) for row in range(NUM_ROWS)])
    image_ND = TOWERS.embed_image(params(), TOWERS.encode(params(), jnp.asarray(rows()["image"])))
    similarity = (
        np.asarray(image_ND) @ np.asarray(TOWERS.embed_text(params(), jnp.asarray(text_ML))).T
    )
    others, owned = np.where(own_NM, -1, similarity), np.where(own_NM, similarity, -1)
    for mesh in (ONE, make_mesh(MeshShape(data=8))):
        metrics = evaluate(8, mesh, references=more_captions)
        for way, axis in (("image_to_text", 1), ("text_to_image", 0)):
            rank = 1 + (others >= owned.max(axis, keepdims=True)).sum(axis)
            for k in (1, 5, 10):
                assert metrics[f"{way}_r{k}"] == np.mean(rank <= k)
        assert metrics["retrieval_images"] == 13 and metrics["retrieval_captions"] == 11
        # Of what training would pair.
        alone = evaluate(8)["contrastive_loss"]
        assert metrics["contrastive_loss"] == pytest.approx(alone, rel=1e-5)
        assert 0 < metrics["image_to_text_map_at_r"] < 1


def test_the_loss_is_that_of_consecutive_batches():
    image_ND, text_ND = embeddings()
    scale, bias = TOWERS.logit_scale_and_bias(params())
    for batch_size, starts in ((4, (0, 4, 8)), (8, (0,)), (32, (0,))):
        parts = [slice(start, start + batch_size) for start in starts]
        pairs = [(image_ND[part], text_ND[part][:, None]) for part in parts]
        expected = np.mean([sigmoid_loss(*pair, scale, bias)[0] for pair in pairs])
        np.testing.assert_allclose(evaluate(batch_size)["contrastive_loss"], expected, rtol=1e-5)
    expected = softmax_loss(*pairs[0], jnp.float32(2))[0]
    actual = evaluate(32, kind="softmax", max_logit_scale=2.0)["contrastive_loss"]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_a_mesh_gives_the_same():
    metrics = evaluate(8, make_mesh(MeshShape(data=2, fsdp=2, tensor=2)))
    assert metrics.keys() == evaluate(8).keys()
    for name, value in evaluate(8).items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_no_captioned_rows_is_an_error():
    masked = [batch | {"mask": np.zeros(8, bool)} for batch in batches(8)]
    alone = [batch | {"tokens": np.eye(8, LENGTH, dtype=np.int32)} for batch in batches(8)]
    for nothing in ([], masked, alone):
        with pytest.raises(UserError, match="expected captioned examples, found none"):
            evaluate_retrieval(TOWERS, params(), nothing, ONE)
