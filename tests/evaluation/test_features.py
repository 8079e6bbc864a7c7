"""Frozen features by hand, and when those that were kept are taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from capjax.data.images import ImagePreprocessing
from capjax.errors import UserError
from capjax.evaluation import features
from capjax.evaluation.features import frozen_features
from capjax.mesh import place_tree
from capjax.models.captioner import Captioner, CaptionerConfig
from capjax.models.towers import Towers
from tests.evaluation.tiny import (
    EIGHT,
    ONE,
    PREPROCESSING,
    LabelledImages,
    params,
    readable,
    towers,
)

COUNT = 13
SOURCE = ("noise", LabelledImages(COUNT))


def made(mesh=ONE, kind="patch_mean", source=SOURCE, preprocessing=PREPROCESSING, **options):
    placed = place_tree(mesh, params(), towers().param_specs())
    return frozen_features(
        towers(), placed, source, preprocessing, mesh=mesh, kind=kind, batch_size=8, **options
    )


def by_hand(kind):
    examples = [SOURCE[1][index] for index in readable(COUNT)]
    images = jnp.stack([PREPROCESSING.preprocess_bytes(x.image) for x in examples])
    model = towers().coca
    ways = {
        "patch_mean": lambda params, x: towers().encode_image(params, x).mean(1),
        "pooled": lambda params, x: model.pooled(params, model.encode(params, x)),
        "embedding": lambda params, x: model.embed_image(params, model.encode(params, x)),
    }
    return jax.jit(ways[kind])(params(), images)


@pytest.mark.parametrize("kind", features.KINDS)
def test_by_hand(kind):
    for mesh in (ONE, EIGHT) if kind == "pooled" else (ONE,):
        rows = made(mesh, kind)
        np.testing.assert_allclose(rows.values, by_hand(kind), rtol=1e-4, atol=1e-5)
        assert rows.values.dtype == np.float32 and rows.unreadable == 2
        assert rows.keys == tuple(f"a/{index:03d}" for index in readable(COUNT))


def test_what_is_kept_is_taken_for_the_same_alone(tmp_path, monkeypatch):
    directory = epath.Path(tmp_path / "features")
    first = made(directory=directory)
    (file,) = directory.iterdir()
    whole = file.read_bytes()

    def fail(*_, **__):
        raise AssertionError("computed")

    with monkeypatch.context() as patched:
        patched.setattr(features, "map_images", fail)
        for mesh in (ONE, EIGHT):
            again = made(mesh, directory=directory)
            np.testing.assert_array_equal(again.values, first.values)
            np.testing.assert_array_equal(again.labels_N, first.labels_N)
            assert again.keys == first.keys and again.unreadable == first.unreadable
        others = [
            {"kind": "pooled"},
            {"source": ("other", SOURCE[1])},
            {"source": ("noise", LabelledImages(COUNT + 1))},
            {"source": ("noise", LabelledImages(COUNT, seed=2))},
            {"preprocessing": ImagePreprocessing(image_size=8, mode="pad")},
            {"max_examples": 5},
        ]
        for other in others:
            with pytest.raises(AssertionError, match="computed"):
                made(directory=directory, **other)
        for damaged in (b"", whole[: len(whole) // 2], whole.replace(b"a", b"b")):
            file.write_bytes(damaged)
            with pytest.raises(AssertionError, match="computed"):
                made(directory=directory)
    np.testing.assert_array_equal(made(directory=directory).values, first.values)
    assert list(directory.iterdir()) == [file] and file.read_bytes() == whole


def test_what_there_is_not_is_an_error():
    with pytest.raises(UserError, match="choose one of patch_mean, pooled, embedding"):
        made(kind="mean")
    config = CaptionerConfig(
        image_size=8, patch_size=4, width=8, depth=1, num_heads=1, mlp_dim=8, vocab_size=9
    )
    captioner = Towers(captioner=Captioner(config))
    with pytest.raises(UserError, match="no contrastive towers"):
        frozen_features(captioner, {}, SOURCE, PREPROCESSING, mesh=ONE, kind="embedding")


def test_where_features_cannot_be_written_they_are_not_kept(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    found = made(directory=epath.Path(tmp_path / "file" / "features"))
    assert len(found.keys) == len(readable(COUNT))
    said = capsys.readouterr().err
    assert said.startswith("capjax: warning: features cannot be kept in") and said.count("\n") == 1


def test_features_that_are_not_finite_are_an_error():
    broken = params() | {"encoder": dict(params()["encoder"])}
    name = next(k for k, x in broken["encoder"].items() if not isinstance(x, dict))
    broken["encoder"][name] = broken["encoder"][name] * np.nan
    with pytest.raises(UserError, match="noise: features are not finite"):
        frozen_features(towers(), broken, SOURCE, PREPROCESSING, mesh=ONE, batch_size=8)
