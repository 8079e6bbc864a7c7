"""A checkpoint used as a captioner, against the functions it is made of."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import capjax
from capjax.checkpoint import load_params
from capjax.data import resize
from capjax.decoding import generate as generate_module
from capjax.decoding.load import load
from capjax.decoding.score import score
from capjax.errors import UserError
from capjax.mesh import MeshShape, make_mesh
from tests.decoding.conftest import generate

LENGTH = 12


@pytest.fixture(scope="module")
def captioner(run_directory):
    return load(run_directory)


@pytest.fixture(scope="module")
def pictures():
    """Eleven images of several sizes, as arrays."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(10, 40, (11, 2))
    return [
        (rng.integers(0, 256, (height, width, 3)) * rng.random()).astype(np.uint8)
        for height, width in sizes
    ]


@pytest.fixture(scope="module")
def pixels(captioner, pictures):
    return jnp.stack([captioner.preprocessing.preprocess(picture) for picture in pictures])


def test_everything_comes_from_the_checkpoint(captioner, run_directory):
    kept = load_params(run_directory)
    assert captioner.step == 12
    assert captioner.config["seed"] == 5
    assert captioner.tokenizer.model_bytes == kept.tokenizer_model
    assert captioner.model.config.vocab_size == captioner.tokenizer.vocab_size
    assert captioner.preprocessing.mode == "pad"
    jax.tree.map(np.testing.assert_array_equal, captioner.params, kept.params)


def test_pixels_that_other_packages_make_here_are_told(run_directory, monkeypatch, capsys):
    load(run_directory)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(resize, "_cykooz", object() if resize._cykooz is None else None)
    load(run_directory)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"capjax: warning: {run_directory}: in training the resizer was ")


def test_an_older_step_by_number_or_path(run_directory, captioner):
    older = capjax.load(run_directory, step=3)
    assert older.step == 3
    by_path = capjax.load(run_directory / "checkpoints" / "00000003")
    jax.tree.map(np.testing.assert_array_equal, older.params, by_path.params)
    heads = [one.params["decoder"]["head"]["kernel"] for one in (older, captioner)]
    assert np.any(np.asarray(heads[0]) != np.asarray(heads[1]))
    with pytest.raises(UserError, match=r"step=4: .* has the steps \[3, 12\]"):
        load(run_directory, step=4)


def test_captions_are_those_of_generate(captioner, pictures, pixels):
    made = generate(captioner.model, captioner.params, pixels, max_length=LENGTH)
    expected = [captioner.tokenizer.decode(row) for row in np.asarray(made.tokens_BL)]
    assert len(set(expected)) > 2
    assert captioner.caption(pictures, batch_size=4) == expected
    records = captioner.caption_records(pictures, batch_size=4)
    for row, record in enumerate(records):
        assert list(record) == [
            *("key", "caption", "logprob", "num_tokens", "finish"),
            *("guidance_scale", "seed"),
        ]
        assert record["key"] == str(row)
        assert record["caption"] == expected[row]
        assert record["logprob"] == pytest.approx(float(made.logprobs_BL[row].sum()), abs=1e-4)
        assert record["num_tokens"] == int(made.num_tokens_B[row])
        assert (record["guidance_scale"], record["seed"]) == (1.0, 0)


def test_sampling_does_not_depend_on_the_batch(captioner, pictures):
    once = captioner.caption(pictures, temperature=1.0, seed=3, batch_size=16)
    assert captioner.caption(pictures, temperature=1.0, seed=3, batch_size=4) == once
    assert captioner.caption(pictures, temperature=1.0, seed=4, batch_size=16) != once
    cut = captioner.caption_records(pictures, temperature=1.0, seed=3, max_length=2)
    assert max(record["num_tokens"] for record in cut) == 2


def test_kinds_of_images_can_be_mixed(captioner, pictures, tmp_path):
    def png(picture):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        return file.getvalue()

    (tmp_path / "a.png").write_bytes(png(pictures[2]))
    mixed = [pictures[0], Image.fromarray(pictures[1]), tmp_path / "a.png", png(pictures[3])]
    assert captioner.caption(mixed) == captioner.caption(pictures[:4])


def test_an_unreadable_image_costs_no_other_its_caption(captioner, pictures):
    whole = captioner.caption_records(pictures, temperature=1.0, batch_size=4)
    broken = [b"junk" if row in (0, 4, 5, 6, 7) else p for row, p in enumerate(pictures)]
    records = captioner.caption_records(broken, temperature=1.0, batch_size=4)
    for row, record in enumerate(records):
        if row in (0, 4, 5, 6, 7):
            assert record == {"key": str(row), "error": "not an image: 4 bytes of no known format"}
        else:
            assert record["caption"] == whole[row]["caption"]
    for method in (
        captioner.caption,
        captioner.encode_image,
        lambda images: captioner.score(images, ["a"] * len(images)),
    ):
        with pytest.raises(UserError, match=r"images\[1\] cannot be read: not an image"):
            method([pictures[0], b"junk", b"junk"])


