"""From a config to the objects of the rooms: what `train` and `evaluate` build alike."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from capjax.checkpoint import Keep, check_disk_space, find_steps
from capjax.commands.measures import MEASURES, Measures, open_measures
from capjax.commands.program import build_mesh, build_program, check_counts
from capjax.commands.settings import from_dataclass_kwargs
from capjax.commands.warm_tokens import warm_tokenizer
from capjax.data.augmentation import Augment
from capjax.data.captions import CaptionChoice
from capjax.data.images import ImagePreprocessing
from capjax.data.inspection import source_texts
from capjax.data.mixture import Mixture, parse_schedule
from capjax.data.pipeline import (
    BadRecord,
    Batches,
    Reading,
    eval_batches,
    synthetic_batches,
    train_batches,
)
from capjax.data.sources import Source, open_source
from capjax.data.tokenizer import Tokenizer
from capjax.errors import UserError, did_you_mean
from capjax.models.towers import Towers
from capjax.objectives.combined import Objectives
from capjax.planning.estimate import argument_memory
from capjax.planning.fit import available_bytes, check_fits
from capjax.training.health import Health
from capjax.training.lora import LoRA
from capjax.training.state import TrainState
from capjax.training.storage import exists, read_bytes
from capjax.training.warm_start import WarmStart

SYNTHETIC = "synthetic"


class DataPlan(NamedTuple):
    """The settings that every reading of the data shares."""

    preprocessing: ImagePreprocessing
    captions: CaptionChoice
    references: CaptionChoice
    text_length: int
    reading: Reading


class Stage(NamedTuple):
    """What a stage does in its own way.

    batches: (plan, first example, what is told of bad records) -> what `place` takes.
    place: puts a batch on the devices.
    compile: () -> the step, (state, placed batch) -> (state, metrics), compiled.
    prepare: called once, by the main thread of every process, before anything compiles.
    writers: what gets the metrics beside their files, in every process.
    settled: the state as it is to be saved.
    stop: asked between steps why to stop; "" goes on.
    close: called when the run ends, in whatever way.
    """

    batches: Callable[..., Iterator[Any]]
    place: Callable[[Any], Any]
    compile: Callable[[], Callable]
    prepare: Callable[[Callable[[str], None]], None]
    writers: tuple[Any, ...] = ()
    settled: Callable[[Any], Any] = lambda state: state
    stop: Callable[[], str] = lambda: ""
    close: Callable[[], None] = lambda: None


class Plan(NamedTuple):
    """All that a training run needs besides its workdir."""

    config: ConfigDict
    mesh: Mesh
    data: DataPlan
    augment: Augment
    source: Source | None  # None: synthetic examples
    splits: dict[str, tuple[str, Source]]  # name -> (what was opened, the source)
    measures: Measures  # beside likelihood, captions and retrieval
    tokenizer: Tokenizer
    objectives: Objectives
    towers: Towers
    warm_start: WarmStart
    total_steps: int
    init_state: Callable[[], TrainState]  # to be jitted, within the mesh
    abstract_state: TrainState
    abstract_inputs: Callable[[], tuple]  # what `train_step` takes, as types on the mesh
    train_step: Callable
    health: Health = Health()
    keep: Keep = Keep()
    lora: LoRA = LoRA()  # how parameters are merged before they are used
    stage: "Stage | None" = None  # None: the supervised one


def build_run(config: ConfigDict, workdir: str) -> Plan:
    """Builds and checks all that the config says, before any compile and without writing a byte."""
    mesh = build_mesh(config)
    check_counts(config, mesh)
    data, augment = build_data(config), from_dataclass_kwargs(Augment, config.augment, "augment")
    source = build_source(config)
    splits, measures = open_splits(config), build_measures(config)
    health = from_dataclass_kwargs(Health, config.health, "health")
    kept = epath.Path(workdir).expanduser() / "tokenizer.model"
    tokenizer = build_tokenizer(config, source, kept)
    program = build_program(
        config,
        mesh,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        num_examples=len(source) if source else None,
    )
    check_fits(argument_memory(*program.abstract_inputs()).peak, available_bytes())
    checkpoints = epath.Path(workdir) / "checkpoints"
    keep = build_keep(config, splits, measures, program.total_steps)
    check_disk_space(checkpoints, program.abstract_state, keep.at_most(program.total_steps))
    return Plan(
        config=config,
        mesh=mesh,
        data=data,
        augment=augment,
        source=source,
        splits=splits,
        measures=measures,
        tokenizer=tokenizer,
        warm_start=build_warm_start(config),
        keep=keep,
        lora=program.lora,
        objectives=program.objectives,
        towers=program.towers,
        total_steps=program.total_steps,
        init_state=program.init_state,
        abstract_state=program.abstract_state,
        abstract_inputs=program.abstract_inputs,
        train_step=program.train_step,
        health=health,
    )


def build_data(config: ConfigDict) -> DataPlan:
    """Takes up the sections `preprocessing`, `captions` and `reading`. Raises `UserError`."""
    captions = build_captions(config)
    return DataPlan(
        preprocessing=from_dataclass_kwargs(
            ImagePreprocessing, config.preprocessing, "preprocessing"
        ),
        captions=captions,
        references=_references(config, captions),
        text_length=config.data.text_length,
        reading=from_dataclass_kwargs(Reading, config.reading, "reading"),
    )


def build_captions(config: ConfigDict) -> CaptionChoice:
    """Which captions are used, and for which sources of the mixture others. Raises `UserError`."""
    section = dict(config.captions)
    named, mixture = section.pop("datasets", None) or {}, config.data.get("mixture", {})
    datasets = {}
    for name, fields in named.items():
        field = f"captions.datasets.{name}"
        if name not in mixture:
            raise UserError(
                f"{field}: data.mixture has no such source{did_you_mean(name, mixture)} (it has "
                f"{', '.join(sorted(mixture)) or 'none: name them with data.mixture.NAME=SOURCE'})"
            )
        fields = fields.to_dict() if isinstance(fields, ConfigDict) else fields
        if not isinstance(fields, dict) or "datasets" in fields:
            raise UserError(
                f"{field}={fields}: expected fields of captions, such as {{'sentences': 'run'}}"
            )
        try:
            datasets[name] = _caption_choice(section | _with_weights(fields))
        except UserError as error:
            raise UserError(f"{field}: {error}") from error
    return dataclasses.replace(_caption_choice(section), datasets=datasets)


def _references(config: ConfigDict, captions: CaptionChoice) -> CaptionChoice:
    """What splits are evaluated against: as captions are drawn, or `evaluate.references`."""
    named = config.evaluate.get("references", ())
    return dataclasses.replace(captions, sources=dict.fromkeys(named, 1.0)) if named else captions


def _with_weights(fields: dict[str, Any]) -> dict[str, Any]:
    """Weights belong to their sources: those of others do not weigh these."""
    return {"weights": ()} | fields if "sources" in fields else fields


def _caption_choice(section: dict[str, Any]) -> CaptionChoice:
    """Of one source: `captions.sources` (none: all), weighed by `captions.weights`."""
    section = dict(section)
    sources, weights = section.pop("sources") or (), section.pop("weights") or ()
    for name, value in (("sources", sources), ("weights", weights)):
        if not isinstance(value, list | tuple):
            raise UserError(f"captions.{name}={value!r}: expected a list, such as ({value!r},)")
    if weights and len(weights) != len(sources):
        raise UserError(
            f"captions.weights={tuple(weights)} for captions.sources={tuple(sources)}: expected as "
            "many weights as sources, or none for equal ones"
        )
    try:
        weighed = dict(zip(sources, map(float, weights or (1.0,) * len(sources)), strict=True))
    except (TypeError, ValueError) as error:
        raise UserError(f"captions.weights={tuple(weights)}: expected numbers") from error
    return from_dataclass_kwargs(CaptionChoice, section | {"sources": weighed}, "captions")


def build_source(config: ConfigDict) -> Source | None:
    """The training examples; None for the synthetic ones, which have no end."""
    if config.data.mixture:
        return build_mixture(config)
    if config.data.schedule:
        raise UserError(
            f"data.schedule={tuple(config.data.schedule)} weighs sources of data.mixture, which "
            "is empty: name sources with --config.data.mixture.NAME=SOURCE"
        )
    if config.data.source == SYNTHETIC:
        return None
    if not config.data.source:
        raise UserError(
            "data.source is empty: set it to what is trained on, such as "
            "--config.data.source=emoji:train, a folder of pictures or a glob of *.array_record"
        )
    return open_source(
        config.data.source, styles=config.data.styles or None, flags=config.data.flags
    )


def build_mixture(config: ConfigDict) -> Mixture:
    """The sources of `data.mixture`, in the order of their names."""
    if config.data.source:
        raise UserError(
            f"data.source={config.data.source} beside data.mixture: give one of the two"
        )
    sources = {name: open_source(address) for name, address in sorted(config.data.mixture.items())}
    return Mixture(sources, parse_schedule(config.data.schedule, tuple(sources)))


def open_splits(config: ConfigDict) -> dict[str, tuple[str, Source]]:
    """Name -> (what was opened, the source) of the splits to evaluate. Raises `UserError`."""
    return {name: (source, open_source(source)) for name, source in config.evaluate.splits.items()}


def build_measures(config: ConfigDict, **given: Any) -> Measures:
    """Opens what the section `evaluate` asks for beside the splits, or what is given instead.

    Raises `UserError`.
    """
    asked = {name: config.evaluate.get(name) for name in MEASURES if name in config.evaluate}
    asked |= {name: value for name, value in given.items() if value is not None}
    asked["probe_source"] = asked.get("probe_source") or config.data.source
    return open_measures(**asked)


def build_keep(config: ConfigDict, splits, measures: Measures, total_steps: int) -> Keep:
    """Which checkpoints are kept. Raises `UserError` where the best could never be found.

    `splits`: what is evaluated, by name. Which metrics an evaluation has is known with its first.
    """
    section = dict(config.checkpoint)
    every = section.pop("every_steps")
    keep = from_dataclass_kwargs(Keep, section, "checkpoint")
    if not keep.best_metric:
        return keep
    names = [*splits, *(f"test_{name}" for name, _ in measures.tests)]
    kind, _, rest = keep.best_metric.partition("/")
    split, _, metric = rest.partition("/")
    field = f"checkpoint.best_metric={keep.best_metric}"
    if kind != "eval" or split not in names or not metric:
        known = ", ".join(f"eval/{name}/..." for name in names) or "nothing: set evaluate.splits"
        raise UserError(f"{field}: expected a metric of what is evaluated, {known}")
    evaluated = config.evaluate.every_steps
    if not every or evaluated % every or not 0 < evaluated < total_steps:
        raise UserError(
            f"{field}: evaluate.every_steps={evaluated} must be a multiple of "
            f"checkpoint.every_steps={every} and less than all {total_steps} steps, so that what "
            "is measured is saved"
        )
    return keep


def build_tokenizer(config: ConfigDict, source: Source | None, kept: epath.Path) -> Tokenizer:
    """The one kept in the workdir, else the file that the config names, else that of `warm_start`.

    That is where the run takes parameters that go by token. Else it is a new one, trained on the
    captions that training can draw; which is deterministic: every process gets the same.
    """
    settings = config.data.tokenizer
    if exists(kept):
        return Tokenizer.from_bytes(read_bytes(kept))
    if settings.path:
        return Tokenizer.from_file(settings.path)
    if (theirs := warm_tokenizer(build_warm_start(config))) is not None:
        return theirs
    if source is None:
        raise UserError(
            "data.tokenizer.path is empty, and synthetic data has no captions to train a "
            "tokenizer on; name a SentencePiece model"
        )
    texts = source_texts(source, build_captions(config), settings.max_examples)
    return Tokenizer.train(
        texts, settings.vocab_size, split_by_whitespace=settings.split_by_whitespace
    )


def build_warm_start(config: ConfigDict) -> WarmStart:
    """Takes up the section `warm_start`. Raises `UserError` where its path has no checkpoint."""
    warm = from_dataclass_kwargs(WarmStart, config.warm_start, "warm_start")
    if warm.path:
        find_steps(warm.path)
    elif config.lora.rank:
        raise UserError(
            f"lora.rank={config.lora.rank} adapts parameters that stay as they are, but "
            "warm_start.path is empty: give the workdir or checkpoint that they come from"
        )
    elif warm.include or warm.exclude:
        raise UserError(
            f"warm_start.path is empty, but include={warm.include} and exclude={warm.exclude}: "
            "give the workdir or checkpoint to start from"
        )
    return warm


def training_batches(
    plan: Plan, start: int, on_bad: Callable[[list[BadRecord]], None] = lambda records: None
) -> Batches | Iterator[dict[str, Any]]:
    """This process's rows of the training stream from `start` examples on.

    A process that is alone stops at the first batch beyond the budget of bad records; of several,
    none knows all of them (`BadRecords` does).
    """
    config, data = plan.config, plan.data
    shared = {
        "text_length": data.text_length,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "start": start,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    if plan.source is None:
        size, vocab_size = data.preprocessing.image_size, plan.tokenizer.vocab_size
        return synthetic_batches(image_size=size, vocab_size=vocab_size, **shared)
    return train_batches(
        plan.source,
        plan.tokenizer,
        preprocessing=data.preprocessing,
        augment=plan.augment,
        captions=data.captions,
        reading=data.reading,
        # Several processes stop together, by the count of all of them (`BadRecords`).
        bad_budget=config.data.bad_budget if jax.process_count() == 1 else math.inf,
        on_bad=on_bad,
        **shared,
    )


def evaluation_batches(
    data: DataPlan,
    source: Source,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    max_examples: int | None = None,
) -> Batches:
    """This process's rows of a split, each example once; bad ones are counted, and end nothing."""
    return eval_batches(
        source,
        tokenizer,
        preprocessing=data.preprocessing,
        captions=data.references,
        text_length=data.text_length,
        batch_size=batch_size,
        max_examples=max_examples,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        reading=dataclasses.replace(data.reading, num_workers=0, cache_megabytes=0),
        bad_budget=math.inf,  # of several processes none may stop alone
    )
