"""Image preprocessing against the processors of transformers (those on Pillow), to the bit.

With any resizer installed: what stands for theirs is `exact`.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.data.images import ImagePreprocessing
from capjax.errors import UserError
from capjax.interop.huggingface_images import read_preprocessing, write_preprocessing
from capjax.models.image_encoder import ImageEncoderConfig, normalize

SIZE = 24
SHAPES = [(37, 53), (53, 37), (24, 24), (31, 31), (25, 24), (24, 91), (15, 19), (7, 40), (129, 64)]
CLIP_SIZE = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
SQUARE = {"size": {"height": SIZE, "width": SIZE}}
# The library's module and class, and what is said to it beyond its defaults.
PROCESSORS = {
    "clip": ("clip", "CLIP", CLIP_SIZE),
    "clip, bilinear": ("clip", "CLIP", CLIP_SIZE | {"resample": 2, "image_std": [0.3, 0.5, 0.7]}),
    "clip, stretched": ("clip", "CLIP", SQUARE | {"do_center_crop": False}),
    "siglip": ("siglip", "Siglip", SQUARE),
    "siglip, bilinear": ("siglip", "Siglip", SQUARE | {"resample": 2}),
    "siglip, cropped": ("siglip", "Siglip", CLIP_SIZE | {"do_center_crop": True}),
    "vit": ("vit", "ViT", SQUARE),
    "vit, raw": ("vit", "ViT", SQUARE | {"do_normalize": False}),
}


def image(shape: tuple[int, int]) -> np.ndarray:
    """Noise on slow waves: what both sharp and smooth images do to a filter."""
    rows, columns = np.indices(shape)[..., None]
    waves = 128 + 60 * np.sin(rows / 5) * np.cos(columns / 7 + np.arange(3))
    noise = np.random.default_rng(0).normal(0, 40, (*shape, 3))
    return np.clip(waves + noise, 0, 255).astype(np.uint8)


def encoder(**statistics) -> ImageEncoderConfig:
    sizes = {"patch_size": 8, "width": 8, "depth": 1, "num_heads": 1, "mlp_dim": 8}
    return ImageEncoderConfig(image_size=SIZE, **sizes, **statistics)


def normalized(pixels: np.ndarray, config: ImageEncoderConfig) -> np.ndarray:
    return jax.device_get(normalize(jnp.asarray(pixels[None]), config))[0]


def processor_class(libraries, module: str, name: str):
    package = libraries.transformers.models
    return getattr(getattr(package, module), f"{name}ImageProcessorPil")


@pytest.mark.parametrize("case", PROCESSORS)
def test_pixels_are_the_librarys(case, libraries, tmp_path):
    kind, name, options = PROCESSORS[case]
    theirs = processor_class(libraries, kind, name)(**options)
    theirs.save_pretrained(tmp_path)
    fields, statistics, notes = read_preprocessing(tmp_path, kind, SIZE)
    assert notes == []
    ours = ImagePreprocessing(**fields)
    config = encoder(**statistics)
    for shape in SHAPES:
        pixels = ours.preprocess(image(shape))
        raw = theirs(image(shape), do_rescale=False, do_normalize=False)["pixel_values"][0]
        np.testing.assert_array_equal(pixels, raw.transpose(1, 2, 0), err_msg=str(shape))
        found = normalized(pixels, config)
        wanted = theirs(image(shape))["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("mode", ["crop", "stretch"])
@pytest.mark.parametrize(("kind", "name"), [("clip", "CLIP"), ("siglip", "Siglip"), ("vit", "ViT")])
def test_the_library_reads_what_is_written(kind, name, mode, libraries, tmp_path):
    config = encoder(image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6))
    fields = {"image_size": SIZE, "antialias": True, "mode": mode, "resample": "bilinear"}
    fields["exact"] = True
    content = write_preprocessing(kind, config, fields)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    theirs = processor_class(libraries, kind, name).from_pretrained(tmp_path)
    picture = image((37, 53))
    wanted = theirs(picture)["pixel_values"][0].transpose(1, 2, 0)
    pixels = ImagePreprocessing(**fields).preprocess(picture)
    found = normalized(pixels, config)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)
    statistics = {"image_mean": config.image_mean, "image_std": config.image_std}
    assert read_preprocessing(tmp_path, kind, SIZE) == (fields, statistics, [])


@pytest.mark.parametrize(
    ("kind", "content", "fields"),
    [
        # As they were written before sizes had names, and since they have a file in common.
        ("clip", {"size": 24, "crop_size": 24}, {"mode": "crop", "resample": "bicubic"}),
        ("vit", {"size": 24}, {"mode": "stretch", "resample": "bilinear"}),
        (
            "siglip",
            {"image_processor": {"size": {"height": 24, "width": 24}, "resample": 2}},
            {"mode": "stretch", "resample": "bilinear"},
        ),
    ],
    ids=["old clip", "old vit", "processor"],
)
def test_other_forms_of_the_file(kind, content, fields, tmp_path):
    name = "processor" if "image_processor" in content else "preprocessor"
    (tmp_path / f"{name}_config.json").write_text(json.dumps(content))
    found, _, notes = read_preprocessing(tmp_path, kind, SIZE)
    assert found == {"image_size": SIZE, "antialias": True, "exact": True} | fields
    assert notes == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"resample": 1}, r"resample=1: expected 2 \(bilinear\) or 3 \(bicubic\)"),
        ({"do_resize": False}, "do_resize=False: expected True"),
        ({"rescale_factor": 1.0}, "rescale_factor=1.0: expected 0.0039"),
        (
            {"size": {"shortest_edge": 32}},
            "size={'shortest_edge': 32} is not supported; expected 24",
        ),
        ({"crop_size": {"height": 20, "width": 24}}, "crop_size=.*; expected 24 x 24"),
        ({"do_center_crop": False, "size": {"shortest_edge": 24}}, "size=.*; expected 24 x 24"),
    ],
    ids=str,
)
def test_what_we_do_not_do_is_refused(content, message, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_preprocessing(tmp_path, "clip", SIZE)
