"""`capjax convert`: there and back through every format, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

import capjax
from capjax import cli
from capjax.checkpoint import Checkpointer, RunInfo, load_params
from capjax.commands import convert as convert_command
from capjax.data.tokenizer import Tokenizer
from capjax.errors import UserError
from capjax.interop import big_vision, native
from capjax.interop.mapping import Weights, model_of
from capjax.models import CaptionerConfig, TwoTowersConfig
from capjax.models.image_encoder import ImageEncoderConfig

IMAGE = {"image_size": 8, "patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24}
CAPTIONER = CaptionerConfig(**IMAGE, vocab_size=300, text_length=6)
TWO_TOWERS = TwoTowersConfig(**IMAGE, pool="map", vocab_size=300, text_length=6)


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    """The devices are set up already."""
    monkeypatch.setattr("capjax.commands.runtime.start", lambda args, alike=None: None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "words.model"
    path.write_bytes(Tokenizer.train(["a red cat", "a blue dog", "two red dogs"], 290).model_bytes)
    return path


def weights_of(config) -> Weights:
    """Normal draws, zero where a vocabulary is padded."""
    rng = np.random.default_rng(0)
    abstract = model_of(config).abstract_params()
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract)
    for view in big_vision.to_arrays(config, params).values():
        view[...] = 0.3 * rng.standard_normal(view.shape)
    name = {CaptionerConfig: "captioner", TwoTowersConfig: "two_towers"}
    return Weights(name.get(type(config), "image_encoder"), config, params)


def convert(capsys, *args, status=0) -> str:
    """Standard output, or the line of an error."""
    assert cli.main(["convert", *map(str, args)]) == status, capsys.readouterr().err
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def contents(path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def test_a_captioner_there_and_back(tmp_path, tokenizer, capsys):
    source, output = tmp_path / "cappa.npz", tmp_path / "cappa"
    weights = weights_of(CAPTIONER)
    big_vision.write(source, weights, layout="scan")
    words = convert(
        capsys, f"--input={source}", f"--output={output}", f"--tokenizer={tokenizer}"
    ).splitlines()
    assert [line.split(" [")[0] for line in words[:3]] == [
        "read: image encoder",
        "read: causal logits",
        "read: parallel logits",
    ]
    assert words[3].startswith("written and read back: ") and words[3].endswith(", all equal")
    count = model_of(CAPTIONER).num_params() / 1e6
    assert words[4:] == [f"captioner, {count:.2f} M parameters: big_vision -> capjax: {output}"]

    assert cli.main(["checkpoint", "verify", str(output)]) == 0
    assert capsys.readouterr().out == "step 0: good\n"
    loaded = load_params(output)
    assert_trees_equal(jax.device_get(loaded.params), weights.params)
    assert CaptionerConfig(**loaded.metadata["config"]["model"]["captioner"]) == CAPTIONER
    ready = capjax.load(output)
    assert ready.preprocessing.antialias is False
    assert len(ready.caption([np.zeros((8, 8, 3), np.uint8)])) == 1

    back = tmp_path / "back.npz"
    words = convert(capsys, f"--input={output}", f"--output={back}", "--layout=scan")
    assert "written: causal logits" in words and "captioner" in words
    assert_trees_equal(contents(back), contents(source))


def test_two_towers_there_and_back(tmp_path, capsys):
    source, output = tmp_path / "siglip.npz", tmp_path / "siglip"
    weights = weights_of(TWO_TOWERS)
    big_vision.write(source, weights)
    convert(capsys, f"--input={source}", f"--output={output}")
    assert_trees_equal(jax.device_get(load_params(output).params), weights.params)
    back = tmp_path / "back.npz"
    convert(capsys, f"--input={output}", f"--output={back}")
    assert_trees_equal(contents(back), contents(source))


@pytest.mark.parametrize("config", [CAPTIONER, TWO_TOWERS])
def test_converted_weights_are_evaluated(config, tmp_path, tokenizer, capsys):
    big_vision.write(tmp_path / "x.npz", weights_of(config))
    output = tmp_path / "x"
    convert(capsys, f"--input={tmp_path / 'x.npz'}", f"--output={output}")
    evaluate = ["evaluate", f"--workdir={output}", "--batch_size=8", "--max_examples=16"]
    for flags, words in (([], "give --split"), (["--split=a=emoji:val"], "without a tokenizer")):
        assert cli.main([*evaluate, *flags]) == 2
        assert words in capsys.readouterr().err
    convert(
        capsys,
        *(f"--input={tmp_path / 'x.npz'}", f"--output={output}", f"--tokenizer={tokenizer}"),
        "--overwrite",
    )
    assert cli.main([*evaluate, "--split=a=emoji:val"]) == 0
    metric = "caption_loss" if config is CAPTIONER else "text_to_image_r1"
    assert metric in capsys.readouterr().out


def test_another_layout_without_a_checkpoint(tmp_path, capsys):
    source, output = tmp_path / "loop.npz", tmp_path / "scan.npz"
    big_vision.write(source, weights_of(TWO_TOWERS))
    convert(capsys, f"--input={source}", f"--output={output}", "--layout=scan")
    stacked = contents(output)["img/Transformer/encoderblock/LayerNorm_0/scale"]
    assert stacked.shape == (2, 16)


def test_a_tower_at_another_resolution(tmp_path, capsys):
    source, output = tmp_path / "siglip.npz", tmp_path / "vit"
    weights = weights_of(TWO_TOWERS)
    big_vision.write(source, weights)
    words = convert(capsys, f"--input={source}:img", f"--output={output}", "--image_size=12")
    assert "resized: from 8 to 12 pixels" in words
    loaded = load_params(output)
    config = ImageEncoderConfig(**IMAGE | {"image_size": 12}, pool="map")
    assert ImageEncoderConfig(**loaded.metadata["config"]["model"]["image_encoder"]) == config
    assert loaded.metadata["preprocessing"]["image_size"] == 12
    positions = loaded.params["encoder"]["position_embedding"]
    corners = weights.params["encoder"]["position_embedding"]
    np.testing.assert_allclose(np.asarray(positions)[[0, 2, 6, 8]], corners, rtol=1e-6)


def test_pixels_that_no_patch_reaches(tmp_path, capsys):
    source, output = tmp_path / "siglip.npz", tmp_path / "vit"
    big_vision.write(source, weights_of(TWO_TOWERS))
    convert(capsys, f"--input={source}:img", f"--output={output}", "--image_size=10")
    preprocessing = load_params(output).metadata["preprocessing"]
    assert (preprocessing["image_size"], preprocessing["resize_to"]) == (8, 10)


@pytest.fixture
def run_of_several(tmp_path):
    """A training run's workdir with a captioner and two towers over one encoder."""
    captioner = dataclasses.replace(CAPTIONER, pool="map")
    params = weights_of(TWO_TOWERS).params | weights_of(CAPTIONER).params
    config = {
        "model": {
            "captioner": dataclasses.asdict(captioner),
            "two_towers": dataclasses.asdict(TWO_TOWERS),
        }
    }
    info = RunInfo(config=config, preprocessing={"image_size": 8})
    state = {"params": params, "opt_state": {"mu": np.zeros(3)}, "step": np.int32(7)}
    with Checkpointer(tmp_path / "run" / "checkpoints", info) as checkpointer:
        checkpointer.save(7, state, {"examples_seen": 7})
    return tmp_path / "run", params


