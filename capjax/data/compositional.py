"""Tests of composition: a few images, a few captions, and which of them go together.

A reader for each published layout gives `Item`s; their pictures are read when they are wanted.
"""

import csv
import json
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from capjax.data import files
from capjax.data.decode import ImageError, decode_image
from capjax.data.readers.row_groups import import_parquet
from capjax.data.readers.streams import opened
from capjax.errors import UserError, did_you_mean

_ORDER_WORDS = 30  # to which ARO cuts the captions of its tests of word order


class Picture(NamedTuple):
    """One picture: a path or encoded bytes, perhaps a part of it, perhaps several side by side.

    `box` is (left, top, right, bottom) in pixels, of a single part.
    """

    parts: tuple[str | bytes, ...]
    box: tuple[float, float, float, float] | None = None


class Item(NamedTuple):
    """One question of a test: `truth[i][c]` says whether caption c is true of image i."""

    key: str
    kind: str  # what the wrong captions get wrong, in the test's own words
    images: tuple[Picture, ...]
    captions: tuple[str, ...]
    truth: tuple[tuple[bool, ...], ...]


DIAGONAL = ((True, False), (False, True))  # the truth of two images with a caption each


def read_picture(picture: Picture) -> np.ndarray:
    """uint8 [H, W, 3]; pictures side by side have the height of the lowest.

    Raises `ImageError` for what cannot be read, and for a box that lies outside.
    """
    pixels = [decode_image(_encoded(part)) for part in picture.parts]
    if picture.box is not None:
        left, top, right, bottom = (max(0, round(side)) for side in picture.box)
        pixels = [pixels[0][top:bottom, left:right]]
        if pixels[0].size == 0:
            raise ImageError("empty image", f"the box {picture.box} lies outside of it")
    if len(pixels) == 1:
        return pixels[0]
    height = min(len(image) for image in pixels)
    scaled = [
        Image.fromarray(image).resize((max(1, round(image.shape[1] * height / len(image))), height))
        for image in pixels
    ]
    return np.concatenate([np.asarray(image) for image in scaled], axis=1)


def read_winoground(path: str, images: str) -> list[Item]:
    """Winoground, `examples.jsonl` or Parquet (Thrush et al. 2022, arXiv:2204.03162).

    The kind is the tag: what was swapped ("Object", "Relation", "Both").
    """
    return [
        Item(
            str(row["id"]),
            str(row.get("collapsed_tag", "")),
            tuple(_picture(images, row[f"image_{i}"], ".png") for i in (0, 1)),
            (row["caption_0"], row["caption_1"]),
            DIAGONAL,
        )
        for row in _rows(path)
    ]


def read_vismin(path: str, images: str) -> list[Item]:
    """VisMin's benchmark, Parquet or JSON (Awal et al. 2024, arXiv:2407.16772).

    The kind is the category: object, attribute, counting or relation. The rows are as published, in
    half of which the first caption is that of the second image: beside the file, or in `solutions`
    there, must lie their `sim_solution.csv`, which says of which. Raises `UserError` where it does
    not, or is of other rows.
    """
    rows, solution = list(_rows(path)), list(_vismin_solution(path))
    if [row["category"] for row in rows] != [category for category, _ in solution]:
        raise UserError(
            f"{path}: its {len(rows)} rows are not those of its sim_solution.csv, which has "
            f"{len(solution)}; take both from one release, with all parts of the test set"
        )
    return [
        Item(
            str(row.get("id", number)),
            row["category"],
            tuple(_picture(images, row[f"image_{i}"], ".png") for i in (0, 1)),
            (row["text_0"], row["text_1"]),
            DIAGONAL if is_in_order else DIAGONAL[::-1],
        )
        for number, (row, (_, is_in_order)) in enumerate(zip(rows, solution, strict=True))
    ]


