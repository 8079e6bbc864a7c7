"""What img2dataset itself wrote (tests/fixtures/img2dataset), in each of its formats."""

import json
import shutil
from pathlib import Path

import pytest

from capjax.data.decode import decode_image
from capjax.data.sources import open_source
from capjax.errors import UserError

FIXTURE = Path(__file__).parents[2] / "fixtures" / "img2dataset"
ADDRESSES = {
    "webdataset": "webdataset/{00000..00001}.tar",
    "parquet": "parquet/*.parquet",
    "files": "files",
}


@pytest.fixture
def written(tmp_path):
    """A copy: the index of a tar is kept beside it."""
    return shutil.copytree(FIXTURE, tmp_path / "img2dataset")


def pairs():
    """The picture's key in the corpus, its number and caption, as the metadata files tell."""
    records = [json.loads(path.read_text("utf-8")) for path in FIXTURE.glob("files/*/*.json")]
    return {record["style_key"]: (record["key"], record["caption"]) for record in records}


@pytest.mark.parametrize("layout", ADDRESSES)
def test_every_picture_that_was_downloaded_with_its_caption(written, layout):
    source = open_source(written / ADDRESSES[layout])
    examples = {
        example.metadata["style_key"]: example for example in map(source.__getitem__, range(6))
    }
    assert len(source) == len(examples) == 6, "of seven; missing.png was not there"
    assert examples.keys() == pairs().keys()
    for name, (number, caption) in pairs().items():
        example = examples[name]
        assert Path(example.key).stem == number
        assert [found.text for found in example.captions] == [caption] * bool(caption)
        assert decode_image(example.image).shape == (48, 48, 3)
        (file,) = FIXTURE.glob(f"files/*/{number}.jpg")
        assert example.image == file.read_bytes(), "the same bytes in each format"
        assert example.metadata["url"].endswith(".png")
        assert example.metadata["original_width"] == 64
        assert example.metadata["status"] == "success"
    assert sum(not caption for _, caption in pairs().values()) == 1


def test_one_failed_and_the_metadata_beside_the_shards_says_so(written):
    source = open_source(written / ADDRESSES["parquet"])
    assert "1 rows without status success" in repr(source)
    statistics = [json.loads(path.read_text()) for path in written.glob("webdataset/*_stats.json")]
    assert sum(one["count"] for one in statistics) == 7
    assert sum(one["failed_to_download"] for one in statistics) == 1


@pytest.mark.parametrize(("layout", "files"), [("webdataset", "tar"), ("parquet", "parquet")])
def test_its_directory_is_answered_with_the_address_of_its_files(written, layout, files):
    with pytest.raises(
        UserError, match=rf"no images in .*; its \.{files} files are '.*/\*\.{files}'"
    ):
        open_source(written / layout)
