"""Every method against a plain search over whole texts, without a cache."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capjax.data.tokenizer import EOS_ID
from capjax.decoding.generate import FINISH_REASONS, generate
from capjax.decoding.options import DecodingOptions
from capjax.errors import UserError
from capjax.mesh import MeshShape, make_mesh, place_batch, place_tree

LENGTH = 4
VOCAB = 21
NUM = 6  # images


class Reference:
    """Log-probabilities of next tokens by a whole uncached pass, of one image at a time."""

    def __init__(self, model, params, memory_BPD, memories=None, scale=1.0):
        self.model, self.params = model, params
        self.memory_BPD, self.other_BPD, self.scale = memory_BPD, memories, scale
        self.known = {}

    @functools.partial(jax.jit, static_argnums=0)
    def _states(self, memory_BPD, tokens_BL):
        inputs_BL = jnp.pad(tokens_BL, ((0, 0), (1, 0)))[:, :-1]
        hidden_BLE = self.model.hidden(self.params, inputs_BL, memory_BPD, None)
        return self.model.logits(self.params, hidden_BLE)[..., :VOCAB], hidden_BLE

    def states(self, image, text):
        """(logits, hidden) [V], [E] after the text."""
        tokens = np.zeros((1, LENGTH), np.int32)
        tokens[0, : len(text)] = text
        memory = self.memory_BPD[image : image + 1]
        logits, hidden = self._states(memory, tokens)
        logits = np.asarray(logits[0, len(text)], np.float64)
        if self.other_BPD is not None:
            other = self._states(self.other_BPD[image : image + 1], tokens)[0]
            other = np.asarray(other[0, len(text)], np.float64)
            scale = self.scale(len(text)) if callable(self.scale) else self.scale
            logits = other + scale * (logits - other)
        return logits, np.asarray(hidden[0, len(text)], np.float64)

    def logprobs(self, image, text):
        """[V], padding banned but its share kept."""
        key = (image, tuple(text))
        if key not in self.known:
            logits, _ = self.states(image, text)
            logprobs = logits - np.logaddexp.reduce(logits)
            logprobs[0] = -np.inf
            self.known[key] = logprobs
        return self.known[key]


def beam_search(reference, image, width, penalty, early_stopping, length=LENGTH):
    """Beams as lists, in the way of Hugging Face's generation."""
    live, ended = [(0.0, ())], []
    for step in range(length):
        grown = [
            (total + logprob, (*text, token))
            for total, text in live
            for token, logprob in enumerate(reference.logprobs(image, text))
            if logprob > -np.inf
        ]
        grown = sorted(grown, key=lambda beam: -beam[0])[: 2 * width]
        for rank, (total, text) in enumerate(grown):
            if text[-1] == EOS_ID and rank < width:
                ended.append((total / len(text) ** penalty, text))
        ended = sorted(ended, key=lambda beam: -beam[0])[:width]
        live = [beam for beam in grown if beam[1][-1] != EOS_ID][:width]
        if len(ended) == width:
            at = length if early_stopping == "never" and penalty > 0 else step + 1
            if early_stopping is True or ended[-1][0] >= live[0][0] / at**penalty:
                return ended
    cut = [(total / length**penalty, text) for total, text in live]
    return sorted(ended + cut, key=lambda beam: -beam[0])[:width]


def texts_of(made, image):
    tokens = np.asarray(made.tokens_BSL)[image]
    return [tuple(row[row != 0].tolist()) for row in tokens]


@pytest.fixture(scope="module")
def memory(model, params, images):
    return model.encode(params, images[:NUM])


@pytest.fixture(scope="module")
def reference(model, params, memory):
    return Reference(model, params, memory)


@pytest.mark.parametrize(
    ("width", "penalty", "early_stopping"),
    [(2, 1.0, False), (4, 0.0, True), (4, 1.0, "never"), (5, 2.0, False), (3, -0.5, "never")],
)
def test_beams_are_those_of_a_plain_search(
    model, params, memory, reference, width, penalty, early_stopping
):
    options = DecodingOptions(
        max_length=LENGTH,
        num_beams=width,
        num_captions=width,
        length_penalty=penalty,
        early_stopping=early_stopping,
    )
    made = generate(model, params, memory, options)
    for image in range(NUM):
        want = beam_search(reference, image, width, penalty, early_stopping)
        assert texts_of(made, image) == [text for _, text in want]
        np.testing.assert_allclose(made.score_BS[image], [score for score, _ in want], atol=1e-4)
        for row, (score, text) in enumerate(want):
            total = float(np.asarray(made.logprobs_BSL)[image, row].sum())
            assert total == pytest.approx(score * len(text) ** penalty, abs=1e-4)
            reason = "end" if text[-1] == EOS_ID else "length"
            assert FINISH_REASONS[made.finish_BS[image, row]] == reason


