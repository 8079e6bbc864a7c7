import contextlib
import fcntl
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from capjax.data.prepare import prepare
from capjax.data.prepare_example import HASH_BYTES, PrepareSettings
from capjax.data.prepare_merge import first_equal
from capjax.data.records import ArrayRecordSource, Caption, Example, write_shards
from capjax.data.sources import open_source
from capjax.errors import UserError

EMOJI = "emoji:val"
SMALL = {"shard_size": 40, "dedupe": ("key", "content")}


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def run(output, source=None, name=EMOJI, **arguments):
    settings = PrepareSettings(**arguments.pop("settings", SMALL))
    source = open_source(name) if source is None else source
    return prepare(source, name, output, settings, **arguments)


class Listed:
    """A source of the examples in a list; an error in it is raised."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        if isinstance(self.examples[index], Exception):
            raise self.examples[index]
        return self.examples[index]

    def __repr__(self):
        return "Listed()"


def images(count: int) -> list[bytes]:
    source = open_source(EMOJI)
    found = dict.fromkeys(source[i].image for i in range(2 * count))
    return list(found)[:count]


def test_shards_hold_the_source_in_its_order(tmp_path):
    manifest, was_finished = run(tmp_path / "out", part_size=64)
    assert not was_finished
    source = open_source(EMOJI)
    seen, expected = set(), []
    for example in (source[i] for i in range(len(source))):
        if example.image not in seen:
            expected.append(example)
        seen.add(example.image)
    shards = open_source(tmp_path / "out")
    assert [shards[i] for i in range(len(shards))] == expected
    assert len(shards) == manifest["examples"]["out"]
    assert manifest["examples"]["in"] == len(source)


def test_the_manifest_tells_the_truth(tmp_path):
    manifest, _ = run(tmp_path / "out")
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    names = [shard["name"] for shard in manifest["shards"]]
    assert set(content(tmp_path / "out")) == {*names, "manifest.json", "dropped.jsonl"}
    for shard in manifest["shards"]:
        path = tmp_path / "out" / shard["name"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        assert path.stat().st_size == shard["bytes"]
        assert len(ArrayRecordSource(path)) == shard["examples"]
    assert all(shard["examples"] == 40 for shard in manifest["shards"][:-1])
    lines = [json.loads(s) for s in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    dropped = manifest["dropped"]
    assert Counter(line["reason"] for line in lines) == {
        reason: dropped[reason]["count"] for reason in dropped
    }


def test_workers_and_parts_change_no_byte(tmp_path):
    run(tmp_path / "one", part_size=1000)
    run(tmp_path / "three", part_size=50, num_workers=3)
    assert content(tmp_path / "one") == content(tmp_path / "three")


def test_interrupted_anywhere_equals_uninterrupted(tmp_path):
    run(tmp_path / "whole")

    for first in range(2, 20):
        calls = 0

        def interrupt(report):
            nonlocal calls
            calls += 1
            if calls % first == 0:  # noqa: B023 (used within the turn)
                raise KeyboardInterrupt

        output = tmp_path / f"at{first}"
        for _ in range(3):
            with contextlib.suppress(KeyboardInterrupt):
                run(output, part_size=20, report=interrupt)
        run(output)
        assert content(output) == content(tmp_path / "whole"), first


@pytest.mark.parametrize("last", ["copyfile", "rmtree"])
def test_interrupted_while_files_get_their_names(tmp_path, monkeypatch, last):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, last, interrupt)
        run(tmp_path / "out")
    assert run(tmp_path / "out").was_finished == (last == "rmtree")
    run(tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def kill_until_done(command: list[str], kills: int, longest_s: float, seed: int) -> int:
    """Runs and kills a command; then lets it finish. Returns how often it was killed at work."""
    rng, killed = random.Random(seed), 0
    for _ in range(kills):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        process.stderr.readline()  # at work from here on
        time.sleep(rng.uniform(0, longest_s))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
        process.stderr.close()
    subprocess.run(command, check=True, capture_output=True)
    return killed


def command_line(source: str, output: Path, workers: int, *flags: str) -> list[str]:
    flags = (*flags, f"--output={output}", f"--num_workers={workers}")
    return [sys.executable, "-m", "capjax.cli", "data", "prepare", source, *flags]


def test_killed_equals_uninterrupted(tmp_path):
    flags = ("--format=jpeg", "--shard_size=40")
    source = "emoji:style"
    killed = kill_until_done(command_line(source, tmp_path / "killed", 1, *flags), 3, 0.3, seed=0)
    assert killed >= 2
    settings = {"format": "jpeg", "shard_size": 40}
    run(tmp_path / "whole", name=source, settings=settings)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


@pytest.mark.slow
def test_killed_twenty_times_equals_uninterrupted(tmp_path):
    flags = ("--format=jpeg", "--resize=48", "--shard_size=50", "--dedupe=key,content")
    source = "emoji:train"
    killed = kill_until_done(command_line(source, tmp_path / "killed", 2, *flags), 20, 1.2, seed=1)
    assert killed >= 5
    settings = {"format": "jpeg", "resize": 48, "shard_size": 50, "dedupe": ("key", "content")}
    run(tmp_path / "whole", name=source, settings=settings)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_workers_end_with_the_process_that_was_killed(tmp_path):
    psutil = pytest.importorskip("psutil")
    flags = ("--format=webp", "--resize=70")
    process = subprocess.Popen(
        command_line("emoji:train", tmp_path / "out", 2, *flags), stderr=subprocess.PIPE
    )
    children = []
    while process.poll() is None and len(children) < 2:
        found = psutil.Process(process.pid).children()
        children = [child for child in found if "spawn_main" in " ".join(child.cmdline())]
        time.sleep(0.05)
    while not list((tmp_path / "out").glob(".prepare/parts/*.json")):
        time.sleep(0.05)
    process.kill()
    process.wait()
    process.stderr.close()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert len(children) >= 2
    assert not alive


def test_duplicates_are_dropped_where_wanted(tmp_path):
    a, b, c = images(3)
    captions = (Caption("x"),)
    examples = [
        Example("1", a, captions),
        Example("1", b, captions),  # the key of the first
        Example("2", b, captions),  # the bytes of one that is dropped: stays
        Example("3", a, captions),  # the bytes of the first
        Example("4", c, captions),
    ]
    write_shards(examples, tmp_path / "in", "x", 10)
    for dedupe, left in {
        (): ["1", "1", "2", "3", "4"],
        ("key",): ["1", "2", "3", "4"],
        ("content",): ["1", "1", "4"],
        ("key", "content"): ["1", "2", "4"],
    }.items():
        output = tmp_path / "-".join(("out", *dedupe))
        settings = {"dedupe": dedupe}
        run(output, name=str(tmp_path / "in"), settings=settings, part_size=1)
        shards = open_source(output)
        assert [shards[i].key for i in range(len(shards))] == left
    lines = [json.loads(line) for line in (output / "dropped.jsonl").read_text().splitlines()]
    assert lines == [
        {"index": 1, "key": "1", "reason": "duplicate key", "detail": "as example 0"},
        {"index": 3, "key": "3", "reason": "duplicate content", "detail": "as example 0"},
    ]


@given(arrays(np.uint8, st.tuples(st.integers(0, 20), st.just(HASH_BYTES)), elements=st.just(0)))
def test_first_equal_finds_the_first(hashes):
    hashes = hashes.copy()
    rng = np.random.default_rng(len(hashes))
    hashes[:, rng.integers(0, HASH_BYTES, len(hashes))] = 1
    hashes[:: 1 + len(hashes) % 3, 15] = rng.integers(0, 3)
    rows = [row.tobytes() for row in hashes]
    assert first_equal(hashes).tolist() == [rows.index(row) for row in rows]


def bad_source(tmp_path):
    """Ten examples: one that cannot be read, one of no image, one without a caption."""
    write_shards(
        [Example(f"k{i}", data, (Caption("x"),)) for i, data in enumerate(images(10))],
        tmp_path / "in",
        "x",
        10,
    )
    (path,) = (tmp_path / "in").iterdir()
    source = ArrayRecordSource(path)
    examples = [source[i] for i in range(10)]
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(examples[2].image) + 9] ^= 1
    examples[4] = examples[4]._replace(image=b"GIF89a")
    examples[6] = examples[6]._replace(captions=())
    write_shards(examples, tmp_path / "bad", "x", 10)
    (bad,) = (tmp_path / "bad").iterdir()
    damaged = bytearray(bad.read_bytes())
    damaged[damaged.index(examples[2].image) + 9] ^= 1
    bad.write_bytes(damaged)
    return str(tmp_path / "bad")


def test_bad_examples_are_counted_listed_and_stop_it_beyond_the_budget(tmp_path):
    name = bad_source(tmp_path)
    with pytest.raises(
        UserError, match=r"2 of 10 examples cannot be used.*max_bad=0\.1 .*example 2: unr"
    ):
        run(tmp_path / "out", name=name, max_bad=0.1)
    assert not list((tmp_path / "out").glob("*.array_record"))
    manifest, _ = run(tmp_path / "out", name=name, max_bad=0.2)  # goes on
    assert manifest["examples"] == {"in": 10, "out": 7}
    dropped = manifest["dropped"]
    assert [drop["count"] for drop in dropped.values()] == [1, 1, 1]
    assert dropped["unreadable record"]["first"] == ["example 2"]
    assert dropped["no caption"]["first"] == ["k6"]


def test_nothing_left_is_an_error(tmp_path):
    source = Listed([Example("a", images(1)[0])])
    with pytest.raises(UserError, match="no example is left: no caption 1"):
        run(tmp_path / "out", source)


def test_a_finished_output_is_said_to_be_so(tmp_path):
    first, _ = run(tmp_path / "out")
    before = content(tmp_path / "out")
    again, was_finished = run(tmp_path / "out", num_workers=3, max_bad=0.5)
    assert was_finished
    assert again == first
    assert content(tmp_path / "out") == before


def test_a_finished_output_that_lost_a_shard_is_not_called_finished(tmp_path):
    run(tmp_path / "out")
    next((tmp_path / "out").glob("*.array_record")).unlink()
    with pytest.raises(UserError, match=r"array_record is missing or was changed"):
        run(tmp_path / "out")


@pytest.mark.parametrize("is_finished", [True, False])
def test_other_work_in_the_output_is_refused(tmp_path, is_finished):
    def stop(report):
        if not is_finished:
            raise KeyboardInterrupt

    try:
        run(tmp_path / "out", report=stop)
    except KeyboardInterrupt:
        assert not is_finished
    with pytest.raises(UserError, match=r"another preparation \(shard_size: 40 -> 41\)"):
        run(tmp_path / "out", settings={**SMALL, "shard_size": 41})
    with pytest.raises(UserError, match=r"name: \"emoji:val\" -> \"emoji:style\"; num_examples"):
        run(tmp_path / "out", name="emoji:style")
    changed = [open_source(EMOJI)[i] for i in range(len(open_source(EMOJI)))]
    changed[0] = changed[0]._replace(image=changed[1].image)
    with pytest.raises(UserError, match="probe"):
        run(tmp_path / "out", Listed(changed))


def test_a_second_process_is_refused(tmp_path):
    def stop(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", report=stop)
    with (tmp_path / "out" / ".prepare" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being written by another process"):
            run(tmp_path / "out")
    run(tmp_path / "out")


def test_a_part_that_the_disk_lost_is_made_again(tmp_path):
    def stop(report):
        if report.stage == "shards":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", report=stop, part_size=64)
    (tmp_path / "out" / ".prepare" / "parts" / "000000000064.array_record").unlink()
    with pytest.raises(UserError, match="run the same command again"):
        run(tmp_path / "out")
    run(tmp_path / "out")
    run(tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_bad": 2.0}, "max_bad=2"),
        ({"num_workers": 0}, "num_workers=0"),
        ({"source": Listed([])}, "0 examples"),
    ],
)
def test_impossible_arguments_are_refused(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        run(tmp_path / "file")
    with pytest.raises(UserError, match="holds other files"):
        run(tmp_path)
    (tmp_path / "manifest.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="is not of `capjax data prepare`"):
        run(tmp_path)
    with pytest.raises(UserError, match="expected a local directory"):
        run("gs://bucket/x")
    assert set(content(tmp_path)) == {"file", "manifest.json"}
