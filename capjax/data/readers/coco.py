"""Curated caption sets, each one JSON file beside a directory of images.

Every reader gives one example an image, with its captions in the order of the file, and what the
file says of the image as metadata. `images` names the directory; else the usual places are tried.
"""

import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from capjax.data.readers.indexed_files import IndexedFiles, beside, given_images, indexed_files
from capjax.data.readers.packed_rows import Row
from capjax.data.readers.streams import load_json
from capjax.errors import UserError, did_you_mean

_NOCAPS_IMAGES = ("images", "images/val", "val", "val_imgs", "validation", "test", "")
_TEXTCAPS_IMAGES = ("train_images", "train_val_images/train_images", "images", "test_images", "")
_KARPATHY_IMAGES = ("", "images", "coco", "flickr30k-images", "flickr30k_images")
_KARPATHY_IMAGES_8K = ("Flicker8k_Dataset", "Flickr8k_Dataset")  # spelt so in the archive
_TEXTCAPS_LEFT = {"image_id", "caption_str", "reference_strs", "caption_id"}


def open_coco(path: str, *, images: str | None = None) -> IndexedFiles:
    """COCO captions, `captions_train2017.json` and the like (https://arxiv.org/abs/1504.00325).

    Keys are image ids. Without `annotations` (the test sets) images have no captions. Raises
    `UserError` for another JSON file and as `indexed_files` does.
    """
    split = _stem(path).removeprefix("captions_").removeprefix("image_info_")
    return _coco_like("coco", path, images, (split, f"images/{split}", "images", ""))


def open_nocaps(path: str, *, images: str | None = None) -> IndexedFiles:
    """nocaps, `nocaps_val_4500_captions.json` (https://arxiv.org/abs/1812.08658).

    As COCO's; metadata has each image's `domain`: in-domain, near-domain or out-domain.
    """
    return _coco_like("nocaps", path, images, _NOCAPS_IMAGES)


def open_vizwiz(path: str, *, images: str | None = None) -> IndexedFiles:
    """VizWiz-Captions, `annotations/train.json` (https://arxiv.org/abs/2002.08565).

    As COCO's; rejected captions (spam) and precanned ones (that the image shows nothing) are left
    out, as in the challenge. An image may be left with none.
    """
    split = _stem(path)
    guesses = (split, f"images/{split}", "images", "")
    left_out = {"is_rejected": "rejected captions", "is_precanned": "precanned captions"}
    return _coco_like("vizwiz", path, images, guesses, left_out)


def open_karpathy(
    path: str, *, split: str | None = None, images: str | None = None
) -> IndexedFiles:
    """Karpathy and Fei-Fei's splits of COCO, Flickr30k and Flickr8k (https://arxiv.org/abs/1412.2306).

    `path`: `dataset_coco.json`, `dataset_flickr30k.json` or `dataset_flickr8k.json`; `split`, which
    must be given: one of the file's, or several as `train+restval`; `images`: what holds COCO's
    `train2014/` and `val2014/`, or Flickr's images. Keys are COCO's ids, else file names. Raises
    `UserError` for an unknown split, naming those of the file.
    """
    entries = _entries("karpathy", path, load_json(path), "images")
    sizes = Counter(_get(item, "split", str, path) for item in entries)
    chosen = (split or "").replace("+", " ").replace(",", " ").split()
    unknown = [name for name in chosen if name not in sizes]
    if unknown or not chosen:
        have = ", ".join(f"{name} ({size} images)" for name, size in sizes.items())
        hint = did_you_mean(unknown[0], sizes) if unknown else ""
        raise UserError(
            f"karpathy {path}: split={split!r}: expected ?split= with one of {have}, or several "
            f"joined as train+restval{hint}"
        )

    def rows() -> Iterator[Row]:
        for item in entries:
            if item["split"] not in chosen:
                continue
            name = _get(item, "filename", str, path)
            folder = _get(item, "filepath", str, path) if "filepath" in item else ""
            metadata = {key: item[key] for key in ("split", "imgid", "cocoid") if key in item}
            sentences = _get(item, "sentences", list, path)
            captions = _captions(
                "raw", [_get(sentence, "raw", str, path) for sentence in sentences]
            )
            yield Row(
                str(item.get("cocoid", name)), posixpath.join(folder, name), captions, metadata
            )

    guesses = (*_KARPATHY_IMAGES, *_KARPATHY_IMAGES_8K)
    return indexed_files("karpathy", path, rows(), _places(path, images, guesses))