def test_score_is_the_teacher_forced_sum(captioner, pictures, pixels):
    captions = ["a red cat", "the sun", "", "two green birds and a dog on a mat, or so"] + ["a"] * 7
    labels = captioner.tokenizer.encode_batch(captions, LENGTH)
    model, params = captioner.model, captioner.params
    inputs = jnp.pad(jnp.asarray(labels), ((0, 0), (1, 0)))[:, :-1]
    hidden = model.hidden(params, inputs, model.encode(params, pixels), None)
    logits = model.logits(params, hidden)[..., : model.config.vocab_size]
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    chosen = np.take_along_axis(logprobs, labels[..., None], axis=2)[..., 0]
    expected = np.where(labels > 0, chosen, 0).sum(axis=1)
    scores = captioner.score(pictures, captions, batch_size=4)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-4)


def test_encode_image_is_the_mean_over_patches(captioner, pictures, pixels):
    patches = captioner.encode_image(pictures, patches=True, batch_size=4)
    expected = captioner.model.encode(captioner.params, pixels)
    np.testing.assert_allclose(patches, expected, atol=1e-5)
    means = captioner.encode_image(pictures, batch_size=4)
    assert means.shape == (11, 32)
    np.testing.assert_allclose(means, np.asarray(expected).mean(axis=1), atol=1e-5)


def test_uneven_batches_compile_once(captioner, pictures):
    captioner.caption(pictures[:8], batch_size=8)
    size = generate_module._generate._cache_size()
    captioner.caption(pictures[:5], batch_size=8)  # padded to 8
    captioner.caption(pictures, batch_size=8)
    assert generate_module._generate._cache_size() == size


def test_a_mesh_gives_the_same(run_directory, captioner, pictures):
    spread = load(run_directory, mesh=make_mesh(MeshShape(data=4, fsdp=2)))
    for temperature in (0.0, 1.0):
        expected = captioner.caption(pictures, temperature=temperature)
        assert spread.caption(pictures, temperature=temperature) == expected
    captions = ["a red cat"] * len(pictures)
    np.testing.assert_allclose(
        spread.score(pictures, captions), captioner.score(pictures, captions), atol=1e-4
    )
    np.testing.assert_allclose(
        spread.encode_image(pictures), captioner.encode_image(pictures), atol=1e-5
    )


