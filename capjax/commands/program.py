"""From a config to the program of its training step, which needs no data: shapes are enough."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from capjax.commands.models import build_objectives, build_towers
from capjax.commands.settings import from_dataclass_kwargs
from capjax.data.tokenizer import EOS_ID
from capjax.dims import Params, PRNGKeyArray
from capjax.errors import UserError
from capjax.mesh import BATCH, MeshShape, check_batch_size, make_mesh, num_batch_shards
from capjax.models.towers import Towers
from capjax.objectives.combined import Objectives, combined_loss
from capjax.training.lora import LoRA, held_patterns, merge, with_lora
from capjax.training.optimizer import OptimizerConfig, make_optimizer
from capjax.training.schedule import duration
from capjax.training.state import TrainState, init_state
from capjax.training.step import make_train_step

# What the key of the factors' draw is folded from: no model of a run has this number.
_LORA_DRAW = 0xFFFFFFFF


class Program(NamedTuple):
    """The training step of a config, and what it works on."""

    config: ConfigDict
    mesh: Mesh
    objectives: Objectives
    towers: Towers
    lora: LoRA
    optimizer: OptimizerConfig
    tx: optax.GradientTransformation
    total_steps: int
    init_state: Callable[[], TrainState]  # to be jitted, within the mesh
    abstract_state: TrainState
    train_step: Any  # jitted: (state, batch) -> (state, metrics)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape, type and sharding of a global batch, as the data pipeline delivers it."""
        config = self.config
        B, size, K = config.batch_size, config.preprocessing.image_size, config.captions.per_image
        tokens = (B, config.data.text_length) if K == 1 else (B, K, config.data.text_length)
        arrays = {
            "image": ((B, size, size, 3), jnp.uint8),
            "tokens": (tokens, jnp.int32),
            "position": ((B,), jnp.uint32),
        }
        return {
            name: jax.ShapeDtypeStruct(
                shape,
                dtype,
                sharding=NamedSharding(self.mesh, P(BATCH, *(None,) * (len(shape) - 1))),
            )
            for name, (shape, dtype) in arrays.items()
        }

    def abstract_inputs(self) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct]]:
        """What `train_step` takes, as types on the mesh, whose devices need not be here."""
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(self.mesh, x.sharding.spec)
            ),
            self.abstract_state,
        )
        return state, self.abstract_batch()


def build_program(
    config: ConfigDict,
    mesh: Mesh,
    *,
    vocab_size: int,
    eos_id: int = EOS_ID,
    num_examples: int | None = None,
) -> Program:
    """Builds and checks the step over `mesh`, without compiling it and without an array.

    `num_examples` are those of the data; None where they have no end or are not known. Call
    `check_counts` first. Raises `UserError`.
    """
    objectives = build_objectives(config)
    towers = build_towers(config, objectives, vocab_size, eos_id)
    optimizer, total_steps = build_optimizer(config, num_examples)
    adapted = adapt(config, towers, optimizer)
    optimizer = adapted.optimizer
    tx, learning_rate = make_optimizer(optimizer, total_steps, adapted.unpadded_params)
    has_ema = optimizer.ema_decay > 0
    start = functools.partial(init_state, adapted.init, tx, config.seed, ema=has_ema)
    loss = combined_loss(towers, objectives, config.captions.per_image)
    with jax.set_mesh(mesh):
        abstract_state = jax.eval_shape(start)
    return Program(
        config=config,
        mesh=mesh,
        objectives=objectives,
        towers=towers,
        lora=adapted.lora,
        optimizer=optimizer,
        tx=tx,
        total_steps=total_steps,
        init_state=start,
        abstract_state=abstract_state,
        train_step=make_train_step(
            loss.on(lambda params: merge(params, adapted.lora.scale)),
            tx,
            learning_rate=learning_rate,
            accumulation_steps=config.accumulation_steps,
            freeze=optimizer.freeze,
            ema_decay=optimizer.ema_decay,
        ),
    )


class Adapted(NamedTuple):
    """What the section `lora` makes of a run's parameters and of its optimizer."""

    lora: LoRA
    init: Callable[[PRNGKeyArray], Params]  # of `Towers.init`, with the factors
    unpadded_params: Params  # of `Towers.unpadded_params`, with the factors
    optimizer: OptimizerConfig  # holds fast what does not train


def adapt(config: ConfigDict, towers: Towers, optimizer: OptimizerConfig) -> Adapted:
    """Takes up the section `lora`; with a rank of 0 all is as it was. Raises `UserError`."""
    lora = from_dataclass_kwargs(LoRA, config.lora, "lora")

    def init(key: PRNGKeyArray) -> Params:
        return with_lora(towers.init(key), jax.random.fold_in(key, _LORA_DRAW), lora)

    unpadded = towers.unpadded_params()
    if lora.rank:
        unpadded = jax.eval_shape(lambda x: with_lora(x, jax.random.key(0), lora), unpadded)
    freeze = (*optimizer.freeze, *held_patterns(unpadded, lora))
    return Adapted(lora, init, unpadded, dataclasses.replace(optimizer, freeze=freeze))


def build_mesh(config: ConfigDict, devices: list | None = None) -> Mesh:
    """The mesh over `devices` (default: all). Raises `UserError` where it does not fit them."""
    return make_mesh(from_dataclass_kwargs(MeshShape, config.mesh, "mesh"), devices)


def check_counts(config: ConfigDict, mesh: Mesh) -> None:
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
    together = build_objectives(config).rows_together(config.captions.per_image)
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
        "data.bad_budget": 0,
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
    if config.data.bad_budget > 1:
        raise UserError(f"data.bad_budget={config.data.bad_budget}: expected a share, 0 to 1")


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
