"""The stream: one law of positions, whatever the threads, workers, processes, batches, restarts."""

import io
import itertools
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from functools import cache, partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from capjax.data import pipeline
from capjax.data.augmentation import Augment
from capjax.data.batches import DecodedImages
from capjax.data.captions import CaptionChoice
from capjax.data.images import ImagePreprocessing
from capjax.data.pipeline import DataError, Reading, eval_batches, synthetic_batches, train_batches
from capjax.data.records import ArrayRecordSource, write_shards
from capjax.data.stream import example_index, position_rng, substitute_index
from capjax.data.tokenizer import EOS_ID, PAD_ID
from capjax.errors import UserError
from tests.data.numbered import BAD, SIZE, Source, example_ids, make_example, take, tokenizer

AUGMENT = Augment(crop_scale=(0.3, 1.0), shift_pixels=2, flip=True, color_jitter=0.2)


def stream(source, *, batch_size=6, augment=AUGMENT, seed=3, **options) -> pipeline.Batches:
    return train_batches(
        source,
        tokenizer(),
        preprocessing=ImagePreprocessing(SIZE),
        augment=augment,
        text_length=12,
        batch_size=batch_size,
        seed=seed,
        **options,
    )


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])
        assert left[name].dtype == right[name].dtype


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ArrayRecordSource:
    examples = [make_example(i) for i in range(50)]
    for i in (3, 30):
        examples[i] = examples[i]._replace(image=b"garbage")
    directory = tmp_path_factory.mktemp("shards")
    return ArrayRecordSource(write_shards(examples, directory, "test", 20))


def test_a_batch_is_what_the_interface_says():
    with stream(Source(5)) as batches:
        batch = next(batches)
    assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
        "image": ((6, SIZE, SIZE, 3), "uint8"),
        "tokens": ((6, 12), "int32"),
        "position": ((6,), "uint32"),
    }


def test_a_batch_with_the_index_is_otherwise_the_same():
    plain = take(stream(Source(50, BAD), bad_budget=1.0), 10)
    batches = stream(Source(50, BAD), bad_budget=1.0, with_index=True, augment=Augment())
    taken = take(batches, 10)
    assert taken["index"].tolist() == example_ids(taken)  # of those that stand in for bad ones too
    assert (taken["index"].dtype, taken["bag"].dtype) == (np.int32, np.int32)
    assert taken["mask"].all()
    assert not taken["bag"].any()
    np.testing.assert_array_equal(taken["tokens"], plain["tokens"])
    np.testing.assert_array_equal(taken["position"], plain["position"])


def test_several_captions_an_image_lie_side_by_side():
    one = take(stream(Source(5), augment=Augment()), 3)
    two = take(stream(Source(5), augment=Augment(), captions=CaptionChoice(per_image=2)), 3)
    assert two["tokens"].shape == (18, 2, 12)
    assert_same(one, two | {"tokens": two["tokens"][:, 0]})
    for row, (first, second) in zip(example_ids(two), two["tokens"], strict=True):
        texts = {tokenizer().decode(first), tokenizer().decode(second)}
        assert texts == {f"example {row}", f"number {row}"}


def test_max_tokens_keeps_the_beginning_of_a_text():
    whole, short = (
        take(stream(Source(5), captions=CaptionChoice(max_tokens=n)), 2)["tokens"] for n in (0, 3)
    )
    np.testing.assert_array_equal(short[:, :2], whole[:, :2])
    assert (short[:, 2] == EOS_ID).all()
    assert (short[:, 3:] == PAD_ID).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(0, 2**40), st.integers(0, 2**63))
