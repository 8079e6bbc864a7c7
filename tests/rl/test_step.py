"""A step of reinforcement on a tiny captioner: what it samples, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from capjax.errors import UserError
from capjax.mesh import MeshShape, make_mesh, place_batch, place_tree
from capjax.models.captioner import Captioner, CaptionerConfig
from capjax.objectives.policy_gradient import ALGORITHMS, PolicyGradient
from capjax.rl.rollout import Rollout, sample, token_entropy, token_logprobs
from capjax.rl.state import reinforce_state
from capjax.rl.step import Reward, Sampling, _next_learner, _updates, make_step
from capjax.training.state import init_state

VOCAB_SIZE, L, WANTED = 12, 5, 7
MODEL = Captioner(
    CaptionerConfig(
        image_size=8,
        patch_size=4,
        width=16,
        depth=1,
        num_heads=2,
        mlp_dim=32,
        vocab_size=VOCAB_SIZE,
        text_length=L,
    )
)


def batch(num_rows=8, is_masked=False):
    rng = np.random.default_rng(0)
    mask = np.ones(num_rows, bool)
    mask[-1] = not is_masked
    rows = {
        "image": rng.integers(0, 256, (num_rows, 8, 8, 3), np.uint8),
        "tokens": np.tile(np.array([3, 4, 1, 0, 0], np.int32), (num_rows, 1)),
        "position": np.arange(100, 100 + num_rows, dtype=np.uint32),
        "mask": mask,
    }
    return {name: jnp.asarray(x) for name, x in rows.items()}


@functools.cache
def params():
    """Parameters whose zero-initialised head is not zero."""
    tree = MODEL.init(jax.random.key(0))
    return jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), tree
    )


def wanted_share(frozen, batch, tokens_BJL, given):
    """The share of a caption's positions that hold one token."""
    return jnp.mean(tokens_BJL == WANTED, 2, dtype=jnp.float32)


def start(policy, tx, initial=None):
    state = init_state(lambda key: initial or params(), tx, 0)
    return reinforce_state(state, policy.kl_weight)


def step_of(policy, tx=None, sampling=Sampling(num_samples=4), **fields):  # noqa: B008
    tx = tx or optax.sgd(0.3)
    rewards = [Reward("wanted", 1.0, wanted_share)]
    return make_step(MODEL, policy, sampling, rewards, tx, **fields), tx


def by_hand(params, images, tokens_BKL, prefix=(), temperature=1.0):
    """(log p of tokens that stand behind the prefix, all of their distributions), from logits."""
    B, K, P = len(images), tokens_BKL.shape[1], len(prefix)
    front = jnp.broadcast_to(jnp.array(prefix, jnp.int32), (B, K, P))
    text_RT = jnp.concatenate([front, tokens_BKL], 2).reshape(B * K, -1)
    read_RT = jnp.concatenate([jnp.zeros_like(text_RT[:, :1]), text_RT[:, :-1]], 1)
    memory = jnp.repeat(MODEL.encode(params, images), K, 0)
    logits = MODEL.logits(params, MODEL.hidden(params, read_RT, memory))[:, P:, :VOCAB_SIZE]
    logprobs = jax.nn.log_softmax(logits / temperature)
    of_text = jnp.take_along_axis(logprobs, text_RT[:, P:, None], 2)
    return of_text.reshape(tokens_BKL.shape), logprobs


