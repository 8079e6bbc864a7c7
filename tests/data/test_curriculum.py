"""The curriculum: its epochs as published, whole bags in every process, batches of one shape."""

import itertools
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capjax.data.augmentation import Augment
from capjax.data.bags import write_bags
from capjax.data.captions import CaptionChoice
from capjax.data.curriculum import (
    PUBLISHED,
    BagOrder,
    Curriculum,
    Place,
    Stage,
    bag_file,
    open_bags,
    parse_curriculum,
)
from capjax.data.images import ImagePreprocessing
from capjax.data.mixture import Mixture
from capjax.data.pipeline import Reading, train_batches
from capjax.data.tokenizer import EOS_ID, PAD_ID
from capjax.errors import UserError
from tests.data.numbered import BAD, SIZE, Source, example_ids, take, tokenizer

TWO_STAGES = parse_curriculum(["2:2", "3:easy:5"])


def bags_of(count: int, *sizes: int) -> dict[tuple[str, int], np.ndarray]:
    """Disjoint bags of `count` examples, of every size both "hard" and "easy"."""
    order = np.random.default_rng(0).permutation(count).astype(np.int32)
    return {
        (level, size): order[: count // size * size].reshape(-1, size)
        for level in ("hard", "easy")
        for size in sizes
    }


def order_of(count: int = 23, batch_size: int = 8, **options) -> BagOrder:
    return BagOrder(TWO_STAGES, bags_of(count, 2, 5), batch_size, seed=3, **options)


def test_the_published_schedule():
    sizes = [PUBLISHED.at(epoch).size for epoch in range(20)]
    assert sizes == [2, 2, 2, 3, 3, 3, 3, 3, 5, 5, 7, 7, 10, 10, 15, 15, 15, 20, 20, 20]
    assert PUBLISHED.at(1000) == Stage(20, "hard", 20)
    assert parse_curriculum(str(PUBLISHED).split(",")) == PUBLISHED
    assert TWO_STAGES.stages == (Stage(2, "hard", 2), Stage(3, "easy", 5))


def test_batches_of_100_hold_as_many_bags_as_published():
    order = BagOrder(PUBLISHED, bags_of(2000, 2, 3, 5, 7, 10, 15, 20), 100, seed=0)
    found, epochs = {}, []
    for number in range(order.num_batches()):
        place = order.place(number)
        epochs.append(place.epoch)
        found[place.stage.size] = int(order.rows(number).mask_R.sum())
    assert found == {2: 100, 3: 99, 5: 100, 7: 98, 10: 100, 15: 90, 20: 100}
    batches = {2: 20, 3: 666 // 33, 5: 20, 7: 285 // 14, 10: 20, 15: 133 // 6, 20: 20}
    expected = [batches[PUBLISHED.at(epoch).size] for epoch in range(20)]
    assert np.bincount(epochs).tolist() == expected
    assert order.place(order.num_batches()) == Place(20, 0, PUBLISHED.stages[-1])


@given(
    count=st.integers(10, 60),
    batch_size=st.sampled_from([10, 12, 16]),
    groups=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=40, deadline=None)
def test_an_epoch_passes_once_over_whole_bags(count, batch_size, groups, seed):
    order = BagOrder(TWO_STAGES, bags_of(count, 2, 5), batch_size, seed, groups)
    number = 0
    for epoch in range(4):
        stage = TWO_STAGES.at(epoch)
        bags = {tuple(bag) for bag in order.bags[stage.level, stage.size].tolist()}
        seen = []
        while order.place(number).epoch == epoch:
            assert order.place(number).stage == stage
            index, mask, bag = order.rows(number)
            here = index[mask].reshape(-1, stage.size)
            seen += map(tuple, here.tolist())
            full = groups * (batch_size // groups // stage.size)
            assert bag[mask].tolist() == np.repeat(np.arange(len(here)), stage.size).tolist()
            assert set(bag[~mask].tolist()) <= {full}
            assert (len(index), len(here)) == (batch_size, min(full, len(bags)))
            number += 1
        assert len(seen) == len(set(seen))
        assert set(seen) <= bags
        assert len(bags) - len(seen) < full


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(replace(order_of(), seed=seed).rows(epoch * 2).index_R.tolist())
        for seed, epoch in itertools.product(range(4), range(2))
    }
    assert len(orders) == 8


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_every_process_has_whole_bags_of_the_same_batch(process_count):
    order = order_of(200, 24, groups=4)
    for number in (0, 40, 57):
        whole, size = order.rows(number), order.place(number).stage.size
        parts = [order.rows(number, i, process_count) for i in range(process_count)]
        for field, x in whole._asdict().items():
            np.testing.assert_array_equal(np.concatenate([getattr(p, field) for p in parts]), x)
        for part in parts:
            _, counts = np.unique(part.bag_R[part.mask_R], return_counts=True)
            assert set(counts.tolist()) == {size}


def stream(source, order=None, **options):
    order = order or order_of()
    return train_batches(
        source,
        tokenizer(),
        preprocessing=ImagePreprocessing(SIZE),
        **{"augment": Augment(), "reading": Reading(0), "seed": 3, "text_length": 12} | options,
        batch_size=order.batch_size,
        bags=order,
    )


def test_batches_of_bags():
    order = order_of()
    taken = take(stream(Source(23), order), 10)
    rows = [order.rows(number) for number in range(10)]
    index, mask, bag = (np.concatenate(x) for x in zip(*rows, strict=True))
    np.testing.assert_array_equal(taken["index"], index)
    np.testing.assert_array_equal(taken["mask"], mask)
    np.testing.assert_array_equal(taken["bag"], bag)
    np.testing.assert_array_equal(taken["position"], np.arange(80))
    assert mask[:32].all()  # two epochs of bags of 2: two batches each
    assert not mask[37:40].any()  # bags of 5
    ids = np.array(example_ids(taken))
    np.testing.assert_array_equal(ids[mask], index[mask])
    assert not taken["image"][~mask].any()
    assert taken["tokens"][~mask].tolist() == [[EOS_ID] + [PAD_ID] * 11] * int((~mask).sum())
    texts = [tokenizer().decode(tokens) for tokens in taken["tokens"][mask]]
    for i, text in zip(ids[mask].tolist(), texts, strict=True):
        assert text in (f"example {i}", f"number {i}")


def test_a_bad_example_leaves_its_row_empty_and_is_counted():
    batches = stream(Source(23, BAD), captions=CaptionChoice(per_image=2), bad_budget=1.0)
    taken = take(batches, 4)
    whole = take(stream(Source(23), captions=CaptionChoice(per_image=2)), 4)
    is_bad = np.isin(whole["index"], list(BAD))
    assert is_bad.sum() > len(BAD)
    np.testing.assert_array_equal(taken["mask"], ~is_bad)
    np.testing.assert_array_equal(taken["index"], whole["index"])
    np.testing.assert_array_equal(taken["bag"], whole["bag"])
    np.testing.assert_array_equal(taken["image"][~is_bad], whole["image"][~is_bad])
    np.testing.assert_array_equal(taken["tokens"][~is_bad], whole["tokens"][~is_bad])
    assert taken["tokens"].shape == (32, 2, 12)
    assert [record.index for record in batches.bad_records] == whole["index"][is_bad].tolist()


@pytest.mark.parametrize("process_count", [1, 2])
def test_restarts_threads_and_processes_change_nothing(process_count):
    order = pickle.loads(pickle.dumps(order_of(60, 12, groups=2)))
    options = {"augment": Augment(shift_pixels=2, color_jitter=0.3)}
    whole = take(stream(Source(60), order, **options), 40)
    parts = [
        take(
            stream(
                Source(60),
                order,
                start=31 * 12,
                process_index=index,
                process_count=process_count,
                reading=Reading(2),
                **options,
            ),
            9,
        )
        for index in range(process_count)
    ]
    for name, x in whole.items():
        rows = [part[name].reshape(9, -1, *x.shape[1:]) for part in parts]
        joined = np.concatenate(rows, axis=1).reshape(-1, *x.shape[1:])
        np.testing.assert_array_equal(joined, x[31 * 12 :])


def test_bags_of_a_mixture_take_their_sources_captions():
    choice = CaptionChoice({"tts": 1.0}, datasets={"b": CaptionChoice({"keyword": 1.0})})
    mixture = Mixture({"a": Source(15), "b": Source(8)})
    taken = take(stream(mixture, captions=choice), 2)
    for i, tokens in zip(taken["index"].tolist(), taken["tokens"], strict=True):
        text = f"example {i}" if i < 15 else f"number {i - 15}"
        assert tokenizer().decode(tokens) == text


def test_bags_from_files(tmp_path):
    bags = bags_of(23, 2, 5)
    for key in (("hard", 2), ("easy", 5)):
        bag_file(tmp_path, *key).parent.mkdir()
        write_bags(bag_file(tmp_path, *key), bags[key].tolist(), [f"k{i}" for i in range(23)])
    (unnamed,) = set(range(23)) - set(bags["hard", 2].ravel().tolist())
    opened = open_bags(tmp_path, TWO_STAGES, Source(23, {unnamed: "record"}))
    assert set(opened) == {("hard", 2), ("easy", 5)}
    for key, found in opened.items():
        np.testing.assert_array_equal(found, bags[key])
        assert found.dtype == np.int32
    with pytest.raises(UserError, match=r"1 of 20 images are not in .* such as 'k\d+'"):
        open_bags(tmp_path, Curriculum(TWO_STAGES.stages[1:]), Source(int(bags["easy", 5].max())))
    with pytest.raises(UserError, match=r"2 examples of the key 'k\d'.*unique"):
        open_bags(tmp_path, TWO_STAGES, Mixture({"a": Source(23), "b": Source(5)}))
    bag_file(tmp_path, "hard", 2).write_text(json.dumps([["k0", "k1"], ["k2", "k0"]]))
    with pytest.raises(UserError, match="each image in one bag at most"):
        open_bags(tmp_path, TWO_STAGES, Source(23))
    bag_file(tmp_path, "hard", 2).unlink()
    with pytest.raises(UserError, match=r"2\.json: expected a JSON list"):
        open_bags(tmp_path, TWO_STAGES, Source(23))


@pytest.mark.parametrize("entry", ["3", "x:2", "3:-2", "3::2", "3:a:b:2", ""])
def test_entries_that_are_none(entry):
    with pytest.raises(UserError, match="expected END_EPOCH:SIZE"):
        parse_curriculum(["1:2", entry])


@pytest.mark.parametrize("entries", [[], ["0:2"], ["3:2", "3:5"], ["3:2", "2:5"], ["3:1"]])
def test_stages_that_make_no_curriculum(entries):
    with pytest.raises(UserError, match=r"^curriculum"):
        parse_curriculum(entries)


def test_what_does_not_fit_is_refused():
    good = order_of()
    with pytest.raises(UserError, match="5 images does not fit into the 4 rows of a group"):
        replace(good, groups=2)
    with pytest.raises(UserError, match="batch_size=8 does not divide into 3 groups"):
        replace(good, groups=3)
    with pytest.raises(UserError, match="no bags of 5 images of level 'easy'"):
        replace(good, bags=bags_of(4, 2, 5))
    with pytest.raises(UserError, match="start at a whole batch"):
        stream(Source(23), start=4)
    with pytest.raises(UserError, match="bags in 1 groups do not divide over 2 processes"):
        stream(Source(23), process_count=2)
    with pytest.raises(UserError, match="bags name example 22"):
        stream(Source(20))