def _vismin_solution(path: str) -> Iterator[tuple[str, bool]]:
    """(category, whether the first caption is the first image's) of each row."""
    usual = [files.sibling(path, f"{folder}sim_solution.csv") for folder in ("", "solutions/")]
    found = next((place for place in usual if Path(place).is_file()), None)
    if found is None:
        raise UserError(
            f"{path}: which caption is whose is said by VisMin's sim_solution.csv; put it beside "
            "the file (it is in the folder vismin-bench/solutions of rabiulcste/vismin)"
        )
    for row in csv.DictReader(Path(found).read_text("utf-8").splitlines()):
        first = row["Text"].split(" & ")[0]
        if first not in ("T0_I0 > T1_I0", "T1_I0 > T0_I0"):
            raise UserError(f"{found}: expected a comparison of T0_I0 and T1_I0, got {first!r}")
        yield row["category"], first.startswith("T0")


def read_sugarcrepe(path: str, images: str) -> list[Item]:
    """SugarCrepe (Hsieh et al. 2023, arXiv:2306.14610): one of its files, or their directory.

    `images`: COCO's val2017. The kind is the name of the file, such as "swap_att".
    """
    paths = [path]
    if Path(path).is_dir():
        paths = [str(file) for file in sorted(Path(path).glob("*.json"))]
    return [
        _choice(
            f"{kind}/{row['id']}",
            kind,
            _picture(images, row["filename"]),
            [row["caption"], row["negative_caption"]],
        )
        for file in paths
        for kind in [Path(file).stem]
        for row in _rows(file)
    ]


def read_aro(path: str, images: str) -> list[Item]:
    """ARO's Visual Genome tests (Yuksekgonul et al. 2023, arXiv:2210.01936).

    `visual_genome_relation.json`, whose kind is the relation, or `visual_genome_attribution.json`,
    whose kind is the pair of attributes, as "round_white". The image is cut to its box.
    """
    items = []
    for number, row in enumerate(_rows(path)):
        kind = row["relation_name"] if "relation_name" in row else "_".join(row["attributes"])
        left, top = row["bbox_x"], row["bbox_y"]
        box = (left, top, left + row["bbox_w"], top + row["bbox_h"])
        picture = _picture(images, row["image_path"])._replace(box=box)
        captions = [row["true_caption"], row["false_caption"]]
        items.append(_choice(str(number), kind, picture, captions))
    return items


def read_order(path: str, images: str) -> list[Item]:
    """ARO's tests of word order: JSON rows of `image` and `caption_options`, the true one first.

    ARO draws the four shuffles of each caption anew each time, so they must have been written down
    once. All are cut to 30 words.
    """
    return [
        _choice(
            str(number),
            "order",
            _picture(images, row["image"]),
            [" ".join(text.split()[:_ORDER_WORDS]) for text in row["caption_options"]],
        )
        for number, row in enumerate(_rows(path))
    ]


def read_nlvr2(path: str, images: str) -> list[Item]:
    """NLVR2, `test1.json` and the like (Suhr et al. 2019, arXiv:1811.00491), by its sentences.

    An item is a sentence and its pairs of photographs, left and right as one image, of which it is
    true or not. So it asks for no threshold; a sentence whose pairs are all alike asks nothing.
    """
    sentences: dict[tuple[str, str], list[tuple[Picture, bool]]] = {}
    texts: dict[tuple[str, str], str] = {}
    for row in _rows(path):
        group, _, number = row["identifier"].rpartition("-")
        at = (group.rpartition("-")[0], number)
        names = [f"{group}-img{side}.png" for side in (0, 1)]
        pair = Picture(tuple(posixpath.join(images, name) for name in names))
        sentences.setdefault(at, []).append((pair, str(row["label"]).lower() == "true"))
        texts[at] = row["sentence"]
    return [
        Item(
            "-".join(at),
            "",
            tuple(pair for pair, _ in pairs),
            (texts[at],),
            tuple((is_true,) for _, is_true in pairs),
        )
        for at, pairs in sentences.items()
    ]


