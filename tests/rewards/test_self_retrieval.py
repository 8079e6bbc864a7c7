"""The self-retrieval reward: its vectors, what is picked from, ties, a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.errors import UserError
from capjax.mesh import MeshShape, make_mesh, place_batch
from capjax.rewards.self_retrieval import self_retrieval

COSINES = jnp.array([[0.30, 0.28, 0.20], [0.25, 0.27, 0.27], [0.10, 0.22, 0.31]])
CAPTIONS, IMAGES = COSINES[:, None], jnp.eye(3)  # the cosines are the captions' coordinates


def drawn(B=8, K=3, M=2, D=16, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"caption": (B, K, D), "image": (B, D), "negative": (B, M, D)}
    found = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    found = {name: x / np.linalg.norm(x, axis=-1, keepdims=True) for name, x in found.items()}
    found["caption"] = 0.6 * found["image"][:, None] + 0.8 * found["caption"]
    found["caption"] /= np.linalg.norm(found["caption"], axis=-1, keepdims=True)
    return {name: x.astype(np.float32) for name, x in found.items()}


def plainly(rows, scale, bag_B, mask_B, index_B):
    """(log p, hit) in float64, a caption at a time."""
    is_rival_BC = (index_B[:, None] != index_B) & (bag_B[:, None] == bag_B) & mask_B
    caption_BKD, image_BD, negative_BMD = (
        rows[name].astype(np.float64) for name in ("caption", "image", "negative")
    )
    log_BK, hit_BK = np.zeros((2, *caption_BKD.shape[:2]))
    for b, k in np.ndindex(*log_BK.shape):
        rivals = np.concatenate([image_BD[is_rival_BC[b]], negative_BMD[b]]) @ caption_BKD[b, k]
        own = image_BD[b] @ caption_BKD[b, k]
        log_BK[b, k] = scale * own - np.log(np.exp(scale * np.append(rivals, own)).sum())
        hit_BK[b, k] = own > rivals.max()
    return log_BK, hit_BK


def reward(rows, **options):
    given = {name: jnp.asarray(x) for name, x in rows.items() if name != "negative"}
    return self_retrieval(given["caption"], given["image"], **options)


def test_vectors():
    found = self_retrieval(CAPTIONS, IMAGES)
    np.testing.assert_allclose(found[:, 0], [-0.126968, -0.758624, -0.000123], atol=1e-5)
    found = self_retrieval(CAPTIONS, IMAGES, 1.0)
    np.testing.assert_allclose(found[:, 0], [-1.059537, -1.091990, -1.002291], atol=1e-6)
    found = self_retrieval(CAPTIONS, IMAGES, form="accuracy")
    np.testing.assert_array_equal(found[:, 0], [1, 0, 1])  # the second ties with the third image


def test_bags_masks_and_negatives_as_computed_plainly():
    rows = drawn()
    rows["image"][2] = rows["image"][0]
    bag_B, mask_B = np.array([0, 0, 0, 1, 1, 2, 2, 3]), np.array([1, 1, 1, 1, 0, 1, 1, 1], bool)
    index_B = np.array([7, 1, 7, 3, 4, 5, 6, 2])
    expected = plainly(rows, 20.0, bag_B, mask_B, index_B)
    for form, by_hand_BK in zip(("log", "accuracy"), expected, strict=True):
        found = self_retrieval(
            *(jnp.asarray(rows[name]) for name in ("caption", "image")),
            20.0,
            form=form,
            bag_B=jnp.asarray(bag_B),
            mask_B=jnp.asarray(mask_B),
            index_B=jnp.asarray(index_B),
            negative_BMD=jnp.asarray(rows["negative"]),
        )
        assert jnp.isfinite(found).all()
        np.testing.assert_allclose(found[mask_B], by_hand_BK[mask_B], atol=2e-5)
    assert 0 < expected[1].mean() < 1


def test_distractors_in_any_order():
    rows = drawn()
    order = np.array([0, *1 + np.random.default_rng(0).permutation(7)])
    shuffled = {name: x[order] for name, x in rows.items()}
    for form in ("log", "accuracy"):
        found, other = reward(rows, form=form), reward(shuffled, form=form)
        np.testing.assert_allclose(other, found[order], rtol=1e-5)


def test_one_bag_is_the_batch_and_an_image_alone_is_picked():
    rows = drawn()
    np.testing.assert_array_equal(reward(rows), reward(rows, bag_B=jnp.zeros(8, jnp.int32)))
    alone = jnp.arange(8)
    np.testing.assert_array_equal(reward(rows, bag_B=alone), 0)
    np.testing.assert_array_equal(reward(rows, bag_B=alone, form="accuracy"), 1)
    masked = reward(rows, mask_B=jnp.arange(8) < 4)[:4]
    fewer = reward({name: x[:4] for name, x in rows.items()})
    np.testing.assert_allclose(masked, fewer, atol=1e-5)


def test_equal_images_are_misses():
    rows = drawn()
    rows["image"][3] = rows["image"][0]
    hit_BK = np.asarray(reward(rows, form="accuracy"))
    assert not hit_BK[[0, 3]].any() and hit_BK.any()
    rows["negative"][:, 1] = rows["image"]
    negative_BMD = jnp.asarray(rows["negative"])
    assert not reward(rows, form="accuracy", negative_BMD=negative_BMD).any()
    assert (reward(rows, negative_BMD=negative_BMD) <= -np.log(2) + 1e-5).all()


def test_an_image_that_is_there_twice_is_no_rival_of_itself():
    """Of two images, one of them twice: log p is that of the two alone, and a hit a hit."""
    rows = drawn(3, K=2)
    rows["image"][2] = rows["image"][0]
    caption_BKD, image_BD = rows["caption"], rows["image"]
    once = {name: x[:2] for name, x in rows.items()}
    index_B = jnp.array([5, 8, 5])
    apart = caption_BKD[[0, 2]] @ (image_BD[0] - image_BD[1])
    found = reward(rows, scale=10.0, index_B=index_B)
    np.testing.assert_allclose(found[jnp.array([0, 2])], -np.log1p(np.exp(-10 * apart)), atol=2e-5)
    hits = reward(rows, form="accuracy", index_B=index_B)
    np.testing.assert_array_equal(hits[:1], reward(once, form="accuracy")[:1])
    assert hits[0].any() and not reward(rows, form="accuracy")[0].any()
    np.testing.assert_array_equal(reward(rows, index_B=jnp.zeros(3, jnp.int32)), 0)


@functools.partial(jax.jit, static_argnames="form")
def of_batch(batch, form):
    return self_retrieval(
        batch["caption"],
        batch["image"],
        20.0,
        form=form,
        bag_B=batch["bag"],
        mask_B=batch["mask"],
        index_B=batch["index"],
        negative_BMD=batch["negative"],
    )


def test_eight_devices_as_one():
    rows = drawn(16)
    rows |= {"bag": np.arange(16, dtype=np.int32) // 5, "mask": np.arange(16) != 3}
    rows["index"] = np.arange(16, dtype=np.int32) // 2
    expected = plainly(rows, 20.0, rows["bag"], rows["mask"], rows["index"])
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        batch = place_batch(mesh, rows)
        for form, by_hand_BK in zip(("log", "accuracy"), expected, strict=True):
            found = of_batch(batch, form)
            assert jax.typeof(found).sharding.spec[0] == ("replica", "data", "fsdp")
            np.testing.assert_allclose(
                np.asarray(found)[rows["mask"]], by_hand_BK[rows["mask"]], atol=2e-5
            )


def test_another_form_is_refused():
    with pytest.raises(UserError, match=r"form='hit': choose one of log, accuracy"):
        reward(drawn(), form="hit")
