"""Every shipped config: what it resolves to, what it says of itself, and that it builds."""

import ast
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from capjax.commands import build, settings
from capjax.commands.models import build_objectives, build_towers
from capjax.commands.train import first_state, train_run
from capjax.mesh import place_batch
from capjax.training.workdir import open_workdir

GOLDEN = Path(__file__).parents[1] / "golden" / "configs"
OBJECTIVES = ("cap", "cappa", "icmlm", "clip", "siglip", "coca", "siglip_cappa")
PAPER = [name for name in settings.shipped_configs() if not name.startswith("emoji")]
CONFIGS = [
    "emoji_quickstart",
    "emoji_cappa",
    "emoji_guided",
    "emoji_vague",
    *(f"emoji_finetune:{corpus}" for corpus in ("vague", "full")),
    *(f"emoji_objectives:{objective}" for objective in OBJECTIVES),
    *(f"emoji_reinforce:{rewards}" for rewards in ("self_retrieval", "cider", "both")),
    *PAPER,
]


def resolved_text(name: str) -> str:
    fields = settings.flatten(settings.resolved_dict(settings.load_config(name)))
    return "".join(f"{field} = {value!r}\n" for field, value in fields.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_resolved_config_is_the_golden_one(name):
    """To accept a change: `python -m tests.commands.test_shipped_configs` writes the files."""
    assert resolved_text(name) == golden(name).read_text(), name


def golden(name: str) -> Path:
    return GOLDEN / f"{name.replace(':', '-')}.txt"


@pytest.mark.parametrize("name", PAPER)
def test_the_figures_in_the_docstring_are_those_of_the_model(name):
    text = ast.get_docstring(ast.parse(settings.shipped_configs()[name].read_text())) or ""
    config = settings.load_config(name)
    towers = build_towers(config, build_objectives(config), 32_000)
    found = re.search(r"([\d.]+) M\s+parameters", text)
    assert found is not None and float(found[1]) == round(towers.num_params() / 1e6, 2)
    found = re.search(r"([\d.]+)\s+GFLOP\s+an\s+image", text)
    assert found is not None and float(found[1]) == round(towers.flops_per_example() / 1e9, 1)


def shrink(name: str):
    """The config at the smallest size, on the embedded corpus, for two steps."""
    config = settings.load_config(name)
    with config.unlocked():
        config.batch_size = 32  # the fixed draw keeps groups of four on each of eight devices
        config.total_steps, config.total_examples = 2, None
        config.preprocessing.image_size = 32
        config.data.update(source="emoji:train", text_length=10)
        config.data.styles = ("fluent",)
        config.data.tokenizer.update(path="", vocab_size=320)
        config.captions.sources = ("tts",)
        config.reading.update(num_workers=0, num_threads=0)
        config.evaluate.update(splits={}, batch_size=32)
        config.optimizer.warmup_steps = 1
        config.optimizer.cooldown_steps = 0
        config.mesh.update(replica=1, data=-1, fsdp=1, tensor=1)
        model = config.model
        if model.variant:
            model.variant = "mu/16"  # of all alike, so that what is compiled for one serves others
        else:
            model.update(width=32, depth=1, num_heads=2, mlp_dim=64, text_depth=1)
        for field in ("decoder_variant", "text_variant"):
            if model[field]:
                model[field] = "mu"
        model.update(decoder_depth=2, text_depth=1, caption_queries=4, num_heads=2)
        model.update(decoder_num_heads=2, text_num_heads=2)
        config.tensorboard = False
    return config


def two_steps(config, workdir: Path):
    """The metrics of two steps on all devices, the parameters before and after."""
    plan = build.build_run(config, str(workdir))
    losses = []
    with jax.set_mesh(plan.mesh), build.training_batches(plan, 0) as batches:
        state = first_state(plan, print)
        before = jax.device_get(state.params)
        for _ in range(2):
            batch = place_batch(plan.mesh, next(batches))
            state, metrics = plan.train_step(state, batch)
            losses.append(jax.device_get(metrics))
        return losses, before, jax.device_get(state.params)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """The workdir of a shrunk run of `cappa_b16`, for configs that start from one."""
    workdir = tmp_path_factory.mktemp("pretrained") / "run"
    config = shrink("cappa_b16")
    plan = build.build_run(config, str(workdir))
    with open_workdir(workdir, settings.resolved_dict(config)) as opened:
        train_run(plan, opened)
    return workdir


# One of each kind, whose step differs from the others' by more than sizes.
KINDS = ("cappa_b16", "siglip_cappa_b16", "clip_b16", "coca_b32", "lit_b16")


@pytest.mark.parametrize("name", [name for name in PAPER if name not in KINDS])
def test_every_config_builds_shrunk(name, tmp_path):
    plan = build.build_run(shrink(name), str(tmp_path / "run"))
    assert plan.total_steps == 2 and plan.mesh.size == jax.device_count()


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)  # small ones are trained by test_objectives.py
def test_two_steps_of_a_config_of_each_kind_shrunk(name, tmp_path, request):
    config = shrink(name)
    if config.warm_start.include:
        config.warm_start.path = str(request.getfixturevalue("pretrained"))
    steps, before, after = two_steps(config, tmp_path / "run")
    for metrics in steps:
        assert metrics["nonfinite"] == 0
        assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    frozen = [re.compile(pattern) for pattern in config.optimizer.freeze]
    for (path, x), y in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if any(pattern.fullmatch(name) for pattern in frozen):
            np.testing.assert_array_equal(x, y)
        elif name.endswith("kernel"):
            assert (x != y).any(), name


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for config_name in CONFIGS:
        golden(config_name).write_text(resolved_text(config_name))
