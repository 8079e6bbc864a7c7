"""Tests of composition in the layouts they are published in, small."""

import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from capjax.data.compositional import DIAGONAL, Picture, read_items, read_picture
from capjax.data.decode import ImageError
from capjax.errors import UserError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def png(color, size=(4, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def color_of(picture: Picture) -> tuple:
    return tuple(read_picture(picture)[0, 0].tolist())


@pytest.fixture
def images(tmp_path):
    directory = tmp_path / "images"
    directory.mkdir()
    for name, color in (("red", RED), ("blue", BLUE)):
        (directory / f"{name}.png").write_bytes(png(color))
    return str(directory)


def write(path, rows, lines=False) -> str:
    parts = [json.dumps(row, ensure_ascii=False) for row in rows] if lines else [json.dumps(rows)]
    text = "\n".join(parts)
    path.write_text(text)
    return str(path)


def test_winoground(tmp_path, images):
    rows = [
        {
            "id": number,
            "image_0": "red",
            "image_1": "blue",
            "caption_0": "red, not\u2028blue",
            "caption_1": "blue, not red",
            "tag": "Adjective-Color",
            "secondary_tag": "",
            "num_main_preds": 1,
            "collapsed_tag": "Object",
        }
        for number in range(2)
    ]
    for path in (
        write(tmp_path / "examples.jsonl", rows, lines=True),
        write(tmp_path / "one.jsonl", rows[:1], lines=True),
    ):
        item = read_items("winoground", path, images)[0]
        assert item.key == "0" and item.kind == "Object" and item.truth == DIAGONAL
        assert item.captions == ("red, not\u2028blue", "blue, not red")
        assert [color_of(picture) for picture in item.images] == [RED, BLUE]


def test_vismin_in_parquet(tmp_path):
    shown = [{"bytes": png(RED), "path": "a.png"}, {"bytes": png(BLUE), "path": "b.png"}]
    row = {"image_0": shown[0], "text_0": "red", "image_1": shown[1], "text_1": "blue"}
    swapped = {"image_0": shown[1], "text_0": "red", "image_1": shown[0], "text_1": "blue"}
    for number, part in enumerate((row | {"id": "7"}, swapped | {"id": "8"})):
        table = pyarrow.Table.from_pylist([part | {"category": "attribute"}])
        pyarrow.parquet.write_table(table, tmp_path / f"test-{number}.parquet")
    path = str(tmp_path / "test-*.parquet")
    with pytest.raises(UserError, match=r"sim_solution\.csv; put it beside"):
        read_items("vismin", path, "")
    (tmp_path / "solutions").mkdir()
    solution = tmp_path / "solutions" / "sim_solution.csv"
    rows = [
        "idx,Text,Image,category",
        "0,T0_I0 > T1_I0 & T1_I1 > T0_I1,T0_I0 > T0_I1 & T1_I1 > T1_I0,attribute",
        "0,T1_I0 > T0_I0 & T0_I1 > T1_I1,T0_I1 > T0_I0 & T1_I0 > T1_I1,attribute",
    ]
    solution.write_text("\n".join(rows))
    items = read_items("vismin", path, "")
    assert [(item.key, item.kind) for item in items] == [("7", "attribute"), ("8", "attribute")]
    for item in items:
        for image, truth in zip(item.images, item.truth, strict=True):
            [caption] = [
                text for text, is_true in zip(item.captions, truth, strict=True) if is_true
            ]
            assert color_of(image) == {"red": RED, "blue": BLUE}[caption]
    solution.write_text("\n".join(rows[:2]))
    with pytest.raises(UserError, match="its 2 rows are not those"):
        read_items("vismin", path, "")


def test_sugarcrepe(tmp_path, images):
    directory = tmp_path / "data"
    directory.mkdir()
    rows = {
        str(number): {
            "filename": "red.png",
            "caption": f"{number} red",
            "negative_caption": f"{number} blue",
        }
        for number in range(3)
    }
    for name in ("swap_att", "add_obj"):
        write(directory / f"{name}.json", rows)
    items = read_items("sugarcrepe", str(directory), images)
    assert [item.key for item in items] == [
        f"{kind}/{n}" for kind in ("add_obj", "swap_att") for n in "012"
    ]
    assert items[1].captions == ("1 red", "1 blue") and items[1].truth == ((True, False),)
    assert items[0].kind == "add_obj" and color_of(items[0].images[0]) == RED
    [one, *_] = read_items("sugarcrepe", str(directory / "swap_att.json"), images)
    assert one.kind == "swap_att"


def test_aro(tmp_path, images):
    halves = np.zeros((6, 8, 3), np.uint8)
    halves[:, 4:] = BLUE
    Image.fromarray(halves).save(f"{images}/2.png")
    row = {
        "image_id": "2",
        "image_path": "2.png",
        "bbox_x": 4,
        "bbox_y": 1,
        "bbox_w": 3,
        "bbox_h": 5,
        "true_caption": "the horse is eating the grass",
        "false_caption": "the grass is eating the horse",
    }
    relations = [row | {"relation_name": "eating"}]
    [item] = read_items("aro_relation", write(tmp_path / "r.json", relations), images)
    assert item.kind == "eating" and item.captions[0] == row["true_caption"]
    assert item.truth == ((True, False),)
    pixels = read_picture(item.images[0])
    assert pixels.shape == (5, 3, 3) and (pixels == BLUE).all()
    pairs = [row | {"attributes": ["round", "white"]}]
    [item] = read_items("aro_attribution", write(tmp_path / "a.json", pairs), images)
    assert item.kind == "round_white"

    options = ["a b c", "b a c", "a c b", "c a b", " ".join(map(str, range(40)))]
    rows = [{"image": "red.png", "caption_options": options}]
    [item] = read_items("aro_order", write(tmp_path / "o.json", rows), images)
    assert item.truth == ((True, False, False, False, False),)
    assert len(item.captions[-1].split()) == 30


def test_nlvr2(tmp_path, images):
    for number in (0, 1, 2):
        for side, width in ((0, 4), (1, 8)):
            color = (number, side, 0)
            (tmp_path / "images" / f"dev-85-{number}-img{side}.png").write_bytes(
                png(color, (width, 4 + 4 * side))
            )
    rows = [
        {
            "sentence": f"sentence {sentence}",
            "identifier": f"dev-85-{pair}-{sentence}",
            "label": "True" if pair != 1 else "False",
            "left_url": "",
        }
        for sentence in (0, 1)
        for pair in (0, 1, 2)
    ]
    path = write(tmp_path / "dev.json", rows, lines=True)
    first, second = read_items("nlvr2", path, images)
    assert first.captions == ("sentence 0",) and second.captions == ("sentence 1",)
    assert first.truth == ((True,), (False,), (True,))
    pixels = read_picture(second.images[2])
    assert pixels.shape == (4, 4 + 4, 3)  # the right one is scaled to the height of the left one
    assert pixels[0, 0].tolist() == [2, 0, 0] and pixels[0, -1].tolist() == [2, 1, 0]


def test_refusals(tmp_path, images):
    path = write(tmp_path / "x.json", [{"sentence": "a"}])
    with pytest.raises(UserError, match="did you mean winoground"):
        read_items("winogrund", path, images)
    with pytest.raises(UserError, match=r"not in the layout of nlvr2 .*identifier"):
        read_items("nlvr2", path, images)
    with pytest.raises(UserError, match="no items"):
        read_items("nlvr2", write(tmp_path / "empty.json", []), images)
    (tmp_path / "bad.json").write_text("{]")
    with pytest.raises(UserError, match="neither JSON nor JSON lines"):
        read_items("nlvr2", str(tmp_path / "bad.json"), images)
    with pytest.raises(ImageError, match=r"missing\.png"):
        read_picture(Picture((f"{images}/missing.png",)))
    with pytest.raises(ImageError, match="lies outside"):
        read_picture(Picture((f"{images}/red.png",), box=(9, 9, 12, 12)))


def test_imagecode(tmp_path):
    """Frames are counted by their numbers, 7 before 10, and named by these."""
    for folder in ("MSR-VTT-video7-shot1_0", "open-images-1_a"):
        (tmp_path / folder).mkdir()
        for number in (0, 7, 10):
            (tmp_path / folder / f"img{number}.jpg").write_bytes(png(BLUE if number == 7 else RED))
    rows = {
        "MSR-VTT-video7-shot1_0": {"1": "no other is blue ", "2": "red, at the end"},
        "open-images-1_a": {"0": "red"},
    }
    path = write(tmp_path / "valid_data.json", rows)
    first, second, third = read_items("imagecode", path, str(tmp_path))
    assert (first.key, first.kind) == ("MSR-VTT-video7-shot1_0/1", "video")
    assert first.captions == ("no other is blue",)
    assert first.truth == ((False,), (True,), (False,)) and second.truth[2] == (True,)
    assert [color_of(picture) for picture in first.images] == [RED, BLUE, RED]
    assert third.kind == "static" and third.truth[0] == (True,)
    with pytest.raises(UserError, match=r"MSR-VTT-video7-shot1_0: expected images img0\.jpg"):
        read_items("imagecode", path, str(tmp_path / "elsewhere"))
    few = write(tmp_path / "few.json", {"open-images-1_a": {"3": "red"}})
    with pytest.raises(UserError, match="open-images-1_a has 3 images, but no 3"):
        read_items("imagecode", few, str(tmp_path))
    unlabelled = write(tmp_path / "test_data_unlabeled.json", {"open-images-1_a": ["red"]})
    with pytest.raises(UserError, match="not in the layout of imagecode"):
        read_items("imagecode", unlabelled, str(tmp_path))
