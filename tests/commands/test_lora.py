"""A run that adapts kernels: from a checkpoint, resumed to the bit, merged for whoever loads it."""

import json
import shutil

import jax
import numpy as np
import pytest

import capjax
from capjax.checkpoint import Checkpointer, load_params
from capjax.commands import build, evaluators, settings
from capjax.commands.summary import describe, run_info
from capjax.commands.train import MAY_CHANGE, train_run
from capjax.errors import UserError
from capjax.training.lora import LORA, merge
from capjax.training.patterns import by_name
from capjax.training.workdir import open_workdir

STEPS = 4


def configured(tiny_config, **lora):
    config = settings.load_config(str(tiny_config))
    with config.unlocked():
        config.total_steps, config.checkpoint.every_steps = STEPS, 2
        config.optimizer.warmup_steps = 0
        config.evaluate.max_examples = 32
        config.lora.update(lora)
    return config


@pytest.fixture(scope="module")
def base(tiny_config, tmp_path_factory):
    """The workdir of a run whose parameters are other than those that a new run draws."""
    workdir = tmp_path_factory.mktemp("base") / "run"
    config = configured(tiny_config)
    config.seed = 1
    plan = build.build_run(config, str(workdir))
    with jax.set_mesh(plan.mesh):
        state = jax.jit(plan.init_state)()
        with Checkpointer(workdir / "checkpoints", run=run_info(plan)) as checkpointer:
            checkpointer.save(0, state, {"examples_seen": 0})
    return workdir


@pytest.fixture(scope="module")
def run(tiny_config, base, tmp_path_factory):
    """(plan, workdir, the models that were evaluated) of a run that nobody interrupted."""
    config = configured(tiny_config, rank=2, targets=("decoder",), train=("decoder/norm",))
    config.warm_start.path = str(base)
    workdir = tmp_path_factory.mktemp("lora") / "run"
    return build.build_run(config, str(workdir)), workdir


def trained(plan, workdir):
    """The models that were evaluated at the end."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluators.Evaluation, "split", lambda *args: seen.append(args[-1]) or {})
        with open_workdir(workdir, settings.resolved_dict(plan.config), MAY_CHANGE) as opened:
            train_run(plan, opened)
    return seen


def state_of(plan, workdir):
    checkpointer = Checkpointer(workdir / "checkpoints", run=run_info(plan))
    with jax.set_mesh(plan.mesh), checkpointer:
        step, state, _ = checkpointer.restore_latest(plan.abstract_state)
    assert step == STEPS
    return state


def test_only_the_factors_train_and_all_that_is_loaded_is_merged(run, base):
    plan, workdir = run
    assert " of LoRA" in describe(plan)
    (evaluated,) = trained(plan, workdir)
    state = state_of(plan, workdir)
    before = by_name(load_params(base).params)
    for name, x in by_name(merge(state.params, 0.0)).items():
        is_same = np.array_equal(x, before[name])
        assert is_same != name.startswith("decoder/norm/"), name
    factors = by_name(state.params[LORA])
    assert set(factors) == {
        f"{n}/{x}" for n in before if n.startswith("decoder") and n.endswith("kernel") for x in "ab"
    }
    assert all(np.abs(x).max() > 0 for name, x in factors.items() if name.endswith("/b"))
    expected = by_name(merge(state.params, plan.lora.scale))
    for params in (capjax.load(workdir).params, evaluated.params):
        assert by_name(params).keys() == expected.keys()
        for name, x in by_name(params).items():
            np.testing.assert_allclose(x, expected[name], rtol=1e-6, atol=1e-7, err_msg=name)
    # The whole of the optimizer's arrays: two moments of each factor and of what trains beside.
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(moments) == 2 * (len(factors) + 2)


def test_resumed_it_goes_on_bit_for_bit(run):
    plan, workdir = run
    if not workdir.exists():
        trained(plan, workdir)
    whole = state_of(plan, workdir)
    shutil.rmtree(workdir / "checkpoints" / f"{STEPS:08d}")
    trained(plan, workdir)
    resumed = state_of(plan, workdir)
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)
    losses = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in losses if "train/loss" in x] == [1, 2, 3, 4]


def test_without_a_base_there_is_nothing_to_adapt(tiny_config, workdir):
    with pytest.raises(UserError, match=r"lora.rank=2 adapts.*warm_start.path is empty"):
        build.build_run(configured(tiny_config, rank=2), str(workdir))
