"""Retrieval on COCO's 5,000 test images as judged by several ground truths, through `eccv_caption`.

The captions written for an image are not all that fit it. CxC (Parekh et al. 2021) and ECCV Caption
(Chun et al. 2022) add those that were missing; mAP@R on the latter orders models as people do.
"""

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from importlib import resources

import numpy as np
from jax.sharding import Mesh

from capjax.errors import UserError
from capjax.evaluation.measured import Measured
from capjax.evaluation.ranking import nearest

WANTED = ("coco_5k_recalls", "cxc_recalls", "eccv_r1", "eccv_rprecision", "eccv_map_at_r")
WAYS = {"i2t": "image_to_text", "t2i": "text_to_image"}
NAMES = {"rprecision": "r_precision"}
GROUND_TRUTHS = {"i2t": "eccv_image_to_caption.json", "t2i": "eccv_caption_to_image.json"}


def measure_coco_retrieval(
    image_ND: np.ndarray,
    image_ids: Sequence[int],
    text_MD: np.ndarray,
    caption_ids: Sequence[int],
    mesh: Mesh | None = None,
) -> Measured:
    """As `measure_coco_lists`, of embeddings; of equals the one of the lower row is first."""
    lists = {}
    for way, queries_ND, query_ids, targets_MD, target_ids in (
        ("i2t", image_ND, image_ids, text_MD, caption_ids),
        ("t2i", text_MD, caption_ids, image_ND, image_ids),
    ):
        count = min(_deepest()[way], len(targets_MD))
        _, index_NK = nearest(queries_ND, targets_MD, count, mesh)
        found_NK = np.asarray(target_ids)[index_NK].tolist()
        lists[way] = dict(zip(query_ids, found_NK, strict=True))
    return measure_coco_lists(lists["i2t"], lists["t2i"])


def measure_coco_lists(
    captions_of: Mapping[int, Sequence[int]], images_of: Mapping[int, Sequence[int]]
) -> Measured:
    """What `eccv_caption` says of ranked lists.

    Args:
      captions_of: COCO's id of each of the 5,000 images of Karpathy's test split to the ids of
        captions, best first; images_of: of each of its 25,010 captions to the ids of images. The
        lists are as long as the longest of ECCV Caption's at least (48 and 19).

    Returns coco_5k_<way>_r1, _r5, _r10, cxc_<way>_r1, ..., eccv_<way>_r1, _r_precision, _map_at_r,
    where <way> is image_to_text or text_to_image. Raises `UserError` where the package is missing,
    and where images or captions of the test split are.
    """
    package = _package()
    metrics = package.Metrics()
    for name, given, wanted in (
        ("image_ids", captions_of, metrics.coco_gts["i2t"]),
        ("caption_ids", images_of, metrics.coco_gts["t2i"]),
    ):
        if missing := wanted.keys() - given.keys():
            raise UserError(
                f"{name}: {len(missing)} of the {len(wanted)} of COCO's test split are missing, "
                f"such as {min(missing)}; embed the whole of Karpathy's test split"
            )
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        found = metrics.compute_all_metrics(
            {key: list(ids) for key, ids in captions_of.items()},
            {key: list(ids) for key, ids in images_of.items()},
            target_metrics=list(WANTED),
        )
    named = {}
    for metric, values in found.items():
        truth, _, measure = metric.replace("coco_5k", "coco5k").partition("_")
        truth, measure = truth.replace("coco5k", "coco_5k"), NAMES.get(measure, measure)
        for way, value in values.items():
            named[f"{truth}_{WAYS[way]}_{measure}"] = float(value)
    notes = {"coco_retrieval": "eccv_caption; of equals the one of the lower row counts as first"}
    return Measured(named, notes=notes)


def _deepest() -> dict[str, int]:
    """The length of the longest list of ECCV Caption, and of recall at 10, each way."""
    data = resources.files(_package()) / "data"
    return {
        way: max(10, *map(len, json.loads((data / name).read_text()).values()))
        for way, name in GROUND_TRUTHS.items()
    }


def _package():
    try:
        import eccv_caption
    except ImportError as error:
        raise UserError(
            "ECCV Caption needs the package eccv-caption: pip install 'capjax[eval]'"
        ) from error
    return eccv_caption
