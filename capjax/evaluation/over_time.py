"""What a captioner says of the same few images at every evaluation of its training."""

import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from capjax.evaluation.splits import CaptionRecord
from capjax.training.workdir import write_atomic

IMAGES = 12  # of each split


def read_over_time(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines {"step", "key", "caption"} of such a file; what is no such line is left out.

    Raises `OSError` where the file is there and cannot be read.
    """
    path = epath.Path(path)
    lines = []
    for text in path.read_bytes().decode(errors="replace").split("\n") if path.exists() else ():
        try:
            line = json.loads(text)
            known = {"key": str(line["key"]), "caption": str(line["caption"])}
            lines.append({"step": int(line["step"]), **known})
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
    return lines


def keep_over_time(path: epath.PathLike, records: Sequence[CaptionRecord], step: int) -> None:
    """Adds the captions of one step; lines of this step and later ones are replaced.

    The images are those of the lines that are there, of an earlier part of the run or of the
    steps that it repeats; without any, the first `IMAGES` of `records`.

    Raises `OSError` where the file cannot be read or written.
    """
    lines = read_over_time(path)
    keys = {line["key"] for line in lines}
    chosen = [record for record in records if record.key in keys] or records[:IMAGES]
    kept = [line for line in lines if line["step"] < step]
    kept += [{"step": step, "key": record.key, "caption": record.caption} for record in chosen]
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
