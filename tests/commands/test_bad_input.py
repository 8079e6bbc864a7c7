"""Everything a user can get wrong about a run: one line, status 2, and nothing is left behind."""

import pytest

from capjax import cli

OVERRIDES = [
    ("total_step=3", "did you mean"),
    ("total_steps=many", "expected a whole number"),
    ("total_epochs=1", "both set"),
    ("batch_size=12", "does not divide"),
    ("batch_size=0", "batch_size=0"),
    ("mesh.data=3", "mesh"),
    ("mesh.fsdp=-1", "only one axis may be -1"),
    ("model.num_heads=5", "multiple"),
    ("model.variant=B/16", "changes nothing"),
    ("model.patch_size=7", "patch_size"),
    ("model.posemb=rope", "posemb"),
    ("model.dtype=float16", "dtype"),
    ("model.remat=some", "remat"),
    ("data.source=emoji:trian", "did you mean"),
    ("data.source=/no/such/place", "/no/such/place"),
    ("data.text_length=1", "text_length"),
    ("data.bad_budget=-1", "data.bad_budget=-1.0: expected at least 0"),
    ("data.tokenizer.vocab_size=100", "vocab_size"),
    ("data.tokenizer.path=/no/tokenizer.model", "/no/tokenizer.model"),
    ("captions.weights=1,2", "captions.weights"),
    ("captions.sources=", "captions.weights"),
    ("captions.datasets.web.lower=false", "data.mixture has no such source"),
    ("preprocessing.mode=squeeze", "mode"),
    ("augment.crop_scale=0.5,2", "crop_scale"),
    ("augment.color_jitter=2", "color_jitter"),
    ("reading.num_threads=-1", "num_threads"),
    ("objective.captioning.parallel_fraction=1.5", "parallel_fraction"),
    ("optimizer.learning_rate=-1", "learning_rate"),
    ("optimizer.schedule=step", "schedule"),
    ("optimizer.warmup_steps=1000", "warmup"),
    ("accumulation_steps=5", "accumulation_steps"),
    ("evaluate.splits.concept=/no/split", "/no/split"),
    ("evaluate.batch_size=3", "evaluate.batch_size"),
    ("checkpoint.keep=0", "checkpoint.keep=0: expected at least 1"),
    ("checkpoint.keep_every_steps=-1", "checkpoint.keep_every_steps=-1: expected at least 0"),
    ("checkpoint.best_mode=most", "expected max or min"),
    ("checkpoint.best_metric=eval/val/cider", "expected a metric of what is evaluated, eval/conc"),
    ("checkpoint.best_metric=eval/concept/loss", "evaluate.every_steps=0 must be a multiple of"),
    ("log_every_steps=0", "log_every_steps"),
]


@pytest.mark.parametrize(("override", "words"), OVERRIDES)
def test_a_wrong_config_is_one_line_and_leaves_nothing(
    override, words, tiny_config, workdir, capsys
):
    flags = [f"--config.{override}"]
    if override == "captions.sources=":
        flags.append("--config.captions.weights=1,2")
    status = cli.main(["train", f"--config={tiny_config}", f"--workdir={workdir}", *flags])
    error = capsys.readouterr().err.strip()
    assert status == 2, error
    assert error.startswith("capjax: error: ")
    assert words in error
    assert "\n" not in error
    assert not workdir.exists()


def test_too_little_disk(tiny_config, workdir, capsys, monkeypatch):
    import shutil

    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert cli.main(["train", f"--config={tiny_config}", f"--workdir={workdir}"]) == 2
    assert "free" in capsys.readouterr().err
    assert not workdir.exists()


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_commands_on_a_place_without_a_run(command, tmp_path, capsys):
    assert cli.main([command, f"--workdir={tmp_path / 'nothing'}"]) == 2
    error = capsys.readouterr().err.strip()
    assert "nothing" in error
    assert "\n" not in error
    assert not (tmp_path / "nothing").exists()


def test_a_split_that_is_not_named(tmp_path, capsys):
    assert cli.main(["evaluate", f"--workdir={tmp_path}", "--split=emoji:val"]) == 2
    assert "NAME=SOURCE" in capsys.readouterr().err