def test_misuse_is_named(captioner, pictures, tmp_path):
    assert captioner.caption([]) == []
    for call, message in (
        (lambda: captioner.caption(pictures, batch_size=0), "batch_size=0"),
        (lambda: captioner.caption(pictures, seed=-1), "seed=-1"),
        (lambda: captioner.caption(pictures, max_length=13), "max_length=13"),
        (lambda: captioner.caption(pictures, max_length=0), "max_length=0"),
        (lambda: captioner.score(pictures, ["a"]), "11 images for 1 captions"),
        (lambda: captioner.encode_image([]), "0 images, batch_size=32"),
        (lambda: load(tmp_path / "none"), "no checkpoint in .*none"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_records_of_several_captions(captioner, pictures):
    """n-best: the best is the record's own; draws are those of one caption an image."""
    beams = captioner.caption_records(pictures, num_beams=4, num_captions=3, batch_size=4)
    drawn = captioner.caption_records(pictures, temperature=1.0, num_captions=3, seed=3)
    once = captioner.caption(pictures, temperature=1.0, seed=3)
    for records in (beams, drawn):
        for record in records:
            assert 1 <= len(record["captions"]) <= 3
            fields = ("caption", "logprob", "num_tokens", "finish")
            assert [record[name] for name in fields] == [
                record["captions"][0][name] for name in fields
            ]
    assert [record["caption"] for record in drawn] == once


def test_prefixes_of_all_and_of_each(captioner, pictures):
    for prefix in ("a red", ["a blue dog"] * 5 + ["two"] * 6):
        records = captioner.caption_records(pictures, prefix=prefix, batch_size=4)
        for row, record in enumerate(records):
            assert record["caption"].startswith(prefix if isinstance(prefix, str) else prefix[row])
    too_long = ["a"] * 10 + ["two green birds " * 9]
    records = captioner.caption_records(pictures, prefix=too_long)
    assert "prefix too long" in records[10]["error"]
    assert records[9]["caption"] == captioner.caption(pictures[9:10], prefix="a")[0]
    with pytest.raises(UserError, match="1 prefixes for 11 images"):
        captioner.caption(pictures, prefix=["a"])


def test_texts_that_may_not_be_written_and_that_end(captioner, pictures):
    free = captioner.caption(pictures)
    word = next(
        w for caption in free for w in caption.split() if w in ["a", "red", "cat", "blue", "dog"]
    )
    banned = captioner.caption(pictures, banned=[word])
    assert banned != free and captioner.caption(pictures, banned=[]) == free
    records = captioner.caption_records(pictures, stop=[word])
    for caption, record in zip(free, records, strict=True):
        assert caption.startswith(record["caption"])
    assert "stop" in {record["finish"] for record in records}


def test_guidance_is_in_the_record(captioner, pictures):
    guided = captioner.caption_records(pictures, guidance_scale=2.0)
    assert {record["guidance_scale"] for record in guided} == {2.0}
    assert captioner.caption(pictures, guidance_scale=1.0) == captioner.caption(pictures)
    away = captioner.caption(pictures, guidance_scale=3.0, contrast=pictures[0])
    assert away != [record["caption"] for record in guided]
    assert not captioner.has_null_image
    with pytest.raises(UserError, match="contrast cannot be read"):
        captioner.caption(pictures, guidance_scale=3.0, contrast=b"junk")


def test_scores_by_token_and_without_the_prior(captioner, pictures):
    captions = ["a red cat", "the sun", "", "two green birds"] + ["a"] * 7
    plain = captioner.score(pictures, captions)
    labels = captioner.tokenizer.encode_batch(captions, LENGTH)
    by_token = captioner.score(pictures, captions, normalize=True)
    np.testing.assert_allclose(by_token, plain / (labels > 0).sum(axis=1), rtol=1e-5)
    half, whole = (captioner.score(pictures, captions, alpha=a) for a in (0.5, 1.0))
    np.testing.assert_allclose(plain - half, half - whole, atol=1e-4)
    model, params = captioner.model, captioner.params
    dropped = model.drop_memory(
        params, model.encode(params, jnp.zeros((11, 16, 16, 3), jnp.uint8)), jnp.ones(11, bool)
    )
    prior = score(model, params, dropped, jnp.asarray(labels))
    np.testing.assert_allclose(plain - whole, prior, atol=1e-4)


def test_classes_score_as_captions(captioner, pictures):
    names, templates = ["cat", "dog", "red cat"], ("a {}", "the {}")
    found = captioner.classify(pictures, names, templates, alpha=0.5)
    assert found.shape == (11, 3)
    for column, name in enumerate(names):
        each = [
            captioner.score(pictures, [t.replace("{}", name)] * 11, alpha=0.5) for t in templates
        ]
        np.testing.assert_allclose(found[:, column], np.logaddexp(*each), atol=1e-4)
    with pytest.raises(UserError, match=r"has no \{\}"):
        captioner.classify(pictures, names, ("a",))


def test_few_classes_without_the_prior_on_a_mesh(run_directory, captioner, pictures):
    spread = load(run_directory, mesh=make_mesh(MeshShape(data=4, fsdp=2)))
    for model in (captioner, spread):
        found = model.classify(pictures[:3], ["cat", "dog", "sun"], alpha=1.0)
        assert found.shape == (3, 3)
    np.testing.assert_allclose(
        found, captioner.classify(pictures[:3], ["cat", "dog", "sun"], alpha=1.0), atol=1e-4
    )


def test_a_captioner_without_image_is_a_language_model(run_directory, captioner, pictures):
    """Alone it writes what guidance of scale 0 does; another vocabulary is refused."""
    language = captioner.as_language_model(captioner.tokenizer, alpha=0.0, beta=0.0)
    alone = captioner.caption(pictures, language=language)
    assert alone == captioner.caption(pictures, guidance_scale=0.0)
    assert len(set(alone)) == 1
    # log q + alpha log p - beta log p(x) with q = p(x) and beta 1 is the captioner, at alpha.
    same = captioner.as_language_model(captioner.tokenizer, alpha=1.0, beta=1.0)
    assert captioner.caption(pictures, language=same) == captioner.caption(pictures)
    older = load(run_directory, step=3)
    other = captioner.as_language_model(older.tokenizer, alpha=1.0, beta=0.5)
    assert older.caption(pictures, language=other, num_beams=3) != older.caption(pictures)
    from capjax.data.tokenizer import Tokenizer

    strange = Tokenizer.train(["other texts"], 280)
    with pytest.raises(UserError, match=r"is not .* of the model that is to guide it"):
        captioner.as_language_model(strange)


def test_what_cannot_be_asked_of_all_images_is_said_at_once(captioner, pictures):
    for fields, message in (
        ({"prefix": "two green birds " * 9}, "prefix=.*leave no room in max_length=12"),
        ({"contrast": pictures[0]}, "contrast: guidance_scale=1 leads away from nothing"),
        ({"stop": [" "]}, "a text in it is blank"),
        ({"num_beams": 200}, "num_beams=200: at most 192 of this vocabulary"),
        ({"temperature": 1e-40}, "temperature=1e-40: expected 0"),
        ({"length_penalty": 0.5}, "length_penalty=0.5 is of beams"),
    ):
        with pytest.raises(UserError, match=message):
            captioner.caption(pictures, **fields)
