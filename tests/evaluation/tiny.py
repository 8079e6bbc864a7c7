"""Small labelled pictures and a small CoCa, for the tests of what is measured image by image."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from capjax.data.images import ImagePreprocessing
from capjax.data.records import CorruptRecord, Example
from capjax.data.tokenizer import Tokenizer
from capjax.dims import Params
from capjax.mesh import MeshShape, make_mesh
from capjax.models.coca import CoCa, CoCaConfig
from capjax.models.towers import Towers

PREPROCESSING = ImagePreprocessing(image_size=8)
BROKEN, LOST, UNLABELLED = 4, 9, 6  # no image, no record, no label
ONE = make_mesh(MeshShape(), devices=jax.devices()[:1])
EIGHT = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))


class LabelledImages:
    """Pictures of noise, of the classes 0, 1 and 2 in turn, whose brightness is the class."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index) -> Example:
        if index == LOST:
            raise CorruptRecord("here", index, "lost")
        label = (index + self.seed) % 3
        rng = np.random.default_rng([self.seed, index])
        pixels = (rng.integers(0, 100, (8, 8, 3)) + 60 * label).astype(np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "PNG")
        image = b"none" if index == BROKEN else content.getvalue()
        key = f"{'ab'[self.seed % 2]}/{index:03d}"
        return Example(key, image, label=None if index == UNLABELLED else label)


def readable(count: int) -> list[int]:
    return [index for index in range(count) if index not in (BROKEN, LOST)]


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a dark thing", "a grey thing", "the bright thing of them"], 290)


@functools.cache
def towers() -> Towers:
    """A CoCa, which writes captions and embeds images and texts."""
    return Towers(
        coca=CoCa(
            CoCaConfig(
                image_size=8,
                patch_size=4,
                width=16,
                depth=1,
                num_heads=2,
                mlp_dim=16,
                decoder_depth=2,
                caption_queries=3,
                vocab_size=tokenizer().vocab_size,
                text_length=8,
            )
        )
    )


@functools.cache
def params() -> Params:
    """Neither the head nor a bias is zero."""
    rng = np.random.default_rng(1)

    def draw(path, x):
        is_scale = jax.tree_util.keystr(path).endswith("scale']")
        return jnp.asarray(rng.normal(is_scale, 0.25, x.shape), jnp.float32)

    return jax.tree.map_with_path(draw, towers().abstract_params())
