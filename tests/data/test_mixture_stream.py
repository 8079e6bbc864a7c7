"""Batches of a mixture: one stream for any processes and restarts, each source in its order."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from ml_collections import ConfigDict

from capjax.commands.build import build_captions, build_source
from capjax.commands.settings import load_config
from capjax.commands.train import check_schedule
from capjax.data.augmentation import Augment
from capjax.data.captions import CaptionChoice
from capjax.data.images import ImagePreprocessing
from capjax.data.mixture import Mixture, MixtureOrder, check_appended, parse_schedule
from capjax.data.pipeline import train_batches
from capjax.data.records import Caption, CorruptRecord, Example
from capjax.data.stream import example_index, mix
from capjax.data.tokenizer import PAD_ID, Tokenizer
from capjax.errors import UserError
from tests.data.test_pipeline import example_ids, make_example, take

TOKENIZER = Tokenizer.train([f"example {i} number" for i in range(100)], 300)
SEED = 5


@dataclasses.dataclass
class Numbers:
    """Examples first, first + 1, ... by their numbers; those of `bad` cannot be read."""

    first: int
    length: int
    bad: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Example:
        if i in self.bad:
            raise CorruptRecord("shard", i, "crc")
        return make_example(self.first + i)


def mixture(schedule=((0, (3.0, 1.0)),), **options) -> Mixture:
    return Mixture({"a": Numbers(0, 50, **options), "b": Numbers(1000, 7)}, schedule)


def ids(source, count, *, batch_size=8, **options) -> list[int]:
    batches = train_batches(
        source,
        TOKENIZER,
        preprocessing=ImagePreprocessing(8),
        augment=Augment(),
        text_length=8,
        batch_size=batch_size,
        seed=SEED,
        **options,
    )
    steps = count * options.get("process_count", 1) // batch_size
    return example_ids(take(batches, steps))


def test_each_source_is_visited_in_its_own_order_once_an_epoch():
    found = ids(mixture(), 800)
    a, b = [i for i in found if i < 1000], [i - 1000 for i in found if i >= 1000]
    assert a == [example_index(mix(SEED, 0), p, 50) for p in range(len(a))]
    assert b == [example_index(mix(SEED, 1), p, 7) for p in range(len(b))]
    assert sorted(a[:50]) == list(range(50))
    assert sorted(b[:7]) == list(range(7))
    assert abs(len(a) - 600) <= 40


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_make_the_rows_of_the_same_batches(process_count):
    whole = np.reshape(ids(mixture(), 160), (20, process_count, -1))
    for index in range(process_count):
        share = {"process_index": index, "process_count": process_count}
        mine = ids(mixture(), 160 // process_count, **share)
        assert mine == whole[:, index].ravel().tolist()


@pytest.mark.parametrize(("start", "batch_size"), [(0, 16), (24, 8), (1016, 8), (1040, 4)])
def test_a_restart_with_any_batch_goes_on_alike(start, batch_size):
    whole = ids(mixture(), 1200)
    assert ids(mixture(), 64, start=start, batch_size=batch_size) == whole[start : start + 64]


def test_a_bad_record_is_replaced_within_its_source():
    sound, found = ids(mixture(), 400), ids(mixture(bad=frozenset({3, 4})), 400, bad_budget=0.5)
    for before, after in zip(sound, found, strict=True):
        if before in (3, 4):
            assert after < 1000
            assert after not in (3, 4)
        else:
            assert after == before


@dataclasses.dataclass
class Described(Numbers):
    """The same with captions of two sources: a short one, and a long one of three sentences."""

    def __getitem__(self, i: int) -> Example:
        short, long = Caption("Number", "alt"), Caption("Example 1. Example 2. Example 3.", "long")
        return super().__getitem__(i)._replace(captions=(short, long))


PLAIN = CaptionChoice({"alt": 1.0})
OWN = CaptionChoice(
    {"alt": 1.0, "long": 3.0},
    lower=False,
    sentences="one",
    templates=("{dataset} {caption}",),
    max_tokens=6,
)


def described(captions: CaptionChoice, steps: int = 160, **options) -> dict[str, np.ndarray]:
    parts = {"a": Described(0, 50, frozenset({3, 4})), "b": Described(1000, 7)}
    batches = train_batches(
        Mixture(parts, ((0, (3.0, 1.0)),)),
        TOKENIZER,
        preprocessing=ImagePreprocessing(8),
        augment=Augment(shift_pixels=1, color_jitter=0.1),
        captions=captions,
        text_length=12,
        batch_size=8,
        seed=SEED,
        bad_budget=1.0,
        **options,
    )
    return take(batches, steps)


def test_captions_of_one_source_differ_and_nothing_else_does():
    found = described(dataclasses.replace(PLAIN, datasets={"b": OWN}))
    plain, own = described(PLAIN), described(OWN)
    order = MixtureOrder(SEED, ((0, (3.0, 1.0)),))
    is_b = np.array([order.place(position)[0] == 1 for position in range(1280)])
    assert is_b[:1024].sum() == 256
    np.testing.assert_array_equal(found["image"], plain["image"])
    np.testing.assert_array_equal(found["image"], own["image"])
    np.testing.assert_array_equal(
        found["tokens"], np.where(is_b[:, None], own["tokens"], plain["tokens"])
    )
    texts = np.array([TOKENIZER.decode(row) for row in found["tokens"]])
    assert set(texts[~is_b]) == {"number"}
    kept = (found["tokens"][is_b] != PAD_ID).sum(1)
    assert kept.max() == 6  # of 12, the end included
    shares = Counter(texts[is_b] == TOKENIZER.decode(TOKENIZER.encode("b Number", 6)))
    assert abs(shares[True] - is_b.sum() / 4) < 4 * (is_b.sum() * 3 / 16) ** 0.5


def test_captions_by_source_go_on_alike_after_a_restart_on_more_processes():
    choice = dataclasses.replace(PLAIN, datasets={"b": OWN})
    whole = described(choice, 20)["tokens"].reshape(20, 2, 4, 12)
    for index in range(2):
        share = {"start": 40, "process_index": index, "process_count": 2}
        again = described(choice, 15, **share)["tokens"].reshape(15, 4, 12)
        np.testing.assert_array_equal(again, whole[5:, index])


def test_weights_appended_on_resume_hold_from_there_on():
    old, first = mixture(), ((0, (3.0, 1.0)),)
    new = mixture((*first, (400, (0.0, 1.0))))
    assert ids(new, 400) == ids(old, 400)
    assert min(ids(new, 200, start=400)) >= 1000


def test_by_index_a_mixture_is_its_sources_one_after_another():
    both = mixture()
    assert [both[i].key for i in (0, 49, 50, 56)] == ["k0", "k49", "k1000", "k1006"]
    with pytest.raises(IndexError, match="expected 0 <= index < 57"):
        both[57]
    assert mixture(()).schedule == ((0, (50.0, 7.0)),)
    shares = Counter(i >= 1000 for i in ids(mixture(()), 57 * 8))
    assert abs(shares[True] - 7 * 8) <= 25


def test_schedules_are_read_and_checked():
    names = ("a", "b")
    assert parse_schedule(["0:b=1;a=3", "100:a=0; b=1"], names) == ((0, (3, 1)), (100, (0, 1)))
    for entry, words in {
        "0:a=1": "no weight of 'b'",
        "0:a=1;b=2;c=3": "weighs c",
        "x:a=1;b=2": "expected POSITION:WEIGHTS",
        "0:a=1;b=much": "expected POSITION:WEIGHTS",
    }.items():
        with pytest.raises(UserError, match=words):
            parse_schedule([entry], names)
    check_appended(["0:a=1"], ["0:a=1", "64:a=2"], 64)
    for after in (["0:a=2"], ["0:a=1", "63:a=2"], []):
        with pytest.raises(UserError, match="may only append entries, from 64 on"):
            check_appended(["0:a=1"], after, 64)


def test_a_config_names_the_sources(tmp_path):
    overrides = [
        "data.source=",
        "data.mixture.web=emoji:val",
        "data.mixture.art=emoji:style",
        "data.schedule=0:art=1;web=3",
    ]
    config = load_config("emoji_quickstart", overrides)
    source = build_source(config)
    assert source.names == ("art", "web")
    assert source.schedule == ((0, (1.0, 3.0)),)
    check_schedule(config, str(tmp_path))
    for other in ("{", '{"batch_size": 4, "data": {}}'):  # `open_workdir` tells what is wrong
        (tmp_path / "config.json").write_text(other)
        check_schedule(config, str(tmp_path))
    (tmp_path / "config.json").write_text('{"batch_size": 4, "data": {"schedule": ["0:art=1"]}}')
    with pytest.raises(UserError, match="may only append"):
        check_schedule(config, str(tmp_path))
    overrides += [
        "captions.datasets.web.sources=alt",
        "captions.datasets.web.sentences=run",
        "captions.datasets.web.max_tokens=1k",
    ]
    config = load_config("emoji_quickstart", [*overrides, "captions.weights=2"])
    choice = build_captions(config)
    web, rest = choice.of("web"), choice.of("art")
    assert rest == dataclasses.replace(choice, datasets=choice.datasets)
    assert (rest.sources, rest.sentences) == ({"tts": 2.0}, "all")
    assert web == CaptionChoice({"alt": 1.0}, sentences="run", max_tokens=1000)
    with pytest.raises(UserError, match="give one of the two"):
        build_source(load_config("emoji_quickstart", overrides[1:]))
    with pytest.raises(UserError, match="which is empty"):
        build_source(load_config("emoji_quickstart", overrides[3:]))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("captions.datasets.wbe.lower=false", "datasets.wbe: data.mixture has no such source; did"),
        ("captions.datasets.web.sentence=one", "no such field; did you mean sentences?"),
        ("captions.datasets.web.datasets=one", "no such field"),
        ("captions.datasets.web.lower=maybe", "web.lower=maybe: expected true or false"),
        ("captions.datasets.web=one", "no such field"),
        ("captions.datasets.web.sentences=two", "datasets.web: captions.sentences='two': choose"),
        ("captions.datasets.web.weights=1,2", "datasets.web: captions.weights=.1, 2. for"),
        ("captions.datasets.web.weights=much", r"web: captions.weights=\('much',\): expected num"),
        ("captions.datasets.web.per_image=2", "web.per_image=2: .*set captions.per_image=2"),
    ],
)
def test_wrong_captions_of_a_source_are_refused_in_one_line(override, words):
    overrides = ["data.source=", "data.mixture.web=emoji:val", override]
    with pytest.raises(UserError, match=words) as error:
        build_captions(load_config("emoji_quickstart", overrides))
    assert "\n" not in str(error.value)


def test_captions_of_a_source_in_a_config_file_are_checked():
    config = load_config("emoji_quickstart", ["data.source=", "data.mixture.web=emoji:val"])
    for wrong in ("one", ConfigDict({"datasets": {}})):
        with config.unlocked():
            config.captions.datasets = ConfigDict({"web": wrong})
        with pytest.raises(UserError, match=r"datasets\.web=.*expected fields of captions"):
            build_captions(config)
    with config.unlocked():
        config.captions.datasets = ConfigDict({"web": {"lower": 3}})
    with pytest.raises(UserError, match=r"web: captions\.lower=3: expected true or false"):
        build_captions(config)
