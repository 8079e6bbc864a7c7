"""From a config to the objects of the rooms: what `train` and `evaluate` build alike."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from capjax.checkpoint import check_disk_space, find_steps
from capjax.commands.models import build_objectives, build_towers
from capjax.commands.settings import from_dataclass_kwargs
from capjax.data.images import ImagePreprocessing
from capjax.data.inspection import source_texts
from capjax.data.pipeline import Batches, Reading, eval_batches, synthetic_batches, train_batches
from capjax.data.sources import Source, open_source
from capjax.data.tokenizer import Tokenizer
from capjax.data.transforms import Augment, CaptionChoice
from capjax.errors import UserError
from capjax.mesh import MeshShape, check_batch_size, make_mesh, num_batch_shards
from capjax.models.towers import Towers
from capjax.objectives.combined import Objectives, combined_loss
from capjax.training.optimizer import OptimizerConfig, make_optimizer
from capjax.training.schedule import duration
from capjax.training.state import TrainState, init_state
from capjax.training.step import make_train_step
from capjax.training.warm_start import WarmStart

SYNTHETIC = "synthetic"


class DataPlan(NamedTuple):
    """The settings that every reading of the data shares."""

    preprocessing: ImagePreprocessing
    captions: CaptionChoice
    text_length: int
    reading: Reading


class Plan(NamedTuple):
    """All that a training run needs besides its workdir."""

    config: ConfigDict
    mesh: Mesh
    data: DataPlan
    augment: Augment
    source: Source | None  # None: synthetic examples
    splits: dict[str, tuple[str, Source]]  # name -> (what was opened, the source)
    tokenizer: Tokenizer
    objectives: Objectives
    towers: Towers
    warm_start: WarmStart
    total_steps: int
    init_state: Callable[[], TrainState]  # to be jitted, within the mesh
    abstract_state: TrainState
    train_step: Callable


def build_run(config: ConfigDict, workdir: str) -> Plan:
    """Builds and checks all that the config says, before any compile and without writing a byte."""
    mesh = build_mesh(config)
    objectives = build_objectives(config)
    check_counts(config, objectives, mesh)
    data, augment = build_data(config), from_dataclass_kwargs(Augment, config.augment, "augment")
    source = build_source(config)
    splits = open_splits(config)
    kept = epath.Path(workdir).expanduser() / "tokenizer.model"
    tokenizer = build_tokenizer(config, source, kept)
    towers = build_towers(config, objectives, tokenizer.vocab_size, tokenizer.eos_id)
    optimizer, total_steps = build_optimizer(config, len(source) if source else None)
    tx, learning_rate = make_optimizer(optimizer, total_steps, towers.unpadded_params())
    loss = combined_loss(towers, objectives, config.captions.per_image)
    start = functools.partial(init_state, towers.init, tx, config.seed, ema=optimizer.ema_decay > 0)
    with jax.set_mesh(mesh):
        abstract_state = jax.eval_shape(start)
    check_disk_space(epath.Path(workdir) / "checkpoints", abstract_state, config.checkpoint.keep)
    return Plan(
        config=config,
        mesh=mesh,
        data=data,
        augment=augment,
        source=source,
        splits=splits,
        tokenizer=tokenizer,
        objectives=objectives,
        towers=towers,
        warm_start=build_warm_start(config),
        total_steps=total_steps,
        init_state=start,
        abstract_state=abstract_state,
        train_step=make_train_step(
            loss,
            tx,
            learning_rate=learning_rate,
            accumulation_steps=config.accumulation_steps,
            freeze=optimizer.freeze,
            ema_decay=optimizer.ema_decay,
        ),
    )


def build_mesh(config: ConfigDict) -> Mesh:
    """The mesh over all devices. Raises `UserError` where it does not fit them."""
    return make_mesh(from_dataclass_kwargs(MeshShape, config.mesh, "mesh"))


def check_counts(config: ConfigDict, objectives: Objectives, mesh: Mesh) -> None:
    """Raises `UserError` for a batch that does not divide, or a number below its least value."""
    check_batch_size(config.batch_size, mesh)
    check_batch_size(config.evaluate.batch_size, mesh, "evaluate.batch_size")
    microbatch, rest = divmod(config.batch_size, max(config.accumulation_steps, 1))
    if rest:
        raise UserError(
            f"accumulation_steps={config.accumulation_steps} does not divide "
            f"batch_size={config.batch_size}; make the batch a multiple of it"
        )
    check_batch_size(microbatch, mesh, "batch_size / accumulation_steps")
    together = objectives.rows_together(config.captions.per_image)
    if microbatch % (num_batch_shards(mesh) * together):
        raise UserError(
            f"objective.captioning.parallel_draw=fixed keeps {together} consecutive images on a "
            f"device, but batch_size={config.batch_size} leaves {microbatch} images a microbatch "
            f"on {num_batch_shards(mesh)} batch shards; make the batch a multiple of "
            f"{num_batch_shards(mesh) * together * config.accumulation_steps}, or draw bernoulli"
        )
    least = {
        "accumulation_steps": 1,
        "seed": 0,
        "log_every_steps": 1,
        "data.text_length": 2,
        "checkpoint.keep": 1,
        "checkpoint.every_steps": 0,
        "evaluate.every_steps": 0,
        "evaluate.max_examples": 1,
        "profile.start_step": 0,
        "profile.num_steps": 0,
    }
    for name, low in least.items():
        value: Any = functools.reduce(lambda part, key: part[key], name.split("."), config)
        if value < low:
            raise UserError(f"{name}={value}: expected at least {low}")


def build_data(config: ConfigDict) -> DataPlan:
    """Takes up the sections `preprocessing`, `captions` and `reading`. Raises `UserError`."""
    return DataPlan(
        preprocessing=from_dataclass_kwargs(
            ImagePreprocessing, config.preprocessing, "preprocessing"
        ),
        captions=build_captions(config),
        text_length=config.data.text_length,
        reading=from_dataclass_kwargs(Reading, config.reading, "reading"),
    )


def build_captions(config: ConfigDict) -> CaptionChoice:
    """Which captions are used: `captions.sources` (none: all), weighed by `captions.weights`."""
    section = dict(config.captions)
    sources, weights = section.pop("sources") or (), section.pop("weights") or ()
    if weights and len(weights) != len(sources):
        raise UserError(
            f"captions.weights={tuple(weights)} for captions.sources={tuple(sources)}: expected as "
            "many weights as sources, or none for equal ones"
        )
    weighed = dict(zip(sources, weights or (1.0,) * len(sources), strict=True))
    return from_dataclass_kwargs(CaptionChoice, section | {"sources": weighed}, "captions")


def build_source(config: ConfigDict) -> Source | None:
    """The training examples; None for the synthetic ones, which have no end."""
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


def open_splits(config: ConfigDict) -> dict[str, tuple[str, Source]]:
    """Name -> (what was opened, the source) of the splits to evaluate. Raises `UserError`."""
    return {name: (source, open_source(source)) for name, source in config.evaluate.splits.items()}


def build_tokenizer(config: ConfigDict, source: Source | None, kept: epath.Path) -> Tokenizer:
    """The one kept in the workdir, else the file that the config names, else a new one.

    A new one is trained on the captions that training can draw. That is deterministic: every
    process gets the same.
    """
    settings = config.data.tokenizer
    if kept.exists():
        return Tokenizer.from_bytes(kept.read_bytes())
    if settings.path:
        return Tokenizer.from_file(settings.path)
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
    elif warm.include or warm.exclude:
        raise UserError(
            f"warm_start.path is empty, but include={warm.include} and exclude={warm.exclude}: "
            "give the workdir or checkpoint to start from"
        )
    return warm


def build_optimizer(config: ConfigDict, num_examples: int | None) -> tuple[OptimizerConfig, int]:
    """The optimizer's settings, and the steps in all. Raises `UserError`."""
    to_steps = functools.partial(duration, batch_size=config.batch_size, num_examples=num_examples)
    section = dict(config.optimizer)
    fixed = {
        key: section.pop(key) for key in list(section) if key.startswith(("warmup_", "cooldown_"))
    }
    for part in ("warmup", "cooldown"):
        section[f"{part}_steps"] = to_steps(part, fixed, default=0)
    total_steps = to_steps(
        "total", {key: config[key] for key in config if key.startswith("total_")}
    )
    return from_dataclass_kwargs(OptimizerConfig, section, "optimizer"), total_steps


def training_batches(plan: Plan, start: int) -> Batches | Iterator[dict[str, Any]]:
    """This process's rows of the training stream from `start` examples on."""
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
        bad_budget=config.data.bad_budget,
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
    """This process's rows of a split, each example once."""
    return eval_batches(
        source,
        tokenizer,
        preprocessing=data.preprocessing,
        captions=data.captions,
        text_length=data.text_length,
        batch_size=batch_size,
        max_examples=max_examples,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        reading=dataclasses.replace(data.reading, num_workers=0, cache_megabytes=0),
    )
