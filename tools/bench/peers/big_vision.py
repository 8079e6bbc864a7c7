"""big_vision's CapPa step from a checkout of google-research/big_vision, which `BIG_VISION` names.

It starts from capjax's initial parameters, and its rows are parallel where capjax's are, so the
losses of the two can be compared. The update is that of its `trainers/proj/cappa/generative.py`:
the same gradients, norms and order, with optax's AdamW as capjax's, which decays kernels alone.
Variant: "scan" (default: unrolled).
"""

import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from capjax.interop.big_vision import to_arrays
from capjax.objectives.caption_rows import draw_caption_rows
from capjax.objectives.captioning_objective import CaptioningObjective
from peers import B2, LEARNING_RATE, PARALLEL_FRACTION, WEIGHT_DECAY, Job, Step, ours
from peers.big_vision_checkout import modules


def _nested(arrays: dict[str, np.ndarray]) -> dict:
    tree: dict = {}
    for name, x in arrays.items():
        *parents, leaf = name.removeprefix("params/").split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jnp.asarray(x)
    return tree


def model_of(job: Job):
    """(its model at the job's sizes, its module of utilities)."""
    cappa, utils = modules()
    config = ours.captioner(job._replace(variant="")).config
    model = cappa.Model(
        num_heads=config.num_heads,
        num_layers=config.depth,
        mlp_dim=config.mlp_dim,
        emb_dim=config.width,
        vocab_size=config.vocab_size,
        seq_len=config.text_length,
        patches=(config.patch_size,) * 2,
        decoder_num_layers=config.decoder_depth,
        masked_pred_prob=PARALLEL_FRACTION,
        masking_ratio=1.0,
        decoder_bias=False,
        scan=job.variant == "scan",
    )
    return model, utils


def optimizer() -> optax.GradientTransformation:
    """AdamW behind clipping, as capjax's."""

    def decayed(tree):
        return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", tree)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(LEARNING_RATE, b2=B2, weight_decay=WEIGHT_DECAY, mask=decayed),
    )


def update_of(model, utils, tx: optax.GradientTransformation):
    """The step (params, opt, rng, batch, draws_B) -> (params, opt, rng, measurements), jitted.

    `draws_B` stands for its uniform draw of a number for each row: 0 makes the row parallel.
    """

    def norm(tree):
        return jnp.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(tree)))

    def update(params, opt, rng, batch, draws_B):
        rng, rng_model = jax.random.split(rng)

        def loss_of(params):
            with mock.patch.object(jax.random, "uniform", lambda *_, **__: draws_B):
                logits = model.apply(
                    {"params": params},
                    batch["image"],
                    batch["tokens"],
                    train=True,
                    rngs={"dropout": rng_model},
                )
            weights = jnp.where(batch["tokens"] != 0, 1.0, 0.0)
            return utils.weighted_softmax_xent(
                logits=logits, labels=batch["tokens"], weights=weights, reduction=True
            )

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt = tx.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        return params, opt, rng, (loss, norm(grads), norm(params), norm(updates))

    return jax.jit(update, donate_argnums=(0, 1, 2))


def batch_of(rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Its batch: images as floats from -1 to 1."""
    image = jnp.asarray(rows["image"].astype(np.float32) / 127.5 - 1)
    return {"image": image, "tokens": jnp.asarray(rows["tokens"])}


def prepare(job: Job) -> Step:
    """See the module."""
    if job.dtype != "float32":
        raise SystemExit("big_vision's CapPa decoder computes in float32 alone")
    model, utils = model_of(job)
    reference, start, _, rows = ours.build(job._replace(variant=""))
    state = start()
    layout = "scan" if job.variant == "scan" else "loop"
    params = _nested(to_arrays(reference.config, state.params, layout))
    objective = CaptioningObjective(parallel_fraction=PARALLEL_FRACTION)
    is_parallel = jax.jit(
        lambda key, step: (
            draw_caption_rows(rows, jax.random.fold_in(key, step), objective)[0].is_parallel_R
        )
    )
    tx, batch, key, number = optimizer(), batch_of(rows), state.key, 0
    box = [params, jax.jit(tx.init)(params), jax.random.PRNGKey(0)]
    begin = time.perf_counter()
    lowered = update_of(model, utils, tx).lower(*box, batch, jnp.zeros(job.batch_size))
    compiled = lowered.compile()
    facts = ours.compiled_facts(compiled, params, time.perf_counter() - begin)

    def run() -> float:
        nonlocal number
        draws_B = jnp.where(is_parallel(key, number), 0.0, 1.0)
        number += 1
        *box[:], measurements = compiled(*box, batch, draws_B)
        return float(measurements[0])

    return Step(run, *ours.gemm_of(job.dtype), facts)
