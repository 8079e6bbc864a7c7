"""A checkpoint, ready to use: `capjax.load(path).caption(images)`, `.embed_images(images)`."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from capjax.checkpoint import find_steps, load_params, step_directory
from capjax.checkpoint.reading import warn
from capjax.data.captions import clean_text
from capjax.data.decode import ImageError
from capjax.data.images import ImagePreprocessing
from capjax.data.tokenizer import Tokenizer
from capjax.decoding.generate import Generated, check_options, generate
from capjax.decoding.inputs import ImageLike, compiled_size, pad_rows, read_ahead, to_pixels
from capjax.decoding.score import score
from capjax.dims import Array, Params
from capjax.errors import UserError
from capjax.mesh import num_batch_shards, place_batch, place_tree
from capjax.models.captioner import Captioner
from capjax.models.coca import CoCa
from capjax.models.towers import Towers, towers_from_dict
from capjax.models.two_towers import TwoTowers

MAX_SEED = 2**32 - 1

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
    """A trained model with what it needs to be used: tokenizer and image preprocessing.

    `params` is a plain nested dict of arrays and `towers` the models that read it. Captions need a
    captioner or CoCa, embeddings two towers or CoCa. Images are uint8 arrays [H, W, 3], PIL images,
    paths or encoded bytes, in any mix. Batches are padded to one size, so that each method compiles
    once for it. With a `mesh`, its devices share the rows.
    """

    towers: Towers
    params: Params
    stored_tokenizer: Tokenizer | None  # converted weights may come without
    preprocessing: ImagePreprocessing
    config: dict[str, Any]  # the run's resolved config
    step: int
    mesh: Mesh | None = None

    def on_mesh(self, mesh: Mesh) -> "LoadedModel":
        """The same, its parameters laid out on `mesh`, whose devices share the rows."""
        params = place_tree(mesh, self.params, self.towers.param_specs())
        return dataclasses.replace(self, params=params, mesh=mesh)

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises `UserError` where the checkpoint has none."""
        if self.stored_tokenizer is None:
            raise UserError(
                "this checkpoint was converted without a tokenizer; convert it again with "
                "--tokenizer=FILE.model to read and write captions"
            )
        return self.stored_tokenizer

    @property
    def model(self) -> Captioner | CoCa:
        """The one that writes captions. Raises `UserError` where there is none."""
        if self.towers.generator is None:
            raise UserError(
                "this checkpoint holds contrastive towers and no caption decoder; it embeds images "
                "and texts (embed_images, embed_texts), or take a checkpoint of a captioner"
            )
        return self.towers.generator

    @property
    def embedder(self) -> TwoTowers | CoCa:
        """The one with images and texts in one space. Raises `UserError` where there is none."""
        if self.towers.embedder is None:
            raise UserError(
                "this checkpoint holds a captioner and no contrastive towers; encode_image gives "
                "its image features, score its captions' likelihood"
            )
        return self.towers.embedder

    def caption(
        self,
        images: Sequence[ImageLike],
        temperature: float = 0.0,
        seed: int = 0,
        max_length: int | None = None,
        batch_size: int = 32,
    ) -> list[str]:
        """One caption an image. Raises `UserError` naming the first image that cannot be read.

        Temperature 0 is greedy; above it, a draw depends on the seed and on the image's place in
        `images`, not on the batch. `max_length` counts tokens, the end of the caption included.
        """
        records = self.caption_records(images, temperature, seed, max_length, batch_size)
        for record in records:
            if "error" in record:
                raise UserError(f"images[{record['key']}] cannot be read: {record['error']}")
        return [record["caption"] for record in records]

    def caption_records(
        self,
        images: Sequence[ImageLike],
        temperature: float = 0.0,
        seed: int = 0,
        max_length: int | None = None,
        batch_size: int = 32,
    ) -> list[Record]:
        """As `caption`, with all that `stream` says of each image; the keys are "0", "1", ..."""

        def read(index: int) -> tuple[Record, np.ndarray | ImageError]:
            return {"key": str(index)}, self.pixels(images[index])

        return list(
            self.stream(
                read_ahead(read, range(len(images)), ahead=2 * batch_size),
                temperature=temperature,
                seed=seed,
                max_length=max_length,
                batch_size=batch_size,
            )
        )

    def stream(
        self,
        rows: Iterable[tuple[Record, np.ndarray | ImageError]],
        *,
        temperature: float = 0.0,
        seed: int = 0,
        max_length: int | None = None,
        batch_size: int = 32,
    ) -> Iterator[Record]:
        """Completes the records of any number of images, in order, as the captions are made.

        `rows` are the start of a record (its `key`, and what else belongs there) and what `pixels`
        gave for the image. Added are `caption`, `logprob` (summed over the tokens, of the tempered
        distribution), `num_tokens` (the end of the caption included), `guidance_scale` (1) and
        `seed`; or only `error`, where the image cannot be read. Raises `UserError` for options that
        are wrong, at once.
        """
        max_length = self.model.config.text_length if max_length is None else max_length
        check_options(self.model, max_length, temperature)
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: expected at least 1")
        if not 0 <= seed <= MAX_SEED:
            raise UserError(f"seed={seed}: expected 0 to {MAX_SEED}")
        run = functools.partial(
            generate,
            self.model,
            self.params,
            max_length=max_length,
            temperature=temperature,
            key=jax.random.key(seed),
        )
        return self._stream(run, rows, batch_size, seed)

    def _stream(self, run: Callable, rows: Iterable, batch_size: int, seed: int):
        under_way = None  # the batch on the device while the next one is read
        for chunk, start, size in self._chunks(rows, batch_size):
            made = self._start_batch(run, [pixels for _, pixels in chunk], start, size)
            if under_way is not None:
                yield from self._records(*under_way, seed)
            under_way = (chunk, made)
        if under_way is not None:
            yield from self._records(*under_way, seed)

    def score(
        self, images: Sequence[ImageLike], captions: Sequence[str], batch_size: int = 32
    ) -> np.ndarray:
        """float32 [N]: log p(captions[i] | images[i]), summed over the tokens and the end.

        Captions are lower-cased where those of training were, and cut at the model's text length.
        Raises `UserError` for lists of different lengths and for an image that cannot be read.
        """
        if len(images) != len(captions):
            raise UserError(f"{len(images)} images for {len(captions)} captions: give one each")
        labels = self._encode(captions, self.model.config.text_length)
        return self._map_images(
            lambda batch: score(self.model, self.params, batch["image"], batch["labels"]),
            images,
            batch_size,
            labels=labels,
        )

    def encode_image(
        self, images: Sequence[ImageLike], patches: bool = False, batch_size: int = 32
    ) -> np.ndarray:
        """float32 [N, D]: the mean over the encoder's patches; or all of them, [N, P, D]."""
        return self._map_images(
            lambda batch: _encode(self.towers, self.params, batch["image"], patches),
            images,
            batch_size,
        )

    def embed_images(self, images: Sequence[ImageLike], batch_size: int = 32) -> np.ndarray:
        """float32 [N, D] of length 1, comparable by dot product with `embed_texts`."""
        return self._map_images(
            lambda batch: _embed_images(self.embedder, self.params, batch["image"]),
            images,
            batch_size,
        )

    def embed_texts(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """float32 [N, D] of length 1. Texts are lower-cased where training did so, and cut."""
        if not len(texts) or batch_size < 1:
            raise UserError(f"{len(texts)} texts, batch_size={batch_size}: expected at least 1")
        embedder = self.embedder
        tokens = self._encode(texts, embedder.config.text_length)
        outputs = []
        for chunk, _, size in self._chunks(tokens, batch_size):
            made = self._on_device(
                lambda batch: _embed_texts(embedder, self.params, batch["tokens"]),
                {"tokens": np.stack(chunk)},
                size,
            )
            outputs.append(jax.device_get(made)[: len(chunk)])
        return np.concatenate(outputs)

    def _encode(self, texts: Sequence[str], length: int) -> np.ndarray:
        lower = self.config.get("captions", {}).get("lower", False)
        return self.tokenizer.encode_batch([clean_text(text, lower) for text in texts], length)

    def pixels(self, image: ImageLike) -> np.ndarray | ImageError:
        """uint8 [size, size, 3], or why the image cannot be read."""
        try:
            return to_pixels(image, self.preprocessing)
        except ImageError as error:
            return error

    def _start_batch(self, run, pixels: list, start: int, size: int) -> Generated | None:
        """Sends a batch to the device; None where no image of it could be read."""
        mask = np.array([isinstance(image, np.ndarray) for image in pixels])
        if not mask.any():
            return None
        blank = np.zeros_like(pixels[int(mask.argmax())])
        images = np.stack([image if ok else blank for image, ok in zip(pixels, mask, strict=True)])
        index = np.arange(start, start + len(pixels), dtype=np.int32)
        return self._on_device(
            lambda batch: run(batch["image"], index_B=batch["index"], mask_B=batch["mask"]),
            {"image": images, "index": index, "mask": mask},
            size,
        )

    def _records(self, chunk: list, made: Generated | None, seed: int) -> Iterator[Record]:
        made = jax.device_get(made)
        for row, (about, pixels) in enumerate(chunk):
            if isinstance(pixels, ImageError):
                yield {**about, "error": str(pixels)}
            elif made is not None:
                yield {
                    **about,
                    "caption": self.tokenizer.decode(made.tokens_BL[row].tolist()),
                    "logprob": float(made.logprobs_BL[row].sum()),
                    "num_tokens": int(made.num_tokens_B[row]),
                    "guidance_scale": 1.0,
                    "seed": seed,
                }

    def _map_images(
        self,
        run: Callable[[dict[str, Array]], Array],
        images: Sequence[ImageLike],
        batch_size: int,
        **columns: np.ndarray,
    ) -> np.ndarray:
        """The rows `run` makes of all images and of the `columns` beside them."""
        if not len(images) or batch_size < 1:
            raise UserError(f"{len(images)} images, batch_size={batch_size}: expected at least 1")
        outputs = []
        rows = read_ahead(self.pixels, images, ahead=2 * batch_size)
        for chunk, start, size in self._chunks(rows, batch_size):
            for index, pixels in enumerate(chunk, start):
                if isinstance(pixels, ImageError):
                    raise UserError(f"images[{index}] cannot be read: {pixels}")
            beside = {name: x[start : start + len(chunk)] for name, x in columns.items()}
            made = self._on_device(run, {"image": np.stack(chunk), **beside}, size)
            outputs.append(jax.device_get(made)[: len(chunk)])
        return np.concatenate(outputs)

    def _chunks(self, rows: Iterable, batch_size: int) -> Iterator[tuple[list, int, int]]:
        """(rows, index of the first, rows to pad to): all padded alike, as the first needs it."""
        shards = num_batch_shards(self.mesh) if self.mesh is not None else 1
        rows, start, size = iter(rows), 0, 0
        while chunk := list(itertools.islice(rows, batch_size)):
            size = size or compiled_size(len(chunk), batch_size, shards)
            yield chunk, start, size
            start += len(chunk)

    def _on_device(self, run: Callable, rows: dict[str, np.ndarray], size: int) -> Any:
        """`run` of the rows, padded to `size` and split over the mesh if there is one."""
        padded = {name: pad_rows(x, size) for name, x in rows.items()}
        if self.mesh is None:
            return run({name: jnp.asarray(x) for name, x in padded.items()})
        with jax.set_mesh(self.mesh):
            return run(place_batch(self.mesh, padded))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _encode(towers: Towers, params: Params, images_BHWC: Array, patches: bool) -> Array:
    patches_BPD = towers.encode_image(params, images_BHWC).astype(jnp.float32)
    return patches_BPD if patches else jnp.mean(patches_BPD, axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _embed_images(embedder: TwoTowers | CoCa, params: Params, images_BHWC: Array) -> Array:
    return embedder.embed_image(params, embedder.encode(params, images_BHWC))


@functools.partial(jax.jit, static_argnums=0)
def _embed_texts(embedder: TwoTowers | CoCa, params: Params, tokens_TL: Array) -> Array:
    return embedder.embed_text(params, tokens_TL)


def load(path: str | os.PathLike, step: int | None = None, mesh: Mesh | None = None) -> LoadedModel:
    """The model of a run's newest checkpoint, or of `step`.

    `path` is a workdir, its `checkpoints` directory, or one checkpoint in it. Without a mesh all
    runs on the first device. Raises `UserError` where there is no such checkpoint, or none whole.
    """
    if step is not None:
        directory, steps = find_steps(path)
        if step not in steps:
            raise UserError(f"step={step}: {path} has the steps {steps}; name one of them")
        path = step_directory(directory, step)
    loaded = load_params(path)
    config = loaded.metadata["config"]
    try:
        # Trained with an attention that this machine may lack; all of them compute the same.
        kinds = {kind: fields | {"attention": "auto"} for kind, fields in config["model"].items()}
        towers = towers_from_dict(kinds)
        preprocessing = ImagePreprocessing(**loaded.metadata["preprocessing"])
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"the checkpoint {path} does not describe a model of this version of capjax "
            f"({error}); it was written by capjax {loaded.metadata['versions'].get('capjax')}"
        ) from error
    if other := preprocessing.other_pixels(loaded.metadata.get("pixels_by", {})):
        warn(f"{path}: {other}")
    model = LoadedModel(
        towers=towers,
        params=loaded.params,
        stored_tokenizer=(
            Tokenizer.from_bytes(loaded.tokenizer_model) if loaded.tokenizer_model else None
        ),
        preprocessing=preprocessing,
        config=config,
        step=loaded.step,
    )
    return model if mesh is None else model.on_mesh(mesh)
