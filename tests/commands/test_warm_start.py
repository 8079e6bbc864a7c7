"""What a warm start says of parameters that were trained with other numerics."""

import dataclasses

import pytest

from capjax.checkpoint import LoadedCheckpoint
from capjax.commands import build, settings
from capjax.commands.summary import check_tokens, run_info, warm_start_changes
from capjax.errors import UserError


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


def test_rows_of_another_tokenizer_are_refused(plan):
    names = ["decoder/head/kernel", "decoder/norm/scale", "decoder/token_embedding/embedding"]
    check_tokens(plan, loaded(plan), names)
    check_tokens(plan, loaded(plan, b"x"), names[1:2])
    with pytest.raises(UserError, match=r"head/kernel.*another tokenizer.*data\.tokenizer\.path"):
        check_tokens(plan, loaded(plan, b"x"), names)
