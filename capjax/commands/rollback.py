"""Going back to an earlier checkpoint, and on from there with later data."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils

from capjax.checkpoint import list_steps
from capjax.checkpoint.directory import discard_after
from capjax.errors import UserError
from capjax.training.health import Health
from capjax.training.spikes import (
    Rollback,
    Spiked,
    read_rollbacks,
    write_rollbacks,
)


def kept_rollbacks(root: epath.Path, start_step: int) -> list[Rollback]:
    """The rollbacks behind a run that goes on from `start_step`.

    Those that went back to a later step are forgotten: they will happen again.
    """
    found = read_rollbacks(root)
    kept = [rollback for rollback in found if rollback.restored_step <= start_step]
    if kept != found and jax.process_index() == 0:
        write_rollbacks(root, kept)
    return kept


def data_offset(
    rollbacks: Sequence[Rollback], start_step: int, extra: Mapping[str, Any], batch_size: int
) -> int:
    """How far the position in the data is ahead of step x batch size, from `start_step` on.

    `extra` is that of the checkpoint: saved after a rollback it knows the offset itself.
    """
    saved = extra.get("examples_seen", 0) - start_step * batch_size
    return max([0, saved, *(rollback.offset(batch_size) for rollback in rollbacks[-1:])])


def go_back(
    root: epath.Path, spike: Spiked, health: Health, batch_size: int, position: int
) -> Rollback:
    """Makes the checkpoint before a spike the newest, and notes what is passed over.

    `position` is that in the data after the spike's batch. Every process calls this. Checkpoints
    go first: a kill before the note is written leaves a run that comes to the same spike again.

    Raises `UserError` where the run has gone back too often.
    """
    before, checkpoints = read_rollbacks(root), root / "checkpoints"
    good = [step for step in list_steps(checkpoints) if step <= spike.step - health.rollback_steps]
    _meet("what there is before the rollback")  # all have read before one writes
    if len(before) >= health.max_rollbacks:
        raise UserError(
            f"{spike}, after {len(before)} rollbacks already (health.max_rollbacks); lower "
            "optimizer.learning_rate in another --workdir, or go on all the same with "
            "--config.health.spike_action=warn"
        )
    restored = max(good, default=0)
    earlier = [rollback for rollback in before if rollback.restored_step <= restored]
    skipped_from = restored * batch_size + data_offset(earlier, restored, {}, batch_size)
    rollback = Rollback(spike.step, restored, skipped_from, position, spike.reason)
    if jax.process_index() == 0:
        discard_after(checkpoints, restored)
        write_rollbacks(root, [*before, rollback])
    _meet("what there is after the rollback")
    return rollback


def _meet(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
