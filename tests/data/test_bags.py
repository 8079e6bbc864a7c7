"""Bags: on points by hand, their promises on any points, their files."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capjax.data import bags
from capjax.data.bags import (
    DUPLICATE,
    build_bags,
    build_bags_of_sizes,
    random_bags,
    read_bags,
    write_bags,
)
from capjax.errors import UserError


def at_angles(*degrees):
    angle = np.deg2rad(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def test_bags_by_hand():
    # The last two are nearest and go first. 0 and 20 are each other's nearest: the lower row is
    # the anchor. 41 finds nobody.
    points = at_angles(0, 20, 41, 100, 112)
    assert build_bags(points, 2) == [[3, 4], [0, 1]]
    assert build_bags(points, 2, min_similarity=np.cos(np.deg2rad(15))) == [[3, 4]]
    # Near-duplicates (5 and 6 degrees apart) do not share a bag, and both may be in one.
    points = at_angles(0, 5, 20, 26)
    assert build_bags(points, 2) == [[1, 2], [0, 3]]
    assert build_bags(points, 3) == []
    assert build_bags(points, 3, duplicate=1.0) == [[1, 0, 2]]


def test_who_makes_no_bag_may_join_another():
    """0 has the nearest rows, 1 and 2; but these are near-duplicates, and 3 is too far."""
    points, least = at_angles(0, 12, 14, 37), np.cos(np.deg2rad(31))
    assert build_bags(points, 3, min_similarity=least) == [[2, 0, 3]]


def test_rows_that_are_the_same_by_name():
    points = at_angles(0, 14, 29, 42.5)
    assert build_bags(points, 2) == [[2, 3], [0, 1]]
    assert build_bags(points, 2, same_N=["a", "b", "b", "c"]) == [[2, 3], [0, 1]]
    assert build_bags(points, 2, same_N=["a", "a", "b", "b"]) == [[1, 2], [3, 0]]
    assert build_bags(points, 2, same_N=["a"] * 4) == []


@given(
    seed=st.integers(0, 2**16),
    count=st.integers(1, 40),
    size=st.integers(2, 6),
    duplicate=st.sampled_from([0.3, DUPLICATE]),
)
@settings(max_examples=60)
def test_promises(seed, count, size, duplicate):
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((count, 3)) * rng.uniform(0.1, 10, (count, 1))
    points[rng.integers(0, count, count // 2)] = points[0]
    found = build_bags(points, size, duplicate=duplicate)
    assert found == build_bags(points.astype(np.float64) * 4, size, duplicate=duplicate)
    rows = [row for bag in found for row in bag]
    assert len(set(rows)) == len(rows) and all(len(bag) == size for bag in found)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    for bag in found:
        cosine = unit[bag] @ unit[bag].T
        assert (cosine[~np.eye(size, dtype=bool)] <= duplicate + 1e-5).all()


def test_blocks_change_nothing(monkeypatch):
    points = np.random.default_rng(0).standard_normal((50, 8))
    expected = build_bags(points, 4)
    assert len(expected) > 8
    monkeypatch.setattr(bags, "BLOCK", 7)
    assert build_bags(points, 4) == expected


def one_by_one(unit, size, duplicate, least, same):
    """Bags as they are defined, all cosines at hand."""
    cosine = unit @ unit.T
    alike = (cosine > duplicate) | (same[:, None] == same)
    nearest = np.sort(np.where(alike, -1.0, cosine), axis=1)[:, 1 - size :]
    free, found = set(range(len(unit))), []
    for anchor in np.argsort(-nearest.mean(1), kind="stable").tolist():
        bag = [anchor]
        for row in sorted(free, key=lambda row: (-cosine[anchor, row], row)):
            is_new = cosine[anchor, row] >= least and not alike[row, bag].any()
            bag += [row] if is_new and len(bag) < size else []
        if anchor in free and len(bag) == size:
            free -= set(bag)
            found.append(bag)
    return found


@pytest.mark.parametrize("spread", [1e-3, 0.3, 10.0])
@pytest.mark.parametrize("neighbours", [1, 5, 32])
def test_bags_of_several_sizes_as_defined(monkeypatch, neighbours, spread):
    """However few neighbours are kept, and where float32 cannot tell them apart."""
    monkeypatch.setattr(bags, "NEIGHBOURS", neighbours)
    rng = np.random.default_rng(neighbours)
    limits = (0.9, -1.0), (DUPLICATE, 0.8), (1 - 1e-6, -1.0), (1.1, 0.8), (1.1, -1.0)
    for duplicate, least in limits:
        points = rng.standard_normal((1, 8)) + spread * rng.integers(-1, 2, (60, 8))
        points[:2] = rng.standard_normal((2, 8))
        same = rng.integers(0, 50, 60)
        found = build_bags_of_sizes(
            points,
            (2, 4, 61),
            duplicate=duplicate,
            min_similarity=least,
            same_N=[f"n{number}" for number in same],
        )
        unit = bags._on_grid(points)
        for size in (2, 4):
            assert found[size] == one_by_one(unit, size, duplicate, least, same)
        assert found[61] == []


def test_bags_are_tighter_than_chance():
    points = np.random.default_rng(1).standard_normal((200, 8))
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    means = [(unit[bag] @ unit[bag].T).mean() for bag in build_bags(points, 4)]
    assert np.mean(means[:10]) > np.mean(means[-10:]) > 0.25  # 0.25: the row itself
    assert np.mean(means) > 0.5


@given(
    seed=st.integers(0, 2**40),
    count=st.integers(0, 40),
    size=st.integers(2, 6),
    names=st.integers(1, 50),
)
def test_random_bags(seed, count, size, names):
    same = [f"n{row % names}" for row in range(count)]
    found = random_bags(count, size, seed=seed, same_N=same)
    rows = [row for bag in found for row in bag]
    assert len(set(rows)) == len(rows)
    assert all(len({same[row] for row in bag}) == size for bag in found)
    left = {same[row] for row in range(count) if row not in rows}
    assert len(left) < size
    assert len(random_bags(count, size, seed=seed)) == count // size


def test_random_bags_differ_by_seed():
    assert len({str(random_bags(30, 3, seed=seed)) for seed in range(10)}) == 10
    with pytest.raises(UserError, match="size=1"):
        random_bags(30, 1, seed=0)


def test_files_in_the_form_of_truematch(tmp_path):
    path = tmp_path / "3.json"
    write_bags(path, [[2, 0, 1]], ["10", "7", "391895"])
    assert json.loads(path.read_text()) == [[391895, 10, 7]]
    assert read_bags(path) == [["391895", "10", "7"]]
    assert read_bags(path, {"10": "val/10.jpg"}) == [["391895", "val/10.jpg", "7"]]
    write_bags(path, [[1, 0]], ["007", "fluent/1f600"])
    assert read_bags(path) == [["fluent/1f600", "007"]]


@pytest.mark.parametrize("content", ["{", "3", "[[1, 2], [3]]", "[[1, 1]]"])
def test_other_files(tmp_path, content):
    path = tmp_path / "bags.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"bags\.json: expected"):
        read_bags(path)


def test_what_makes_no_bags():
    assert build_bags(np.eye(2), 3) == []
    with pytest.raises(UserError, match="size=1: a bag takes at least 2"):
        build_bags(np.eye(3), 1)
    with pytest.raises(UserError, match="row 1 is not finite or vanishes"):
        build_bags(np.diag([1.0, 0.0]), 2)
