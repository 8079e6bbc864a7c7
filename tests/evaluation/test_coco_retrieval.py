"""COCO's several ground truths, through the package that ships them."""

import numpy as np
import pytest

from capjax.errors import UserError
from capjax.evaluation.coco_retrieval import measure_coco_lists, measure_coco_retrieval


@pytest.fixture
def truths(require_module):
    """The ids of COCO's captions of each image, and of the image of each."""
    return require_module("eccv_caption").Metrics().coco_gts


def test_lists_of_an_oracle(truths):
    """What is written for the image first, then what is nothing."""
    filling = list(range(-1, -50, -1))
    lists = [{key: [*own, *filling] for key, own in truths[way].items()} for way in ("i2t", "t2i")]
    found = measure_coco_lists(*lists).metrics
    assert found["coco_5k_image_to_text_r1"] == found["coco_5k_text_to_image_r1"] == 1
    assert found["coco_5k_image_to_text_r10"] == 1
    np.testing.assert_allclose(found["cxc_image_to_text_r1"], 0.9992, atol=1e-6)
    np.testing.assert_allclose(found["cxc_text_to_image_r1"], 0.99996, atol=1e-6)
    np.testing.assert_allclose(found["eccv_image_to_text_r1"], 0.9984, atol=2e-5)
    assert found["eccv_text_to_image_r1"] == 1
    # Filled up with captions and images rather than nothing, some of which fit: .31306, .13633.
    np.testing.assert_allclose(found["eccv_image_to_text_map_at_r"], 0.31306, atol=5e-4)
    np.testing.assert_allclose(found["eccv_text_to_image_map_at_r"], 0.13633, atol=5e-4)
    assert 0 < found["eccv_image_to_text_r_precision"] < 0.5


def test_embeddings_of_an_oracle(truths):
    """Each caption at its image's place: the same recalls as of the lists."""
    rng = np.random.default_rng(0)
    image_ids, caption_ids = list(truths["i2t"]), list(truths["t2i"])
    image_ND = rng.standard_normal((len(image_ids), 8)).astype(np.float32)
    image_ND /= np.linalg.norm(image_ND, axis=1, keepdims=True)
    row_of = {image: row for row, image in enumerate(image_ids)}
    text_MD = image_ND[[row_of[truths["t2i"][caption][0]] for caption in caption_ids]]
    found = measure_coco_retrieval(image_ND, image_ids, text_MD, caption_ids).metrics
    assert found["coco_5k_image_to_text_r1"] == found["coco_5k_text_to_image_r1"] == 1
    np.testing.assert_allclose(found["cxc_text_to_image_r1"], 0.99996, atol=1e-6)


def test_a_part_of_the_split_is_refused(truths):
    some = dict(list(truths["i2t"].items())[:10])
    with pytest.raises(UserError, match="image_ids: 4990 of the 5000"):
        measure_coco_lists(some, truths["t2i"])