@pytest.mark.parametrize("model", ["captioner", "two_towers", "image_encoder"])
def test_one_model_of_several(model, run_of_several, tmp_path, capsys):
    path, params = run_of_several
    convert(capsys, f"--input={path}", f"--output={tmp_path / 'x.npz'}", f"--model={model}")
    found = big_vision.read(tmp_path / "x.npz")
    assert found.model == model
    assert_trees_equal(found.params["encoder"], params["encoder"])
    assert ("image_head" in found.params) == (model != "captioner")


def test_which_of_several_must_be_said(run_of_several, tmp_path, capsys):
    path, _ = run_of_several
    error = convert(capsys, f"--input={path}", f"--output={tmp_path / 'x.npz'}", status=2)
    assert "several models: choose model from ('captioner', 'two_towers', 'image_encoder')" in error
    error = convert(
        capsys, f"--input={path}", f"--output={tmp_path / 'x.npz'}", "--model=coca", status=2
    )
    assert "the checkpoint has no model=coca: choose model from ('captioner'," in error
    assert not list(tmp_path.glob("x*"))


def test_through_hugging_face(tmp_path, capsys):
    pytest.importorskip("safetensors")
    source, middle, back = tmp_path / "siglip.npz", tmp_path / "hf", tmp_path / "back.npz"
    big_vision.write(source, weights_of(TWO_TOWERS))
    words = convert(capsys, f"--input={source}", f"--output={middle}", "--to=huggingface")
    assert words.startswith("note: huggingface resizes images with antialiasing")
    assert "big_vision -> huggingface" in words
    words = convert(capsys, f"--input={middle}", f"--output={back}")
    assert "huggingface -> big_vision" in words
    assert_trees_equal(contents(back), contents(source))


