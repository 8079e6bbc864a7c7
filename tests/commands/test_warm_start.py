"""What a warm start says of parameters that were trained with other numerics."""

import dataclasses

import jax.numpy as jnp
import pytest
from etils import epath

from capjax.checkpoint import Checkpointer, LoadedCheckpoint, RunInfo
from capjax.commands import build, settings
from capjax.commands.summary import check_tokens, run_info, warm_start_changes
from capjax.commands.warm_tokens import warm_tokenizer
from capjax.errors import UserError
from capjax.training.warm_start import WarmStart


@pytest.fixture(scope="module")
def plan(tiny_config, tmp_path_factory):
    config = settings.load_config(str(tiny_config))
    return build.build_run(config, str(tmp_path_factory.mktemp("plan") / "run"))


def loaded(plan, tokenizer_model=None, preprocessing=(), **model) -> LoadedCheckpoint:
    info = run_info(plan)
    # As a checkpoint's JSON holds them.
    captioner = info.config["model"]["captioner"] | {"image_mean": [0.5, 0.5, 0.5]} | model
    metadata = {
        "config": {"model": {"captioner": captioner}},
        "preprocessing": info.preprocessing | dict(preprocessing),
    }
    return LoadedCheckpoint({}, metadata, tokenizer_model or info.tokenizer_model, 7)


def test_nothing_where_nothing_differs(plan):
    names = ["encoder/norm/scale", "decoder/norm/scale"]
    assert warm_start_changes(plan, loaded(plan), names) == []
    # What is not taken may differ.
    other = loaded(plan, tokenizer_model=b"x", mask_padding=True)
    assert warm_start_changes(plan, other, names[:1]) == []


def test_what_the_arrays_do_not_tell_is_said(plan):
    here = dataclasses.asdict(plan.data.preprocessing)["antialias"]
    other = loaded(plan, b"x", {"antialias": not here}, activation="quick_gelu", mask_padding=True)
    assert warm_start_changes(plan, other, ["encoder/norm/scale", "decoder/norm/scale"]) == [
        "model.activation='gelu_tanh' here, 'quick_gelu' where the parameters come from",
        "model.mask_padding=False here, True where the parameters come from",
        f"preprocessing.antialias={here} here, {not here} where the parameters come from",
    ]


def test_longer_captions_are_said(plan):
    names = ["decoder/position_embedding"]
    assert warm_start_changes(plan, loaded(plan, text_length=6), names) == [
        "data.text_length=8 here, 6 there: positions 0 to 5 are taken, 6 to 7 as drawn"
    ]
    assert warm_start_changes(plan, loaded(plan, text_length=10), names) == [
        "data.text_length=8 here, 10 there: positions 0 to 7 are taken"
    ]


def test_the_tokenizer_is_that_of_the_rows_that_are_taken(plan, workdir, tiny_config):
    params = {"encoder": {"norm": jnp.ones(2)}, "decoder": {"head": {"kernel": jnp.ones(2)}}}
    for step, info in ((1, run_info(plan)), (2, RunInfo())):
        with Checkpointer(workdir / "checkpoints", run=info) as checkpointer:
            checkpointer.save(step, {"params": params}, {"examples_seen": 0})
    first, last = (str(workdir / "checkpoints" / f"{step:08d}") for step in (1, 2))
    config = settings.load_config(str(tiny_config))
    config.warm_start.path = first
    config.data.tokenizer.vocab_size = 330
    theirs, fresh = plan.tokenizer.fingerprint, epath.Path(workdir) / "fresh"
    source = plan.source
    assert build.build_tokenizer(config, source, fresh).fingerprint == theirs
    assert warm_tokenizer(WarmStart(first, include=("encoder",))) is None
    assert warm_tokenizer(WarmStart(first, exclude=("decoder/head",))) is None
    assert warm_tokenizer(WarmStart()) is None
    with pytest.raises(UserError, match=r"takes decoder/head/kernel, but .*data\.tokenizer\.path"):
        warm_tokenizer(WarmStart(last))
    config.warm_start.include = ("encoder",)
    assert build.build_tokenizer(config, source, fresh).vocab_size == 330


def test_rows_of_another_tokenizer_are_refused(plan):
    names = ["decoder/head/kernel", "decoder/norm/scale", "decoder/token_embedding/embedding"]
    check_tokens(plan, loaded(plan), names)
    check_tokens(plan, loaded(plan, b"x"), names[1:2])
    with pytest.raises(UserError, match=r"head/kernel.*another tokenizer.*data\.tokenizer\.path"):
        check_tokens(plan, loaded(plan, b"x"), names)
