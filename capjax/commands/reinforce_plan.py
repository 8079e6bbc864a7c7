"""From the parts of a reinforcement run to its compiled step, its batches, and the plan of all."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from capjax.checkpoint import check_disk_space
from capjax.commands import build
from capjax.commands.build import Plan, Stage
from capjax.commands.program import Adapted, adapt, build_optimizer
from capjax.commands.reinforce_alarms import AlarmWriter
from capjax.commands.reinforce_data import (
    HostScores,
    ImageArrays,
    load_function,
    with_arrays,
)
from capjax.commands.reinforce_grammar import open_grammar, own_towers, write_grammar_beginning
from capjax.commands.reinforce_parts import (
    BEGINNINGS,
    Parts,
    check_beginnings,
    open_parts,
    write_beginnings,
)
from capjax.commands.reinforce_trial import try_functions
from capjax.commands.settings import from_dataclass_kwargs
from capjax.data.augmentation import Augment
from capjax.data.pipeline import train_batches
from capjax.errors import UserError
from capjax.mesh import BATCH, place_batch, place_tree, reshard
from capjax.models.towers import Towers
from capjax.objectives.captioning_objective import CaptioningObjective
from capjax.objectives.combined import Objectives
from capjax.rl.host import HostStep, Programs, with_next
from capjax.rl.reward_terms import HOST, TOWER_TOKENS, build_rewards
from capjax.rl.rollout import Rollout
from capjax.rl.state import reinforce_state
from capjax.rl.step import Step, make_step
from capjax.training.health import Health
from capjax.training.lora import merge
from capjax.training.optimizer import OptimizerConfig, make_optimizer
from capjax.training.state import init_state


def build_reinforcement(config: ConfigDict, workdir: str) -> Plan:
    """Builds and checks all that the config says, before any compile and without writing a byte.

    Raises `UserError`.
    """
    root = epath.Path(workdir).expanduser()
    parts = open_parts(config)
    check_beginnings(parts, root)
    config = parts.config
    augment = from_dataclass_kwargs(Augment, config.augment, "augment")
    towers = Towers(captioner=parts.model)
    health = from_dataclass_kwargs(Health, config.health, "health")
    if health.spike_action == "rollback":
        raise UserError(
            "health.spike_action=rollback: a loss of reinforcement swings about 0 and has no "
            "spikes; set alarms.action, or spike_action=warn"
        )
    optimizer, total_steps = _durations(parts)
    adapted = adapt(config, towers, optimizer)
    tx, step = _build_step(parts, adapted, total_steps)
    score = _host_scores(parts)
    with jax.set_mesh(parts.mesh):
        start, abstract_state = _state(parts, adapted, tx, score is not None)
    keep = build.build_keep(config, parts.splits, parts.measures, total_steps)
    check_disk_space(root / "checkpoints", abstract_state, keep.at_most(total_steps))
    program = _Program(parts, step, abstract_state, score, root)
    return Plan(
        config=config,
        mesh=parts.mesh,
        data=parts.data,
        augment=augment,
        source=parts.source,
        splits=parts.splits,
        measures=parts.measures,
        tokenizer=parts.base.tokenizer,
        warm_start=build.build_warm_start(config),
        objectives=Objectives(CaptioningObjective(**config.objective.captioning)),
        towers=towers,
        lora=adapted.lora,
        total_steps=total_steps,
        init_state=start,
        abstract_state=abstract_state,
        abstract_inputs=lambda: (abstract_state, ()),
        train_step=step.whole,
        health=health,
        keep=keep,
        stage=program.stage(),
    )


def _durations(parts: Parts) -> tuple[OptimizerConfig, int]:
    """The optimizer's settings, whose schedule counts updates, and the steps in all."""
    config = parts.config
    if parts.order is not None and all(
        config[f"total_{unit}"] is None for unit in ("steps", "examples", "epochs")
    ):
        config = ConfigDict(config.to_dict())
        config.total_steps = parts.order.num_batches()  # all epochs of the curriculum
    optimizer, total_steps = build_optimizer(config, len(parts.source))
    updates = parts.sampling.num_updates
    optimizer = dataclasses.replace(
        optimizer,
        timescale=optimizer.timescale * updates,
        warmup_steps=optimizer.warmup_steps * updates,
        cooldown_steps=optimizer.cooldown_steps * updates,
    )
    return optimizer, total_steps


