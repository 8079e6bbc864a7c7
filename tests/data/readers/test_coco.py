"""Each file here has the fields of the published one, in its order."""

import json
import pickle

import fsspec
import pytest

from capjax.data.records import Caption, CorruptRecord, Example
from capjax.data.sources import open_source
from capjax.errors import UserError


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return str(path)


def texts(source):
    return {source[i].key: [c.text for c in source[i].captions] for i in range(len(source))}


def coco_images(*names):
    return [
        {
            "license": 4,
            "file_name": name,
            "coco_url": f"http://images.cocodataset.org/val2017/{name}",
            "height": 427,
            "width": 640,
            "date_captured": "2013-11-14 17:02:52",
            "flickr_url": "http://farm7.staticflickr.com/x.jpg",
            "id": number,
        }
        for number, name in enumerate(names, 397133)
    ]


def captions_of(*pairs, **more):
    return [
        {"image_id": image, "id": number, "caption": text, **more}
        for number, (image, text) in enumerate(pairs)
    ]


@pytest.fixture
def coco(tmp_path):
    for name in ("000000397133.jpg", "000000397134.jpg"):
        write(tmp_path / "val2017" / name, name.encode())
    annotations = captions_of((397134, "A bus.\n"), (397133, "A man."), (397134, " A red bus."))
    return write(
        tmp_path / "annotations" / "captions_val2017.json",
        {
            "info": {"description": "COCO 2017 Dataset", "year": 2017},
            "licenses": [{"url": "http://creativecommons.org/", "id": 4, "name": "CC"}],
            "images": coco_images("000000397133.jpg", "000000397134.jpg"),
            "annotations": [*annotations, *captions_of((1, "of no image"))],
        },
    )


def test_coco_groups_captions_by_image(coco):
    source = open_source(f"coco:{coco}")
    assert texts(source) == {"397133": ["A man."], "397134": ["A bus.", "A red bus."]}
    assert source[0].image == b"000000397133.jpg"
    assert source[0].captions == (Caption("A man.", "caption"),)
    assert source[0].metadata["image_id"] == 397133
    assert source[0].metadata["width"] == 640
    assert repr(source) == (
        f"coco({coco!r}; 2 images, 3 captions, 1 captions of images that are not listed)"
    )
    assert texts(pickle.loads(pickle.dumps(source))) == texts(source)


def test_coco_images_where_they_are_said_to_be(coco, tmp_path):
    assert len(open_source(f"coco:{coco}?images=val2017")) == 2  # beside `annotations`
    assert len(open_source(f"coco:{coco}?images={tmp_path}/val2017")) == 2
    (tmp_path / "val2017" / "000000397134.jpg").unlink()
    with pytest.raises(CorruptRecord, match="No such file"):
        open_source(f"coco:{coco}")[1]
    with pytest.raises(UserError, match=r"none of the 2 images.*\?images=DIRECTORY"):
        open_source(f"coco:{coco}?images={tmp_path}/val2014")


def test_coco_on_a_remote_store(coco, tmp_path):
    system = fsspec.filesystem("memory")
    system.put(str(tmp_path), "/coco", recursive=True)
    source = open_source("coco:memory://coco/annotations/captions_val2017.json")
    assert texts(source) == texts(open_source(f"coco:{coco}"))


def test_coco_test_set_has_no_captions(tmp_path):
    write(tmp_path / "test2017" / "a.jpg", b"A")
    path = write(
        tmp_path / "annotations" / "image_info_test2017.json",
        {"info": {}, "images": coco_images("a.jpg"), "licenses": [], "categories": []},
    )
    assert texts(open_source(f"coco:{path}")) == {"397133": []}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 99_999, "not JSON"),
        ([], "expected a JSON object"),
        ({"data": []}, "list of objects as 'images'.*'data'"),
        ({"images": [1]}, "list of objects as 'images'"),
        ({"images": [], "annotations": []}, "no usable row among 0"),
        ({"images": [{"id": 1}]}, "'file_name' to be str"),
        ({"images": coco_images("a.jpg"), "annotations": [{"image_id": 1}]}, "'caption' to be str"),
        ({"images": coco_images("a.jpg") * 2}, "'397133' is that of row 0 and of row 1"),
        ({"images": coco_images("../../../etc/passwd")}, "leaves the directory"),
    ],
)
def test_coco_wrong_as_a_whole_is_refused(tmp_path, content, reason):
    write(tmp_path / "a.jpg", b"A")
    with pytest.raises(UserError, match=reason):
        open_source(f"coco:{write(tmp_path / 'captions_x.json', content)}")


def karpathy_image(split, name, **more):
    sentences = [
        {"tokens": ["a", "dog"], "raw": f"A dog {i}. ", "imgid": 0, "sentid": i} for i in (0, 1)
    ]
    return {
        "sentids": [0, 1],
        "imgid": 0,
        "sentences": sentences,
        "split": split,
        "filename": name,
        **more,
    }


@pytest.fixture
def karpathy_coco(tmp_path):
    images = []
    for number, split in enumerate(["test", "restval", "val", "train"], 391895):
        folder = "train2014" if split == "train" else "val2014"
        name = f"COCO_{folder}_{number:012d}.jpg"
        write(tmp_path / "coco" / folder / name, name.encode())
        images.append(karpathy_image(split, name, filepath=folder, cocoid=number))
    return write(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})


