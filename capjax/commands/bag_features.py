"""What `capjax data bags` groups: the images of a source and how alike they are."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from capjax.data.captions import CaptionChoice, reference_texts
from capjax.data.records import CorruptRecord
from capjax.data.sources import Source
from capjax.decoding.load import load
from capjax.decoding.loaded_model import LoadedModel
from capjax.errors import UserError
from capjax.evaluation.features import frozen_features
from capjax.mesh import MeshShape, make_mesh

Captions = Mapping[str, Sequence[str]]


class BagImages(NamedTuple):
    """N images: keys, names, and what to compare them by, float32 [N, D] (None: nothing).

    The name is the first caption, or the key of an image without: images of one name do not share
    a bag, as no caption tells them apart.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    features_ND: np.ndarray | None = None


def by_name(keys: Sequence[str], captions: Captions) -> BagImages:
    """The images of these keys, without features."""
    names = (captions[key][0].lower() if captions[key] else key for key in keys)
    return BagImages(tuple(keys), tuple(names))


def read_captions(
    source: Source, address: str, chosen: Sequence[str], max_examples: int | None
) -> dict[str, list[str]]:
    """Key -> captions of the examples that can be read, in the order of the source.

    Args:
      address: what was opened.
      chosen: the sources of captions that count; empty for all.
      max_examples: takes that many, evenly spread; None for all.

    Raises `UserError` where two examples have one key.
    """
    choice = CaptionChoice(dict.fromkeys(chosen, 1.0), lower=False)
    count = min(len(source), max_examples or len(source))
    captions: dict[str, list[str]] = {}
    for position in range(count):
        try:
            example = source[position * len(source) // count]
        except CorruptRecord:
            continue
        if example.key in captions:
            raise UserError(
                f"--input={address}: several examples have the key {example.key!r}; bags need keys "
                "that are unique (`capjax data prepare` drops the later ones)"
            )
        captions[example.key] = reference_texts(example, choice)
    return captions


def embedded(args: argparse.Namespace, source: Source, captions: Captions) -> BagImages:
    """The images that can be read and, where captions count, have one.

    Raises `UserError` for a checkpoint without two towers, for several processes, and where too
    few images are left.
    """
    if jax.process_count() > 1:
        raise UserError(f"{jax.process_count()} processes: bags are made by one, on its devices")
    mesh = make_mesh(MeshShape())
    loaded = load(args.checkpoint, mesh=mesh)
    print(f"{args.input}: embedding {len(captions)} images", file=sys.stderr, flush=True)
    rows = frozen_features(
        loaded.towers,
        loaded.params,
        (args.input, source),
        loaded.preprocessing,
        mesh=mesh,
        kind="embedding",
        batch_size=args.batch_size,
        max_examples=args.max_examples,
    )
    with_texts = args.features != "image"
    used = [row for row, key in enumerate(rows.keys) if captions[key] or not with_texts]
    if len(used) < 2:
        raise UserError(
            f"--input={args.input}, --features={args.features}: {len(used)} of {len(captions)} "
            f"images have a caption of --caption_sources={args.caption_sources or 'any'}; use "
            "--features=image, or name sources that there are"
        )
    if left_out := rows.unreadable + len(rows.keys) - len(used):
        print(f"left out, without a readable image or a caption: {left_out}")
    keys = [rows.keys[row] for row in used]
    parts = [] if args.features == "text" else [rows.values[used]]
    if with_texts:
        parts.append(_text_features(loaded, [captions[key] for key in keys], args.batch_size))
    return by_name(keys, captions)._replace(features_ND=np.concatenate(parts, axis=1))


def _text_features(
    loaded: LoadedModel, captions: Sequence[Sequence[str]], batch_size: int
) -> np.ndarray:
    """The mean embedding of each image's captions, of length 1: [N, D]."""
    distinct, row_E = np.unique(np.concatenate(captions), return_inverse=True)
    embedded_ED = loaded.embed_texts(distinct.tolist(), batch_size)[row_E]
    starts = np.cumsum([0, *(len(own) for own in captions[:-1])])
    sum_ND = np.add.reduceat(embedded_ED, starts, axis=0)
    return sum_ND / np.linalg.norm(sum_ND, axis=1, keepdims=True)


def cosines(images: BagImages, bags: Sequence[Sequence[int]]) -> dict[str, Any]:
    """How alike the images of a bag are, the mean cosine of its pairs, over all bags."""
    if images.features_ND is None:
        return {}
    unit_ND = images.features_ND / np.linalg.norm(images.features_ND, axis=1, keepdims=True)
    size = len(bags[0])
    length_G = np.array([(unit_ND[bag].sum(0) ** 2).sum() for bag in bags])  # all pairs' sum
    cosine_G = np.sort((length_G - size) / (size * (size - 1)))
    places = {"tightest": -1, "median": len(bags) // 2, "loosest": 0}
    return {"cosine": {name: round(float(cosine_G[i]), 4) for name, i in places.items()}}
