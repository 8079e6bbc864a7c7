"""Texts as a tree of tokens, in which a prefix that several share stands once.

Its nodes are the prefixes, the empty one (the root) first, in depth-first order, and are laid out
in chunks of equal size: runs of nodes, each behind the ancestors of its first. So every node finds
its ancestors in its own chunk, and a chunk is read without the others.
Letters beyond `capjax.dims`: X chunks, C places in one.
"""

from typing import NamedTuple

import numpy as np

from capjax.data.tokenizer import EOS_ID, PAD_ID
from capjax.dims import Array, Bool, Int

CHUNK = 128  # nodes; more of them cost attention, fewer repeat more ancestors


class TokenTree(NamedTuple):
    """A tree in chunks, and where each token of each text lies in it."""

    token_XC: Int[np.ndarray | Array, "X C"]  # the last of the prefix; 0 at the root
    position_XC: Int[np.ndarray | Array, "X C"]  # tokens of the prefix
    parent_XC: Int[np.ndarray | Array, "X C"]  # its place in the chunk; the root's is its own
    is_seen_XCC: Bool[np.ndarray | Array, "X C C"]  # ancestors, and itself
    is_node_XC: Bool[np.ndarray | Array, "X C"]  # False in what fills the last chunk
    labels_TL: Int[np.ndarray | Array, "T L"]  # the texts
    # Place x * C + c of the prefix that ends in the token; of an EOS, that of the prefix before it,
    # plus X * C.
    place_TL: Int[np.ndarray | Array, "T L"]


def build_tree(labels_TL: np.ndarray, chunk: int = CHUNK) -> TokenTree:
    """The tree of texts as the tokenizer's `encode_batch` gives them, on the host.

    `chunk` is in nodes; it is at least twice the texts' length and at most all of them.
    """
    labels_TL = np.asarray(labels_TL, np.int32)
    token_M, parent_M, position_M, node_TL = _number_prefixes(labels_TL)
    num_nodes, length = len(token_M), labels_TL.shape[1]
    size = min(max(chunk, 2 * (length + 1)), num_nodes)
    chunks, place_M = _cut(parent_M, size)
    shape = (len(chunks), size)
    node_XC, parent_XC = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    is_node_XC = np.zeros(shape, bool)
    is_seen_XCC = np.broadcast_to(np.eye(size, dtype=bool), (*shape, size)).copy()
    for x, nodes in enumerate(chunks):
        places = {node: place for place, node in enumerate(nodes)}
        node_XC[x, : len(nodes)], is_node_XC[x, : len(nodes)] = nodes, True
        for place, node in enumerate(nodes[1:], 1):
            parent_XC[x, place] = places[parent_M[node]]
            is_seen_XCC[x, place] |= is_seen_XCC[x, parent_XC[x, place]]
    before_TL = np.pad(node_TL[:, :-1], ((0, 0), (1, 0)))
    is_end_TL = labels_TL == EOS_ID
    place_TL = place_M[np.where(is_end_TL, before_TL, node_TL)] + is_end_TL * node_XC.size
    return TokenTree(
        token_XC=token_M[node_XC],
        # A text that was cut has no end: nothing reads the state behind its last token.
        position_XC=np.minimum(position_M[node_XC], length - 1),
        parent_XC=parent_XC,
        is_seen_XCC=is_seen_XCC,
        is_node_XC=is_node_XC,
        labels_TL=labels_TL,
        place_TL=place_TL.astype(np.int32),
    )


def _number_prefixes(labels_TL: np.ndarray) -> tuple[np.ndarray, ...]:
    """Last token, parent and length of each prefix M; and the prefix up to each token."""
    order = np.lexsort(labels_TL.T[::-1])
    sorted_TL = labels_TL[order]
    is_shared_TL = np.zeros(sorted_TL.shape, bool)  # with the text before
    is_shared_TL[1:] = np.logical_and.accumulate(sorted_TL[1:] == sorted_TL[:-1], axis=1)
    is_new_TL = ~is_shared_TL & (sorted_TL != PAD_ID) & (sorted_TL != EOS_ID)
    number_TL = np.where(is_new_TL, np.cumsum(is_new_TL).reshape(is_new_TL.shape), 0)
    number_TL = np.maximum.accumulate(number_TL, axis=0)
    before_TL = np.pad(number_TL[:, :-1], ((0, 0), (1, 0)))
    position_TL = np.broadcast_to(np.arange(1, labels_TL.shape[1] + 1), labels_TL.shape)
    of_nodes = (np.pad(x[is_new_TL], (1, 0)) for x in (sorted_TL, before_TL, position_TL))
    node_TL = np.empty_like(number_TL)
    node_TL[order] = number_TL
    return *of_nodes, node_TL


def _cut(parent_M: np.ndarray, size: int) -> tuple[list[list[int]], np.ndarray]:
    """The nodes of each chunk, and the place of each node where it is no mere ancestor."""
    chunks: list[list[int]] = []
    place_M = np.zeros(len(parent_M), np.int64)
    start = 0
    while start < len(parent_M):
        ancestors, node = [], start
        while node:
            node = int(parent_M[node])
            ancestors.insert(0, node)
        stop = min(len(parent_M), start + size - len(ancestors))
        first = len(chunks) * size + len(ancestors)
        place_M[start:stop] = np.arange(first, first + stop - start)
        chunks.append([*ancestors, *range(start, stop)])
        start = stop
    return chunks, place_M
