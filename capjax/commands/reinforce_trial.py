"""What is tried on a few examples before anything compiles: the prefix, functions of the user's."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from capjax.commands.reinforce_data import called
from capjax.data.captions import CaptionChoice, clean_text, reference_texts
from capjax.data.mixture import Mixture
from capjax.data.records import CorruptRecord
from capjax.data.sources import Source
from capjax.decoding.loaded_model import LoadedModel
from capjax.errors import UserError
from capjax.rl.step import Sampling
from capjax.training.storage import warn

NUM_TRIED = 32  # examples whose captions are cut into tokens


class Prefix(NamedTuple):
    """What captions stand behind.

    `is_apart`: behind it captions have the ids that they have alone.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    is_apart: bool = True


def open_prefix(
    config: ConfigDict, base: LoadedModel, sampling: Sampling, source: Source, choice: CaptionChoice
) -> Prefix:
    """The prefix of `sampling`, whose text is lower-cased as captions are.

    Raises `UserError` where it leaves captions no room, or where the tokenizer writes it otherwise
    before some caption than alone; warns where the checkpoint was trained behind one and there is
    none here.
    """
    path, most = config.warm_start.path, base.model.config.text_length
    text = clean_text(sampling.prefix, choice.lower)
    if not text:
        _warn_of_templates(base, path)
    tokenizer = base.tokenizer
    ids = _ids(tokenizer, text) if text else ()
    room = most - len(ids)
    if not text and room < sampling.max_length:
        raise UserError(
            f"sampling.max_length={sampling.max_length}: expected at most {most}, the text length "
            f"of {path}"
        )
    if not text:
        return Prefix()
    if room < max(sampling.max_length, 1):
        raise UserError(
            f"sampling.prefix={sampling.prefix!r}: its {len(ids)} tokens leave {max(room, 0)} of "
            f"the {most} of {path} to captions (sampling.max_length={sampling.max_length}); "
            "shorten one of them"
        )
    if config.policy.likelihood_weight and not config.captions.templates:
        raise UserError(
            f"policy.likelihood_weight={config.policy.likelihood_weight} with sampling.prefix="
            f"{sampling.prefix!r}: its captions have no prefix; set captions.templates, such as "
            f"'{text} {{caption}}'"
        )
    is_apart = True
    for example, dataset in _examples(source, NUM_TRIED):
        for caption in reference_texts(example, choice.of(dataset)):
            behind = _ids(tokenizer, f"{text} {caption}")
            if behind[: len(ids)] != ids:
                raise UserError(
                    f"sampling.prefix={sampling.prefix!r}: the tokenizer of {path} has a token "
                    f"for the end of it and the beginning of {caption!r}; choose a prefix that "
                    "captions were trained behind, of whole words"
                )
            is_apart &= behind[len(ids) :] == _ids(tokenizer, caption)
    return Prefix(text, ids, is_apart)


def try_functions(
    functions: Mapping[str, Callable],
    base: LoadedModel,
    source: Source,
    choice: CaptionChoice,
    num_captions: int,
) -> None:
    """Calls functions of the user's once, with two images of the source and their captions.

    Each image has `num_captions`, its references over and over. Raises `UserError` as `called`.
    """
    images, captions, references = [], [], []
    for example, dataset in _examples(source, NUM_TRIED) if functions else ():
        pixels = base.pixels(example.image)
        if isinstance(pixels, np.ndarray):
            known = reference_texts(example, choice.of(dataset))
            images.append(pixels)
            references.append(known)
            endless = itertools.cycle(known or ["a picture"])
            captions.append(list(itertools.islice(endless, num_captions)))
        if len(images) == 2:
            break
    if not images:
        return  # a run on such a source says so itself
    for name, function in functions.items():
        called(name, function, np.stack(images), captions, references)


def _examples(source: Source, count: int) -> Iterator[tuple]:
    """At most `count` examples, evenly spread, that can be read, and the names of their sources."""
    count = min(count, len(source))
    for number in range(count):
        index = number * len(source) // count
        try:
            yield source[index], source.name_at(index) if isinstance(source, Mixture) else ""
        except CorruptRecord:
            continue


def _ids(tokenizer, text: str) -> tuple[int, ...]:
    """The ids of a text without its end."""
    length = tokenizer.count(text)
    return tuple(tokenizer.encode(text, length)[: length - 1].tolist())


def _warn_of_templates(base: LoadedModel, path: str) -> None:
    """Of a checkpoint that writes captions behind something, decoded behind nothing."""
    templates = base.config.get("captions", {}).get("templates", ())
    before = base.config.get("sampling", {}).get("prefix", "")
    behind = [text for text in templates if not text.lstrip().startswith("{caption}")]
    if jax.process_index() == 0 and (before or (behind and len(behind) == len(templates))):
        warn(
            f"sampling.prefix is empty, and {path} was trained on captions behind "
            f"{before or behind[0].partition('{caption}')[0].strip()!r}: what it writes there is "
            "part of its captions; set sampling.prefix"
        )
