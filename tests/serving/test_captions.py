"""Parameters, and one batch of requests, against the same captioner used from Python."""

import numpy as np
import pytest

from capjax.decoding import generate as generate_module
from capjax.errors import UserError
from capjax.serving import parameters
from capjax.serving.captions import batch_key, caption_batch, structure
from capjax.serving.limits import Limits


@pytest.fixture(scope="module")
def images(captioner, pictures):
    return [captioner.pixels(picture) for picture in pictures]


@pytest.fixture(scope="module")
def parse(captioner):
    return lambda **fields: parameters.parse(
        [(name, str(value)) for name, value in fields.items()], captioner, Limits()
    )


def test_what_is_not_said_is_the_default(parse):
    asked = parse()
    assert (asked.options.method, asked.options.max_length, asked.seed) == ("greedy", 12, 0)
    asked = parse(guidance_scale="1.5", num_captions="2", temperature=".5", seed="3", key="a")
    assert asked.options.guidance_scale == 1.5
    assert (asked.options.num_captions, asked.options.temperature) == (2, 0.5)
    assert (asked.seed, asked.key) == (3, "a")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temprature": 1}, "unknown parameter 'temprature'; did you mean temperature?"),
        ({"num_beams": "two"}, "num_beams='two': expected a whole number"),
        ({"guidance_scale": "1,5"}, "guidance_scale='1,5': expected a number"),
        ({"guidance_scale": "inf"}, "guidance_scale=inf"),
        ({"guidance_scale": "-21"}, "guidance_scale=-21.0: expected -20 to 20"),
        ({"temperature": "nan"}, "temperature=nan"),
        ({"temperature": "0.001"}, "temperature=0.001: expected 0 .greedy., or 0.01 to 10"),
        ({"num_captions": 3}, "num_captions=3: greedy search has one caption"),
        ({"num_captions": 9, "temperature": 1}, "num_captions=9: this server allows at most 8"),
        ({"num_beams": 100}, "num_beams=100: this server allows at most 8"),
        ({"top_p": 0.5}, "top_p=0.5 is of sampling"),
        ({"max_length": 13}, "max_length=13: expected 1 to 12"),
        ({"seed": -1}, "seed=-1: expected 0 to"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"prefix": "x" * 1001}, "prefix has 1001 characters"),
        ({"prefix": "a red cat", "max_length": 2}, "leave no room in max_length=2"),
        ({"seed": "9" * 5000}, "seed has 5000 characters"),
    ],
)
def test_what_is_wrong_is_named(parse, fields, words):
    with pytest.raises(UserError, match=words):
        parse(**fields)


def test_a_field_given_twice_is_refused(captioner):
    with pytest.raises(UserError, match="seed is given twice"):
        parameters.parse([("seed", "1"), ("seed", "2")], captioner, Limits())


def test_a_batch_is_each_image_captioned_alone(captioner, parse, pictures, images):
    for fields in ({"guidance_scale": 2.0}, {"temperature": 1.0, "num_captions": 2, "seed": 3}):
        asked = [parse(key=row, **fields) for row in range(5)]
        records = caption_batch(captioner, images[:5], asked, 8)
        for row, record in enumerate(records):
            alone = captioner.caption_records([pictures[row]], **fields)[0]
            captions = record.pop("captions", [record]), alone.pop("captions", [alone])
            for one, other in zip(*captions, strict=True):
                assert one["caption"] == other["caption"]
                assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
            assert {**record, "logprob": 0} == {**alone, "key": str(row), "logprob": 0}


def test_prefixes_may_differ_in_a_batch(captioner, parse, pictures, images):
    asked = [parse(prefix=text) for text in ("a red", "", "two green")]
    assert len({batch_key(one) for one in asked}) == 1
    records = caption_batch(captioner, images[:3], asked, 4)
    expected = captioner.caption(pictures[:3], prefix=["a red", "", "two green"])
    assert [record["caption"] for record in records] == expected
    assert records[0]["caption"].startswith("a red")


def test_the_seed_parts_batches_of_draws_only(parse):
    assert batch_key(parse(seed=1)) == batch_key(parse(seed=2, key="b"))
    assert batch_key(parse(seed=1, temperature=1)) != batch_key(parse(seed=2, temperature=1))


def test_the_structure_is_all_that_is_compiled(captioner, parse, images):
    def compiled(fields):
        before = generate_module._generate._cache_size()
        caption_batch(captioner, images[:1], [parse(max_length=3, **fields)], 8)
        return generate_module._generate._cache_size() - before

    structures = []
    for fields in (
        {},
        {"prefix": "a"},
        {"guidance_scale": 2},
        {"guidance_scale": 3},
        {"temperature": 1, "seed": 1},
        {"temperature": 0.5, "seed": 2},
        {"temperature": 0.5, "top_p": 0.5},
        {"num_beams": 2},
        {"num_beams": 2, "num_captions": 2},
    ):
        is_new = structure(parse(max_length=3, **fields).options) not in structures
        assert compiled(fields) == is_new, fields
        structures.append(structure(parse(max_length=3, **fields).options))
    assert len(set(structures)) == 5


def test_images_arrive_as_the_model_wants_them(images):
    assert {(image.shape, image.dtype) for image in images} == {((16, 16, 3), np.dtype("uint8"))}
