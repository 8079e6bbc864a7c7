"""100 damaged shards: each costs exactly the record that was hit, until the budget is spent."""

import random

import numpy as np
import pytest

from capjax.data.augmentation import Augment
from capjax.data.images import ImagePreprocessing
from capjax.data.pipeline import DataError, train_batches
from capjax.data.records import ArrayRecordSource, CorruptRecord, write_shards
from capjax.errors import UserError
from tests.data.numbered import SIZE, example_ids, make_example, take, tokenizer

NUM_SHARDS, NUM_RECORDS = 100, 4
TOTAL = NUM_SHARDS * NUM_RECORDS


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """The shards, a bit of one record of each flipped, and the indices of those records."""
    examples = [make_example(i) for i in range(TOTAL)]
    paths = write_shards(examples, tmp_path_factory.mktemp("shards"), "test", NUM_RECORDS)
    rng, lost = random.Random(0), set()
    for shard, path in enumerate(paths):
        hit = shard * NUM_RECORDS + rng.randrange(NUM_RECORDS)
        image, content = examples[hit].image, bytearray(path.read_bytes())
        assert content.count(image) == 1
        content[content.index(image) + rng.randrange(len(image))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        lost.add(hit)
    assert len(lost) == NUM_SHARDS
    return paths, lost


def stream(paths, bad_budget: float, start: int = 0):
    return train_batches(
        ArrayRecordSource(paths),
        tokenizer(),
        preprocessing=ImagePreprocessing(SIZE),
        augment=Augment(),
        text_length=12,
        batch_size=20,
        seed=3,
        bad_budget=bad_budget,
        start=start,
    )


def test_each_costs_the_record_that_was_hit(damaged):
    paths, lost = damaged
    source = ArrayRecordSource(paths)
    assert len(source) == TOTAL
    for i in range(TOTAL):
        if i in lost:
            with pytest.raises(CorruptRecord) as error:
                source[i]
            where = (str(paths[i // NUM_RECORDS]), i % NUM_RECORDS)
            assert (error.value.shard, error.value.index) == where
        else:
            assert source[i] == make_example(i)


def test_a_shard_that_was_cut_is_named_before_the_first_batch(damaged, tmp_path):
    paths, _ = damaged
    cut = tmp_path / "cut.array_record"
    cut.write_bytes(paths[0].read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cut\.array_record"):
        ArrayRecordSource([*paths, cut])


def test_a_run_within_its_budget_goes_on_and_a_resume_sees_the_same(damaged):
    paths, lost = damaged
    batches = stream(paths, bad_budget=0.5)
    epoch = take(batches, TOTAL // 20)
    assert {record.index for record in batches.bad_records} == lost
    assert batches.bad == {"unreadable record": len(batches.bad_records)}
    assert not lost & set(example_ids(epoch))
    again = take(stream(paths, bad_budget=0.5, start=200), TOTAL // 20 - 10)
    for name, rows in again.items():
        np.testing.assert_array_equal(rows, epoch[name][200:])


def test_a_run_beyond_its_budget_ends(damaged):
    paths, _ = damaged
    with pytest.raises(DataError, match=r"bad_budget=0\.01: unreadable record"):
        take(stream(paths, bad_budget=0.01), TOTAL // 20)