@pytest.mark.parametrize(("temperature", "prefix"), [(1.0, ()), (0.5, ()), (0.5, (3, 9))])
def test_probabilities_are_those_sampled_from(temperature, prefix):
    memory = MODEL.encode(params(), batch()["image"])
    mask = jnp.arange(8) < 7
    made = sample(
        MODEL, params(), memory, jnp.arange(8), mask, jax.random.key(1),
        num_samples=3, temperature=temperature, prefix=prefix,
    )  # fmt: skip
    again, hidden = token_logprobs(MODEL, params(), memory, made.tokens_BKL, temperature, prefix)
    np.testing.assert_allclose(again, made.logprobs_BKL, atol=2e-5)
    found, logprobs = by_hand(params(), batch()["image"], made.tokens_BKL, prefix, temperature)
    is_token = made.tokens_BKL != 0
    np.testing.assert_allclose(jnp.where(is_token, found, 0), made.logprobs_BKL, atol=2e-5)
    assert made.tokens_BKL.shape == (8, 3, L - len(prefix))
    assert not made.tokens_BKL[7].any() and made.tokens_BKL[:7, :, 0].all()
    entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, -1)
    found = token_entropy(MODEL, params(), hidden, temperature)
    np.testing.assert_allclose(found, entropy, atol=1e-5)


@pytest.mark.parametrize("prefix", [(), (3, 9)])
def test_the_gradient_is_that_of_likelihood_weighed_by_advantage(prefix):
    """One update by SGD, against the closed form -A log p over all tokens behind the prefix."""
    policy = PolicyGradient(**ALGORITHMS["rloo"])
    step, tx = step_of(policy, optax.sgd(1.0), prefix=prefix)
    rows = batch(is_masked=True)
    state = start(policy, tx)
    captions = jax.jit(step.sampled)(state, rows)
    after, metrics = jax.jit(step.learned)(state, {}, rows, captions, {})
    tokens = captions.tokens_BKL
    reward = wanted_share({}, rows, tokens, {})
    advantage = (reward - reward.mean(1, keepdims=True)) * 4 / 3 * rows["mask"][:, None]

    def loss(params):
        logprobs, _ = by_hand(params, rows["image"], tokens, prefix)
        is_token = (tokens != 0) & rows["mask"][:, None, None]
        return -jnp.sum(jnp.where(is_token, advantage[:, :, None] * logprobs, 0)) / is_token.sum()

    expected = jax.tree.map(lambda x, y: x - y, params(), jax.grad(loss)(params()))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=3e-6), after.params, expected)
    assert int(after.step) == 1 and float(metrics["ratio_deviation"]) < 1e-4
    assert float(metrics["reward"]) == pytest.approx(float(reward[:7].mean()), abs=1e-6)


@pytest.mark.parametrize("name", ["rloo", "scst", "grpo", "dpo"])
def test_it_learns_what_is_wanted(name):
    fields = dict(ALGORITHMS[name])
    if name == "grpo":
        fields["kl_weight"] = 0.001
    policy = PolicyGradient(**fields)
    sampling = Sampling(num_samples=4, num_updates=2 if name == "grpo" else 1)
    step, tx = step_of(policy, optax.adam(0.003), sampling)
    frozen = {"reference": params()}
    whole = jax.jit(step.whole)
    state, found = start(policy, tx), []
    for number in range(25):
        rows = batch() | {"position": jnp.arange(8, dtype=jnp.uint32) + 8 * number}
        state, metrics = whole(state, frozen, rows)
        found.append(float(metrics["reward"]))
    assert found[0] < 0.4 and np.mean(found[-3:]) > 0.7
    assert int(state.step) == 25 and float(state.learner.reward_count) == 25
    assert float(state.learner.running_mean) == pytest.approx(np.mean(found), abs=1e-5)