def test_karpathy_split_of_coco(karpathy_coco):
    source = open_source(f"karpathy:{karpathy_coco}?split=test")
    assert source[0] == Example(
        "391895",
        b"COCO_val2014_000000391895.jpg",
        (Caption("A dog 0.", "raw"), Caption("A dog 1.", "raw")),
        metadata={"split": "test", "imgid": 0, "cocoid": 391895},
    )
    both = open_source(f"karpathy:{karpathy_coco}?split=train+restval")
    assert list(texts(both)) == ["391896", "391898"]


@pytest.mark.parametrize("query", ["", "?split=", "?split=trian", "?split=train+trian"])
def test_karpathy_needs_a_split_of_the_file(karpathy_coco, query):
    with pytest.raises(UserError, match=r"one of test \(1 images\), restval \(1 images\)"):
        open_source(f"karpathy:{karpathy_coco}{query}")


def test_karpathy_split_of_flickr(tmp_path):
    write(tmp_path / "flickr30k-images" / "1000092795.jpg", b"F")
    images = [karpathy_image("train", "1000092795.jpg")]
    path = write(tmp_path / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    assert texts(open_source(f"karpathy:{path}?split=train")) == {
        "1000092795.jpg": ["A dog 0.", "A dog 1."]
    }


def test_nocaps_has_domains(tmp_path):
    write(tmp_path / "images" / "0013ea2087020901.jpg", b"N")
    image = {
        "license": 0,
        "open_images_id": "0013ea2087020901",
        "height": 1024,
        "width": 732,
        "date_captured": "2018-11-06 11:04:33",
        "file_name": "0013ea2087020901.jpg",
        "coco_url": "https://s3.amazonaws.com/nocaps/val/0013ea2087020901.jpg",
        "id": 0,
        "domain": "near-domain",
    }
    annotations = captions_of((0, "A baby is standing in front of a house."))
    content = {"licenses": [], "info": {}, "images": [image], "annotations": annotations}
    source = open_source(f"nocaps:{write(tmp_path / 'nocaps_val_4500_captions.json', content)}")
    assert texts(source) == {"0": ["A baby is standing in front of a house."]}
    assert source[0].metadata["domain"] == "near-domain"


def test_vizwiz_leaves_out_rejected_and_precanned_captions(tmp_path):
    for i in (0, 1):
        write(tmp_path / "train" / f"VizWiz_train_{i:08d}.jpg", b"V")
    images = [
        {
            "file_name": f"VizWiz_train_{i:08d}.jpg",
            "id": i,
            "text_detected": True,
            "vizwiz_url": f"https://ivc.ischool.utexas.edu/VizWiz_train_{i:08d}.jpg",
        }
        for i in (0, 1)
    ]
    marks = {"is_rejected": False, "is_precanned": False, "text_detected": True}
    annotations = [
        *captions_of((0, "A can."), (0, "A can of coke."), **marks),
        *captions_of((0, "spam"), (1, "spam"), **{**marks, "is_rejected": True}),
        *captions_of((1, "Quality issues are too severe."), **{**marks, "is_precanned": True}),
    ]
    content = {"info": {}, "images": images, "annotations": annotations}
    source = open_source(f"vizwiz:{write(tmp_path / 'annotations' / 'train.json', content)}")
    assert texts(source) == {"0": ["A can.", "A can of coke."], "1": []}
    assert source[0].metadata["text_detected"] is True
    assert "2 rejected captions, 1 precanned captions" in repr(source)


def test_textcaps_groups_by_image(tmp_path):
    write(tmp_path / "train_images" / "011e7e629fb9ae7b.jpg", b"T")
    captions = ["Five bottles of Listerine.", "Many bottles stand together."]
    data = [
        {
            "caption_str": text,
            "image_id": "011e7e629fb9ae7b",
            "image_classes": ["Personal care"],
            "flickr_original_url": "https://c4.staticflickr.com/8/7124/x_o.jpg",
            "flickr_300k_url": "https://c4.staticflickr.com/8/7124/x_z.jpg",
            "image_width": 1024,
            "image_height": 664,
            "set_name": "train",
            "image_name": "011e7e629fb9ae7b",
            "image_path": "train/011e7e629fb9ae7b.jpg",
            "caption_id": 100000 + i,
            "caption_tokens": ["<s>", "five", "</s>"],
            "reference_strs": captions,
            "reference_tokens": [["<s>", "five", "</s>"]],
        }
        for i, text in enumerate(captions)
    ]
    content = {"dataset_type": "train", "dataset_name": "textcaps", "dataset_version": 0.1}
    path = tmp_path / "TextCaps_0.1_train.json"
    source = open_source(f"textcaps:{write(path, {**content, 'data': data})}")
    assert texts(source) == {"011e7e629fb9ae7b": captions}
    assert source[0].metadata["flickr_300k_url"].endswith("x_z.jpg")
    assert "caption_tokens" not in source[0].metadata
    source = open_source(f"textcaps:{write(path, {**content, 'data': data[:1]})}")
    assert source[0].captions == tuple(Caption(text, "reference_strs") for text in captions)
    for entry in data:
        del entry["caption_str"], entry["reference_strs"]
    assert texts(open_source(f"textcaps:{write(path, {**content, 'data': data})}")) == {
        "011e7e629fb9ae7b": []
    }