def read_imagecode(path: str, images: str) -> list[Item]:
    """ImageCoDe, `valid_data.json` and the like (Krojer et al. 2022, arXiv:2203.15867).

    An item is a description and the ten images of its set, of which it is true of one. `images` has
    a folder for each set, with `img0.jpg`, `img7.jpg` and so on; the file counts them in the order
    of their numbers. The kind is "video", or "static" for the sets of Open Images. Raises
    `UserError` where a folder lacks images.
    """
    items = []
    for row in _rows(path):
        folder, descriptions = row["id"], {k: text for k, text in row.items() if k != "id"}
        pictures = _numbered(posixpath.join(images, folder))
        for target, text in descriptions.items():
            if not 0 <= int(target) < len(pictures):
                raise UserError(f"{path}: {folder} has {len(pictures)} images, but no {target}")
            truth = tuple((place == int(target),) for place in range(len(pictures)))
            kind = "static" if "open-images" in folder else "video"
            items.append(Item(f"{folder}/{target}", kind, pictures, (text.strip(),), truth))
    return items


def _numbered(folder: str) -> tuple[Picture, ...]:
    """The images `img<number>.jpg` of a folder, by number."""
    numbers = [path.stem.removeprefix("img") for path in Path(folder).glob("img*.jpg")]
    if not numbers or not all(number.isdecimal() for number in numbers):
        raise UserError(f"{folder}: expected images img0.jpg, img7.jpg, ...; found {numbers}")
    paths = [posixpath.join(folder, f"img{number}.jpg") for number in sorted(numbers, key=int)]
    return tuple(Picture((path,)) for path in paths)


READERS: Mapping[str, Callable[[str, str], list[Item]]] = {
    "winoground": read_winoground,
    "vismin": read_vismin,
    "sugarcrepe": read_sugarcrepe,
    "aro_relation": read_aro,
    "aro_attribution": read_aro,
    "aro_order": read_order,
    "nlvr2": read_nlvr2,
    "imagecode": read_imagecode,
}


def read_items(test: str, path: str, images: str) -> list[Item]:
    """The items of a test, one of `READERS`, in a file; `images` is the directory of the images.

    Raises `UserError` for another test, a file that cannot be read, and one of another layout.
    """
    if test not in READERS:
        raise UserError(
            f"no test {test!r}: expected one of {', '.join(READERS)}{did_you_mean(test, READERS)}"
        )
    try:
        items = READERS[test](path, images)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not in the layout of {test} ({type(error).__name__}: {error}); "
            "name the file as it was published, and its test"
        ) from error
    if not items:
        raise UserError(f"{path}: no items; expected a file of {test}")
    return items


def _choice(key: str, kind: str, picture: Picture, captions: Sequence[str]) -> Item:
    """One image and its captions, of which the first is true."""
    truth = tuple(number == 0 for number in range(len(captions)))
    return Item(key, kind, (picture,), tuple(captions), (truth,))


def _rows(path: str) -> Iterator[Mapping[str, Any]]:
    """The objects of a file: Parquet (or several), a JSON list or object (by `id`), or lines."""
    if path.endswith(".parquet"):
        for file in files.expand(path):
            yield from import_parquet().read_table(file).to_pylist()
        return
    with opened(path) as file:
        text = file.read().decode()
    try:
        content = json.loads(text)
    except ValueError:
        try:
            content = [json.loads(line) for line in text.split("\n") if line.strip()]
        except ValueError as error:
            raise UserError(f"{path} is neither JSON nor JSON lines: {error}") from error
    if isinstance(content, dict) and not all(isinstance(row, dict) for row in content.values()):
        content = [content]  # one line
    if isinstance(content, dict):
        content = [{"id": key, **row} for key, row in content.items()]
    yield from content


def _picture(images: str, image: Any, suffix: str = "") -> Picture:
    """Of a name below `images` (with `suffix` if it has none) or of bytes as Parquet holds them."""
    if isinstance(image, Mapping):
        return Picture((image["bytes"],))
    name = image if posixpath.splitext(image)[1] else image + suffix
    return Picture((posixpath.join(images, name),))


def _encoded(part: str | bytes) -> bytes:
    if isinstance(part, bytes):
        return part
    try:
        return files.read_bytes(part)
    except OSError as error:
        raise ImageError("unreadable file", f"{part}: {error.strerror or error}") from error