def _build_step(parts: Parts, adapted: Adapted, total_steps: int) -> tuple[Any, Step]:
    optimizer, lora = adapted.optimizer, adapted.lora
    tx, learning_rate = make_optimizer(
        optimizer, total_steps * parts.sampling.num_updates, adapted.unpadded_params
    )

    def reference(params, frozen):
        return frozen["reference"] if _has_copy(parts) else merge(params, 0.0)

    step = make_step(
        parts.model,
        parts.policy,
        parts.sampling,
        build_rewards(parts.rewards, parts.embedders()),
        tx,
        learning_rate=learning_rate,
        accumulation_steps=parts.config.accumulation_steps,
        freeze=optimizer.freeze,
        ema_decay=optimizer.ema_decay,
        may_lower_rate=parts.alarms.action == "lower_rate",
        prefix=parts.prefix.ids,
        plain_params=lambda params: merge(params, lora.scale),
        reference_params=reference,
    )
    return tx, step


def _has_copy(parts: Parts) -> bool:
    """Whether the reference is a copy of the first parameters: where these change."""
    lora = parts.config.lora
    return parts.policy.has_reference and not (lora.rank and not lora.train)


def _host_scores(parts: Parts) -> HostScores | None:
    """What the host does for rewards; None where it does nothing."""
    if not parts.has_host:
        return None
    reads_text = parts.reward_towers is not None and not parts.reads_tokens
    functions = {
        name: load_function(name, term.file)
        for name, term in parts.rewards.functions.items()
        if name in parts.rewards.used
    }
    choice, num_captions = parts.data.captions, _captions_shape(parts)[1]
    try_functions(functions, parts.base, parts.source, choice, num_captions)
    return HostScores(
        parts.rewards,
        parts.base.tokenizer,
        parts.references() if parts.rewards.on_host else [],
        functions,
        parts.reward_towers if reads_text else None,
        parts.config.rewards.prompt,
    )


def _state(parts: Parts, adapted: Adapted, tx: Any, is_ahead: bool) -> tuple[Callable, Any]:
    """(what makes the first state, its types). Call within the mesh."""
    shape = _captions_shape(parts)

    def start():
        has_ema = adapted.optimizer.ema_decay > 0
        state = init_state(adapted.init, tx, parts.config.seed, ema=has_ema)
        ahead = None
        if is_ahead:
            spec = P(BATCH, None, None)
            ahead = Rollout(
                reshard(jnp.zeros(shape, jnp.int32), spec),
                reshard(jnp.zeros(shape, jnp.float32), spec),
            )
        return reinforce_state(state, parts.policy.kl_weight, ahead)

    return start, jax.eval_shape(start)


def _captions_shape(parts: Parts) -> tuple[int, int, int]:
    """[B, J, L] of the captions sampled for a batch."""
    num_captions = parts.sampling.num_samples + (parts.policy.baseline == "greedy")
    return parts.config.batch_size, num_captions, parts.sampling.max_length


