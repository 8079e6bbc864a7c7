"""What is measured beside likelihood, captions and retrieval: opened before any work starts."""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from capjax.commands.compose import open_test
from capjax.commands.represent import ClassNames, Opened, label_names
from capjax.data.compositional import Item
from capjax.data.sources import EMOJI_DIRECTORY, open_source
from capjax.decoding.load import load
from capjax.decoding.loaded_model import LoadedModel
from capjax.decoding.options import DecodingOptions
from capjax.errors import UserError
from capjax.evaluation.lexicon import Lexicon, read_lexicon
from capjax.evaluation.tokenization import choose
from capjax.mesh import MeshShape, make_mesh
from capjax.rewards.clip_score import PROMPT

# The fields of the section `evaluate` that are read here.
MEASURES = (
    *("probes", "probe_source", "probe_examples", "labels", "composition"),
    *("judge", "judge_prompt", "guidance_scales", "lexicon"),
)

EMOJI_LEXICON = EMOJI_DIRECTORY / "lexicon.txt"


class Probes(NamedTuple):
    """k-NN, linear probe, few-shot and zero-shot: what they learn from, and the labels' names."""

    train: Opened
    class_names: ClassNames
    max_examples: int  # of `train`


class Measures(NamedTuple):
    """What is asked for.

    probes: None for none.
    tests: of composition, by name.
    judge: two towers that had no part in making the captions, on this process's devices; None for
      none. judge_prompt: what texts begin with for its scores.
    guidance_scales: with which the captions are made once more.
    lexicon: of what captions may mention and references support; None for none.
    tokenizer, java: of the captions' agreement with references (`agreement.measure_captions`).
    """

    probes: Probes | None = None
    tests: tuple[tuple[str, list[Item]], ...] = ()
    judge: LoadedModel | None = None
    judge_prompt: str = PROMPT
    guidance_scales: tuple[float, ...] = ()
    lexicon: Lexicon | None = None
    tokenizer: str = "treebank"
    java: bool | None = False


def open_measures(
    *,
    probes: bool = False,
    probe_source: str = "",
    probe_examples: int = 50_000,
    labels: str = "",
    composition: Sequence[str] = (),
    judge: str = "",
    judge_prompt: str = PROMPT,
    guidance_scales: Sequence[float] = (),
    lexicon: str = "",
    tokenizer: str = "treebank",
    java: bool | None = False,
) -> Measures:
    """Opens what the fields of the section `evaluate` name.

    Args:
      probe_source: what probes learn from, at most `probe_examples` of it, evenly spread; labels:
        the file of their names (`label_names`).
      composition: tests, each NAME or NAME=FILE or NAME=FILE;IMAGES (`compose.open_test`).
      judge: a workdir or checkpoint with towers.
      lexicon: a file (`read_lexicon`), or "emoji" for that of the embedded corpus.

    Raises `UserError` for what is not there.
    """
    if probes and not probe_source:
        raise UserError("evaluate.probe_source is empty: name what the probes learn from")
    for scale in guidance_scales:
        DecodingOptions(guidance_scale=scale)  # a wrong one is said now
    tests = tuple(_test(text) for text in composition)
    if len({name for name, _ in tests}) < len(tests):
        raise UserError(f"evaluate.composition={list(composition)}: a test twice; give each once")
    known = None
    if probes:
        names = label_names(probe_source, labels)
        known = Probes((probe_source, open_source(probe_source)), names, probe_examples)
    return Measures(
        probes=known,
        tests=tests,
        judge=_judge(judge) if judge else None,
        judge_prompt=judge_prompt,
        guidance_scales=tuple(scale for scale in guidance_scales if scale != 1),
        lexicon=read_lexicon(EMOJI_LEXICON if lexicon == "emoji" else lexicon) if lexicon else None,
        tokenizer=choose(tokenizer),
        java=java,
    )


def _test(text: str) -> tuple[str, list[Item]]:
    name, _, places = text.partition("=")
    path, _, images = places.partition(";")
    return name, open_test(name, path, images)


def _judge(path: str) -> LoadedModel:
    judge = load(path)
    if judge.towers.embedder is None:
        raise UserError(f"evaluate.judge={path}: it has no contrastive towers; name CLIP or SigLIP")
    judge.tokenizer  # noqa: B018 (raises where it has none)
    # Of this process: each judges all captions, whatever mesh the run is on.
    return judge.on_mesh(make_mesh(MeshShape(), devices=jax.local_devices()))
