"""Lines that read back exactly, a trim that keeps what is whole and wanted, and the plug-ins."""

import errno
import importlib.util
import json
import math
import struct
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capjax.errors import UserError
from capjax.training import metrics
from capjax.training.metrics import JsonlWriter, LastEvaluation, make_writers, read_metrics, trim


def lines_of(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(number=st.floats(width=32), step=st.integers(0, 10**9))
def test_float32_reads_back_bit_for_bit(tmp_path_factory, number, step):
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(step, {"train/loss": np.float32(number)})
    writer.close()
    (line,) = read_metrics(path)
    assert line["step"] == step
    got = np.float32(line["train/loss"])
    assert np.isnan(got) if np.isnan(number) else struct.pack("f", got) == struct.pack("f", number)


def test_float64_jax_scalars_and_integers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = {"a": 0.1 + 0.2, "b": jnp.float32(1 / 3), "c": 7, "d": 5e-324}
    writer = JsonlWriter(path)
    writer.write(1, values)
    writer.close()
    (line,) = read_metrics(path)
    assert {k: line[k] for k in values} == {k: float(v) for k, v in values.items()}
    assert list(line) == ["step", "wall_s", "a", "b", "c", "d"]


def test_nonfinite_values_are_valid_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(3, {"a": float("nan"), "b": float("inf"), "c": float("-inf")})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)  # flushed: not closed yet
    assert (line["a"], line["b"], line["c"]) == ("NaN", "Infinity", "-Infinity")
    (line,) = read_metrics(path)
    assert np.isnan(line["a"]) and line["b"] == np.inf and line["c"] == -np.inf
    writer.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.lists(st.integers(0, 20), max_size=12),
    restored=st.integers(-1, 21),
    cut=st.integers(0, 40),
    garbage=st.binary(max_size=12),
)
def test_trim_keeps_exactly_the_whole_lines_up_to_the_step(
    tmp_path_factory, steps, restored, cut, garbage
):
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    whole = [json.dumps({"step": s, "wall_s": i + 0.5, "x": "}"}) for i, s in enumerate(steps)]
    torn = json.dumps({"step": 0, "wall_s": 1.0, "train/loss": 0.123456789})[:cut].encode()
    data = "".join(line + "\n" for line in whole).encode() + torn + garbage
    path.write_bytes(data)
    wall_s = trim(path, restored)
    kept = [line for line, s in zip(whole, steps, strict=True) if s <= restored]
    assert path.read_text().splitlines() == kept
    assert wall_s == (json.loads(kept[-1])["wall_s"] if kept else 0.0)
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]
    assert trim(path, restored) == wall_s  # and nothing more the second time


def test_trim_keeps_a_whole_last_line_without_its_newline(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "wall_s": 2.0}\n{"step": 2, "wall_s": 3.0}')
    assert trim(path, 2) == 3.0
    assert path.read_text().endswith('"wall_s": 3.0}\n')


def test_trim_without_a_file(tmp_path):
    assert trim(tmp_path / "metrics.jsonl", 5) == 0.0
    assert list(tmp_path.iterdir()) == []


def test_a_crash_while_trimming_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')

    def crash(*_):
        raise OSError(errno.ENOSPC, "the disk went away")

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(OSError, match="went away"):
        trim(path, 1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"st'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_goes_on_in_steps_and_wall_time(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 4, "wall_s": 100.0}\n{"step": 8, "wall_s": 200.0}\n')
    writer = JsonlWriter(path, restored_step=4)
    writer.write(5, {"train/loss": 1.0})
    writer.close()
    assert [line["step"] for line in lines_of(path)] == [4, 5]
    assert 100.0 <= lines_of(path)[1]["wall_s"] < 110.0


def test_fresh_start_drops_every_line_of_a_run_that_saved_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "wall_s": 1.0}\n{"step": 3, "wall_s": 2.0}\n')
    JsonlWriter(path, restored_step=None).close()
    assert path.read_bytes() == b""


