"""What a run says of itself: before it starts, in its checkpoints, and when it is done."""

import collections
import dataclasses
import platform
from typing import Any

import jax
from etils import epath

from capjax.checkpoint import LoadedCheckpoint, RunInfo
from capjax.checkpoint.files import read_metadata
from capjax.checkpoint.metadata import library_versions
from capjax.commands.build import Plan
from capjax.commands.settings import resolved_dict
from capjax.commands.warm_tokens import BY_TOKEN
from capjax.data.prepare_output import probe
from capjax.data.sources import Source
from capjax.errors import UserError
from capjax.training.goodput import LOST, TimeSpent
from capjax.training.loop import TrainSummary
from capjax.training.lora import LORA
from capjax.training.progress import duration, process_age_s
from capjax.training.warm_start import POSITIONS


def run_info(plan: Plan) -> RunInfo:
    """What every checkpoint of the run holds. Its `model` section is complete."""
    config = resolved_dict(plan.config)
    config["model"] = plan.towers.to_dict()
    return RunInfo(
        config=config,
        preprocessing=dataclasses.asdict(plan.data.preprocessing),
        tokenizer_model=plan.tokenizer.model_bytes,
        pixels_by=plan.data.preprocessing.made_by() if plan.source else {},
        data=data_identity(plan.source) if plan.source else {},
    )


def data_identity(source: Source) -> dict[str, Any]:
    """What tells the training data from other data, by a few of its examples."""
    return {"num_examples": len(source), "sha256": probe(source)}


def other_data(plan: Plan, checkpoint: epath.Path) -> str:
    """How the training data is not that of the run so far; "" if it seems the same."""
    recorded = read_metadata(checkpoint).get("data", {})
    if not recorded or plan.source is None:
        return ""
    here = data_identity(plan.source)
    if here == recorded:
        return ""
    return (
        f"the training data: {here['num_examples']:,} examples with the hash {here['sha256']:.12}, "
        f"before {recorded['num_examples']:,} with {recorded['sha256']:.12}"
    )


def other_pixels(plan: Plan, checkpoint: epath.Path) -> str:
    """How pixels are made here otherwise than in the run so far; "" if they are not."""
    recorded = read_metadata(checkpoint).get("pixels_by", {})
    return plan.data.preprocessing.other_pixels(recorded)


def describe(plan: Plan) -> str:
    """The line before the first step: sizes, data, devices."""
    examples = f"{len(plan.source):,} examples" if plan.source else "synthetic examples"
    mesh = "x".join(f"{size}{axis}" for axis, size in plan.mesh.shape.items() if size > 1)
    factors = jax.tree.leaves(plan.abstract_state.params.get(LORA, {}))
    added = f" and {sum(x.size for x in factors) / 1e6:.2f} M of LoRA" if factors else ""
    return (
        f"{plan.towers.num_params() / 1e6:.2f} M parameters{added}, {examples}, "
        f"vocabulary {plan.tokenizer.vocab_size}, {plan.total_steps:,} steps of "
        f"{plan.config.batch_size}, on {devices()}{f' as {mesh}' if mesh else ''}"
    )


# With the same arrays a model of other values computes something else.
_IMAGE_NUMERICS = ("activation", "norm_eps", "image_mean", "image_std")
_TEXT_NUMERICS = ("text_causal", "text_pool", "eos_id", "text_pad_id", "mask_padding")
_PIXELS = ("antialias", "mode", "resample")


