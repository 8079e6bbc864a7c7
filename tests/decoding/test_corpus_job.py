"""`capjax caption` into a directory: shards, restarts, shares, formats, duplicates, disk full."""

import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pyarrow import parquet

from capjax import cli
from capjax.data.sources import open_source
from capjax.decoding import corpus_files
from capjax.decoding.generate import generate
from capjax.decoding.inputs import read_ahead
from capjax.decoding.load import load
from capjax.mesh import MeshShape, make_mesh

SHARD = 12
COUNT = 40


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Forty images: number 17 is broken, the pixels of 14, 15, 30 and 31 are those of 13."""
    folder = tmp_path_factory.mktemp("photos")
    source = open_source("emoji:val")
    for i in range(COUNT):
        (folder / f"{i:02d}.png").write_bytes(source[i].image)
    (folder / "17.png").write_bytes(b"no image")
    for i in (14, 15, 30, 31):
        shutil.copy(folder / "13.png", folder / f"{i:02d}.png")
    return folder


def caption(checkpoint, source, output, *flags: str) -> int:
    inputs = [f"--checkpoint={checkpoint}", f"--input={source}", f"--output={output}"]
    sizes = ["--batch_size=1", f"--shard_size={SHARD}"]
    return cli.main(["caption", *inputs, *sizes, *flags])


def contents(path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir() if each.is_file()}


def records(path) -> list[dict]:
    files = [path] if path.is_file() else sorted(path.glob("captions-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(run_directory, photos, tmp_path_factory):
    """The directory of a job that was never interrupted."""
    path = tmp_path_factory.mktemp("out") / "whole"
    assert caption(run_directory, photos, path, "--temperature=1") == 0
    return path


def test_shards_hold_what_a_file_does(run_directory, photos, finished, tmp_path):
    file = tmp_path / "a.jsonl"
    assert caption(run_directory, photos, file, "--temperature=1", "--shard_size=99") == 0
    made = records(finished)
    assert made == records(file)
    assert [record["index"] for record in made] == list(range(COUNT))
    assert len({record.get("caption") for record in made}) > COUNT // 2
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["counts"] == {
        "records": COUNT, "captions": COUNT - 1, "errors": 1, "filtered": 0, "duplicates": 0
    }  # fmt: skip
    assert [shard["records"] for shard in manifest["shards"]] == [12, 12, 12, 4]


def test_a_restart_makes_what_is_missing_and_nothing_else(
    run_directory, photos, finished, tmp_path, capsys, monkeypatch
):
    path = tmp_path / "a"
    shutil.copytree(finished, path)
    (path / "captions-00001-of-00004.jsonl").unlink()
    (path / "manifest.json").unlink()
    written = []
    write = corpus_files.ShardDirectory.write
    monkeypatch.setattr(
        corpus_files.ShardDirectory,
        "write",
        lambda self, number, made: (written.append(number), write(self, number, made)),
    )
    for _ in range(2):
        assert caption(run_directory, photos, path, "--temperature=1") == 0
        assert contents(path) == contents(finished)
        assert f"39 captions in {path}; 1 images cannot be read" in capsys.readouterr().out
    assert written == [1]


def test_another_job_is_refused_with_the_difference(run_directory, photos, finished, capsys):
    before = contents(finished)
    for flags, difference in [
        (["--temperature=0.5"], "options.temperature: 1.0 -> 0.5"),
        (["--temperature=1", "--step=3"], "checkpoint.step: 12 -> 3"),
        (["--temperature=1", "--seed=4"], "seed: 0 -> 4"),
        (["--temperature=1", "--limit=20"], "input.num_records: 40 -> 20"),
        (["--temperature=1", "--min_tokens=2"], "filters.min_tokens: null -> 2"),
    ]:
        assert caption(run_directory, photos, finished, *flags) == 2
        error = capsys.readouterr().err
        assert difference in error
        assert error.count("\n") == 1
    assert contents(finished) == before


def test_processes_share_the_work(run_directory, photos, finished, tmp_path, capsys):
    path = tmp_path / "a"
    share = ["--temperature=1", "--num_processes=3"]
    for i in (2, 0):
        assert caption(run_directory, photos, path, *share, f"--process_id={i}") == 0
        assert f"share {i} of 3 of {path} is complete" in capsys.readouterr().out
    assert not (path / "manifest.json").exists()
    assert caption(run_directory, photos, path, *share, "--process_id=1") == 0
    assert contents(path) == contents(finished)


def test_slurm_tells_the_share(run_directory, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert caption(run_directory, photos, tmp_path / "a.jsonl") == 2
    assert "2 processes share the work; name a directory" in capsys.readouterr().err
    assert caption(run_directory, photos, tmp_path / "a", "--temperature=1") == 0
    assert "share 1 of 2" in capsys.readouterr().out
    assert [record["index"] for record in records(tmp_path / "a")] == [
        *range(12, 24),
        *range(36, 40),
    ]


def test_parquet_holds_the_same(run_directory, photos, finished, tmp_path):
    path = tmp_path / "a"
    assert caption(run_directory, photos, path, "--temperature=1", "--format=parquet") == 0
    tables = [parquet.read_table(file) for file in sorted(path.glob("captions-*.parquet"))]
    assert len(tables) == 4
    assert all(table.schema == tables[0].schema for table in tables)
    rows = [row for table in tables for row in table.to_pylist()]
    found = [{name: x for name, x in row.items() if x is not None} for row in rows]
    assert found == records(finished)


def test_duplicates_and_filters_are_marked_and_counted(
    run_directory, photos, finished, tmp_path, capsys
):
    means = [r["logprob"] / r["num_tokens"] for r in records(finished) if "caption" in r]
    least = float(np.median(means))
    path = tmp_path / "a"
    flags = ["--temperature=1", "--num_captions=3", "--dedupe", f"--min_logprob={least}"]
    assert caption(run_directory, photos, path, *flags) == 0
    made = records(path)
    duplicates = {r["index"]: r["duplicate_of"] for r in made if "duplicate_of" in r}
    # A shard knows only itself: image 30 is the first of its kind in the third.
    assert duplicates == {14: "13.png", 15: "13.png", 31: "30.png"}
    for record in made:
        if "error" in record:
            continue
        assert len(record["captions"]) == 3
        for each in (record, *record["captions"]):
            assert ("filtered" in each) == (each["logprob"] < least * each["num_tokens"])
    assert made[14]["captions"] == made[13]["captions"]
    assert made[30]["captions"] != made[13]["captions"]
    filtered = sum("filtered" in record for record in made)
    assert 0 < filtered < COUNT
    assert f"; {filtered} filtered; 3 duplicates" in capsys.readouterr().out


def test_a_full_disk_is_one_line_and_the_job_goes_on_later(
    run_directory, photos, finished, tmp_path, capsys, monkeypatch
):
    path = tmp_path / "a"

    def full(target, data):
        if "00002" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(target, data)

    write = corpus_files.write_atomic
    with monkeypatch.context() as patched:
        patched.setattr(corpus_files, "write_atomic", full)
        assert caption(run_directory, photos, path, "--temperature=1") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"--output={path}: No space left on device" in error
    assert not (path / "manifest.json").exists()
    assert caption(run_directory, photos, path, "--temperature=1") == 0
    assert contents(path) == contents(finished)


def test_nothing_readable_is_an_error_after_the_records(run_directory, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"junk")
    assert caption(run_directory, tmp_path / "photos", tmp_path / "a") == 2
    assert "none of the 1 images" in capsys.readouterr().err
    assert [set(record) for record in records(tmp_path / "a")] == [{"index", "key", "error"}]


def test_wrong_options_leave_no_directory(run_directory, photos, tmp_path, capsys):
    for flag, message in [
        ("--max_length=13", "max_length=13: expected 1 to 12"),
        ("--guidance_scale=" + "1," * 12 + "2", "guidance_scale has 13 values"),
        ("--shard_size=0", "--shard_size=0: expected at least 1"),
    ]:
        assert caption(run_directory, photos, tmp_path / "a", flag) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def top_two_gap(loaded, image, tokens) -> float:
    """The distance of the two largest logits behind `tokens` (no padding), without a cache."""
    model = loaded.model
    inputs = jnp.array([[0, *tokens]], jnp.int32)
    memory = model.encode(loaded.params, jnp.asarray(image)[None])
    hidden = model.hidden(loaded.params, inputs, memory)
    first, second = np.sort(np.asarray(model.logits(loaded.params, hidden))[0, -1])[-2:][::-1]
    return float(first - second)


def test_one_device_or_eight_write_the_same_at_one_microbatch(run_directory):
    one, source = load(run_directory), open_source("emoji:train")
    eight = one.on_mesh(make_mesh(MeshShape(), devices=jax.devices()))
    images = np.stack(list(read_ahead(lambda i: one.pixels(source[i].image), range(512), 64)))

    def tokens(loaded, size):
        for start in range(0, len(images), size):
            rows = {"inputs": images[start : start + size]}
            rows["index_B"] = np.arange(start, start + size, dtype=np.int32)
            made = loaded.on_device(
                lambda batch: generate(one.model, loaded.params, **batch), rows, size
            )
            yield from np.asarray(made.tokens_BSL[:, 0])

    differing = 0
    for image, first, second in zip(images, tokens(one, 8), tokens(eight, 64), strict=True):
        unequal = np.flatnonzero(first != second)
        if len(unequal):
            differing += 1
            assert top_two_gap(one, image, first[: unequal[0]]) < 1e-4
    assert differing <= len(images) // 100
    # The yardstick itself: captions as they are do not stand on such edges.
    assert top_two_gap(one, images[0], ()) > 1e-4
    print(f"{differing} of {len(images)} captions differ")
