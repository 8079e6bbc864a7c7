"""`capjax caption` into one file, in this process (eight devices share the batches)."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from capjax import cli
from capjax.checkpoint import Checkpointer, RunInfo
from capjax.data.images import ImagePreprocessing
from capjax.data.sources import open_source
from capjax.data.tokenizer import EOS_ID, Tokenizer
from capjax.decoding.generate import _generate
from capjax.decoding.load import load
from capjax.decoding.options import DecodingOptions
from capjax.models.captioner import Captioner, CaptionerConfig


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    """A workdir with one checkpoint, whose captions differ between images."""
    tokenizer = Tokenizer.train(["a red cat", "a blue dog on a mat", "two green birds"], 290)
    config = CaptionerConfig(
        image_size=16,
        patch_size=8,
        width=32,
        depth=1,
        num_heads=2,
        mlp_dim=64,
        vocab_size=tokenizer.vocab_size,
        text_length=6,
    )
    params = Captioner(config).init(jax.random.key(0))
    head = params["decoder"]["head"]
    head["kernel"] = jax.random.normal(jax.random.key(1), head["kernel"].shape)
    head["bias"] = head["bias"].at[EOS_ID].set(2.0)
    run = RunInfo(
        config={"model": {"captioner": dataclasses.asdict(config)}},
        preprocessing=dataclasses.asdict(ImagePreprocessing(image_size=16)),
        tokenizer_model=tokenizer.model_bytes,
    )
    workdir = tmp_path_factory.mktemp("run")
    with Checkpointer(workdir / "checkpoints", run=run) as checkpointer:
        checkpointer.save(7, {"params": params}, {"examples_seen": 0})
    return workdir


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve images in a folder with a subfolder; one of them has a caption, two are broken."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        pixels = (rng.integers(0, 256, (20, 24, 3)) * rng.random()).astype(np.uint8)
        path = folder / ("sub" if i > 8 else ".") / f"{i:02d}.png"
        Image.fromarray(pixels).save(path)
    (folder / "03.txt").write_text("A red cat\n")
    (folder / "05.png").write_bytes((folder / "05.png").read_bytes()[:200])
    (folder / "06.png").write_bytes(b"")
    (folder / "notes.md").write_text("no image")
    return folder


def caption(checkpoint, source, output, *flags: str) -> int:
    inputs = [f"--checkpoint={checkpoint}", f"--input={source}", f"--output={output}"]
    return cli.main(["caption", *inputs, "--batch_size=1", *flags])


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_folder(run_directory, photos, tmp_path, capsys):
    output = tmp_path / "captions.jsonl"
    output.write_text("of an earlier run")
    assert caption(run_directory, photos, output) == 0
    records = lines(output)
    names = [f"{i:02d}.png" for i in range(9)] + [f"sub/{i:02d}.png" for i in range(9, 12)]
    assert [record["key"] for record in records] == names
    assert [record["index"] for record in records] == list(range(12))
    assert set(records[5]) == set(records[6]) == {"index", "key", "error"}
    assert "image" in records[5]["error"]
    assert records[6]["error"] == "unreadable record: the file is empty"
    good = [record for record in records if "error" not in record]
    fields = {"key", "caption", "logprob", "num_tokens", "finish", "guidance_scale", "seed"}
    for record in good:
        references = {"references"} if record["key"] == "03.png" else set()
        assert set(record) == {"index"} | fields | references
    assert records[3]["references"] == ["A red cat"]
    captioner = load(run_directory)
    expected = captioner.caption([photos / record["key"] for record in good])
    assert len(set(expected)) > 1
    assert [record["caption"] for record in good] == expected
    out = capsys.readouterr().out
    assert f"10 captions in {output}" in out
    assert "2 images cannot be read (first: 05.png: " in out
    assert [path.name for path in tmp_path.iterdir()] == ["captions.jsonl"]


def test_sampling_depends_on_the_seed_not_on_the_batch(run_directory, photos, tmp_path):
    def sampled(name, *flags):
        path = tmp_path / name
        assert caption(run_directory, photos, path, "--temperature=1.0", *flags) == 0
        return [record.get("caption") for record in lines(path)]

    first = sampled("a.jsonl", "--seed=1")
    assert sampled("b.jsonl", "--seed=1", "--batch_size=2") == first
    assert sampled("c.jsonl", "--seed=1", "--limit=3") == first[:3]
    assert sampled("d.jsonl", "--seed=2") != first


def test_a_split_has_references(run_directory, tmp_path):
    output = tmp_path / "style.jsonl"
    assert caption(run_directory, "emoji:style", output, "--limit=9", "--max_length=2") == 0
    source = open_source("emoji:style")
    for index, record in enumerate(lines(output)):
        assert record["key"] == source[index].key
        assert record["references"] == [each.text for each in source[index].captions]
        assert record["num_tokens"] <= 2


def test_one_image(run_directory, photos, tmp_path):
    output = tmp_path / "one.jsonl"
    assert caption(run_directory, photos / "02.png", output, "--step=7") == 0
    assert [record["key"] for record in lines(output)] == ["02.png"]


def test_every_decoding_option_is_a_flag(run_directory, photos, tmp_path):
    flags = ["--num_beams=3", "--num_captions=2", "--length_penalty=0.5", "--early_stopping=never"]
    flags += ["--min_length=2", "--no_repeat_ngram_size=2", '--banned=cat,"on a"', "--banned=dog"]
    assert caption(run_directory, photos, tmp_path / "beams.jsonl", *flags, "--prefix=a ") == 0
    images = [photos / f"{i:02d}.png" for i in (0, 1, 2)]
    expected = load(run_directory).caption_records(
        images,
        DecodingOptions(
            num_beams=3,
            num_captions=2,
            length_penalty=0.5,
            early_stopping="never",
            min_length=2,
            no_repeat_ngram_size=2,
            banned=["cat", "on a", "dog"],
        ),
        prefix="a ",
    )
    made = lines(tmp_path / "beams.jsonl")
    for record, other in zip(made, expected, strict=False):
        assert [each["caption"] for each in record["captions"]] == [
            each["caption"] for each in other["captions"]
        ]
        assert len(record["captions"]) == 2
    assert all(record.get("caption", "a").startswith("a") for record in made)


def test_guidance_of_a_model_that_never_missed_an_image_is_warned_of(
    run_directory, photos, tmp_path, capsys
):
    assert caption(run_directory, photos, tmp_path / "a.jsonl", "--guidance_scale=1,1.5") == 0
    assert "warning: guidance of a model trained without image_dropout" in capsys.readouterr().err
    assert lines(tmp_path / "a.jsonl")[0]["guidance_scale"] == [1.0, 1.5]


def test_the_flags_are_the_fields_and_their_help_the_docstrings(capsys):
    with pytest.raises(SystemExit):
        cli.main(["caption", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(DecodingOptions):
        assert f"--{field.name} " in text
    assert "--num_beams N beams an image (default 1)" in text
    assert "only tokens at least this fraction as probable as the most probable one (d" in text


def test_nothing_readable_is_an_error_after_the_lines(run_directory, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"junk")
    output = tmp_path / "captions.jsonl"
    assert caption(run_directory, tmp_path / "photos", output) == 2
    error = "not an image: 4 bytes of no known format"
    assert lines(output) == [{"index": 0, "key": "a.png", "error": error}]
    assert "none of the 1 images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"checkpoint": "nowhere"}, "no checkpoint in"),
        ({"source": "emoji:styl"}, "did you mean 'emoji:style'"),
        ({"source": "empty"}, "no images in"),
        ({"output": "missing/a.jsonl"}, "there is no directory"),
        ({"output": "empty.jsonl"}, "is a directory"),
        ({"output": "gs://bucket/a"}, "expected a local path"),
        ({"flag": "--format=parquet"}, "--format=parquet is of shards"),
        ({"flag": "--batch_size=0"}, "--batch_size=0: expected at least 1"),
        ({"flag": "--batch_size=many"}, "invalid int value"),
        ({"flag": "--limit=0"}, "--limit=0: expected at least 1"),
        ({"flag": "--seed=-1"}, "--seed=-1: expected at least 0"),
        ({"flag": "--temperature=-1"}, "temperature=-1.0: expected 0 (greedy) or a number"),
        ({"flag": "--num_captions=2"}, "set temperature (1, say) for draws, or num_beams"),
        ({"flag": "--early_stopping=perhaps"}, "early_stopping=perhaps: expected True, False or"),
        ({"flag": "--guidance_scale=1,x"}, "expected a number, or several with commas"),
        ({"flag": "--price_per_hour=nan"}, "--price_per_hour=nan: expected at least 0"),
        ({"flag": "--num_processes=2"}, "--process_id=None --num_processes=2: give both"),
        ({"flag": "--max_length=7"}, "max_length=7: expected 1 to 6"),
        ({"flag": "--step=8"}, "step=8"),
        ({"flag": "--temprature=1"}, "did you mean --temperature?"),
    ],
    ids=str,
)
def test_wrong_input_is_one_line_and_compiles_nothing(
    run_directory, photos, tmp_path, capsys, monkeypatch, changed, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").mkdir()
    compiled = _generate._cache_size()
    flags = [changed["flag"]] if "flag" in changed else []
    status = caption(
        changed.get("checkpoint", run_directory),
        changed.get("source", photos),
        changed.get("output", "a.jsonl"),
        *flags,
    )
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert _generate._cache_size() == compiled
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "empty.jsonl"}
