"""CIDEr-D on the device against that of the host, on the same ids; its hashes; a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.data.tokenizer import EOS_ID
from capjax.mesh import MeshShape, make_mesh, place_batch
from capjax.rewards import consensus, consensus_device
from capjax.rewards.consensus_device import cider_d, ngram_table

REFERENCES = [
    ["a cat sits on a mat", "a cat is on the mat"],
    ["a dog runs in the park", "the dog is running"],
    ["a man rides a horse", "a man on a horse"],
]
COMPILED = jax.jit(cider_d)


def drawn(rng, *shape, vocab=6, least=0):
    """Sentences of few different ids, padded; the last token is the end, unless cut."""
    length = shape[-1]
    ids = rng.integers(2, 2 + vocab, shape, np.int32)
    count = rng.integers(least, length + 2, (*shape[:-1], 1))  # beyond the length: cut
    place = np.arange(length)
    return np.where(place < count - 1, ids, np.where(place == count - 1, EOS_ID, 0))


def unpadded(rows):
    return [row[row != 0].tolist() for row in rows]


def on_host(tokens_BKL, references_BRM, labels):
    """float64 [B, K]: by `consensus`, an image without references 0."""
    frequencies = consensus.document_frequencies([unpadded(image) for image in labels])
    found = np.zeros(tokens_BKL.shape[:2])
    for b, (captions, image) in enumerate(zip(tokens_BKL, references_BRM, strict=True)):
        if known := [reference for reference in unpadded(image) if reference]:
            rows = np.zeros(len(captions), int)
            found[b] = consensus.cider_d(unpadded(captions), [known], frequencies, rows=rows)
    return found


def test_the_tiny_corpus_with_ends():
    words: dict[str, int] = {}

    def ids(text, end=(EOS_ID,)):
        found = [words.setdefault(word, len(words) + 3) for word in text.split()] + list(end)
        return np.pad(np.array(found, np.int32), (0, 8 - len(found)))

    labels = [np.stack([ids(text) for text in image]) for image in REFERENCES]
    texts = ["a cat on a mat", "a dog runs in a park", "a woman rides a horse"]
    candidates = jnp.asarray(np.stack([[ids(text)] for text in texts]))
    table = ngram_table(labels)
    found = COMPILED(candidates, jnp.asarray(np.stack(labels)), table)
    np.testing.assert_allclose(found[:, 0], [4.41926007, 3.26727877, 3.98100798], atol=1e-5)
    breaks_off = jnp.asarray(np.stack([ids(texts[0], ()), ids("a cat on a")])[None])
    found = COMPILED(breaks_off, jnp.asarray(labels[0][None]), table)
    np.testing.assert_allclose(found, [[3.2967, 2.1312]], atol=5e-5)


@pytest.mark.parametrize(("length", "reference_length"), [(12, 9), (3, 5)])
def test_as_the_host_with_frequencies_of_others(length, reference_length):
    rng = np.random.default_rng(length)
    labels = drawn(rng, 40, 3, 10, least=2)
    tokens = drawn(rng, 64, 4, length, vocab=7)  # one id is in no label
    references = drawn(rng, 64, 3, reference_length, vocab=7)
    references[::5, 1:] = 0
    references[3] = 0
    found = np.asarray(COMPILED(*map(jnp.asarray, (tokens, references)), ngram_table(labels)))
    np.testing.assert_allclose(found, on_host(tokens, references, labels), atol=1e-5)
    assert found.max() > 3 and not found[3].any()


def test_eight_devices_as_one():
    rng = np.random.default_rng(0)
    labels = drawn(rng, 40, 3, 10, least=2)
    rows = {"tokens": drawn(rng, 64, 4, 12), "references": drawn(rng, 64, 3, 9)}
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        batch = place_batch(mesh, rows)
        table = jax.device_put(ngram_table(labels), jax.P())
        found = COMPILED(batch["tokens"], batch["references"], table)
        expected = on_host(rows["tokens"], rows["references"], labels)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_tables_of_all_sizes_are_searched():
    for size in (1, 4, 9):
        ids = np.arange(1, size + 1, dtype=np.int32)
        labels = [ids[: place + 1, None] for place in range(size)]  # id i in size - i + 1 images
        table = ngram_table(labels)
        first, second = consensus_device._hashes([np.arange(12, dtype=np.uint32)])
        found = consensus_device._weights(jnp.asarray(first), jnp.asarray(second), table)
        expected = np.full(12, np.log(size))
        expected[1 : size + 1] = -np.log1p(-np.arange(size) / size)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_one_hash_may_collide():
    rng = np.random.default_rng(0)
    bigrams = np.unique(rng.integers(2, 2**15, (300_000, 2), np.int32), axis=0)
    first_G, second_G = consensus_device._hashes(list(bigrams.T.astype(np.uint32)))
    order = np.lexsort((second_G, first_G))
    at = order[np.flatnonzero(np.diff(first_G[order]) == 0)[0] + np.arange(2)]
    assert first_G[at[0]] == first_G[at[1]] and second_G[at[0]] < second_G[at[1]]
    hashes = jnp.asarray(first_G[at]), jnp.asarray(second_G[at])
    one, other = (bigram[None] for bigram in bigrams[at])
    neither = np.array([[1, 1]], np.int32)
    for labels, expected in (
        ([one, other, other, neither], [np.log(4), np.log(2)]),
        ([one, one, neither], [np.log(1.5), np.log(3)]),
        ([other, other, neither], [np.log(3), np.log(1.5)]),
    ):
        found = consensus_device._weights(*hashes, ngram_table(labels))
        np.testing.assert_allclose(found, expected, atol=1e-6)
    captions = jnp.asarray(np.stack([one, other]))
    found = COMPILED(captions, captions[:1].repeat(2, 0), ngram_table([one, other, neither]))
    assert found[0, 0] > 0 and found[1, 0] == 0
