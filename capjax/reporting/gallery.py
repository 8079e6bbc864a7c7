"""Captions beside their images, as the data that the page's script shows.

Per split a list of images (drawn at random, with a seed, from all that were captioned), and per run
what it says of them, every measure of each, where it looked, and what its caption finds instead.
"""

import base64
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from capjax.evaluation.attention import WordMaps
from capjax.reporting.metric_names import in_order, named
from capjax.reporting.runs import Run, evaluations_of
from capjax.reporting.thumbnails import Thumbnails

# Items that name what was found, and the rank which says whether it came before the right one.
_FOUND = {
    "image": ("nearest_key", "caption_to_image_rank"),  # by the caption: the key of an image
    "text": ("image_to_text_nearest", "image_to_text_rank"),  # by the image: a text
}
MAX_ATTENTION_BYTES = 3_000_000  # of the whole page
_RECORD_MEASURES = {
    "exact": "exact_match",
    "unigram_f1": "unigram_f1",
    "logprob": "logprob",
    "num_tokens": "num_tokens",
}
_AGAINST_REFERENCES = {"exact", "unigram_f1"}

Record = dict[str, Any]


def gallery(runs: Sequence[Run], *, seed: int, max_images: int) -> dict[str, Any]:
    """The data of the gallery, ready for JSON: nothing in it is NaN or an array.

    max_images: of all splits together; the small splits are shown whole, the others share the rest.
      The pictures of what captions wrongly find come on top, at most half as many.
    """
    records = {
        split: [{record["key"]: record for record in run.captions.get(split, [])} for run in runs]
        for split in sorted({split for run in runs for split in run.captions})
    }
    keys = {
        split: list(dict.fromkeys(k for run in of for k in run)) for split, of in records.items()
    }
    share = shares({split: len(of) for split, of in keys.items()}, max_images)
    thumbnails, attention = Thumbnails(max_extra=max_images // 2), _AttentionBudget()
    splits = [
        _split(
            split,
            runs,
            records[split],
            random.Random(seed).sample(keys[split], share[split]),
            len(keys[split]),
            thumbnails,
            attention,
        )
        for split in records
    ]
    measures = {name for split in splits for run in split["runs"] for name in run["measures"]}
    return {
        "runs": [
            {"name": run.name, "mode": (run.config.get("preprocessing") or {}).get("mode")}
            for run in runs
        ],
        "measures": [
            {"name": name, "title": named(name).title, "better": named(name).better}
            for name in in_order(measures)
        ],
        "splits": splits,
        "images": thumbnails.images,
        "moved": thumbnails.moved,
        "attention": {"shown": attention.shown, "left_out": attention.left_out},
    }


def shares(sizes: Mapping[str, int], most: int) -> dict[str, int]:
    """How many of each are shown: all of the small ones, and equal shares of the rest."""
    given, left = {}, most
    for i, name in enumerate(sorted(sizes, key=lambda name: sizes[name])):
        given[name] = min(sizes[name], left // (len(sizes) - i))
        left -= given[name]
    return given


def _split(
    split: str,
    runs: Sequence[Run],
    records: Sequence[dict[str, Record]],
    keys: list[str],
    total: int,
    thumbnails: Thumbnails,
    attention: "_AttentionBudget",
) -> dict[str, Any]:
    any_record = {key: record for of in reversed(records) for key, record in of.items()}
    images = [thumbnails.number(any_record[key]) for key in keys]
    said, others = [], {}
    for run, of in zip(runs, records, strict=True):
        measures, found = _measures(run, split, of, keys)
        looked = run.attention.get(split, {})
        said.append(
            {
                "captions": [of[key]["caption"] if key in of else None for key in keys],
                "measures": measures,
                "found": found,
                "attention": {
                    i: attention.encoded(looked[key])
                    for i, key in enumerate(keys)
                    if key in of and _is_of(looked.get(key), of[key]["caption"])
                },
            }
        )
        for key in filter(None, found.get("image", ())):
            other = any_record.get(key, {})
            others[key] = {
                "image": thumbnails.number(other, extra=True),
                "references": _references(other),
            }
    return {
        "name": split,
        "total": total,
        "keys": keys,
        "references": [_references(any_record[key]) for key in keys],
        "images": images,
        "runs": said,
        "others": others,
    }


def _measures(
    run: Run, split: str, records: dict[str, Record], keys: list[str]
) -> tuple[dict[str, list], dict[str, list]]:
    """(numbers by name, what was found wrongly by `_FOUND`), each in the order of `keys`."""
    numbers = {
        name: [_number(_of_record(records.get(key, {}), field)) for key in keys]
        for field, name in _RECORD_MEASURES.items()
    }
    texts: dict[str, list[str]] = {}
    for measured in reversed(evaluations_of(run, split)):
        place = {key: i for i, key in enumerate(measured.keys)}
        rows = [place.get(key) for key in keys]
        for name, values in measured.items.items():
            if values.dtype.kind in "biuf":
                numbers[name] = [None if i is None else _number(values[i].item()) for i in rows]
            else:
                texts[name] = ["" if i is None else str(values[i]) for i in rows]
    found = {
        what: [
            text if text and rank is not None and rank > 1 else None
            for text, rank in zip(texts[name], numbers[rank_name], strict=True)
        ]
        for what, (name, rank_name) in _FOUND.items()
        if name in texts and rank_name in numbers
    }
    known = {name: of for name, of in numbers.items() if any(v is not None for v in of)}
    return known, found


def _is_of(maps: WordMaps | None, caption: str) -> bool:
    """Whether the maps are of this caption, all of it, not of one that was there before."""
    if maps is None or not maps.words:
        return False
    return "".join(caption.split()).casefold() == "".join(maps.words).casefold()


def _of_record(record: Record, field: str) -> Any:
    """The record's field; None for an agreement with references that it does not have."""
    is_known = field not in _AGAINST_REFERENCES or record.get("references")
    return record.get(field) if is_known else None


def _number(value: Any) -> float | int | None:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return int(value) if float(value).is_integer() else float(f"{value:.4g}")


def _references(record: Record) -> list[str]:
    return [str(text) for text in record.get("references") or ()]


class _AttentionBudget:
    """Maps as base64 text until they take `MAX_ATTENTION_BYTES`; counts those left out."""

    def __init__(self) -> None:
        self.shown, self.left_out, self._bytes = 0, 0, 0

    def encoded(self, maps: WordMaps) -> dict[str, Any] | None:
        size = maps.weights.size
        if self._bytes + size > MAX_ATTENTION_BYTES:
            self.left_out += 1
            return None
        self._bytes += size
        self.shown += 1
        return {
            "words": maps.words,
            "grid": list(maps.grid),
            "weights": [base64.b64encode(of.tobytes()).decode() for of in maps.weights],
        }
