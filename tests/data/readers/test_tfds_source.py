import io
import pickle
import sys
from collections import Counter

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from capjax.data.records import Caption, CorruptRecord
from capjax.data.sources import open_source
from capjax.errors import UserError

SHARD = "toy/1.0.0/toy-train.array_record-00000-of-00001"


def png(i):
    buffer = io.BytesIO()
    Image.new("RGB", (8 + i, 8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """A dataset of 7 examples with up to three captions each, prepared by tfds itself."""
    # It asks a bucket of Google's what is known of a dataset that is being prepared.
    monkeypatch.setattr(tfds.core.DatasetInfo, "initialize_from_bucket", lambda _: None)

    class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path  # where TFDS looks for a description, and finds none

        def _info(self):
            captions = {"text": tfds.features.Text(), "id": np.int64}
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "captions": tfds.features.Sequence(captions),
                "title": tfds.features.Text(),
                "image/filename": tfds.features.Text(),
                "label": tfds.features.ClassLabel(num_classes=5),
            }
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, _):
            return {"train": enumerate(map(record, range(7)))}

        def _generate_examples(self):
            raise NotImplementedError

    def record(i):
        return {
            "image": io.BytesIO(png(i)),
            "captions": [{"text": f"caption {i} {j}", "id": j} for j in range(i % 3 + 1)],
            "title": f"title {i}",
            "image/filename": f"{i}.png",
            "label": i % 5,
        }

    Toy(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    return tmp_path


def test_reads_a_prepared_dataset_without_tensorflow(data_dir):
    source = open_source(f"tfds:toy?data_dir={data_dir}")
    assert repr(source) == "TFDSSource('toy/1.0.0/train'; 7 examples)"
    assert [source[i].image for i in range(7)] == [png(i) for i in range(7)], "bytes as they were"
    example = source[2]
    assert example.key == "toy/1.0.0/train/2"
    assert example.captions == tuple(Caption(f"caption 2 {j}", "captions/text") for j in range(3))
    assert example.metadata == {"title": "title 2", "image/filename": "2.png", "label": 2}
    assert pickle.loads(pickle.dumps(source))[2] == example
    assert "tensorflow" not in sys.modules
    for index in (-1, 7):
        with pytest.raises(IndexError, match="0 <= index < 7"):
            source[index]


def test_a_data_dir_of_the_users_home(data_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(data_dir.parent))
    assert len(open_source(f"tfds:toy?data_dir=~/{data_dir.name}")) == 7


def test_slices_and_other_captions(data_dir):
    options = "split=train[:50%]&captions=title,image/filename"
    source = open_source(f"tfds:toy:1.0.0?data_dir={data_dir}&{options}")
    assert len(source) == 4
    assert source[1].captions == (Caption("title 1", "title"), Caption("1.png", "image/filename"))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("toy", "split=trian", "Unknown split 'trian'"),
        ("toy", "image=img", "image=img is no feature, but .*captions/text"),
        ("toy", "image=title", "image=title holds no image, but image"),
        ("toy", "captions=captions/tex", "captions=captions/tex is no feature"),
        ("toy", "captions=label", "captions=label holds no texts"),
        ("toy:2.0.0", "split=train", "Could not find dataset files for: toy:2.0.0"),
        ("coco_captions", "split=train", "name a dataset that tfds has prepared below"),
        ("a:b:c", "split=train", "Parsing builder name string"),
    ],
)
def test_what_is_not_there_is_refused(data_dir, name, options, reason):
    with pytest.raises(UserError, match=reason) as caught:
        open_source(f"tfds:{name}?data_dir={data_dir}&{options}")
    assert "\n" not in str(caught.value)
    assert "tensorflow" not in sys.modules


def test_damaged_files_give_examples_corrupt_records_or_user_errors(data_dir):
    expected = [png(i) for i in range(7)]
    content = (data_dir / SHARD).read_bytes()
    used = [at for at, byte in enumerate(content) if byte]
    outcomes = Counter()
    for at in used[:: len(used) // 60]:
        (data_dir / SHARD).write_bytes(content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :])
        try:
            source = open_source(f"tfds:toy?data_dir={data_dir}")
        except UserError:
            outcomes["refused"] += 1
            continue
        for i in range(7):
            try:
                assert source[i].image == expected[i]
                outcomes["whole"] += 1
            except CorruptRecord as error:
                assert error.index == i
                outcomes["corrupt"] += 1
    assert outcomes["corrupt"] > 50, outcomes


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"pip install 'capjax\[tfds\]'"):
        open_source("tfds:coco_captions")
