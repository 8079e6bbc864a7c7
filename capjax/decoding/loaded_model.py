"""A trained model, ready to use: captions, scores, classes, features and embeddings."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from capjax.data.captions import clean_text
from capjax.data.decode import ImageError
from capjax.data.images import ImagePreprocessing
from capjax.data.tokenizer import Tokenizer
from capjax.decoding.classify import class_scores, class_texts, score_tree
from capjax.decoding.generate import LanguageGuidance
from capjax.decoding.inputs import ImageLike, compiled_size, pad_rows, read_ahead, to_pixels
from capjax.decoding.options import GREEDY, DecodingOptions
from capjax.decoding.score import mean, score_priors, score_tokens, total
from capjax.decoding.stream import CaptionStream, Record
from capjax.decoding.token_tree import build_tree
from capjax.decoding.without_image import WithoutImage
from capjax.dims import Array, Params
from capjax.errors import UserError
from capjax.mesh import num_batch_shards, place_batch, place_tree
from capjax.models.captioner import Captioner
from capjax.models.coca import CoCa
from capjax.models.towers import Towers
from capjax.models.two_towers import TwoTowers


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
    def has_null_image(self) -> bool:
        """Whether it was trained without image at times, which guidance and priors build on."""
        objectives = self.config.get("objective", {}).values()
        return any(x.get("weight") and x.get("image_dropout") for x in objectives)

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
        options: DecodingOptions = GREEDY,
        *,
        seed: int = 0,
        batch_size: int = 32,
        **fields: Any,
    ) -> list[str]:
        """One caption an image. Raises `UserError` naming the first image that cannot be read.

        `fields` are those of `DecodingOptions`, which go before those of `options`, and what
        `stream` takes beside them. For several captions an image see `caption_records`.
        """
        records = self.caption_records(images, options, seed=seed, batch_size=batch_size, **fields)
        for record in records:
            if "error" in record:
                raise UserError(f"images[{record['key']}] cannot be read: {record['error']}")
        return [record["caption"] for record in records]

    def caption_records(
        self,
        images: Sequence[ImageLike],
        options: DecodingOptions = GREEDY,
        *,
        seed: int = 0,
        batch_size: int = 32,
        prefix: str | Sequence[str] | None = None,
        contrast: ImageLike | None = None,
        language: LanguageGuidance | None = None,
        **fields: Any,
    ) -> list[Record]:
        """As `caption`, with all that `stream` says of each image; the keys are "0", "1", ...

        `prefix` may be a list, one text an image.
        """
        if prefix is not None and not isinstance(prefix, str) and len(prefix) != len(images):
            raise UserError(f"{len(prefix)} prefixes for {len(images)} images: give one each")

        def read(index: int) -> tuple[Record, np.ndarray | ImageError]:
            about = {"key": str(index)}
            if prefix is not None and not isinstance(prefix, str):
                about["prefix"] = prefix[index]
            return about, self.pixels(images[index])

        return list(
            self.stream(
                read_ahead(read, range(len(images)), ahead=2 * batch_size),
                dataclasses.replace(options, **fields),
                seed=seed,
                batch_size=batch_size,
                prefix=prefix if prefix is None or isinstance(prefix, str) else "",
                contrast=contrast,
                language=language,
            )
        )

    def stream(
        self,
        rows: Iterable[tuple[Record, np.ndarray | ImageError]],
        options: DecodingOptions = GREEDY,
        *,
        seed: int = 0,
        batch_size: int = 32,
        prefix: str | None = None,
        contrast: ImageLike | None = None,
        language: LanguageGuidance | None = None,
        all_full: bool = False,
    ) -> Iterator[Record]:
        """Completes the records of any number of images, in order, as the captions are made.

        `rows` are the start of a record (its `key`, and what else belongs there) and what `pixels`
        gave for the image. Added are `caption` (a draw, or the best of the beams), `logprob`
        (summed over the tokens, of the guided, tempered distribution), `num_tokens` (the end and
        the prefix included), `finish` ("end", "stop", or "length" where it was cut),
        `guidance_scale`, `seed`, and with several captions an image `captions`, a list of objects
        with the first four of these fields. Or only `error`, where the image cannot be read or the
        prefix does not fit. Draws depend on the image's place among the rows, or on the record's
        own field `index`.

        Args:
          prefix: what captions begin with (and scores leave out); a record's own field `prefix`
            goes before it, unless this is None.
          contrast: an image that guidance leads away from, in place of no image.
          language: see `LanguageGuidance`; its tokenizer must be the captioner's.
          all_full: few rows too are filled up to `batch_size`, so that one program serves all.

        Raises `UserError` for options that are wrong, at once.
        """
        other = None
        if contrast is not None:
            other = self.pixels(contrast)
            if isinstance(other, ImageError):
                raise UserError(f"contrast cannot be read: {other}")
        return CaptionStream(
            self, options, seed, batch_size, prefix, other, language, all_full
        ).records(rows)

    def score(
        self,
        images: Sequence[ImageLike],
        captions: Sequence[str],
        *,
        alpha: float = 0.0,
        normalize: bool = False,
        batch_size: int = 32,
    ) -> np.ndarray:
        """float32 [N]: log p(captions[i] | images[i]), summed over the tokens and the end.

        Captions are lower-cased where those of training were, and cut at the model's text length.
        Off goes `alpha` times their log-probability without image (see `has_null_image`), and with
        `normalize` the result is divided by the number of tokens. Raises `UserError` for lists of
        different lengths and for an image that cannot be read.
        """
        if len(images) != len(captions):
            raise UserError(f"{len(images)} images for {len(captions)} captions: give one each")
        labels = self._encode(captions, self.model.config.text_length)
        logprobs = self._map_images(
            lambda batch: score_tokens(
                self.model, self.params, batch["image"], batch["labels"][:, None]
            ),
            images,
            batch_size,
            labels=labels,
        )[:, 0]
        priors = self._priors(labels) if alpha else 0.0
        return (
            mean(logprobs, labels, priors, alpha) if normalize else total(logprobs, priors, alpha)
        )

    def classify(
        self,
        images: Sequence[ImageLike],
        class_names: Sequence[str],
        templates: Sequence[str] = ("{}",),
        *,
        alpha: float = 0.0,
        batch_size: int = 8,
    ) -> np.ndarray:
        """float32 [N, classes]: how probable each class's texts are as the image's caption.

        A class's texts are the templates with its name in the place of "{}"; their probabilities
        are added up. `alpha` as in `score`. Each image and each shared beginning of texts is read
        once. Raises `UserError` for a template without "{}" and an image that cannot be read.
        """
        texts = class_texts(class_names, templates)
        labels = self._encode(texts, self.model.config.text_length)
        tree = build_tree(labels)
        logprobs = self._map_images(
            lambda batch: score_tree(self.model, self.params, batch["image"], tree),
            images,
            batch_size,
        )
        priors = total(self._priors(labels)) if alpha else 0.0
        return class_scores(total(logprobs), len(templates), priors, alpha)

    def as_language_model(
        self, tokenizer: Tokenizer, alpha: float = 1.0, beta: float = 1.0
    ) -> LanguageGuidance:
        """What this model writes without image, to guide a captioner with this tokenizer.

        Raises `UserError` unless it is this model's own: only equal ids can be weighed.
        """
        if tokenizer != self.tokenizer:
            raise UserError(
                f"the captioner's {tokenizer} is not {self.tokenizer} of the model that is to "
                "guide it; train both with the same data.tokenizer.path"
            )
        return LanguageGuidance(WithoutImage(self.model), self.params, alpha, beta)

    def _priors(self, labels: np.ndarray) -> np.ndarray:
        """The tokens' log-probabilities without image."""
        if self.mesh is None:
            return score_priors(self.model, self.params, labels)
        with jax.set_mesh(self.mesh):
            shards = num_batch_shards(self.mesh)
            return score_priors(self.model, self.params, labels, shards)

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
        return self._map_texts(_embed_texts, texts, batch_size)

    def text_features(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """float32 [N, D]: what the towers make of texts before `embed_texts` projects it."""
        return self._map_texts(_text_features, texts, batch_size)

    def _map_texts(
        self,
        run: Callable[[TwoTowers | CoCa, Params, Array], Array],
        texts: Sequence[str],
        batch_size: int,
    ) -> np.ndarray:
        if not len(texts) or batch_size < 1:
            raise UserError(f"{len(texts)} texts, batch_size={batch_size}: expected at least 1")
        embedder, tokens = self.embedder, self.text_tokens(texts)
        outputs = []
        for chunk, _, size in self.chunks(tokens, batch_size):
            made = self.on_device(
                lambda batch: run(embedder, self.params, batch["tokens"]),
                {"tokens": np.stack(chunk)},
                size,
            )
            outputs.append(jax.device_get(made)[: len(chunk)])
        return np.concatenate(outputs)

    def text_tokens(self, texts: Sequence[str]) -> np.ndarray:
        """int32 [N, L]: texts as the towers read them."""
        return self._encode(texts, self.embedder.config.text_length)

    def _encode(self, texts: Sequence[str], length: int) -> np.ndarray:
        lower = self.config.get("captions", {}).get("lower", False)
        return self.tokenizer.encode_batch([clean_text(text, lower) for text in texts], length)

    def pixels(self, image: ImageLike) -> np.ndarray | ImageError:
        """uint8 [size, size, 3], or why the image cannot be read."""
        try:
            return to_pixels(image, self.preprocessing)
        except ImageError as error:
            return error

    def token_ids(self, text: str) -> list[int]:
        """The ids of a text without its end."""
        cleaned = clean_text(text, self.config.get("captions", {}).get("lower", False))
        length = self.tokenizer.count(cleaned)
        return self.tokenizer.encode(cleaned, length)[: length - 1].tolist()

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
        for chunk, start, size in self.chunks(rows, batch_size):
            for index, pixels in enumerate(chunk, start):
                if isinstance(pixels, ImageError):
                    raise UserError(f"images[{index}] cannot be read: {pixels}")
            beside = {name: x[start : start + len(chunk)] for name, x in columns.items()}
            made = self.on_device(run, {"image": np.stack(chunk), **beside}, size)
            outputs.append(jax.device_get(made)[: len(chunk)])
        return np.concatenate(outputs)

    def chunks(
        self, rows: Iterable, batch_size: int, all_full: bool = False
    ) -> Iterator[tuple[list, int, int]]:
        """(rows, index of the first, rows to pad to): all padded alike, as the first needs it."""
        shards = num_batch_shards(self.mesh) if self.mesh is not None else 1
        rows, start, size = iter(rows), 0, 0
        while chunk := list(itertools.islice(rows, batch_size)):
            wanted = batch_size if all_full else len(chunk)
            size = size or compiled_size(wanted, batch_size, shards)
            yield chunk, start, size
            start += len(chunk)

    def on_device(self, run: Callable, rows: dict[str, np.ndarray], size: int) -> Any:
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


@functools.partial(jax.jit, static_argnums=0)
def _text_features(embedder: TwoTowers | CoCa, params: Params, tokens_TL: Array) -> Array:
    return embedder.text_feature(params, tokens_TL).astype(jnp.float32)