def warm_start_changes(plan: Plan, loaded: LoadedCheckpoint, names: list[str]) -> list[str]:
    """Of parameters taken from a checkpoint by `names`: what else they were trained with."""
    has_text = any(name.startswith(("decoder/", "text_encoder/")) for name in names)
    theirs: dict[str, Any] = {}
    ours: dict[str, Any] = {}
    for kinds, fields in (
        (loaded.metadata["config"]["model"], theirs),
        (plan.towers.to_dict(), ours),
    ):
        for kind in kinds.values():
            fields |= {k: tuple(x) if isinstance(x, list) else x for k, x in kind.items()}
    wanted = _IMAGE_NUMERICS + _TEXT_NUMERICS * has_text
    pairs = [(f"model.{name}", ours.get(name), theirs.get(name)) for name in wanted]
    pixels = dataclasses.asdict(plan.data.preprocessing)
    before = loaded.metadata["preprocessing"]
    pairs += [(f"preprocessing.{name}", pixels[name], before.get(name)) for name in _PIXELS]
    changes = [
        f"{name}={here!r} here, {there!r} where the parameters come from"
        for name, here, there in pairs
        if None not in (here, there) and here != there
    ]
    if POSITIONS in names and ours["text_length"] != theirs["text_length"]:
        here, there = ours["text_length"], theirs["text_length"]
        others = f", {there} to {here - 1} as drawn" if here > there else ""
        taken = f"positions 0 to {min(here, there) - 1} are taken{others}"
        changes.append(f"data.text_length={here} here, {there} there: {taken}")
    return changes


def check_tokens(plan: Plan, loaded: LoadedCheckpoint, names: list[str]) -> None:
    """Raises `UserError` where parameters that go by token come from another tokenizer."""
    by_token = [name for name in names if name.endswith(BY_TOKEN)]
    if by_token and loaded.tokenizer_model not in (b"", plan.tokenizer.model_bytes):
        raise UserError(
            f"the warm start takes {', '.join(by_token)}, which a run with another tokenizer "
            f"trained; set data.tokenizer.path to the tokenizer.model of {plan.warm_start.path}, "
            "or leave them out with warm_start.exclude"
        )


def devices() -> str:
    """Such as "8 x NVIDIA H100 80GB HBM3"; several kinds are joined by "+"."""
    kinds = collections.Counter(device.device_kind for device in jax.devices())
    return " + ".join(f"{count} x {kind}" for kind, count in kinds.items())


def run_summary(
    plan: Plan, summary: TrainSummary, bad: dict[str, int], spent: TimeSpent
) -> dict[str, Any]:
    """The facts of `summary.json`, JSON values all.

    Rates are of this process's lifetime; the time spent is that of all launches.
    """
    facts = {
        "steps": plan.total_steps,
        "examples_seen": plan.total_steps * plan.config.batch_size,
        "num_params": plan.towers.num_params(),
        "tokenizer_sha256": plan.tokenizer.fingerprint,
        "wall_s": process_age_s(),
        "time_spent": spent.to_dict(),
        "bad_records": bad,
        "devices": devices(),
        "mesh": dict(plan.mesh.shape),
        "versions": library_versions(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    return facts | summary._asdict()


def best(plan: Plan, root: epath.Path) -> dict[str, Any] | None:
    """The step that measured best of those kept; None where there is no such."""
    metric = plan.keep.best_metric
    ranked = plan.keep.ranked(root / "checkpoints")
    return {"step": ranked[0][0], "metric": metric, "value": ranked[0][1]} if ranked else None


def closing_words(workdir: epath.Path, facts: dict[str, Any]) -> str:
    """The line after the last step."""
    rate, spent, best = facts["images_per_s"], facts["time_spent"], facts.get("best")
    return (
        f"done: {facts['steps']:,} steps in {facts['wall_s'] / 60:.1f} min"
        + (f", {rate:,.0f} images/s" if rate else "")
        + f", {facts['data_wait_fraction']:.1%} waiting for data, goodput "
        f"{spent['goodput']:.1%}{_launches(spent)}"
        + (f"; best at step {best['step']:,}, {best['metric']} {best['value']:.4g}" if best else "")
        + f"; everything is in {workdir}"
    )


def _launches(spent: dict[str, Any]) -> str:
    if spent["launches"] == 1:
        return ""
    return f" over {spent['launches']} launches ({duration(spent['seconds'][LOST])} done again)"
