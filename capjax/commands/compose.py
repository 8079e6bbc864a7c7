"""A checkpoint on a test of composition: which captions it finds true of which images."""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from capjax.data.captions import clean_text
from capjax.data.compositional import READERS, Item, Picture, read_items, read_picture
from capjax.data.decode import ImageError
from capjax.data.sources import Source, open_source
from capjax.data.swaps import SPLITS, swap_items, swap_pairs
from capjax.data.tokenizer import PAD_ID
from capjax.decoding.generate import generate
from capjax.decoding.inputs import read_ahead
from capjax.decoding.loaded_model import LoadedModel
from capjax.decoding.options import GREEDY
from capjax.decoding.prefix import forced, prefix_ids
from capjax.dims import Array
from capjax.errors import UserError, did_you_mean
from capjax.evaluation.compositional import measure_items, score_rows, score_without_image
from capjax.evaluation.every_row import map_rows
from capjax.evaluation.measured import Measured
from capjax.evaluation.self_retrieval import among_candidates
from capjax.mesh import MeshShape, make_mesh

BUILT = {"emoji": swap_items, "emoji_pairs": swap_pairs}


def open_test(name: str, path: str = "", images: str = "") -> list[Item]:
    """The items of a test.

    "emoji" and "emoji_pairs" are built from the embedded corpus: from its held-out splits, or from
    the source `path`. The others are `data.compositional.READERS`, of a file `path` and a directory
    of `images`. Raises `UserError` where there is no such test, or nothing of it in the source.
    """
    names = (*BUILT, *READERS)
    if name not in names:
        raise UserError(
            f"no test {name!r}: expected one of {', '.join(names)}{did_you_mean(name, names)}"
        )
    if name not in BUILT:
        items = read_items(name, path, images)
        try:
            read_picture(items[0].images[0])  # now, not when a run has come to its evaluation
        except (IndexError, ImageError) as error:
            raise UserError(f"{name}: no image {path} speaks of in {images!r}: {error}") from error
        return items
    sources = [path] if path else [f"emoji:{split}" for split in SPLITS]
    items = [item for source in sources for item in BUILT[name](_examples(open_source(source)))]
    if not items:
        raise UserError(f"{path}: no caption of its examples can be swapped; try emoji:composition")
    return items


def compose(
    model: LoadedModel,
    name: str,
    items: Sequence[Item],
    *,
    alpha: float = 1.0,
    batch_size: int = 32,
) -> Measured:
    """The figures of a test (`measure_items`), by everything that this model can score with.

    A captioner gives three side by side: the log-likelihood of captions, that minus `alpha` times
    the log-likelihood without image, and the latter alone; and the mean confidence in their tokens.
    Towers give a cosine. Captions are lower-cased and cut as in training. Every process returns the
    same. Raises `UserError` for an image that cannot be read.
    """
    mesh = model.mesh or make_mesh(MeshShape(), devices=jax.local_devices()[:1])
    model = model if model.mesh else model.on_mesh(mesh)
    generator, embedder = model.towers.generator, model.towers.embedder
    if not (generator or embedder):
        raise UserError(f"{name}: an image encoder alone scores no captions")
    columns = {
        column: _encode(model, items, reader.config.text_length)
        for column, reader in (("labels", generator), ("texts", embedder))
        if reader is not None
    }
    rows = _score_images(model, items, columns, mesh, batch_size)
    firsts = np.cumsum([0, *(len(item.images) for item in items)])[:-1]
    scores: dict[str, list[np.ndarray]] = {
        scorer: [
            values_BS[first : first + len(item.images), : len(item.captions)]
            for item, first in zip(items, firsts, strict=True)
        ]
        for scorer, values_BS in rows.items()
    }
    if generator is not None and model.has_null_image:
        # Once an item, not once an image: what does not see the images cannot tell them apart.
        alone = functools.partial(score_without_image, generator, model.params)
        priors_NS = map_rows(
            lambda rows: alone(rows["labels"]),
            {"labels": columns["labels"]},
            mesh=mesh,
            batch_size=batch_size,
        )
        scores["null_image"] = [
            np.tile(prior_S[: len(item.captions)], (len(item.images), 1))
            for prior_S, item in zip(priors_NS, items, strict=True)
        ]
        scores["minus_prior"] = [
            likelihood_IC - alpha * prior_IC
            for likelihood_IC, prior_IC in zip(
                scores["likelihood"], scores["null_image"], strict=True
            )
        ]
    measured = measure_items(name, items, scores)
    return measured._replace(skipped=_skipped(model, name), notes={name: {"alpha": alpha}})