def test_a_store_without_append_gets_whole_files(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "is_remote", lambda path: True)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "wall_s": 1.0}\n{"step": 2, "wall_s": 2.0}\n')
    writer = JsonlWriter(path, restored_step=1)
    writer.write(2, {"train/loss": 2.0})
    assert [line["step"] for line in lines_of(path)] == [1]  # kept back until due
    writer.flush()
    assert [line["step"] for line in lines_of(path)] == [1, 2]
    monkeypatch.setattr(metrics, "_REMOTE_EVERY_S", 0.0)
    writer.write(3, {"train/loss": 3.0})
    assert [line["step"] for line in lines_of(path)] == [1, 2, 3]
    writer.close()
    assert [line["step"] for line in lines_of(path)] == [1, 2, 3]


def test_tensorboard_events_hold_the_values_and_the_purge(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    for restored, value in ((None, 1.5), (6, 2.5)):
        for writer in make_writers(tmp_path, restored_step=restored):
            writer.write(7, {"train/loss": np.float32(value)})
            writer.flush()
            writer.close()
    events = []
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # a record: length u64, its crc u32, the bytes, their crc u32
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    values = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert sorted(values) == [(7, "train/loss", 1.5), (7, "train/loss", 2.5)]
    starts = [e.step for e in events if e.HasField("session_log")]
    assert sorted(starts) == [0, 7]  # the viewer drops what earlier files say from there on


def test_wandb_resumes_its_run(tmp_path, monkeypatch):
    calls = []

    class Run:
        id = "run7"
        define_metric = staticmethod(lambda *a, **k: calls.append(("define", a, k)))
        log = staticmethod(lambda row: calls.append(("log", row)))
        finish = staticmethod(lambda: calls.append(("finish",)))

    def init(**options):
        calls.append(("init", options["id"], options["resume"], options["project"]))
        return Run

    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.util.spec_from_loader("wandb", None)
    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        writers = make_writers(tmp_path, tensorboard=False, wandb_project="p", config={"seed": 0})
        writers[-1].write(2, {"train/loss": jnp.float32(0.5)})
        for writer in writers:
            writer.close()
    inits = [call for call in calls if call[0] == "init"]
    assert inits == [("init", None, "allow", "p"), ("init", "run7", "allow", "p")]
    assert ("log", {"step": 2, "train/loss": 0.5}) in calls
    assert calls.count(("finish",)) == 2


def test_wandb_asked_for_and_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb is not installed; pip install 'capjax\[wandb\]'"):
        make_writers(tmp_path, wandb_project="p")
    (only,) = make_writers(tmp_path)  # TensorBoard, when missing, is left out
    assert isinstance(only, JsonlWriter)
    only.close()


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert make_writers(tmp_path, restored_step=0) == ()
    assert list(tmp_path.iterdir()) == []


def test_the_last_evaluation_is_that_of_one_step():
    last = LastEvaluation()
    last.write(8, {"eval/a/loss": 2.0})
    last.write(10, {"train/loss": 3.0, "eval/a/loss": 1.0})
    last.write(10, {"eval/b/cider": np.float32(0.5), "eval/b/ratio": math.nan})
    assert last.at(10) == {"eval/a/loss": 1.0, "eval/b/cider": 0.5}
    assert last.at(8) == last.at(12) == {}
    last.write(12, {"train/loss": 3.0})
    assert last.at(12) == {}


def test_lines_that_a_full_disk_refuses_are_kept(tmp_path, monkeypatch):
    """A part of them is taken first, as a disk that becomes full does."""
    path, said = tmp_path / "metrics.jsonl", []
    writer = JsonlWriter(path, report=said.append)
    writer.write(1, {"train/loss": 1.0})
    real = writer._file

    class Full:
        left = 20

        def write(self, data):
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            count, self.left = real.write(data[: self.left]), 0
            return count

    writer._file = Full()
    for step in (2, 3):
        writer.write(step, {"train/loss": float(step)})
    writer.flush()
    assert said == [
        f"{path} not written: no space left on the disk; its lines are kept in memory and tried "
        "again"
    ]
    writer._file = real
    writer.write(4, {"train/loss": 4.0})
    writer.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]
    assert [line["train/loss"] for line in read_metrics(path)] == [1.0, 2.0, 3.0, 4.0]
