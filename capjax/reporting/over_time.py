"""What a model says of the same images at one step after another, as the rows of a table."""

from typing import NamedTuple

from capjax.reporting.runs import Run
from capjax.reporting.thumbnails import Thumbnails

MAX_STEPS = 24  # columns; of more, as many evenly spread


class Row(NamedTuple):
    """image: the base64 text of a WebP file, or "". captions: at each step; None: not captioned."""

    key: str
    image: str
    reference: str
    captions: list[str | None]


class Samples(NamedTuple):
    """The table of one split; `left_out` is the number of steps that are not shown."""

    split: str
    steps: list[int]
    rows: list[Row]
    left_out: int


def samples(run: Run, max_images: int) -> list[Samples]:
    """A table for each split of which a run in training kept captions.

    Images and references are those of the captions of the whole split, where these are there.
    `max_images` may have a picture, of all splits together.
    """
    thumbnails = Thumbnails(max_extra=max_images)
    return [_samples(run, split, thumbnails) for split in sorted(run.over_time)]


def _samples(run: Run, split: str, thumbnails: Thumbnails) -> Samples:
    said = {(line["step"], line["key"]): line["caption"] for line in run.over_time[split]}
    steps = sorted({step for step, _ in said})
    shown = _spread(steps)
    records = {record["key"]: record for record in run.captions.get(split, ())}
    rows = []
    for key in dict.fromkeys(line["key"] for line in run.over_time[split]):
        record = records.get(key, {})
        number = thumbnails.number(record, extra=True)
        image = thumbnails.images[number] if number >= 0 else ""
        reference = next(iter(record.get("references") or ()), "")
        rows.append(Row(key, image, str(reference), [said.get((step, key)) for step in shown]))
    return Samples(split, shown, rows, len(steps) - len(shown))


def _spread(steps: list[int]) -> list[int]:
    """At most `MAX_STEPS` of them, the first and the last among them."""
    if len(steps) <= MAX_STEPS:
        return steps
    last = len(steps) - 1
    return [steps[place * last // (MAX_STEPS - 1)] for place in range(MAX_STEPS)]
