"""What a warm start says of parameters that were trained with other numerics."""

import dataclasses

import pytest

from capjax.checkpoint import LoadedCheckpoint
from capjax.commands import build, settings
from capjax.commands.summary import run_info, warm_start_changes


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
        "another tokenizer than where the parameters come from",
    ]