def test_a_batch_whose_reward_is_not_finite_leaves_nothing_behind():
    """Neither in the parameters nor in what the learner remembers: baseline and weight."""
    policy = PolicyGradient(**ALGORITHMS["rloo"], kl_weight=0.1, kl_target=1.0)
    tx = optax.adam(0.003)
    rewards = [Reward("given", 1.0, lambda frozen, batch, tokens, given: given["reward"])]
    step = make_step(MODEL, policy, Sampling(num_samples=4), rewards, tx)
    learned, frozen, rows = jax.jit(step.learned), {"reference": params()}, batch()
    state, found = start(policy, tx), []
    captions = Rollout(jnp.full((8, 4, L), 3, jnp.int32), jnp.full((8, 4, L), -2.0))
    reward = jax.random.uniform(jax.random.key(1), (8, 4))
    for given in (reward, reward.at[2, 1].set(jnp.nan), reward):
        state, metrics = learned(state, frozen, rows, captions, {"reward": given})
        found.append(jax.device_get((state.params, state.opt_state, state.learner)))
    for x, y in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_array_equal(x, y)
    assert metrics["nonfinite"] == 0 and found[2][2].reward_count == 2
    assert found[2][2].kl_weight != found[1][2].kl_weight
    assert int(state.step) == 3


def test_one_skipped_update_of_several_is_not_forgotten():
    """Nor is a reward that is none taken up where the loss did not show it."""
    policy = PolicyGradient(kl_weight=0.1, kl_target=1.0)
    state = start(policy, optax.sgd(0.1))
    skipped = iter([1.0, 0.0])

    def update(train, made):
        return train, {"loss": jnp.zeros(()), "nonfinite": jnp.float32(next(skipped))}

    _, metrics = _updates(update, state, {}, 2)
    assert metrics["nonfinite"] == 1
    reward, valid = jnp.ones((2, 3)), jnp.ones((2, 3), bool)
    for is_skipped, value, count in ((1.0, 1.0, 0), (0.0, jnp.nan, 0), (0.0, 1.0, 1)):
        found = {"nonfinite": jnp.float32(is_skipped), "kl": jnp.float32(2.0)}
        after = _next_learner(state.learner, reward * value, valid, found, policy)
        assert (after.reward_count, after.reward_sum) == (count, count)
        assert (after.kl_weight > state.learner.kl_weight) == bool(count)


def test_divergence_holds_the_policy_back():
    """A large weight keeps it at the reference, whatever is wanted."""
    found = {}
    for weight in (0.0, 10.0):
        policy = PolicyGradient(kl_weight=weight, kl_estimator="k2")
        step, tx = step_of(policy, optax.sgd(0.5))
        state = start(policy, tx)
        for number in range(10):
            rows = batch() | {"position": jnp.arange(8, dtype=jnp.uint32) + 8 * number}
            state, metrics = jax.jit(step.whole)(state, {"reference": params()}, rows)
        found[weight] = float(metrics["reward"])
    assert found[0.0] > found[10.0] + 0.2


def test_eight_devices_sample_and_learn_what_one_does():
    policy = PolicyGradient(whiten=True, likelihood_weight=0.1, entropy_weight=0.01)
    found = []
    for devices in (1, 8):
        shape = MeshShape(data=2, fsdp=2, tensor=2) if devices == 8 else MeshShape()
        mesh = make_mesh(shape, jax.devices()[:devices])
        step, tx = step_of(policy, optax.sgd(0.1))  # Adam would blow rounding up
        with jax.set_mesh(mesh):
            placed = place_tree(mesh, params(), MODEL.param_specs())
            state = jax.jit(lambda p: start(policy, tx, p))(placed)  # noqa: B023
            rows = place_batch(mesh, jax.device_get(batch(is_masked=True)))
            captions = jax.jit(step.sampled)(state, rows)
            after, metrics = jax.jit(step.whole)(state, {}, rows)
        found.append(jax.device_get((captions.tokens_BKL, after.params, metrics)))
    (tokens, *one), (tokens_8, *eight) = found
    np.testing.assert_array_equal(tokens, tokens_8)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), one, eight)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(UserError, match="sample 2 or more"):
        step_of(PolicyGradient(), sampling=Sampling(num_samples=1))
    with pytest.raises(UserError, match="without clipping"):
        step_of(PolicyGradient(), sampling=Sampling(num_updates=2))
    with pytest.raises(UserError, match="all the same"):
        Sampling(temperature=0.0)
