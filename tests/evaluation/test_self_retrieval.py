"""Self-retrieval: by hand, by chance, ties, shuffles, bags."""

import numpy as np
import pytest

from capjax.errors import UserError
from capjax.evaluation.self_retrieval import (
    among_candidates,
    bags,
    caption_to_image,
    random_distractors,
)
from capjax.mesh import MeshShape, make_mesh


def keys(count):
    return [f"k{i}" for i in range(count)]


def near(noise, count=130, width=16, seed=0):
    """Captions near their images."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((count, width))
    captions = images + noise * rng.standard_normal((count, width))
    return tuple(
        (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        for x in (captions, images)
    )


def test_caption_to_image_by_hand():
    captions = np.array([[0.5, 0.2, 0.1], [0.4, 0.4, 0.0], [0.9, 0.8, 0.1]])
    found = caption_to_image(captions, np.eye(3), "abc")
    assert found.items["caption_to_image_rank"].tolist() == [1, 2, 3]
    assert found.items["nearest_key"].tolist() == ["b", "a", "a"]
    assert found.metrics["caption_to_image_r1"] == 1 / 3
    assert found.metrics["caption_to_image_r1_ties_as_hits"] == 2 / 3
    assert found.metrics["caption_to_image_tie_rate"] == 1 / 3
    assert found.metrics["caption_to_image_r5"] == 1
    assert found.metrics["caption_to_image_median_rank"] == 2
    on_eight = caption_to_image(captions, np.eye(3), "abc", make_mesh(MeshShape(data=8)))
    assert on_eight.metrics == found.metrics


def test_captions_all_alike_find_nothing():
    same = np.tile(near(0, 1)[0], (120, 1))
    _, images = near(0, 120)
    for captions, pictures in ((same, same), (same, images)):
        found = caption_to_image(captions, pictures, keys(120)).metrics
        assert found["caption_to_image_r1"] <= 1 / 120
        assert found["caption_to_image_r1_ties_as_hits"] == (1 if pictures is same else 1 / 120)
    assert random_distractors(same, same, keys(120)).metrics["rd100_r1"] == 0
    assert random_distractors(same, same, keys(120)).metrics["rd100_r1_ties_as_hits"] == 1


def test_random_distractors_are_a_hundred_and_fixed():
    captions, images = near(0.9)
    found = random_distractors(captions, images, keys(130))
    assert found.metrics == random_distractors(captions, images, keys(130)).metrics
    other = random_distractors(captions, images, keys(130), seed=100)
    assert found.items["rd100_r1"].tolist() != other.items["rd100_r1"].tolist()
    np.testing.assert_allclose(found.metrics["rd100_r1"], found.items["rd100_r1"].mean())
    assert len(set(found.items["rd100_r1"].tolist())) > 2  # the shuffles differ
    # By hand, of the first shuffle: a hundred, and thirty filled up with the first seventy.
    order = np.random.default_rng(0).permutation(130)
    hits = {}
    for group, counted in ((order[:100], 100), (np.r_[order[100:], order[:70]], 30)):
        similarity = captions[group].astype(np.float64) @ images[group].astype(np.float64).T
        best = similarity.argmax(1) == np.arange(100)
        hits |= dict(zip(group[:counted].tolist(), best.tolist(), strict=False))
    one = random_distractors(captions, images, keys(130), num_shuffles=1)
    assert one.items["rd100_r1"].tolist() == [float(hits[row]) for row in range(130)]
    assert 0.1 < one.metrics["rd100_r1"] < 0.9
    assert random_distractors(*near(0), keys(130)).metrics["rd100_r1"] == 1
    few = random_distractors(captions[:99], images[:99], keys(99))
    assert not few.metrics and few.skipped["rd100_r1"].startswith("99 images")


def test_bags_by_hand():
    images = np.eye(4)
    captions = np.array([[1, 2, 0, 9], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1.0]])
    found = bags(captions, images, "abcd", {2: [["b", "a"], ["d", "c"]], 3: [], 4: [list("abcd")]})
    # a is more like b; c ties with d.
    np.testing.assert_array_equal(found.items["bags_2_r1"], [0, 1, 0, 1])
    assert found.metrics["bags_2_r1"] == 0.5 and found.metrics["bags_2_count"] == 2
    assert found.metrics["bags_2_r1_ties_as_hits"] == 0.75
    assert found.metrics["bags_4_r1"] == 0.5
    assert found.skipped == {"bags_3_r1": "no bags of this size"}
    some = bags(captions, images, "abcd", {2: [["b", "d"]]})
    np.testing.assert_array_equal(some.items["bags_2_r1"], [np.nan, 1, np.nan, 1])
    twice = bags(captions, images, "abcd", {2: [["b", "d"], ["b", "a"]]})
    assert twice.metrics["bags_2_r1"] == 0.75 and not twice.items


def test_shares_have_intervals():
    """As wide as the normal law says of so many captions; the median has none."""
    captions, images = near(0.9)
    parts = {
        **dict.fromkeys(
            ("caption_to_image_r1", "caption_to_image_r1_ties_as_hits"),
            caption_to_image(captions, images, keys(130)),
        ),
        "rd100_r1": random_distractors(captions, images, keys(130)),
        "bags_10_r1": bags(
            captions, images, keys(130), {10: np.reshape(keys(130), (13, 10)).tolist()}
        ),
        "imagecode_r1": among_candidates(
            captions, np.stack([images[:10]] * 130), np.arange(130) % 10, keys(130)
        ),
    }
    for name, found in parts.items():
        low, high = found.intervals[name]
        values = found.items.get(name)
        hit = found.metrics[name]
        deviation = np.sqrt(hit * (1 - hit)) if values is None else values.std()
        expected = hit + np.array([-1, 1]) * 1.96 * deviation / np.sqrt(130)
        np.testing.assert_allclose([low, high], expected, atol=0.02, err_msg=name)
        shares = {metric for metric in found.metrics if not metric.endswith(("_rank", "_count"))}
        assert found.intervals.keys() == shares
    # Of bags that overlap images are drawn: b stands or falls with all its captions.
    three = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0.0]])
    found = bags(three, np.eye(3), "abc", {2: [["a", "b"], ["b", "c"]]})
    assert found.metrics["bags_2_r1"] == 0.75 and found.intervals["bags_2_r1"] == (0.0, 1.0)


def test_bags_of_other_images():
    images = np.eye(3)
    with pytest.raises(UserError, match=r"no caption for \['z'\]"):
        bags(images, images, "abc", {2: [["a", "z"]]})
    with pytest.raises(UserError, match="expected 3 different images"):
        bags(images, images, "abc", {3: [["a", "b", "a"]]})


def test_distractors_in_any_order():
    captions, images = near(0.9, 20)
    found = bags(captions, images, keys(20), {20: [keys(20)]})
    shuffled = bags(captions, images, keys(20), {20: [keys(20)[::-1]]})
    np.testing.assert_array_equal(found.items["bags_20_r1"], shuffled.items["bags_20_r1"])
    everything = caption_to_image(captions, images, keys(20))
    assert everything.metrics["caption_to_image_r1"] == found.metrics["bags_20_r1"]


def test_among_ten_frames():
    captions, images = near(0.9, 10)
    frames = np.stack([images] * 10)
    found = among_candidates(captions, frames, np.arange(10), keys(10))
    expected = bags(captions, images, keys(10), {10: [keys(10)]})
    np.testing.assert_array_equal(found.items["imagecode_r1"], expected.items["bags_10_r1"])
    still = np.repeat(images[:, None], 10, 1)
    found = among_candidates(captions, still, np.arange(10), keys(10)).metrics
    assert found == {"imagecode_r1": 0, "imagecode_r1_ties_as_hits": 1}