def test_as_many_beams_as_texts_find_the_best_text_of_all(model, params, memory, reference):
    """All 20 + 20 * 20 texts of two tokens, whose best the search must find."""
    made = generate(
        model,
        params,
        memory,
        DecodingOptions(
            max_length=2, num_beams=24, num_captions=24, length_penalty=0.0, early_stopping="never"
        ),
    )
    for image in range(NUM):
        found = []
        for first, second in itertools.product(range(1, VOCAB), range(1, VOCAB)):
            total = reference.logprobs(image, ())[first]
            if first != EOS_ID:
                found.append((total + reference.logprobs(image, (first,))[second], (first, second)))
        found.append((reference.logprobs(image, ())[EOS_ID], (EOS_ID,)))
        assert texts_of(made, image)[0] == max(found)[1]


def test_one_group_of_beams_is_beam_search_and_groups_differ(model, params, memory, reference):
    made = generate(
        model,
        params,
        memory,
        DecodingOptions(
            max_length=LENGTH,
            num_beams=6,
            num_captions=6,
            num_beam_groups=3,
            diversity_penalty=50.0,
            early_stopping=True,
        ),
    )
    for image in range(NUM):
        texts = texts_of(made, image)
        # A penalty that no token outweighs: no two groups take the same first token.
        firsts = {text[0] for text in texts}
        assert len(firsts) >= 3
        # The first group knows of no other.
        for _, text in beam_search(reference, image, 2, 1.0, True):
            assert text in texts


def contrastive_search(reference, image, top_k, alpha):
    text, states = (), []
    while len(text) < LENGTH:
        logprobs = reference.logprobs(image, text)
        states.append(reference.states(image, text)[1])
        probs = np.exp(logprobs) / np.exp(logprobs).sum()
        candidates = np.argsort(-logprobs, kind="stable")[:top_k]
        if len(text) == LENGTH - 1:
            return (*text, int(candidates[0]))

        def value(token, text=text, probs=probs):
            state = reference.states(image, (*text, int(token)))[1]
            cosines = [s @ state / np.linalg.norm(s) / np.linalg.norm(state) for s in states]
            return (1 - alpha) * probs[token] - alpha * max(cosines)

        text = (*text, int(max(candidates, key=value)))
        if text[-1] == EOS_ID:
            return text
    return text


@pytest.mark.parametrize(("top_k", "alpha"), [(2, 0.3), (4, 0.6)])
def test_contrastive_search_is_that_of_its_definition(
    model, params, memory, reference, top_k, alpha
):
    options = DecodingOptions(max_length=LENGTH, top_k=top_k, penalty_alpha=alpha)
    made = generate(model, params, memory, options)
    want = [contrastive_search(reference, image, top_k, alpha) for image in range(NUM)]
    assert [texts_of(made, image)[0] for image in range(NUM)] == want
    greedy = generate(model, params, memory, DecodingOptions(max_length=LENGTH))
    assert np.any(np.asarray(greedy.tokens_BSL) != np.asarray(made.tokens_BSL))


@pytest.fixture(scope="module", params=["null", "image"])
def guided(request, model, params, images, memory):
    """(contrast images or None, reference with schedule 0.5, 1.5, 1.5, ...)."""
    contrast = None if request.param == "null" else images[NUM : 2 * NUM]
    other = model.drop_memory(params, memory, jnp.ones(NUM, bool))
    if contrast is not None:
        other = model.encode(params, contrast)
    scale = lambda position: 0.5 if position == 0 else 1.5  # noqa: E731
    return contrast, Reference(model, params, memory, other, scale)


def test_guidance_equals_brute_force(model, params, memory, guided):
    contrast, reference = guided
    schedule = {"guidance_scale": [0.5, 1.5], "max_length": LENGTH}
    made = generate(model, params, memory, DecodingOptions(**schedule), contrast=contrast)
    beams = generate(
        model, params, memory, DecodingOptions(num_beams=3, **schedule), contrast=contrast
    )
    for image in range(NUM):
        text, total = (), 0.0
        while len(text) < LENGTH and text[-1:] != (EOS_ID,):
            logprobs = reference.logprobs(image, text)
            text = (*text, int(logprobs.argmax()))
            total += logprobs.max()
        assert texts_of(made, image)[0] == text
        assert float(made.score_BS[image, 0]) == pytest.approx(total, abs=1e-4)
        assert texts_of(beams, image)[0] == beam_search(reference, image, 3, 1.0, False)[0][1]


