"""What training could not use: by position, so that a replay counts nothing twice."""

import json

import pytest

from capjax.data.batches import BadRecord, DataError
from capjax.training.bad_records import BadRecords


def record(position: int, reason: str = "unreadable record") -> BadRecord:
    return BadRecord(position, 7 * position, reason, f"example {position}")


def positions(path) -> list[int]:
    return [json.loads(line)["position"] for line in path.read_text().splitlines()]


def test_a_resume_drops_what_will_come_again(tmp_path):
    for process in (0, 1):
        bad = BadRecords(tmp_path, 0, process_index=process, process_count=2)
        bad.add([])
        bad.add([record(3 + process), record(9)])
        bad.add([record(20 + process)])
    first, second = tmp_path / "bad_records.jsonl", tmp_path / "bad_records-1.jsonl"
    assert json.loads(first.read_text().splitlines()[0]) == record(3)._asdict()
    BadRecords(tmp_path, 20, process_index=0, process_count=2)
    assert (positions(first), positions(second)) == ([3, 9], [4, 9, 21])  # not this one's
    with second.open("a") as file:
        file.write('{"position": 4, "ind')  # torn
    bad = BadRecords(tmp_path, 20)  # now it is alone
    assert (positions(first), positions(second)) == ([3, 9], [4, 9])
    assert bad.count(20) == {"unreadable record": 4}
    bad.add([record(20)])
    assert positions(first) == [3, 9, 20]


def test_counts_are_of_the_positions_before(tmp_path):
    bad = BadRecords(tmp_path, 0)
    bad.add([record(3), record(9, "no caption"), record(16), record(16, "no caption")])
    assert bad.metrics(0) == {}
    assert bad.metrics(16) == {"bad/unreadable_record": 1, "bad/no_caption": 1}
    bad.add([record(33)])
    assert bad.metrics(32) == {"bad/unreadable_record": 2, "bad/no_caption": 2}
    again = BadRecords(tmp_path, 16)
    assert again.metrics(16) == {"bad/unreadable_record": 1, "bad/no_caption": 1}
    again.add([record(16), record(16, "no caption")])
    assert again.count(32) == {"unreadable record": 2, "no caption": 2}


def test_a_run_stops_beyond_its_budget(tmp_path):
    bad = BadRecords(tmp_path, 0, 0.02)
    bad.add([record(position) for position in range(5)])
    assert bad.metrics(199) == {"bad/unreadable_record": 5}  # the share means nothing yet
    assert bad.metrics(250) == {"bad/unreadable_record": 5}
    bad.add([record(250)])
    with pytest.raises(DataError, match=r"6 of 260 .* bad_budget=0\.02: unreadable record 6; they"):
        bad.metrics(260)


def test_nothing_is_written_where_nothing_is_bad(tmp_path):
    BadRecords(tmp_path, 0).add([])
    assert not list(tmp_path.iterdir())


def test_a_copy_that_somebody_made_is_left_alone(tmp_path):
    copy = tmp_path / "bad_records_copy.jsonl"
    copy.write_text("mine")
    assert BadRecords(tmp_path, 0).count(0) == {}
    assert copy.read_text() == "mine"
