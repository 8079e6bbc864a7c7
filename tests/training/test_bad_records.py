"""The file of what training could not use: by position, so that a replay counts nothing twice."""

import json

from capjax.data.batches import BadRecord
from capjax.training.bad_records import open_bad_records


def record(position: int) -> BadRecord:
    return BadRecord(position, 7 * position, "unreadable record", f"example {position}")


def positions(path) -> list[int]:
    return [json.loads(line)["position"] for line in path.read_text().splitlines()]


def test_a_resume_drops_what_will_come_again(tmp_path):
    for process in (0, 1):
        add = open_bad_records(tmp_path, process, 0)
        add([])
        add([record(3 + process), record(9)])
        add([record(20 + process)])
    first, second = tmp_path / "bad_records.jsonl", tmp_path / "bad_records-1.jsonl"
    assert json.loads(first.read_text().splitlines()[0]) == record(3)._asdict()
    with second.open("a") as file:
        file.write('{"position": 4, "ind')  # torn
    add = open_bad_records(tmp_path, 0, 20)
    assert (positions(first), positions(second)) == ([3, 9], [4, 9])
    add([record(20)])
    assert positions(first) == [3, 9, 20]


def test_nothing_is_written_where_nothing_is_bad(tmp_path):
    open_bad_records(tmp_path, 0, 0)([])
    assert not list(tmp_path.iterdir())