def judge_frames(
    judge: LoadedModel, model: LoadedModel, items: Sequence[Item], *, batch_size: int = 32
) -> Measured:
    """ImageCoDe for a captioner: a judge looks for what was captioned among the images of its set.

    Args:
      judge: two towers, on this process's devices; it reads captions without a prompt.
      items: of `read_imagecode`, in each of which one image is true. It is captioned once, however
        many descriptions there are of it.

    Returns what `among_candidates` does. Every process returns the same. Raises `UserError` for an
    image that cannot be read, and for sets of different sizes.
    """
    mesh = model.mesh or make_mesh(MeshShape(), devices=jax.local_devices()[:1])
    model = model if model.mesh else model.on_mesh(mesh)
    targets: dict[Picture, tuple[Item, int]] = {}
    for item in items:
        target = item.truth.index((True,))
        targets.setdefault(item.images[target], (item, target))
    chosen = [item for item, _ in targets.values()]
    sizes = {len(item.images) for item in chosen}
    if len(sizes) > 1:
        raise UserError(f"sets of {sorted(sizes)} images: expected as many in each")
    target_G = np.array([target for _, target in targets.values()])
    texts = _captions(model, chosen, list(enumerate(target_G.tolist())), mesh, batch_size)
    with jax.set_mesh(judge.mesh) if judge.mesh else contextlib.nullcontext():  # not the model's
        frames = [picture.parts[0] for item in chosen for picture in item.images]
        frames_GJD = judge.embed_images(frames, batch_size).reshape(len(chosen), *sizes, -1)
        caption_GD = judge.embed_texts(texts, batch_size)
    return among_candidates(caption_GD, frames_GJD, target_G, [item.key for item in chosen])


def _captions(
    model: LoadedModel,
    items: Sequence[Item],
    places: Sequence[tuple[int, int]],
    mesh: Mesh,
    batch_size: int,
) -> list[str]:
    """Greedy ones, of the images at `places`: number of the item, number of its image."""
    prefix = prefix_ids(model)

    def run(rows: Mapping[str, Array]) -> Array:
        made = generate(
            model.model,
            model.params,
            rows["image"],
            GREEDY,
            index_B=rows["index"],
            mask_B=rows["is_image"],
            forced_BL=forced(prefix, len(rows["image"])),
        )
        return made.tokens_BSL[:, 0, len(prefix) :]

    texts = []
    for start, pixels in _pixels(model, items, places, batch_size):
        rows = {
            "image": np.stack(pixels),
            "index": start + np.arange(len(pixels), dtype=np.int32),
            "is_image": np.ones(len(pixels), bool),
        }
        tokens_NL = map_rows(run, rows, mesh=mesh, batch_size=batch_size)
        texts += [model.tokenizer.decode(tokens_L.tolist()) for tokens_L in tokens_NL]
    return texts


def _score_images(
    model: LoadedModel,
    items: Sequence[Item],
    columns: Mapping[str, np.ndarray],
    mesh: Mesh,
    batch_size: int,
) -> dict[str, np.ndarray]:
    """`score_rows` of every image of every item, one item's images after another's."""
    places = [
        (number, image) for number, item in enumerate(items) for image in range(len(item.images))
    ]
    towers = model.towers
    run = functools.partial(score_rows, towers.generator, towers.embedder, model.params)
    parts = []
    for start, pixels in _pixels(model, items, places, batch_size):
        of = [number for number, _ in places[start : start + len(pixels)]]
        rows = {"image": np.stack(pixels)} | {column: x[of] for column, x in columns.items()}
        parts.append(map_rows(run, rows, mesh=mesh, batch_size=batch_size))
    return {scorer: np.concatenate([part[scorer] for part in parts]) for scorer in parts[0]}


def _skipped(model: LoadedModel, name: str) -> dict[str, str]:
    skipped = {}
    if model.towers.generator is None:
        skipped[f"{name}_likelihood"] = "the checkpoint holds no caption decoder"
    elif not model.has_null_image:
        reason = "trained without image_dropout, so that it knows no captions without image"
        skipped |= {f"{name}_minus_prior": reason, f"{name}_null_image": reason}
    if model.towers.embedder is None:
        skipped[f"{name}_towers"] = "the checkpoint holds no contrastive towers"
    return skipped


def _pixels(
    model: LoadedModel, items: Sequence[Item], places: Sequence[tuple[int, int]], batch_size: int
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(number of the first, pixels) of so many images at a time."""

    def read(place: tuple[int, int]) -> np.ndarray | ImageError:
        try:
            return model.pixels(read_picture(items[place[0]].images[place[1]]))
        except ImageError as error:
            return error

    waiting: list[np.ndarray] = []
    for number, pixels in enumerate(read_ahead(read, places, ahead=2 * batch_size)):
        if isinstance(pixels, ImageError):
            key = items[places[number][0]].key
            raise UserError(f"image {places[number][1]} of item {key} cannot be read: {pixels}")
        waiting.append(pixels)
        if len(waiting) == batch_size or number == len(places) - 1:
            yield number + 1 - len(waiting), waiting
            waiting = []


def _encode(model: LoadedModel, items: Sequence[Item], length: int) -> np.ndarray:
    """int32 [N, S, length]: the captions of each item, and padding up to the most of any."""
    lower = model.config.get("captions", {}).get("lower", False)
    most = max(len(item.captions) for item in items)
    ids_NSL = np.full((len(items), most, length), PAD_ID, np.int32)
    for ids_SL, item in zip(ids_NSL, items, strict=True):
        texts = [clean_text(text, lower) for text in item.captions]
        ids_SL[: len(texts)] = model.tokenizer.encode_batch(texts, length)
    return ids_NSL


def _examples(source: Source) -> Iterable:
    return (source[index] for index in range(len(source)))
