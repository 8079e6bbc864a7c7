"""Datasets that TensorFlow Datasets prepared as ArrayRecord: `tfds:coco_captions?data_dir=DIR`.

Only what lies on the disk is read (`tfds.builder_from_directory`'s way), so neither the dataset's
own code nor TensorFlow is imported and nothing is downloaded. TFDS parses the records; images stay
encoded.
"""

import os
from collections.abc import Iterator
from typing import Any, SupportsIndex

import numpy as np

from capjax.data.records import Caption, CorruptRecord, Example, checked_index
from capjax.errors import UserError


def open_tfds(
    path: str,
    *,
    split: str = "train",
    data_dir: str | None = None,
    image: str = "image",
    captions: str = "captions/text",
) -> "TFDSSource":
    """A split of the prepared dataset `NAME[/CONFIG][:VERSION]` below `data_dir`.

    `data_dir` is TFDS's own by default (~/tensorflow_datasets); `split` is a name or a slice
    (`train[:10%]`); `image` and `captions` are paths of features, several of the latter with
    commas between; a sequence of texts gives a caption each. Raises `UserError` without TFDS, for
    a dataset or split that is not there or not in ArrayRecord files, and for other features.
    """
    try:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import read_only_builder
    except ImportError as error:
        raise UserError(
            f"source tfds:{path}: {error}; install TensorFlow Datasets: pip install 'capjax[tfds]'"
        ) from error
    name = f"source tfds:{path}"
    if data_dir is not None:
        data_dir = os.path.expanduser(data_dir)  # noqa: PTH111 (it may be a URL)
    try:
        builder = read_only_builder.builder_from_files(path, data_dir=data_dir)
    except Exception as error:  # ValueError and what damaged descriptions raise
        raise UserError(
            f"{name}: {_first_line(error)}; name a dataset that tfds has prepared below "
            f"data_dir={data_dir or '~/tensorflow_datasets'}"
        ) from error
    features = dict(builder.info.features.items())
    fields = tuple(field.strip() for field in captions.split(","))
    for option, field in (("image", image), *(("captions", field) for field in fields)):
        known = [path for feature in features for path in _paths(features[feature], feature)]
        if field not in known:
            raise UserError(f"{name}: {option}={field} is no feature, but {', '.join(known)}")
    images = [key for key, value in features.items() if isinstance(value, tfds.features.Image)]
    if image not in images:
        raise UserError(f"{name}: image={image} holds no image, but {', '.join(images) or 'none'}")
    texts = [path for feature in features for path in _paths(features[feature], feature, "Text")]
    for field in fields:
        if field not in texts:
            raise UserError(f"{name}: captions={field} holds no texts, but {', '.join(texts)}")
    decoders: dict[str, Any] = {key: tfds.decode.SkipDecoding() for key in images}
    try:
        records = builder.as_data_source(split=split, decoders=decoders)
        len(records)
    except NotImplementedError as error:
        raise UserError(
            f"{name}: its files are {builder.info.file_format}, which have no random access; "
            "prepare it again with file_format=array_record"
        ) from error
    except Exception as error:
        raise UserError(f"{name}?split={split}: {_first_line(error)}") from error
    return TFDSSource(records, f"{builder.info.full_name}/{split}", image, fields, texts)


class TFDSSource:
    """Random access to the examples of a prepared dataset. Made by `open_tfds`.

    A key is `NAME/VERSION/SPLIT/INDEX`; scalars of the other features are the metadata.
    """

    def __init__(
        self, records: Any, name: str, image: str, captions: tuple[str, ...], texts: list[str]
    ) -> None:
        self.name = name
        self.image = image
        self.captions = captions
        self._records = records
        self._texts = texts

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> Example:
        i = checked_index(index, self)
        try:
            record = self._records[i]
            image = record[self.image]
            if not isinstance(image, bytes) or not image:
                raise ValueError(f"{self.image} is empty")
            found = ((field, text) for field in self.captions for text in _texts(record, field))
            captions = tuple(Caption(text, field) for field, text in found if text)
            return Example(f"{self.name}/{i}", image, captions, metadata=self._metadata(record))
        except Exception as error:  # of the file and of the parser: many kinds
            raise CorruptRecord(self.name, i, f"{type(error).__name__}: {error}") from error

    def __repr__(self) -> str:
        return f"TFDSSource({self.name!r}; {len(self)} examples)"

    def _metadata(self, record: dict[str, Any]) -> dict[str, Any]:
        metadata = {}
        for name, value in record.items():
            if isinstance(value, np.generic):
                value = value.item()
            if name in self._texts and name not in self.captions:
                metadata[name] = value.decode()
            elif isinstance(value, bool | int | float):
                metadata[name] = value
        return metadata


def _texts(record: dict[str, Any], field: str) -> Iterator[str]:
    """The texts at a path, each on one line; names of features may hold slashes themselves."""
    if field in record:
        value = record[field]
        for text in [value] if isinstance(value, bytes | str) else value:
            yield " ".join((text.decode() if isinstance(text, bytes) else text).split())
        return
    for name, value in record.items():
        if field.startswith(f"{name}/"):
            inner = field.removeprefix(f"{name}/")
            for part in value if isinstance(value, list) else [value]:
                yield from _texts(part, inner)


def _paths(feature: Any, name: str, kind: str = "") -> Iterator[str]:
    """The paths of a TFDS feature's leaves, or of those whose class is of that name."""
    inner = getattr(feature, "feature", feature)  # of a sequence
    if hasattr(inner, "items"):
        for key, value in inner.items():
            yield from _paths(value, f"{name}/{key}", kind)
    elif kind in ("", type(inner).__name__):
        yield name


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