@pytest.mark.parametrize("fields", [{}, {"temperature": 1.0, "num_captions": 2}, {"num_beams": 3}])
def test_guidance_of_scale_1_changes_nothing(model, params, memory, fields):
    plain = generate(model, params, memory, DecodingOptions(**fields))
    # A later scale than any position compiles the guided loop, whose scale is 1 throughout.
    schedule = [1.0] * 11 + [2.0]
    guided = generate(
        model, params, memory, DecodingOptions(guidance_scale=schedule, max_length=12, **fields)
    )
    before = np.asarray(plain.num_tokens_BS) < 12
    np.testing.assert_array_equal(
        np.asarray(plain.tokens_BSL)[before], np.asarray(guided.tokens_BSL)[before]
    )
    assert before.any()


def test_rows_of_one_image_are_drawn_apart_and_the_first_is_that_of_one(model, params, memory):
    draw = functools.partial(generate, model, params, memory)
    many = draw(DecodingOptions(temperature=1.0, num_captions=5))
    one = draw(DecodingOptions(temperature=1.0))
    np.testing.assert_array_equal(many.tokens_BSL[:, :1], one.tokens_BSL)
    np.testing.assert_allclose(many.logprobs_BSL[:, :1], one.logprobs_BSL, atol=2e-5)
    assert len({text for image in range(NUM) for text in texts_of(many, image)}) > NUM


def test_a_prefix_is_kept_and_costs_nothing(model, params, memory, reference):
    prefix = np.zeros((NUM, 3), np.int32)
    for image in range(NUM):
        prefix[image, : image % 4] = np.arange(5, 5 + image % 4)[:3]
    for fields in ({}, {"num_beams": 3}, {"temperature": 1.0}, {"top_k": 3, "penalty_alpha": 0.5}):
        made = generate(
            model,
            params,
            memory,
            DecodingOptions(max_length=LENGTH, **fields),
            forced_BL=jnp.asarray(prefix),
        )
        for image in range(NUM):
            (text, *_), given = (
                texts_of(made, image),
                tuple(prefix[image][prefix[image] > 0].tolist()),
            )
            assert text[: len(given)] == given
            want = [
                reference.logprobs(image, text[:i])[text[i]] for i in range(len(given), len(text))
            ]
            found = np.asarray(made.logprobs_BSL)[image, 0]
            np.testing.assert_allclose(found[len(given) : len(text)], want, atol=1e-4)
            assert np.all(found[: len(given)] == 0)


def test_stops_and_bans(model, params, memory):
    free = generate(model, params, memory, DecodingOptions())
    texts = [texts_of(free, image)[0] for image in range(NUM)]
    longest = max(texts, key=len)
    stop = jnp.asarray([longest[1:3]], jnp.int32)
    made = generate(model, params, memory, DecodingOptions(), stop_MW=stop)
    image = texts.index(longest)
    assert texts_of(made, image)[0] == longest[:3]
    assert FINISH_REASONS[made.finish_BS[image, 0]] == "stop"
    for fields in ({}, {"num_beams": 3}, {"temperature": 1.0}):
        made = generate(model, params, memory, DecodingOptions(**fields), banned_MW=stop)
        for image in range(NUM):
            text = texts_of(made, image)[0]
            assert longest[1:3] not in list(itertools.pairwise(text))


