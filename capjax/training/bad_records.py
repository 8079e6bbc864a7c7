"""`bad_records.jsonl` of a workdir: the examples that training could not use, by stream position.

One file for each process that reads: `bad_records.jsonl`, `bad_records-1.jsonl`, … A resume drops
the lines from its position on, which will come again.
"""

import json
from collections.abc import Callable, Sequence

from etils import epath

from capjax.data.batches import BadRecord
from capjax.training.workdir import is_remote, write_atomic


def open_bad_records(
    workdir: epath.PathLike, process_index: int, start: int
) -> Callable[[Sequence[BadRecord]], None]:
    """What adds records to the file of this process, of a run that goes on at position `start`.

    The first process trims all files, whatever the number of processes before.
    """
    root = epath.Path(workdir)
    suffix = f"-{process_index}" if process_index else ""
    path = root / f"bad_records{suffix}.jsonl"
    if process_index == 0:
        for found in sorted(root.glob("bad_records*.jsonl")):
            _trim(found, start)

    def add(records: Sequence[BadRecord]) -> None:
        if not records:
            return
        lines = "".join(json.dumps(record._asdict()) + "\n" for record in records)
        if is_remote(path):  # it cannot append; there are few such records, or the run stops
            write_atomic(path, (path.read_text() if path.exists() else "") + lines)
            return
        with path.open("a") as file:
            file.write(lines)

    return add


def _trim(path: epath.Path, start: int) -> None:
    kept = []
    for line in path.read_text().splitlines():
        try:
            is_before = json.loads(line)["position"] < start
        except (ValueError, KeyError, TypeError):  # torn by a kill
            continue
        if is_before:
            kept.append(line + "\n")
    write_atomic(path, "".join(kept))