def open_textcaps(path: str, *, images: str | None = None) -> IndexedFiles:
    """TextCaps, `TextCaps_0.1_train.json` (https://arxiv.org/abs/2003.12462).

    The file has an entry a caption, with all of the image's as `reference_strs`; images are
    `IMAGE_ID.jpg`. Keys are image ids. The test set has no captions.
    """
    grouped: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for item in _entries("textcaps", path, load_json(path), "data"):
        _, texts = grouped.setdefault(_get(item, "image_id", str, path), (item, []))
        if "caption_str" in item:
            texts.append(_get(item, "caption_str", str, path))

    def rows() -> Iterator[Row]:
        for name, (item, texts) in grouped.items():
            references = (
                _get(item, "reference_strs", list, path) if "reference_strs" in item else []
            )
            # Either may be the fuller one where the file is a part of the published one.
            source = "caption_str" if len(texts) >= len(references) else "reference_strs"
            metadata = {
                field: value
                for field, value in item.items()
                if field not in _TEXTCAPS_LEFT and not field.endswith("_tokens")
            }
            captions = _captions(source, max(texts, references, key=len))
            yield Row(name, f"{name}.jpg", captions, metadata)

    return indexed_files("textcaps", path, rows(), _places(path, images, _TEXTCAPS_IMAGES))


def _coco_like(
    layout: str,
    path: str,
    images: str | None,
    guesses: Sequence[str],
    left_out: dict[str, str] | None = None,
) -> IndexedFiles:
    """`left_out`: marks of annotations that are not used, and what the repr calls these."""
    data = load_json(path)
    counts, texts = Counter[str](), dict[Any, list[str]]()
    entries = _entries(layout, path, data, "images")
    for item in entries:
        texts[_get(item, "id", (int, str), path)] = []
    for item in _entries(layout, path, data, "annotations") if "annotations" in data else []:
        caption, owner = _get(item, "caption", str, path), _get(item, "image_id", (int, str), path)
        mark = next((mark for mark in left_out or {} if item.get(mark)), None)
        if mark is not None:
            counts[(left_out or {})[mark]] += 1
        elif owner not in texts:
            counts["captions of images that are not listed"] += 1
        else:
            texts[owner].append(caption)

    def rows() -> Iterator[Row]:
        for item in entries:
            name = _get(item, "file_name", str, path)
            metadata = {"image_id" if key == "id" else key: item[key] for key in item}
            yield Row(str(item["id"]), name, _captions("caption", texts[item["id"]]), metadata)

    return indexed_files(layout, path, rows(), _places(path, images, guesses), counts)


def _captions(source: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    return [(source, stripped) for text in texts if (stripped := str(text).strip())]


def _places(path: str, images: str | None, guesses: Sequence[str]) -> list[str]:
    return beside(path, *guesses) if images is None else given_images(path, images)


def _stem(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0]


def _entries(layout: str, path: str, data: dict[str, Any], field: str) -> list[dict[str, Any]]:
    items = data.get(field)
    if type(items) is not list or not all(type(item) is dict for item in items):
        raise UserError(
            f"{layout} {path}: expected a list of objects as {field!r}, the fields are "
            f"{', '.join(map(repr, data))}; is this another dataset's file?"
        )
    return items


def _get(item: Any, field: str, kind: type | tuple[type, ...], path: str) -> Any:
    value = item.get(field) if type(item) is dict else None
    if not isinstance(value, kind) or value == "":
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(one.__name__ for one in kinds)
        raise UserError(
            f"{path}: expected {field!r} to be {expected} in every entry, got {value!r:.80} in "
            f"{item!r:.200}; is this another dataset's file, or damaged?"
        )
    return value
