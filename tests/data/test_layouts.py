"""The address of a source in its parts."""

import pytest

from capjax.data.layouts import parse_address, without_caches
from capjax.errors import UserError


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("karpathy:d.json?split=train+restval", ("karpathy", "d.json", {"split": "train+restval"})),
        ("a.csv?images=a+b/c%20d", ("csv", "a.csv", {"images": "a+b/c d"})),
        ("s3://x/{00..09}.tar", ("webdataset", "s3://x/{00..09}.tar", {})),
        ("shards/?.tar", ("webdataset", "shards/?.tar", {})),
        ("gs://x/prepared", ("shards", "gs://x/prepared", {})),
        (
            "s3://x/*.array_record?cache_gb=5",
            ("shards", "s3://x/*.array_record", {"cache_gb": "5"}),
        ),
    ],
)
def test_a_layout_a_path_and_options(name, parts):
    assert parse_address(name) == parts


@pytest.mark.parametrize("name", ["emoji:train", "photos", "x.array_record"])
def test_what_no_layout_opens_is_left_to_others(name):
    assert parse_address(name) is None


def test_options_and_paths_that_are_none():
    with pytest.raises(UserError, match=r"no option 'image_dir'.*did you mean 'image"):
        parse_address("a.csv?image_dir=x")
    with pytest.raises(UserError, match="expected a path behind coco:"):
        parse_address("coco:")


def test_how_an_address_is_cached_does_not_count():
    for one, other in (
        ("s3://b/p?cache_gb=20", "s3://b/p?cache_gb=40&cache=/scratch"),
        ("a.parquet?cache_megabytes=5&caption=c", "a.parquet?caption=c"),
        ("webdataset:a.tar?cache=x", "a.tar"),
    ):
        assert without_caches(one) == without_caches(other)
    assert without_caches("a.csv?image=x") != without_caches("a.csv?image=y")
    for value in ("emoji:train", 3, None, "a.csv?nothing=1"):
        assert without_caches(value) == value
