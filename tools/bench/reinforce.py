"""A step of reinforcement against the supervised steps of as many captions of the same images.

    python tools/bench/reinforce.py --num_samples=5

A supervised step takes one caption an image, so K of them see the same images K times; a step of
reinforcement encodes each once, samples K captions of it, rewards them, and updates on all. The
model is the embedded corpus's (width 128, 64 px, 14 tokens) where flags say nothing else, with
random weights; the reward is self-retrieval by towers of that size, the reference's divergence is
in the loss. Entries, medians of calls that take turns:

    supervised     a training step on B images, a caption each
    sampled        K captions of each image
    learned        rewards, advantages and the update, of captions that were sampled before
    rewarded       the rewards alone
    step           all of it in one program

Prints a JSON line for each, of wall and CPU seconds, and one with step / (K * supervised).
"""

import argparse
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import alternate

from capjax.models.captioner import Captioner, CaptionerConfig
from capjax.models.two_towers import TwoTowers, TwoTowersConfig
from capjax.objectives.captioning import captioning_loss
from capjax.objectives.objective import mean_over_rows
from capjax.objectives.policy_gradient import PolicyGradient
from capjax.rl.reward_terms import TOWER_IMAGE, Rewards, SelfRetrieval, build_rewards
from capjax.rl.state import reinforce_state
from capjax.rl.step import Sampling, make_step
from capjax.rl.towers import RewardTowers
from capjax.training.state import init_state
from capjax.training.step import make_train_step


def make_models(args: argparse.Namespace) -> tuple[Captioner, TwoTowers]:
    """The captioner, and towers of its size."""
    sizes = {
        "image_size": args.image_size,
        "patch_size": 16,
        "width": args.width,
        "depth": args.depth,
        "num_heads": max(1, args.width // 32),
        "mlp_dim": 4 * args.width,
        "vocab_size": args.vocab_size,
        "text_length": args.text_length,
        "dtype": args.dtype,
    }
    captioner = Captioner(CaptionerConfig(**sizes, decoder_depth=args.decoder_depth))
    towers = TwoTowers(TwoTowersConfig(**sizes, text_depth=args.decoder_depth, pool="map"))
    return captioner, towers


def make_batch(args: argparse.Namespace, rng: np.random.Generator) -> dict[str, jax.Array]:
    """A batch of noise, its captions two thirds as long as there is room."""
    B, L, size = args.batch_size, args.text_length, args.image_size
    tokens = rng.integers(2, args.vocab_size, (B, L)).astype(np.int32)
    tokens[:, 2 * L // 3] = 1
    tokens[:, 2 * L // 3 + 1 :] = 0
    image = rng.standard_normal((B, args.width)).astype(np.float32)
    rows = {
        "image": rng.integers(0, 256, (B, size, size, 3), np.uint8),
        "tokens": tokens,
        "position": np.arange(B, dtype=np.uint32),
        "mask": np.ones(B, bool),
        "bag": np.zeros(B, np.int32),
        TOWER_IMAGE: image / np.linalg.norm(image, axis=1, keepdims=True),
    }
    return {name: jnp.asarray(x) for name, x in rows.items()}


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_samples", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=60)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--decoder_depth", type=int, default=2)
    parser.add_argument("--vocab_size", type=int, default=1600)
    parser.add_argument("--text_length", type=int, default=14)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    captioner, towers = make_models(args)
    params, tower_params = captioner.init(jax.random.key(0)), towers.init(jax.random.key(1))
    batch, tx = make_batch(args, np.random.default_rng(0)), optax.adamw(1e-5)
    loss = functools.partial(captioning_loss, captioner, parallel_fraction=0.0)
    supervised = make_train_step(mean_over_rows(loss), tx)
    rewards = build_rewards(Rewards(self_retrieval=SelfRetrieval(weight=1.0)), RewardTowers(towers))
    step = make_step(
        captioner,
        PolicyGradient(kl_weight=0.01),
        Sampling(num_samples=args.num_samples),
        rewards,
        tx,
    )
    frozen = {"towers": tower_params, "reference": jax.tree.map(jnp.copy, params)}
    states = {
        name: init_state(lambda key: jax.tree.map(jnp.copy, params), tx, 0)
        for name in ("supervised", "learned", "step")
    }
    states |= {name: reinforce_state(states[name], 0.01) for name in ("learned", "step")}
    sampled = jax.jit(step.sampled)
    captions = sampled(states["step"], batch)
    learned = jax.jit(step.learned, donate_argnums=0)
    whole = jax.jit(step.whole, donate_argnums=0)
    rewarded = jax.jit(
        lambda tokens: sum(reward.compute(frozen, batch, tokens, {}) for reward in rewards)
    )

    def update(name, function):
        states[name], metrics = function(states[name])
        return jax.block_until_ready(metrics)

    calls = {
        "supervised": lambda: update("supervised", lambda s: supervised(s, batch)),
        "sampled": lambda: jax.block_until_ready(sampled(states["step"], batch)),
        "learned": lambda: update("learned", lambda s: learned(s, frozen, batch, captions, {})),
        "rewarded": lambda: jax.block_until_ready(rewarded(captions.tokens_BKL)),
        "step": lambda: update("step", lambda s: whole(s, frozen, batch)),
    }
    timings = alternate(calls, args.rounds, warmup=1)
    for name, timing in timings.items():
        entry = {"wall_s": round(timing.wall_s, 4), "cpu_s": round(timing.cpu_s, 4)}
        print(json.dumps({"entry": name} | entry))
    K, step_time, one = args.num_samples, timings["step"], timings["supervised"]
    print(
        json.dumps(
            {
                "num_samples": K,
                "mean_tokens": float((captions.tokens_BKL != 0).sum(2).mean()),
                "step_over_supervised_wall": round(step_time.wall_s / (K * one.wall_s), 2),
                "step_over_supervised_cpu": round(step_time.cpu_s / (K * one.cpu_s), 2),
            }
        )
    )


if __name__ == "__main__":
    main()
