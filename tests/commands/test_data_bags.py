"""`capjax data bags`: the bags that the features say, by towers of random weights."""

import json

import numpy as np
import pytest
from PIL import Image

from capjax import cli
from capjax.commands import bag_features
from capjax.data.bags import build_bags, read_bags
from capjax.data.curriculum import open_bags, parse_curriculum
from capjax.data.sources import ImageDirectory
from capjax.decoding.loaded_model import LoadedModel
from tests.evaluation.tiny import PREPROCESSING, params, tokenizer, towers

LOADED = LoadedModel(towers(), params(), tokenizer(), PREPROCESSING, {}, step=3)
CAPTIONS = {
    f"{i}.png": ("a dark thing", "a grey thing", "them")[i % 3] + f" {i // 2}" for i in range(14)
}
CAPTIONS["5.png"] = CAPTIONS["4.png"].upper()


@pytest.fixture(autouse=True)
def towers_of_any_checkpoint(monkeypatch):
    monkeypatch.setattr(bag_features, "load", lambda path, mesh: LOADED.on_mesh(mesh))


@pytest.fixture
def folder(tmp_path):
    """14 captioned pictures, one more without a caption, and a broken one."""
    rng = np.random.default_rng(0)
    for key, caption in CAPTIONS.items():
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / key)
        (tmp_path / key).with_suffix(".txt").write_text(caption)
    (tmp_path / "5.png").write_bytes((tmp_path / "4.png").read_bytes())
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "plain.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    return tmp_path


def bags(folder, *flags: str) -> int:
    places = [f"--input={folder}", f"--output={folder / 'bags'}", "--compile_cache=none"]
    return cli.main(["data", "bags", *places, *flags])


def features(folder, keys, kind: str) -> np.ndarray:
    image = LOADED.embed_images([folder / key for key in keys])
    if kind == "image":
        return image
    text = LOADED.embed_texts([CAPTIONS[key] for key in keys])
    return text if kind == "text" else np.concatenate([image, text], axis=1)


@pytest.mark.parametrize("kind", ["image", "text", "both"])
def test_bags_of_what_is_embedded(folder, capsys, kind):
    assert (
        bags(folder, "--checkpoint=here", f"--features={kind}", "--sizes=3,2,30", "--show=1") == 0
    )
    out = capsys.readouterr().out
    keys = sorted(CAPTIONS) + ["plain.png"] * (kind == "image")
    assert f"left out, without a readable image or a caption: {16 - len(keys)}" in out
    assert f"30 images: no bags; there are {len(keys)} images" in out
    assert not (folder / "bags/hard/30.json").exists()
    made = json.loads((folder / "bags/hard/made.json").read_text())
    names = [CAPTIONS.get(key, key).lower() for key in keys]
    found = features(folder, keys, kind)
    for size in (2, 3):
        expected = [[keys[row] for row in bag] for bag in build_bags(found, size, same_N=names)]
        assert read_bags(folder / f"bags/hard/{size}.json") == expected
        how = made[f"{size}.json"]
        assert how["bags"] == len(expected)
        assert (how["images"], how["features"]) == (len(keys), kind)
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    pairs = [
        unit[keys.index(a)] @ unit[keys.index(b)] for a, b in read_bags(folder / "bags/hard/2.json")
    ]
    assert np.isclose(made["2.json"]["cosine"]["tightest"], max(pairs), atol=1e-4)
    assert np.isclose(made["2.json"]["cosine"]["loosest"], min(pairs), atol=1e-4)
    first = read_bags(folder / "bags/hard/2.json")[0][0]
    assert f"({first}) | " in out


def test_images_of_one_caption_do_not_share_a_bag(folder):
    """Their pixels are the same here too, which this limit allows."""
    flags = ("--features=image", "--sizes=2", "--max_similarity=2")
    assert bags(folder, "--checkpoint=here", *flags) == 0
    assert not any({"4.png", "5.png"} <= set(bag) for bag in read_bags(folder / "bags/hard/2.json"))


def test_easier_bags_have_no_pair_that_is_much_alike(folder):
    limits = ("--max_similarity=0.6", "--min_similarity=-0.5")
    assert bags(folder, "--checkpoint=here", "--level=easy", "--sizes=2", *limits) == 0
    keys = sorted(CAPTIONS)
    unit = features(folder, keys, "both") / np.sqrt(2)
    cosines = [
        unit[keys.index(a)] @ unit[keys.index(b)] for a, b in read_bags(folder / "bags/easy/2.json")
    ]
    assert cosines
    assert -0.5 <= min(cosines) <= max(cosines) <= 0.6 + 1e-6


def test_random_bags_need_no_towers_and_open_as_a_curriculum(folder, capsys):
    assert bags(folder, "--level=random", "--sizes=2,5", "--seed=1") == 0
    assert "with 16 of 16 images\n" in capsys.readouterr().out
    source = ImageDirectory(folder)
    opened = open_bags(folder / "bags", parse_curriculum(["1:random:2", "2:random:5"]), source)
    assert {key: rows.shape for key, rows in opened.items()} == {
        ("random", 2): (8, 2),
        ("random", 5): (3, 5),
    }
    first = (folder / "bags/random/5.json").read_text()
    assert bags(folder, "--level=random", "--sizes=5", "--seed=2") == 0
    assert (folder / "bags/random/5.json").read_text() != first
    (folder / "bags/random/2.json").rename(folder / "bags/random/3.json")  # another's: no record
    assert bags(folder, "--level=random", "--sizes=4", "--seed=3") == 0
    made = json.loads((folder / "bags/random/made.json").read_text())
    assert {name: how["seed"] for name, how in made.items()} == {"5.json": 2, "4.json": 3}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--checkpoint is missing"),
        (["--checkpoint=x", "--sizes=1,2"], "--sizes=1,2: expected numbers from 2 on"),
        (["--checkpoint=x", "--level=a/b"], "--level=a/b"),
        (["--checkpoint=x", "--max_examples=0"], "--max_examples=0"),
        (["--checkpoint=x", "--caption_sources=alt"], "0 of 16 images have a caption"),
        (["--level=random", "--output={folder}/0.png"], "is a file"),
    ],
)
def test_wrong_flags(folder, capsys, flags, message):
    assert bags(folder, *[flag.format(folder=folder) for flag in flags]) == 2
    assert message in capsys.readouterr().err