def test_rules_hold_together(model, params, memory):
    """No token twice, none of two, at least four and at most eight tokens, for every method."""
    common = {
        "max_length": 8,
        "min_length": 3,
        "no_repeat_ngram_size": 1,
        "repetition_penalty": 1.2,
    }
    banned = jnp.asarray([[0, 7], [0, 9]], jnp.int32)
    for fields in (
        {},
        {"temperature": 2.0, "num_captions": 3, "top_k": 12, "top_p": 0.95, "min_p": 0.01},
        {"num_beams": 4, "num_captions": 4},
        {"num_beams": 4, "num_captions": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
        {"penalty_alpha": 0.4, "top_k": 3},
    ):
        made = generate(
            model, params, memory, DecodingOptions(**common, **fields), banned_MW=banned
        )
        for image in range(NUM):
            for text in texts_of(made, image):
                assert len(set(text)) == len(text)
                assert not {7, 9} & set(text)
                assert 4 <= len(text) <= 8


def test_entropies_are_those_of_the_distributions(model, params, memory, reference):
    made = generate(model, params, memory, DecodingOptions(max_length=LENGTH))
    for image in range(NUM):
        text = texts_of(made, image)[0]
        for i in range(len(text)):
            logits, _ = reference.states(image, text[:i])
            logprobs = logits - np.logaddexp.reduce(logits)
            want = -(np.exp(logprobs) * logprobs).sum()
            assert float(made.entropies_BSL[image, 0, i]) == pytest.approx(want, abs=1e-4)
        assert np.all(np.asarray(made.entropies_BSL)[image, 0, len(text) :] == 0)


MESHES = [MeshShape(data=8), MeshShape(replica=2, data=1, fsdp=2, tensor=2)]


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 3, "num_captions": 2, "guidance_scale": 1.5},
        {"penalty_alpha": 0.4, "top_k": 3},
        {
            "temperature": 1.0,
            "num_captions": 2,
            "top_p": 0.9,
            "top_k": 9,
            "no_repeat_ngram_size": 2,
        },
    ],
    ids=str,
)
def test_meshes_agree_with_one_device(model, params, images, shape, fields):
    options = DecodingOptions(max_length=8, repetition_penalty=1.1, **fields)
    forced = np.zeros((24, 2), np.int32)
    forced[::2, 0] = 5
    banned, stop = jnp.asarray([[3, 4]]), jnp.asarray([[0, 6]])
    beside = {"banned_MW": banned.astype(jnp.int32), "stop_MW": stop.astype(jnp.int32)}
    want = generate(model, params, images, options, forced_BL=jnp.asarray(forced), **beside)
    mesh = make_mesh(shape)
    rows = {"inputs": np.asarray(images), "index_B": np.arange(24), "forced_BL": forced}
    with jax.set_mesh(mesh):
        placed = place_tree(mesh, params, model.param_specs())
        made = generate(model, placed, options=options, **place_batch(mesh, rows), **beside)
    for found, expected in zip(made, want, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_numbers_share_an_executable(model, params, memory):
    from capjax.decoding.generate import _generate

    def run(**fields):
        generate(model, params, memory, DecodingOptions(max_length=3, **fields))
        return _generate._cache_size()

    for first, second in (
        ({"guidance_scale": 1.5}, {"guidance_scale": 3.0}),
        (
            {"temperature": 1.0, "top_p": 0.9, "min_p": 0.1},
            {"temperature": 0.5, "top_p": 0.5, "min_p": 0.2},
        ),
        ({"num_beams": 2, "length_penalty": 1.0}, {"num_beams": 2, "length_penalty": 0.0}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 2.0, "min_length": 2}),
    ):
        size = run(**first)
        assert run(**second) == size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_p": 0.9}, "top_p=0.9 is of sampling; set temperature"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p=0.0: expected a number above 0"),
        ({"num_beams": 4, "temperature": 1.0}, "temperature=1.0 is of sampling, but num_beams"),
        ({"num_beams": 4, "num_captions": 5}, "num_captions=5: expected at most num_beams=4"),
        ({"num_beams": 4, "num_beam_groups": 3}, "num_beam_groups=3: expected a divisor"),
        ({"num_beams": 4, "num_beam_groups": 2}, "set together"),
        ({"num_captions": 2}, "greedy search has one caption"),
        ({"penalty_alpha": 0.5}, "top_k=0: contrastive search weighs candidates"),
        ({"early_stopping": True}, "early_stopping=True is of beams"),
        ({"early_stopping": "later", "num_beams": 2}, "True, False or"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan: expected a finite number"),
        ({"guidance_scale": [1.0] * 13}, "13 values for max_length=12"),
        ({"banned": "cat"}, "banned='cat': expected a list"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: expected a positive number"),
    ],
)
def test_bad_options_are_refused(model, params, memory, fields, message):
    with pytest.raises(UserError, match=message):
        generate(model, params, memory, DecodingOptions(**fields))


def test_a_prefix_must_fit(model, params, memory):
    with pytest.raises(UserError, match="a prefix of 5 tokens does not fit into max_length=4"):
        generate(
            model, params, memory, DecodingOptions(max_length=4), forced_BL=jnp.ones((NUM, 5), int)
        )


def test_a_stop_in_a_prefix_is_no_end_and_groups_pay_nothing_for_it(model, params, memory):
    prefix = jnp.full((NUM, 3), 5, jnp.int32).at[:, 1].set(6)
    stop = jnp.asarray([[0, 6]], jnp.int32)
    made = generate(
        model,
        params,
        memory,
        DecodingOptions(num_beams=4, num_beam_groups=2, diversity_penalty=0.5, num_captions=4),
        forced_BL=prefix,
        stop_MW=stop,
    )
    for image in range(NUM):
        assert all(text[:3] == (5, 6, 5) for text in texts_of(made, image))
        # What is ranked by differs from the mean by the penalties, of free positions alone.
        scores, lengths = np.asarray(made.score_BS)[image], np.asarray(made.num_tokens_BS)[image]
        means = np.asarray(made.logprobs_BSL)[image].sum(-1) / lengths
        paid = (means - scores) * lengths / 0.5  # times a token was taken before
        np.testing.assert_allclose(paid, np.round(paid), atol=1e-3)
        assert np.all(paid > -1e-3) and np.all(paid <= 2 * (lengths - 3) + 1e-3)
