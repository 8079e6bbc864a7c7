"""Exact ranks: against whole numbers, ties, blocks, meshes, and what a device holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from capjax.errors import UserError
from capjax.evaluation import ranking
from capjax.evaluation.ranking import (
    count_at_least,
    group_similarities,
    nearest,
    pair_similarities,
    rank_pairs,
)
from capjax.mesh import AXES, MeshShape, make_mesh

N, M, D = 37, 61, 24
MESHES = (
    None,
    make_mesh(MeshShape(), devices=jax.devices()[:1]),
    make_mesh(MeshShape(data=2, fsdp=2, tensor=2)),
)


def unit(rng, *shape):
    x = rng.standard_normal(shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def rows():
    """Embeddings with equal rows among the targets, and pairs: one query has several."""
    rng = np.random.default_rng(0)
    queries, targets = unit(rng, N, D), unit(rng, M, D)
    targets[[5, 20, 60]] = targets[9]
    query = np.concatenate([np.arange(N), [3, 3, 30]])
    target = np.concatenate([rng.permutation(M)[:N], [9, 5, 20]])
    query, target = np.unique([query, target], axis=1)
    return queries, targets, query, target


@pytest.fixture(params=[(8192, 512), (16, 4)], ids=["one block", "many blocks"])
def blocks(request, monkeypatch):
    """The sizes of blocks: all rows in one, or many that do not divide them."""
    for name, size in zip(("TARGETS", "TILE"), request.param, strict=True):
        monkeypatch.setattr(ranking, name, size)
    monkeypatch.setattr(ranking, "QUERIES", 4 * request.param[1])


def by_hand(similarity, query, target):
    """What does not belong to the query and is as similar as the pair or more, and more."""
    better, strictly = [], []
    for q, t in zip(query, target, strict=True):
        others = np.delete(similarity[q], target[query == q])
        better.append((others >= similarity[q, t]).sum())
        strictly.append((others > similarity[q, t]).sum())
    return better, strictly


def test_ranks_whatever_the_blocks_and_the_devices(blocks):
    queries, targets, query, target = rows()
    expected = by_hand(group_similarities(queries[None], targets[None])[0], query, target)
    assert expected[0] != expected[1]  # there are ties
    for mesh in MESHES:
        found = rank_pairs(queries, targets, query, target, mesh)
        np.testing.assert_array_equal(found.better_E, expected[0])
        np.testing.assert_array_equal(found.strictly_E, expected[1])


def test_a_target_of_many_queries_and_ties(monkeypatch):
    """One query with half of the targets: the ranks are right, and bounds as few as pairs."""
    rng, sizes = np.random.default_rng(2), []
    queries = rng.choice([-1.0, 0.0, 1.0], (20, 3)).astype(np.float32)  # many ties, also at 0
    targets = rng.choice([-1.0, 0.0, 1.0], (80, 3)).astype(np.float32)
    query = rng.permutation(np.r_[np.arange(20), np.zeros(60, int)])
    target = rng.permutation(80)
    count = ranking.count_at_least
    monkeypatch.setattr(
        ranking,
        "count_at_least",
        lambda queries, targets, bounds, mesh: (
            sizes.append(bounds.size) or count(queries, targets, bounds, mesh)
        ),
    )
    expected = np.array(by_hand(queries @ targets.T, query, target))
    for mesh in MESHES[::2]:
        np.testing.assert_array_equal(rank_pairs(queries, targets, query, target, mesh), expected)
    assert max(sizes) < 20 * 60  # not queries times pairs of one


def test_processes_rank_what_each_has_alone(monkeypatch):
    """Without a mesh nothing is gathered: several processes would put copies side by side."""
    gathered = lambda x, tiled: np.concatenate([np.asarray(x)] * 2)  # noqa: E731
    monkeypatch.setattr(ranking.multihost_utils, "process_allgather", gathered)
    monkeypatch.setattr(ranking, "QUERIES", 8)
    queries, targets, query, target = rows()
    similarity = group_similarities(queries[None], targets[None])[0]
    for mesh in MESHES[:2]:
        found = rank_pairs(queries, targets, query, target, mesh)
        np.testing.assert_array_equal(found, by_hand(similarity, query, target))
        index = nearest(queries, targets, 1, mesh)[1][:, 0]
        np.testing.assert_array_equal(index, similarity.argmax(1))


def test_nearest_whatever_the_blocks_and_the_devices(blocks):
    queries, targets, *_ = rows()
    similarity = group_similarities(queries[None], targets[None])[0]
    order = np.argsort(-similarity, axis=1, kind="stable")  # of equals the lower index first
    for mesh in MESHES:
        found, index = nearest(queries, targets, 7, mesh)
        np.testing.assert_array_equal(index, order[:, :7])
        np.testing.assert_array_equal(found, np.take_along_axis(similarity, order[:, :7], 1))
    left_out = np.array([[t for t in row if t != row[0]][:6] for row in order])
    np.testing.assert_array_equal(
        nearest(queries, targets, 6, MESHES[2], exclude_N=order[:, 0])[1], left_out
    )


def test_similarities_are_exact():
    """Coordinates of few bits, whose products are whole numbers, and any others to 1e-7."""
    rng = np.random.default_rng(1)
    for width in (3, 512, 1200):
        a = rng.integers(-(2**9), 2**9, (4, width))
        b = rng.integers(-(2**9), 2**9, (5, width))
        np.testing.assert_array_equal(
            group_similarities(a[None].astype(np.float32), b[None].astype(np.float32))[0],
            (a @ b.T).astype(np.float32),
        )
        a, b = unit(rng, 4, width), unit(rng, 5, width)
        expected = a.astype(np.float64) @ b.astype(np.float64).T
        found = group_similarities(a[None], b[None])[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1.5e-7)
        pairs = pair_similarities(a, b, np.arange(4), np.arange(4))
        np.testing.assert_array_equal(pairs, found[range(4), range(4)])


def test_no_product_of_pieces_leaves_the_whole_numbers():
    """The worst rows there are: one coordinate, or all alike and none a whole number of steps."""
    for width in (1, 2, 512, 768, 1024, 1152, 4096):
        bits = ranking._bits(width)
        worst = jnp.full((1, width), 1 / np.sqrt(width), jnp.float32)
        pieces = np.asarray(ranking._pieces(worst, 0, bits), np.float64)
        bound = 2 ** (bits - 1)
        assert np.abs(pieces[0]).max() <= 2 * bound <= 256  # bfloat16 holds it
        assert np.abs(pieces[1:]).max() <= bound
        assert width * bound * bound <= 2**24
        assert (pieces[0] * bound).sum() <= 2**24 and (pieces[0] ** 2).sum() <= 2**24


def test_a_device_holds_blocks_alone(monkeypatch):
    """Temporary memory is that of some tiles, however many queries a block has."""
    monkeypatch.setattr(ranking, "TILE", 32)
    mesh, temporary = MESHES[2], []
    targets = ranking._place(mesh, P(), np.zeros((256, D), np.float32))
    for count in (8 * 256, 8 * 1024):
        queries, bounds, total = (
            ranking._place(mesh, P(AXES), np.zeros((count, width), dtype))
            for width, dtype in ((D, np.float32), (2, np.float32), (2, np.int32))
        )
        arguments = mesh, (0, 0), queries, bounds, total, targets, 256
        compiled = ranking._count.lower(*arguments).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    few, many = temporary
    copies = 2 * (1024 - 256) * (D + 2 + 2) * 4  # of the queries that there are more of, cut up
    assert few < 16 * 32 * 256 * 4 and many - few <= copies


def test_counts_of_written_similarities():
    queries, targets = np.eye(3), np.array([[0.5, 0.25, 0], [0.5, 0, 0], [0.25, 0.75, 0]])
    bounds = np.array([[0.5, 0.5001], [0.0, 0.25], [0.0, -1.0]])
    np.testing.assert_array_equal(
        count_at_least(queries, targets, bounds), [[2, 0], [3, 2], [3, 3]]
    )


def test_what_cannot_be_ranked():
    queries, targets, query, target = rows()
    with pytest.raises(UserError, match="expected at least one row and finite embeddings"):
        rank_pairs(np.where(queries > 0, queries, np.nan), targets, query, target)
    with pytest.raises(UserError, match="targets of width 23"):
        nearest(queries, targets[:, 1:], 1)
    with pytest.raises(UserError, match="count=62: expected 1 to 61"):
        nearest(queries, targets, M + 1)
