"""Where a checkpoint's captioner looks for each word of given captions."""

import functools
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from capjax.data.decode import ImageError
from capjax.data.sources import open_source
from capjax.data.tokenizer import EOS_ID, PAD_ID
from capjax.decoding.inputs import ImageLike, read_ahead
from capjax.decoding.loaded_model import LoadedModel
from capjax.dims import Array, Batch, Float, Params
from capjax.errors import UserError
from capjax.evaluation.attention import WordMaps, word_maps, write_word_maps
from capjax.models.attention_maps import attention_maps
from capjax.models.captioner import Captioner
from capjax.models.coca import CoCa


def write_attention(
    model: LoadedModel, root: epath.Path, split: str, *, layer: int = -1, max_images: int = 1000
) -> epath.Path:
    """`attention/<split>.json` of a workdir, from its `captions/<split>.jsonl`; returns the path.

    At most `max_images`, evenly spread. For one process. Raises as `map_words`, and where there are
    no captions of the split or the file cannot be written.
    """
    path = root / "captions" / f"{split}.jsonl"
    if not path.exists():
        raise UserError(f"{path}: no captions of the split {split!r}; run `capjax evaluate` first")
    records = [json.loads(line) for line in path.read_text().split("\n") if line]
    count = min(len(records), max_images)
    records = [records[place * len(records) // count] for place in range(count)]
    sources = {name: open_source(name) for name in {record["source"] for record in records}}
    found = map_words(
        model,
        [record["key"] for record in records],
        [sources[record["source"]][record["index"]].image for record in records],
        [record["caption"] for record in records],
        layer=layer,
    )
    output = root / "attention" / f"{split}.json"
    try:
        output.parent.mkdir(exist_ok=True)
        write_word_maps(output, found)
    except OSError as error:
        raise UserError(f"{output}: {error.strerror or error}; free some space") from error
    return output


def map_words(
    model: LoadedModel,
    keys: Sequence[str],
    images: Sequence[ImageLike],
    captions: Sequence[str],
    *,
    layer: int = -1,
    batch_size: int = 32,
) -> dict[str, WordMaps]:
    """By key, the words of each caption over the patches of its image, for `write_word_maps`.

    The weights are those with which the model would write the caption, in one of the layers that
    read the image (the last by default), the mean over its heads. Raises `UserError` for an image
    that cannot be read, a layer that is not there, and lists of different lengths.
    """
    if not len(keys) == len(images) == len(captions):
        raise UserError(
            f"{len(keys)} keys, {len(images)} images, {len(captions)} captions: give one each"
        )
    config = model.model.config
    side = config.image_size // config.patch_size
    ids = [model.token_ids(caption)[: config.text_length - 1] for caption in captions]
    found: dict[str, WordMaps] = {}
    pixels = read_ahead(model.pixels, images, ahead=2 * batch_size)
    for chunk, start, size in model.chunks(pixels, batch_size):
        labels_BL = np.full((len(chunk), config.text_length), PAD_ID, np.int32)
        for row, image in enumerate(chunk):
            if isinstance(image, ImageError):
                raise UserError(f"{keys[start + row]}: the image cannot be read: {image}")
            tokens = [*ids[start + row], EOS_ID]
            labels_BL[row, : len(tokens)] = tokens
        rows = {"image": np.stack(chunk), "labels": labels_BL}
        run = functools.partial(_patch_weights, model.model, layer, model.params)
        maps_BLP = jax.device_get(model.on_device(run, rows, size))
        for row in range(len(chunk)):
            tokens = ids[start + row]
            maps = word_maps(model.tokenizer, tokens, maps_BLP[row], (side, side))
            found[keys[start + row]] = maps
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _patch_weights(
    model: Captioner | CoCa, layer: int, params: Params, batch: Batch
) -> Float[Array, "B L P"]:
    """The mean over heads, of the patches alone."""
    maps_BXNLP = attention_maps(model, params, batch["image"], batch["labels"])
    num_layers = maps_BXNLP.shape[1]
    if not -num_layers <= layer < num_layers:
        raise UserError(f"layer={layer}: {num_layers} layers read the image, -1 is the last")
    return jnp.mean(maps_BXNLP[:, layer], axis=1)[..., : model.config.num_patches]