def test_every_epoch_is_a_permutation(num_examples, epoch, seed):
    first = epoch * num_examples
    order = [example_index(seed, first + i, num_examples) for i in range(num_examples)]
    assert sorted(order) == list(range(num_examples))


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed, epoch):
        return tuple(example_index(seed, epoch * 40 + i, 40) for i in range(40))

    orders = {order(seed, epoch) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100
    # Each example comes at each place, and after each other one, about as often.
    order_of = [[example_index(0, epoch * 8 + i, 8) for i in range(8)] for epoch in range(4000)]
    for place in range(8):
        counts = Counter(order[place] for order in order_of)
        assert max(counts.values()) < 1.3 * min(counts.values())
    pairs = Counter(pair for order in order_of for pair in itertools.pairwise(order))
    assert len(pairs) == 56
    assert max(pairs.values()) < 1.4 * min(pairs.values())


def test_each_epoch_of_the_stream_holds_each_example_once():
    taken = take(stream(Source(37), augment=Augment(), batch_size=5), 37 * 4 // 5 + 1)
    ids = example_ids(taken)
    for epoch in range(4):
        assert sorted(ids[epoch * 37 : (epoch + 1) * 37]) == list(range(37))
    np.testing.assert_array_equal(taken["position"], np.arange(len(ids)))
    for row, i in enumerate(ids):
        text = tokenizer().decode(taken["tokens"][row])
        assert text in (f"example {i}", f"number {i}")


@pytest.mark.parametrize("num_threads", [0, 1, 2, 4])
@pytest.mark.parametrize("cache_megabytes", [0, 1])
def test_threads_and_cache_do_not_change_the_stream(num_threads, cache_megabytes):
    reading = Reading(num_threads=num_threads, prefetch=2, cache_megabytes=cache_megabytes)
    assert_same(take(stream(Source(50), reading=reading), 20), reference(20))


@cache
def reference(count: int) -> dict[str, np.ndarray]:
    """The stream made in the plainest way: no threads, no cache, one process."""
    return take(stream(Source(50), reading=Reading(0, 0, 0, 0)), count)


@pytest.mark.parametrize("process_count", [1, 2, 3, 6])
def test_processes_make_the_rows_of_the_same_global_batches(process_count):
    parts = [
        stream(Source(50), process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    for step in range(10):
        rows = [next(part) for part in parts]
        whole = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        expected = {name: x[step * 6 : step * 6 + 6] for name, x in reference(20).items()}
        assert_same(whole, expected)
    for part in parts:
        part.close()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 100), st.sampled_from([1, 2, 3, 4, 5, 12]))
def test_a_restart_anywhere_with_any_batch_size_goes_on_alike(start, batch_size):
    taken = take(stream(Source(50), start=start, batch_size=batch_size), 12 // batch_size + 1)
    stop = start + len(taken["position"])
    assert_same(taken, {name: x[start:stop] for name, x in reference(21).items()})


def test_worker_processes_do_not_change_the_stream_or_the_count(shards):
    plain = stream(shards, reading=Reading(num_threads=0), start=7, bad_budget=1.0)
    workers = stream(shards, reading=Reading(1, 2, 2), start=7, bad_budget=1.0)
    assert_same(take(workers, 15), take(plain, 15))
    assert workers.bad == plain.bad == {"not an image": workers.bad.total()}
    assert workers.bad_records == plain.bad_records
    assert workers.seen == plain.seen == 90


def test_to_seek_costs_nothing():
    source = Source(2**40)
    begin = time.perf_counter()
    for start in (10**6, 10**9, 10**15 + 1):
        with stream(source, start=start) as batches:
            batch = next(batches)
        expected = (start + np.arange(6, dtype=np.uint64)).astype(np.uint32)
        np.testing.assert_array_equal(batch["position"], expected)
    assert time.perf_counter() - begin < 2


def test_augmentation_depends_on_the_position_and_not_only_on_the_example():
    taken = take(stream(Source(1)), 4)
    assert len({image.tobytes() for image in taken["image"]}) > 20
    other = take(stream(Source(1), seed=4), 4)
    assert (taken["image"] != other["image"]).any()
    draws = {position_rng(seed, p).random() for seed in range(20) for p in range(20)}
    assert len(draws) == 400


def test_a_bad_example_is_replaced_where_it_stands_and_counted():
    source = Source(50, BAD)
    batches = stream(source, augment=Augment(), bad_budget=1.0)
    taken = take(batches, 25)
    good = take(stream(Source(50), augment=Augment()), 25)
    expected_bad = []
    for position, (got, was) in enumerate(zip(example_ids(taken), example_ids(good), strict=True)):
        attempt = 0
        while was in BAD:
            expected_bad.append((position, was))
            attempt += 1
            was = substitute_index(3, position, attempt, 50)
        assert got == was
    assert [(record.position, record.index) for record in batches.bad_records] == expected_bad
    assert len(expected_bad) >= 12
    assert batches.bad == Counter(
        {"image": "not an image", "record": "unreadable record", "caption": "no caption"}[BAD[i]]
        for _, i in expected_bad
    )


def test_bad_examples_count_alike_after_a_restart():
    whole = stream(Source(50, BAD), bad_budget=1.0)
    take(whole, 20)
    parts = [stream(Source(50, BAD), start=start, bad_budget=1.0) for start in (0, 42)]
    for part, count in zip(parts, (7, 13), strict=True):
        take(part, count)
    assert parts[0].bad_records + parts[1].bad_records == whole.bad_records


def test_the_run_stops_when_the_budget_is_exceeded():
    source = Source(100, dict.fromkeys(range(5), "record"))
    batches = stream(source, bad_budget=0.02)
    with pytest.raises(DataError, match=r"of 204 examples .* bad_budget=0\.02: unreadable record"):
        take(batches, 200)
    assert batches.seen == 204  # the first batch beyond 200 positions
    enough = stream(source, bad_budget=0.2)
    take(enough, 50)
    assert enough.bad.total() >= 15


@pytest.mark.parametrize("reading", [Reading(num_threads=0), Reading(num_threads=2)])
def test_a_source_with_nothing_usable_stops_at_once(reading):
    source = Source(20, dict.fromkeys(range(20), "image"))
    with pytest.raises(DataError, match="16 examples in a row"):
        next(stream(source, reading=reading))


def test_the_cache_is_dropped_for_a_source_that_is_larger():
    source = Source(200)
    cached = DecodedImages(source, 1)
    cached._room = 10 * SIZE * SIZE * 3  # room for ten images
    for i in range(9):
        cached.read(i)
    assert len(cached._kept) == 9
    for i in range(200):
        cached.read(i)
    assert len(cached._kept) == 0


def evaluate(source, **options) -> list[dict[str, np.ndarray]]:
    preprocessing = ImagePreprocessing(SIZE)
    make = partial(eval_batches, source, tokenizer(), preprocessing=preprocessing, text_length=12)
    with make(**options) as batches:
        return list(batches)


@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("num_examples", [1, 8, 9])
def test_evaluation_covers_each_example_once_in_equal_full_batches(process_count, num_examples):
    parts = [
        evaluate(Source(num_examples), batch_size=4, process_index=i, process_count=process_count)
        for i in range(process_count)
    ]
    assert {len(part) for part in parts} == {-(-num_examples // 4)}
    rows = [
        {name: x[row] for name, x in part[step].items()}
        for step in range(len(parts[0]))
        for part in parts
        for row in range(4 // process_count)
    ]
    assert [row["mask"] for row in rows] == [i < num_examples for i in range(len(rows))]
    for i, row in enumerate(rows[:num_examples]):
        assert row["index"] == i
        expected = np.asarray(Image.open(io.BytesIO(make_example(i).image)))
        np.testing.assert_array_equal(row["image"], expected)
        assert tokenizer().decode(row["tokens"]) == f"example {i}"
    for row in rows[num_examples:]:
        assert row["image"].max() == 0
        assert row["tokens"].tolist() == [EOS_ID] + [PAD_ID] * 11


def test_evaluation_masks_bad_images_and_takes_missing_captions_as_empty():
    batches = eval_batches(
        Source(10, BAD),
        tokenizer(),
        preprocessing=ImagePreprocessing(SIZE),
        captions=CaptionChoice({"keyword": 1.0}),
        text_length=12,
        batch_size=5,
    )
    taken = take(batches, 2)
    assert [i for i in range(10) if not taken["mask"][i]] == [4]
    assert batches.bad == {"not an image": 1}
    assert tokenizer().decode(taken["tokens"][7]) == "number 7"
    missing = evaluate(Source(2, {1: "caption"}), batch_size=2)[0]
    assert missing["mask"].all()
    assert missing["tokens"][1].tolist() == [EOS_ID] + [PAD_ID] * 11


def test_a_part_of_an_evaluation_is_spread_over_the_source():
    taken = evaluate(Source(100), batch_size=4, max_examples=5)
    indices = np.concatenate([batch["index"][batch["mask"]] for batch in taken])
    assert indices.tolist() == [0, 20, 40, 60, 80]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": Source(0)}, "has 0 examples"),
        ({"batch_size": 6, "process_count": 4}, "batch_size=6 does not divide.*use 4 or 8"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"text_length": 1}, "text_length=1: expected at least 2"),
        ({"process_index": 2, "process_count": 2}, "process_index=2: expected 0 to 1"),
        ({"start": -1}, "start=-1"),
        ({"bad_budget": 1.5}, r"bad_budget=1\.5"),
    ],
)
def test_impossible_settings_are_refused_before_the_first_batch(options, message):
    good = {
        "source": Source(5),
        "tokenizer": tokenizer(),
        "preprocessing": ImagePreprocessing(SIZE),
        "augment": Augment(),
        "text_length": 8,
        "batch_size": 4,
        "seed": 0,
    }
    with pytest.raises(UserError, match=message):
        train_batches(**(good | options))


def test_impossible_reading_is_refused():
    with pytest.raises(UserError, match=r"reading\.num_workers=-1"):
        Reading(num_workers=-1)


def test_synthetic_batches_follow_the_law_of_positions():
    make = partial(
        synthetic_batches, image_size=4, text_length=9, vocab_size=300, batch_size=12, seed=0
    )
    whole = {name: [] for name in ("image", "tokens", "position")}
    for batch in itertools.islice(make(), 100):
        for name, x in batch.items():
            whole[name].append(x)
    whole = {name: np.concatenate(parts) for name, parts in whole.items()}
    assert whole["image"].dtype == np.uint8
    assert whole["tokens"].dtype == np.int32
    np.testing.assert_array_equal(whole["position"], np.arange(1200, dtype=np.uint32))
    part = next(make(start=505, process_index=1, process_count=3))
    for name, x in part.items():
        np.testing.assert_array_equal(x, whole[name][509:513])
    ends = (whole["tokens"] == EOS_ID).argmax(1)
    assert ((whole["tokens"] == EOS_ID).sum(1) == 1).all()
    assert ends.min() >= 1
    for row, end in zip(whole["tokens"], ends, strict=True):
        assert row[:end].min() > 2
        assert (row[end + 1 :] == PAD_ID).all()
    assert whole["tokens"].max() < 300
    with pytest.raises(UserError, match="batch_size=12"):
        make(process_count=5)


CHILD = """
    import sys, time
    from capjax.data.images import ImagePreprocessing
    from capjax.data.pipeline import Reading, train_batches
    from capjax.data.records import ArrayRecordSource
    from capjax.data.tokenizer import Tokenizer
    from capjax.data.augmentation import Augment

    if __name__ == "__main__":
        batches = train_batches(
            ArrayRecordSource(sys.argv[2:]), Tokenizer.from_file(sys.argv[1]),
            preprocessing=ImagePreprocessing(8), augment=Augment(), text_length=8, batch_size=4,
            seed=0, reading=Reading(num_workers=2), bad_budget=1.0)
        next(batches)
        next(batches)
        print("ready", flush=True)
        time.sleep(60)
"""


def in_shared_memory(pid: int) -> set[Path]:
    """The files below /dev/shm that a process has mapped, removed since or not."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return set(map(Path, re.findall(r"(/dev/shm/\S+)", maps)))


def test_workers_die_with_a_killed_parent(tmp_path, shards):
    # A fresh process besides: no test has marked the absl flags as parsed there.
    script, model = tmp_path / "child.py", tmp_path / "tokenizer.model"
    script.write_text(textwrap.dedent(CHILD))
    model.write_bytes(tokenizer().model_bytes)
    command = [sys.executable, str(script), str(model), *shards.paths]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "ready\n"
        children = psutil.Process(parent.pid).children(recursive=True)
        assert len(children) >= 2
        shared = set().union(*(in_shared_memory(x.pid) for x in (parent, *children)))
        assert shared  # the queues' semaphores at least
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        _, alive = psutil.wait_procs(children, timeout=5)
    survivors = [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    for child in survivors:
        child.kill()
    assert not survivors
    deadline = time.monotonic() + 5
    while left := {path for path in shared if path.exists()}:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