class _Program:
    """The step of a run with what it reads: what is frozen, and arrays by image."""

    def __init__(
        self,
        parts: Parts,
        step: Step,
        abstract_state: Any,
        score: HostScores | None,
        root: epath.Path,
    ) -> None:
        self._parts, self._step, self._root = parts, step, root
        self._abstract_state = abstract_state
        self._alarms = AlarmWriter(parts.alarms, root)
        self._frozen: dict[str, Any] = {}
        self._host = None
        if score is not None:
            self._host = HostStep(score, functools.partial(place_batch, parts.mesh))

    def stage(self) -> Stage:
        """What the training loop takes."""
        host = self._host
        return Stage(
            batches=self._batches,
            place=host.place if host else functools.partial(place_batch, self._parts.mesh),
            compile=self._compiled,
            prepare=self._prepare,
            writers=(self._alarms,),
            settled=self._alarms.settled,
            stop=self._alarms.stop,
            close=host.close if host else lambda: None,
        )

    def _prepare(self, say: Callable[[str], None]) -> None:
        """Does what processes must do together, in one order: no thread of theirs does it later.

        Images are embedded, frozen parameters laid out, and what the run began with is kept.
        """
        parts = self._parts
        write_beginnings(parts, self._root)
        if jax.process_index() == 0 and parts.measures.judge is None:
            say("no evaluate.judge: nothing will tell whether the reward is hacked")
        self._frozen = self._opened(say)
        write_grammar_beginning(parts.rewards.grammar, self._root, self._root / BEGINNINGS)
        self._arrays.shapes()
        # The mesh has its copy, where one is needed.
        self._parts = parts._replace(base=dataclasses.replace(parts.base, params={}))

    @functools.cached_property
    def _arrays(self) -> ImageArrays:
        parts = self._parts
        return ImageArrays(
            parts.rewards,
            parts.reward_towers,
            (parts.config.data.source or "mixture", parts.source),
            parts.references,
            directory=self._root / "features",
            batch_size=parts.config.rewards.batch_size,
            prompt=parts.config.rewards.prompt,
            tokenizer=parts.base.tokenizer,
            text_length=parts.model.config.text_length,
            prefix=parts.prefix.text,
        )

    def _batches(self, plan: Plan, start: int, on_bad: Callable) -> Iterator:
        parts, config = self._parts, plan.config
        batches = train_batches(
            parts.source,
            plan.tokenizer,
            preprocessing=plan.data.preprocessing,
            augment=plan.augment,
            captions=plan.data.captions,
            reading=plan.data.reading,
            text_length=plan.data.text_length,
            batch_size=config.batch_size,
            seed=config.seed,
            start=start,
            with_index=True,
            bags=parts.order,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            bad_budget=config.data.bad_budget if jax.process_count() == 1 else math.inf,
            on_bad=on_bad,
        )
        rows = with_arrays(batches, self._arrays)  # which closes them
        return with_next(rows) if self._host else rows

    def _compiled(self) -> Callable:
        """Compiles, with the mesh set, and gives the step of the loop."""
        frozen = self._frozen
        batch = self._types(self._batch_shapes())
        if self._host is None:
            whole = jax.jit(self._step.whole, donate_argnums=0)
            program = whole.lower(self._abstract_state, frozen, batch).compile()
            return self._alarms.lowering(lambda state, placed: program(state, frozen, placed))
        policy = self._abstract_state._replace(ahead=None)
        sampled = jax.jit(self._step.sampled).lower(policy, batch).compile()
        captions = jax.eval_shape(self._step.sampled, policy, batch)
        learned = jax.jit(self._step.learned, donate_argnums=0)
        learned = learned.lower(
            policy, frozen, batch, captions, self._types(self._given_shapes())
        ).compile()
        self._host.programs = Programs(sampled, learned, frozen)
        return self._alarms.lowering(self._host)

    def _opened(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Parameters that do not train, on the mesh."""
        parts, frozen = self._parts, {}
        if _has_copy(parts):
            names = parts.model.param_specs().keys()
            params = {name: parts.base.params[name] for name in names}
            frozen["reference"] = place_tree(parts.mesh, params, parts.model.param_specs())
        if (towers := parts.reward_towers) is not None:
            if "grammar" in parts.rewards.used:
                opened = open_grammar(
                    parts.rewards.grammar,
                    own_towers(parts.config.rewards.towers),
                    parts.references,
                    self._arrays.image_ND,
                    parts.config.rewards.prompt,
                    self._root,
                    say,
                )
                towers, frozen["grammar"] = opened.placed(towers, parts.mesh)
            frozen["towers"] = towers.params
        if (table := self._arrays.ngrams) is not None:
            specs = jax.tree.map(lambda x: P(*(None,) * x.ndim), table)
            frozen["ngrams"] = place_tree(parts.mesh, table, specs)
        return frozen

    def _batch_shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Of a row of a batch: shapes and types."""
        config = self._parts.config
        size, K, L = (
            config.preprocessing.image_size,
            config.captions.per_image,
            config.data.text_length,
        )
        return {
            "image": ((size, size, 3), np.uint8),
            "tokens": ((L,) if K == 1 else (K, L), np.int32),
            "position": ((), np.uint32),
            "index": ((), np.int32),
            "mask": ((), np.bool_),
            "bag": ((), np.int32),
            **self._arrays.shapes(),
        }

    def _given_shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Of a row of what the host gives."""
        parts, (_, num_captions, _) = self._parts, _captions_shape(self._parts)
        shapes: dict[str, Any] = {
            HOST + name: ((num_captions,), np.float32) for name in parts.rewards.on_host
        }
        if parts.reward_towers is not None and not parts.reads_tokens:
            length = parts.reward_towers.embedder.config.text_length
            shapes[TOWER_TOKENS] = ((num_captions, length), np.int32)
        return shapes

    def _types(self, shapes: dict[str, tuple[tuple[int, ...], Any]]) -> dict[str, Any]:
        B, mesh = self._parts.config.batch_size, self._parts.mesh
        return {
            name: jax.ShapeDtypeStruct(
                (B, *shape),
                dtype,
                sharding=NamedSharding(mesh, P(BATCH, *(None,) * len(shape))),
            )
            for name, (shape, dtype) in shapes.items()
        }
