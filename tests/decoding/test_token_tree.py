"""The tree of tokens: its nodes are the prefixes, and every chunk holds its nodes' ancestors."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from capjax.decoding.token_tree import build_tree

texts = st.lists(st.lists(st.integers(2, 4), max_size=5), min_size=1, max_size=12)


def labels_of(texts: list[list[int]], length: int = 5) -> np.ndarray:
    """Five ids a text; the longest are cut, without an end."""
    rows = [([*text, 1] + [0] * length)[:length] for text in texts]
    return np.array(rows, np.int32)


@settings(max_examples=60)
@given(texts, st.integers(1, 40))
def test_places_lead_to_the_prefixes(texts, chunk):
    labels = labels_of(texts)
    tree = build_tree(labels, chunk)
    num_chunks, size = tree.token_XC.shape
    before_end = [[token for token in text if token > 1] for text in labels.tolist()]
    prefixes = {tuple(text[:i]) for text in before_end for i in range(len(text) + 1)}
    assert size <= len(prefixes)

    def prefix(x, place):
        seen = np.flatnonzero(tree.is_seen_XCC[x, place])
        seen = seen[np.argsort(tree.position_XC[x][seen], kind="stable")]
        assert seen[-1] == place
        assert list(tree.parent_XC[x][seen[1:]]) == list(seen[:-1])
        return tuple(int(t) for t in tree.token_XC[x][seen[1:]])

    found = [prefix(x, c) for x in range(num_chunks) for c in range(size) if tree.is_node_XC[x, c]]
    assert set(found) == prefixes
    for text, places in zip(labels, tree.place_TL, strict=True):
        for i, (token, place) in enumerate(zip(text, places, strict=True)):
            if token == 0:
                continue
            is_end, rest = divmod(int(place), num_chunks * size)
            assert is_end == (token == 1)
            assert prefix(*divmod(rest, size)) == tuple(text[: i + (token != 1)])


def test_a_shared_prefix_stands_once():
    labels = np.array([[5, 6, 7, 1], [5, 6, 8, 1], [5, 6, 1, 0], [5, 6, 7, 1]])
    tree = build_tree(labels)
    assert tree.token_XC.tolist() == [[0, 5, 6, 7, 8]]
    assert tree.position_XC.tolist() == [[0, 1, 2, 3, 3]]
    assert tree.parent_XC.tolist() == [[0, 0, 1, 2, 2]]
    assert tree.place_TL[0].tolist() == [1, 2, 3, 8]
    assert tree.place_TL[2, :3].tolist() == [1, 2, 7]