def test_what_is_there_is_replaced_only_when_asked(tmp_path, capsys):
    source, output = tmp_path / "siglip.npz", tmp_path / "out"
    big_vision.write(source, weights_of(TWO_TOWERS))
    convert(capsys, f"--input={source}", f"--output={output}")
    line = convert(capsys, f"--input={source}", f"--output={output}", status=2)
    assert f"--output={output} exists; give --overwrite to replace it" in line
    convert(capsys, f"--input={source}:img", f"--output={output}", "--overwrite")
    assert list(load_params(output).metadata["config"]["model"]) == ["image_encoder"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"x")
    line = convert(
        capsys, f"--input={source}", f"--output={tmp_path / 'photos'}", "--overwrite", status=2
    )
    assert "not ours" in line
    line = convert(capsys, f"--input={source}", f"--output={source}", "--overwrite", status=2)
    assert "is the input" in line
    line = convert(capsys, f"--input={source}:img", f"--output={source}", "--overwrite", status=2)
    assert "is the input" in line
    step = f"{output}/00000000"
    line = convert(capsys, f"--input={step}", f"--output={output}", "--overwrite", status=2)
    assert "is the input" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos", "siglip.npz"]


def test_what_a_format_has_no_place_for_is_said(tmp_path, tokenizer, capsys):
    config = dataclasses.replace(TWO_TOWERS, text_pad_id=0)
    preprocessing = {"image_size": 8, "antialias": True, "resample": "bicubic"}
    weights = weights_of(config)._replace(
        preprocessing=preprocessing, tokenizer_model=tokenizer.read_bytes()
    )
    native.write(tmp_path / "run", weights)
    words = convert(capsys, f"--input={tmp_path / 'run'}", f"--output={tmp_path / 'x.npz'}")
    assert words.splitlines()[:3] == [
        "note: big_vision's files do not say how images are prepared: here antialias=True, "
        "mode=stretch, resample=bicubic",
        "note: big_vision's files do not say what pads texts: here token 0",
        "note: left out, as big_vision's files have no place for it: the tokenizer",
    ]


def test_a_captioner_without_a_place_for_its_mask(tmp_path, capsys):
    config = dataclasses.replace(CAPTIONER, mask_padding=True)
    native.write(tmp_path / "run", weights_of(CAPTIONER)._replace(config=config))
    args = [f"--input={tmp_path / 'run'}", f"--output={tmp_path / 'x.npz'}"]
    assert "mask_padding=True: big_vision's models have False" in convert(capsys, *args, status=2)


