"""What becomes of an evaluation whose workdir cannot be written."""

import contextlib
import errno
import json

import pytest
from etils import epath

from capjax import cli
from capjax.commands import evaluators
from capjax.commands.build import build_data
from capjax.commands.defaults import default_config
from capjax.commands.evaluators import Evaluation
from capjax.commands.measures import Measures
from capjax.commands.models import build_objectives
from capjax.commands.reinforce_alarms import AlarmWriter
from capjax.decoding.loaded_model import LoadedModel
from capjax.evaluation.measured import Measured
from capjax.evaluation.splits import CaptionRecord
from capjax.rl.alarms import Alarms
from capjax.training.metrics import JsonlWriter
from capjax.training.workdir import write_atomic
from tests.commands.tiny_runs import judge, write_run, write_source
from tests.evaluation import tiny

RECORD = CaptionRecord(
    *("k0", "here", 0, "a dark thing", ["a dark thing"]), *(True, 1.0, -1.0, 4, 1.0, 0, 3)
)


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(autouse=True)
def measured_already(monkeypatch):
    """Only what is done with the numbers is asked."""
    numbers = {"loss": 1.0, "shuffled_images_loss": 2.0}
    found = Measured({"image_to_text_r1": 0.5})
    monkeypatch.setattr(evaluators, "evaluate_likelihood", lambda *_, **__: numbers)
    monkeypatch.setattr(evaluators, "caption_split", lambda *_, **__: [RECORD])
    monkeypatch.setattr(evaluators, "evaluate_retrieval", lambda *_, **__: found)
    monkeypatch.setattr("capjax.commands.runtime.start", lambda *args, **kwargs: None)


@pytest.fixture
def full(monkeypatch):
    """A disk that takes no whole file any more."""
    monkeypatch.setattr("os.fsync", no_space)


def files(directory) -> set[str]:
    return {path.name for path in directory.rglob("*") if path.is_file()}


def test_training_goes_on(full, tmp_path, monkeypatch):
    monkeypatch.setattr(Evaluation, "_rows", lambda *_: contextlib.nullcontext(()))
    config, said = default_config(), []
    evaluation = Evaluation(
        epath.Path(tmp_path),
        tiny.ONE,
        build_data(config),
        build_objectives(config),
        Measures(),
        batch_size=8,
        max_examples=None,
        say=said.append,
        over_time=True,
    )
    model = LoadedModel(
        tiny.towers(), tiny.params(), tiny.tokenizer(), tiny.PREPROCESSING, {}, step=3
    )
    found = evaluation.split("asked", ("here", tiny.LabelledImages(3)), model)
    assert found["loss"] == 1 and found["exact_match"] == 1 and found["image_to_text_r1"] == 0.5
    assert said == [
        f"warning: {tmp_path}/{name} not written: No space left on device"
        for name in evaluation.unwritten
    ]
    captions = ["captions/asked.jsonl", "captions/over_time/asked.jsonl"]
    assert evaluation.unwritten == [*captions, "evaluations/asked.json"]
    assert not files(tmp_path)


def test_alarms_are_kept_as_soon_as_they_can_be(tmp_path, capsys, monkeypatch):
    writer, path = AlarmWriter(Alarms(), epath.Path(tmp_path)), tmp_path / "alarms.jsonl"
    with monkeypatch.context() as filled:
        filled.setattr("os.fsync", no_space)
        writer.write(1, {"train/repetition": 0.5})
        assert f"{path} not written: No space left on device" in capsys.readouterr().out
        assert not files(tmp_path)
        with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
            write_atomic(path, "")
    writer.write(2, {"train/repetition": 0.1})
    writer.write(3, {"train/repetition": 0.6})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


@pytest.fixture
def evaluate(tmp_path, capsys):
    """`capjax evaluate` of two towers: exit status, what was printed, what was said of errors."""
    write_run(tmp_path / "run", *judge())
    write_source(tmp_path / "asked", 5, 1)

    def run() -> tuple[int, str, str]:
        arguments = [f"--workdir={tmp_path / 'run'}", f"--split=asked={tmp_path / 'asked'}"]
        status = cli.main(["evaluate", *arguments, "--batch_size=8"])
        return status, *capsys.readouterr()

    return run


def test_evaluate_prints_what_it_cannot_write(evaluate, full, tmp_path, monkeypatch):
    before = files(tmp_path)
    status, printed, said = evaluate()
    assert status == 2 and "image_to_text_r1" in printed
    warning, error = said.splitlines()
    assert warning.endswith("evaluations/asked.json not written: No space left on device")
    assert error.endswith(
        "run: not written: evaluations/asked.json; free some space or make it writable, and "
        "evaluate again"
    )
    assert files(tmp_path) == before | {"metrics.jsonl"}
    monkeypatch.setattr(JsonlWriter, "_store", no_space)
    status, printed, said = evaluate()
    assert status == 2 and "image_to_text_r1" in printed
    assert "not written: evaluations/asked.json, metrics.jsonl; free" in said


def test_evaluate_measures_nothing_where_no_line_can_be_added(evaluate, tmp_path):
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    status, printed, said = evaluate()
    assert status == 2 and not printed
    assert said.endswith("metrics.jsonl: Is a directory; make it writable\n")
    assert said.count("\n") == 1
