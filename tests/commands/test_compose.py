"""A checkpoint on tests of composition, and where it looks for the words of captions."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from capjax.commands.attention import map_words, write_attention
from capjax.commands.compose import compose, judge_frames, open_test
from capjax.data.compositional import Item, Picture
from capjax.data.images import ImagePreprocessing
from capjax.data.sources import open_source
from capjax.data.tokenizer import Tokenizer
from capjax.decoding.loaded_model import LoadedModel
from capjax.errors import UserError
from capjax.mesh import MeshShape, make_mesh
from capjax.models.captioner import Captioner, CaptionerConfig
from capjax.models.towers import Towers
from capjax.models.two_towers import TwoTowers, TwoTowersConfig

SIZES = {
    "image_size": 16,
    "patch_size": 8,
    "width": 16,
    "depth": 1,
    "num_heads": 2,
    "mlp_dim": 16,
    "text_length": 12,
}


@pytest.fixture(scope="module")
def loaded():
    """A captioner and towers of random weights, trained without images at times."""
    source = open_source("emoji:val")
    texts = [source[index].captions[0].text for index in range(len(source))]
    tokenizer = Tokenizer.train(texts, 400)
    sizes = SIZES | {"vocab_size": tokenizer.vocab_size}
    towers = Towers(
        captioner=Captioner(CaptionerConfig(**sizes, decoder_depth=2)),
        two_towers=TwoTowers(TwoTowersConfig(**sizes)),
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), towers.abstract_params()
    )
    return LoadedModel(
        towers=towers,
        params=params,
        stored_tokenizer=tokenizer,
        preprocessing=ImagePreprocessing(image_size=16),
        config={
            "captions": {"lower": True},
            "objective": {"captioning": {"weight": 1.0, "image_dropout": 0.1}},
        },
        step=1,
    )


def captioner_alone(loaded):
    towers = Towers(captioner=loaded.towers.captioner)
    params = {name: loaded.params[name] for name in towers.abstract_params()}
    return dataclasses.replace(
        loaded, towers=towers, params=params, config={"captions": {"lower": True}}
    )


def test_every_scorer_of_pairs(loaded):
    items = open_test("emoji_pairs", "emoji:val")[:7]
    found = compose(loaded, "emoji_pairs", items, alpha=0.5, batch_size=8)
    assert found.keys == tuple(item.key for item in items)
    scorers = ("", "_confidence", "_towers", "_null_image", "_minus_prior")
    names = {f"emoji_pairs_{rule}{s}" for rule in ("text", "image", "group") for s in scorers}
    assert names <= set(found.metrics) and found.skipped == {}
    # What does not see the images never tells them apart, nor both captions by them.
    assert not found.items["emoji_pairs_image_null_image"].any()
    assert not found.items["emoji_pairs_text_null_image"].any()
    # Against the scores of one image and one caption at a time.
    for alpha, suffix in ((0.0, ""), (0.5, "_minus_prior")):
        for number, item in enumerate(items):
            images = [part for picture in item.images for part in picture.parts * 2]
            s = loaded.score(images, item.captions * 2, alpha=alpha).reshape(2, 2)
            text = s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0]
            image = s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1]
            assert found.items[f"emoji_pairs_text{suffix}"][number] == text
            assert found.items[f"emoji_pairs_image{suffix}"][number] == image
    # A prior that outweighs everything prefers what is improbable without image.
    items = open_test("emoji", "emoji:val")[:8]
    found = compose(loaded, "emoji", items, alpha=1e3, batch_size=8)
    improbable = 1 - found.items["emoji_text_null_image"]
    np.testing.assert_array_equal(found.items["emoji_text_minus_prior"], improbable)


def test_eight_devices(loaded):
    items = open_test("emoji_pairs", "emoji:val")[:7]
    found = compose(loaded, "emoji_pairs", items, batch_size=8)
    eight = compose(loaded.on_mesh(make_mesh(MeshShape())), "emoji_pairs", items)
    assert eight.metrics == found.metrics


def test_items_of_different_shapes(loaded):
    pictures = open_test("emoji", "emoji:val")
    one, other = pictures[0].images[0], pictures[5].images[0]
    items = [
        Item("a", "", (one,), ("x", "man", "woman"), ((True, False, False),)),
        Item("b", "", (one, other, one), ("woman",), ((True,), (False,), (True,))),
        Item("c", "", (other,), ("man", "x"), ((True, False),)),
    ]
    model = captioner_alone(loaded)
    found = compose(model, "mixed", items, batch_size=4)
    pairs = [
        (picture.parts[0], caption)
        for item in items
        for picture in item.images
        for caption in item.captions
    ]
    scores = model.score(*zip(*pairs, strict=True))
    a, b, c = scores[:3], scores[3:6], scores[6:]
    want = [a[0] > max(a[1:]), np.nan, c[0] > c[1]]
    np.testing.assert_equal(found.items["mixed_text"], np.array(want, float))
    want = [np.nan, min(b[0], b[2]) > b[1], np.nan]
    np.testing.assert_equal(found.items["mixed_image"], np.array(want, float))
    assert "mixed_group" not in found.metrics


def test_what_cannot_be_measured_is_said(loaded, tmp_path):
    model = captioner_alone(loaded)
    items = open_test("emoji", "emoji:val")[:2]
    found = compose(model, "emoji", items)
    assert set(found.skipped) == {"emoji_minus_prior", "emoji_null_image", "emoji_towers"}
    assert not any("null" in name or "towers" in name for name in found.metrics)
    broken = items[0]._replace(images=(Picture((b"no image",)),))
    with pytest.raises(UserError, match=f"image 0 of item {broken.key} cannot be read"):
        compose(model, "emoji", [broken])
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("woman cook")
    with pytest.raises(UserError, match="can be swapped"):
        open_test("emoji", str(tmp_path))


def test_words_over_patches(loaded):
    source = open_source("emoji:val")
    images = [source[index].image for index in range(3)]
    captions = ["man artist", "woman: dark skin tone", "x"]
    found = map_words(loaded, ["a", "b", "c"], images, captions, batch_size=2)
    assert list(found) == ["a", "b", "c"]
    assert found["b"].words == ["woman:", "dark", "skin", "tone"]
    assert found["b"].grid == (2, 2) and found["b"].weights.shape == (4, 4)
    assert (found["b"].weights.max(1) == 255).all()
    first = map_words(loaded, ["b"], images[1:2], captions[1:2], layer=0)["b"]
    assert (first.weights != found["b"].weights).any()
    with pytest.raises(UserError, match="layer=2: 2 layers"):
        map_words(loaded, ["b"], images[1:2], captions[1:2], layer=2)
    with pytest.raises(UserError, match="1 keys, 3 images"):
        map_words(loaded, ["b"], images, captions)


def test_attention_of_a_workdir(loaded, tmp_path):
    with pytest.raises(UserError, match="no captions of the split 'val'"):
        write_attention(loaded, epath.Path(tmp_path), "val")
    source = open_source("emoji:val")
    records = [
        {"key": source[i].key, "source": "emoji:val", "index": i, "caption": f"man {i}"}
        for i in range(5)
    ]
    (tmp_path / "captions").mkdir()
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "captions" / "val.jsonl").write_text(lines)
    path = write_attention(loaded, epath.Path(tmp_path), "val", max_images=2)
    found = json.loads(path.read_text())
    assert path == tmp_path / "attention" / "val.json"
    assert list(found) == [records[0]["key"], records[2]["key"]]
    assert found[records[2]["key"]]["words"] == ["man", "2"]
    images = [source[2].image]
    want = map_words(loaded, ["c"], images, ["man 2"])["c"].weights
    assert np.abs(np.array(found[records[2]["key"]]["weights"]) - want).max() <= 1


def test_what_was_captioned_is_found_among_its_set(loaded, tmp_path):
    """Of a set with two descriptions of one image, that image is captioned once."""
    names = [tmp_path / f"{number}.png" for number in range(6)]
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(name)
    pictures = [Picture((str(name),)) for name in names]
    sets = [(pictures[:3], 1), (pictures[3:], 2), (pictures[:3], 1)]
    items = [
        Item(f"{n}", "", tuple(of), ("a cat",), tuple((i == at,) for i in range(3)))
        for n, (of, at) in enumerate(sets)
    ]
    found = judge_frames(loaded, loaded, items)
    captions = loaded.caption([names[1], names[5]])
    similarity = loaded.embed_texts(captions) @ loaded.embed_images(names).T
    hits = [similarity[0, :3].argmax() == 1, similarity[1, 3:].argmax() == 2]
    assert found.items["imagecode_r1"].tolist() == hits and found.keys == ("0", "1")
    with pytest.raises(UserError, match=r"sets of \[2, 3\] images"):
        short = items[1]._replace(images=items[1].images[1:], truth=items[1].truth[1:])
        judge_frames(loaded, loaded, [items[0], short])