def test_a_failure_leaves_nothing(tmp_path, capsys, monkeypatch):
    source, output = tmp_path / "siglip.npz", tmp_path / "out.npz"
    big_vision.write(source, weights_of(TWO_TOWERS))
    read = big_vision.read

    def spoilt(path, **fields):
        weights = read(path, **fields)
        if str(path).endswith(".partial"):
            weights.params["encoder"]["norm"]["scale"] += 1
        return weights

    monkeypatch.setattr(big_vision, "read", spoilt)
    line = convert(capsys, f"--input={source}", f"--output={output}", status=2)
    assert "differs by" in line and "that format cannot hold this model" in line
    assert [path.name for path in tmp_path.iterdir()] == ["siglip.npz"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--input={d}/no.npz"], "no.npz"),
        (["--input={d}/nowhere"], "is not there"),
        (["--input={d}/notes.txt"], "file of no known kind"),
        (["--input={d}"], "no checkpoint"),
        (["--input={d}/x.npz:txt"], "neither a CapPa nor"),
        (["--input={d}/x.npz:vit"], "no sub-tree 'vit'; it has b, img, t, txt"),
        (["--input={d}/x.npz", "--from=huggingface"], "expected a directory"),
        (["--input={d}/x.npz", "--from=pytorch"], "invalid choice"),
        (["--input={d}/x.npz", "--image_size=0"], "--image_size=0"),
        (["--input={d}/x.npz", "--image_size=3"], "at least a patch, 4 pixels"),
        (["--input={d}/x.npz", "--text_length=9"], "the weights are for 6 tokens"),
        (["--input={d}/x.npz", "--layout=scan"], "is for big_vision output"),
        (["--input={d}/x.npz", "--model=captioner"], "is for capjax input"),
        (["--input={d}/x.npz", "--activation=gelu"], "is for open_clip input"),
        (["--input={d}/x.npz", "--to=big_vision"], "end in .npz"),
        (["--input={d}/x.npz", "--tokenizer={d}/no.model"], "no.model"),
        (["--input={d}/x.npz", "--tokenizer={d}/notes.txt"], "not a SentencePiece model"),
        (["--input={d}/x.npz", "--outptu={d}/y"], "did you mean --output"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(args, words, tmp_path, capsys):
    big_vision.write(tmp_path / "x.npz", weights_of(TWO_TOWERS))
    (tmp_path / "notes.txt").write_text("notes")
    args = [arg.format(d=tmp_path) for arg in args]
    line = convert(capsys, *args, f"--output={tmp_path / 'out'}", status=2)
    assert line.startswith("capjax: error: ") and line.count("\n") == 1
    assert words in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "x.npz"]


@pytest.mark.parametrize(
    ("output", "words"), [("gs://bucket/x", "local path"), ("no/such/x", "no directory")]
)
def test_where_nothing_can_be_written(output, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    big_vision.write(tmp_path / "x.npz", weights_of(TWO_TOWERS))
    assert words in convert(capsys, "--input=x.npz", f"--output={output}", status=2)


def test_a_tokenizer_of_another_model(tmp_path, tokenizer, capsys):
    small = dataclasses.replace(CAPTIONER, vocab_size=100)
    big_vision.write(tmp_path / "x.npz", weights_of(small))
    args = [f"--input={tmp_path / 'x.npz'}", f"--tokenizer={tokenizer}"]
    line = convert(capsys, *args, f"--output={tmp_path / 'out'}", status=2)
    assert "the model 100" in line
    line = convert(capsys, *args, f"--output={tmp_path / 'out.npz'}", status=2)
    assert "no place for it" in line
    with pytest.raises(UserError, match="ends a text with token 1, the model with 5"):
        convert_command._tokenizer(str(tokenizer), dataclasses.replace(TWO_TOWERS, eos_id=5))
