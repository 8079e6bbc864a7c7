"""One step: the same on any mesh and over microbatches, compiled once, never poisoned."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from capjax.errors import UserError
from capjax.mesh import BATCH, MeshShape, make_mesh, out_sharding, place_batch, place_tree, reshard
from capjax.models.captioner import Captioner, CaptionerConfig
from capjax.objectives.captioning import captioning_loss
from capjax.objectives.metrics import masked_mean
from capjax.objectives.objective import Loss, mean_over_rows
from capjax.training.optimizer import OPTIMIZERS, OptimizerConfig, make_optimizer
from capjax.training.state import init_state
from capjax.training.step import make_train_step

TX, SCHEDULE = make_optimizer(OptimizerConfig(warmup_steps=2), 10)
ONE = MeshShape(data=1)
BATCH_SIZE = 16


def init_params(key):
    """A linear map, split over the mesh."""
    sharding = out_sharding(P("fsdp", "tensor"))
    return {"kernel": jax.random.normal(key, (8, 4), out_sharding=sharding)}


def linear_loss(params, batch, key):
    """Mean squares with noise for each example, and a metric over some of the rows."""

    def noise(position):
        return jax.random.normal(jax.random.fold_in(key, position))

    kernel = reshard(params["kernel"], P(None, "tensor"))
    y = jnp.einsum("bd,df->bf", batch["x"], kernel, out_sharding=out_sharding(P(BATCH, "tensor")))
    loss_B = jnp.mean((y + jax.vmap(noise)(batch["position"])[:, None]) ** 2, axis=1)
    return jnp.mean(loss_B), {"even_loss": masked_mean(loss_B, batch["position"] % 2 == 0)}


def linear_batch(seed=0):
    x = np.random.default_rng(seed).normal(size=(BATCH_SIZE, 8)).astype(np.float32)
    return {"x": x, "position": np.arange(BATCH_SIZE, dtype=np.uint32) + BATCH_SIZE * seed}


def run(shape, *, batches, accumulation_steps=1, loss_fn=linear_loss, params_and_specs=None):
    """The state after `batches`, and the metrics of each step, on the host."""
    sizes = [size for size in (shape.replica, shape.data, shape.fsdp, shape.tensor) if size > 0]
    mesh = make_mesh(shape, devices=jax.devices()[: int(np.prod(sizes))])
    loss = loss_fn if isinstance(loss_fn, Loss) else mean_over_rows(loss_fn)
    step = make_train_step(loss, TX, learning_rate=SCHEDULE, accumulation_steps=accumulation_steps)
    metrics = []
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(init_params, TX, 0))()
        if params_and_specs:
            params = place_tree(mesh, *params_and_specs)
            state = state._replace(params=params, opt_state=jax.jit(TX.init)(params))
        placed = [place_batch(mesh, batch) for batch in batches]
        with jax.transfer_guard("disallow"):
            for batch in placed:
                state, step_metrics = step(state, batch)
                metrics.append(step_metrics)
        return jax.device_get((state._replace(key=jax.random.key_data(state.key)), metrics))


@functools.cache
def three_steps():
    return run(ONE, batches=[linear_batch(seed) for seed in range(3)])


def assert_trees_close(actual, expected, rtol):
    paths = jax.tree.leaves_with_path(expected)
    for x, (path, y) in zip(jax.tree.leaves(actual), paths, strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6, err_msg=jax.tree_util.keystr(path))


def test_metrics_of_a_step_are_those_of_its_loss():
    mesh = make_mesh(ONE, devices=jax.devices()[:1])
    _, metrics = three_steps()
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(init_params, TX, 0))()
        key = jax.random.fold_in(state.key, 0)
        batch = place_batch(mesh, linear_batch())
        (loss, _), grads = jax.jit(jax.value_and_grad(linear_loss, has_aux=True))(
            state.params, batch, key
        )
    np.testing.assert_allclose(metrics[0]["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics[0]["grad_norm"], np.linalg.norm(grads["kernel"]), rtol=1e-5)
    np.testing.assert_allclose(
        metrics[0]["param_norm"], np.linalg.norm(state.params["kernel"]), rtol=1e-5
    )
    assert [m["learning_rate"] for m in metrics] == [SCHEDULE(step) for step in range(3)]
    assert all(m["nonfinite"] == 0 and np.ndim(m["even_loss"]) == 0 for m in metrics)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("shape", [ONE, MeshShape(data=8), MeshShape(fsdp=4, tensor=2, data=1)])
def test_meshes_and_microbatches_give_the_numbers_of_one_step(shape, accumulation_steps):
    batches = [linear_batch(seed) for seed in range(3)]
    actual = run(shape, batches=batches, accumulation_steps=accumulation_steps)
    assert_trees_close(actual, three_steps(), 1e-5)
    assert actual[0].step == 3


def test_repeated_runs_are_bitwise_equal():
    shape = MeshShape(fsdp=4, tensor=2, data=1)
    batches = [linear_batch(seed) for seed in range(3)]
    first, second = run(shape, batches=batches), run(shape, batches=batches)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def gram_loss(together=1):
    """Rows that meet: the squares of all pairs' products, beside noise shared by neighbours."""

    def prepare(batch, key):
        weight_B = jnp.abs(batch["x"][:, 0])
        return batch | {"weight": weight_B / jnp.mean(weight_B)}

    def rows(params, batch, key):
        kernel = reshard(params["kernel"], P(None, "tensor"))
        y = jnp.einsum("bd,df->bf", batch["x"], kernel, out_sharding=out_sharding(P(BATCH, None)))
        groups = y.reshape(
            (len(y) // together, together, -1), out_sharding=out_sharding(P(BATCH, None, None))
        )
        spread_G = jnp.mean(jnp.square(groups - groups.mean(1, keepdims=True)), (1, 2))
        loss = jnp.mean(batch["weight"] * jnp.mean(y**2, 1)) + jnp.mean(spread_G)
        return loss, {}, {"y": y, "sum": y.sum(1)}

    def across(params, embeddings):
        y = reshard(embeddings["y"], P(None, None))
        pairs = jnp.einsum("bf,cf->bc", y, y)
        scale = jnp.mean(params["kernel"])
        loss = scale * jnp.mean(pairs**2) + jnp.var(embeddings["sum"])
        return loss, {"pairs": jnp.mean(pairs)}

    return Loss(rows, across, prepare, rows_together=together)


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize(("shape", "accumulation_steps"), [(ONE, 4), (MeshShape(data=4), 2)])
def test_rows_that_meet_meet_across_microbatches(shape, accumulation_steps, together):
    run_it = functools.partial(
        run,
        batches=[linear_batch(seed) for seed in range(3)],
        loss_fn=gram_loss(together),
    )
    want = run_it(ONE)
    found = run_it(shape, accumulation_steps=accumulation_steps)
    assert_trees_close(found, want, 1e-5)
    assert {"pairs", "loss"} <= found[1][0].keys()


def test_accumulation_must_divide_the_batch():
    with pytest.raises(UserError, match="accumulation_steps=3 does not divide the batch of 16"):
        run(ONE, batches=[linear_batch()], accumulation_steps=3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])  # 1e30: the loss overflows
def test_a_step_that_is_not_finite_changes_no_number(bad):
    batches = [linear_batch(seed) for seed in range(4)]
    batches[2]["x"][3, 1] = bad
    state, metrics = run(ONE, batches=batches[:3])
    after, later = run(ONE, batches=batches)
    before, _ = run(ONE, batches=batches[:2])
    assert [m["nonfinite"] for m in later] == [0, 0, 1, 0]
    assert not np.isfinite(metrics[2]["loss"])
    assert state.step == 3 and before.step == 2
    for x, y in zip(
        jax.tree.leaves((state.params, state.opt_state)),
        jax.tree.leaves((before.params, before.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)
    assert np.isfinite(after.params["kernel"]).all()
    assert (after.params["kernel"] != state.params["kernel"]).any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_sees_a_step_that_is_not_finite(name):
    """One microbatch of two is bad; frozen parameters and an average are there too."""

    def init(key):
        return init_params(key) | {"held": {"kernel": jnp.ones((8, 4))}}

    def loss(params, batch, key):
        kernel = params["kernel"] + params["held"]["kernel"]
        return linear_loss({"kernel": kernel}, batch, key)

    config = OptimizerConfig(name=name, freeze=("held/.*",), ema_decay=0.9)
    tx, _ = make_optimizer(config, 10)
    step = make_train_step(
        mean_over_rows(loss), tx, accumulation_steps=2, freeze=config.freeze, ema_decay=0.9
    )
    state, _ = step(init_state(init, tx, 0, ema=True), linear_batch(0))
    before = jax.device_get(state._replace(key=jax.random.key_data(state.key)))
    bad = linear_batch(1)
    bad["x"][3, 1] = np.nan
    state, metrics = step(state, bad)
    after = jax.device_get(state._replace(key=jax.random.key_data(state.key)))
    assert metrics["nonfinite"] == 1 and (before.step, after.step) == (1, 2)
    for x, y in zip(jax.tree.leaves(before[1:]), jax.tree.leaves(after[1:]), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    state, metrics = step(state, linear_batch(2))
    assert metrics["nonfinite"] == 0 and (state.params["kernel"] != after.params["kernel"]).any()


def test_a_gradient_that_is_not_finite_counts_though_the_loss_is():
    def loss(params, batch, key):
        return jnp.sum(jnp.sqrt(jnp.abs(0 * params["kernel"]))), {}

    state, metrics = run(ONE, loss_fn=loss, batches=[linear_batch()])
    assert metrics[0]["loss"] == 0 and metrics[0]["nonfinite"] == 1
    assert np.isfinite(state.params["kernel"]).all()


def test_a_parameter_that_is_not_finite_counts_though_no_row_meets_it():
    def loss(params, batch, key):
        return 0 * jnp.sum(params["kernel"][0]), {}

    step = make_train_step(mean_over_rows(loss), TX)
    state = init_state(init_params, TX, 0)
    kernel = state.params["kernel"].at[1, 0].set(jnp.nan)
    _, metrics = step(state._replace(params={"kernel": kernel}), linear_batch())
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and metrics["nonfinite"] == 1


def test_an_average_follows_but_not_into_a_step_that_is_not_finite():
    step = make_train_step(mean_over_rows(linear_loss), TX, ema_decay=0.9)
    state = init_state(init_params, TX, 0, ema=True)
    batches = [linear_batch(seed) for seed in range(3)]
    batches[2]["x"][0, 0] = np.nan
    averages = []
    for batch in batches:
        before = np.asarray(state.params["kernel"])
        state, metrics = step(state, batch)
        averages.append(np.asarray(state.ema["kernel"]))
    np.testing.assert_array_equal(averages[2], averages[1])
    np.testing.assert_array_equal(state.params["kernel"], before)
    moved = averages[0] + (1 - 2 / 11) * (before - averages[0])  # the decay of the second step
    np.testing.assert_allclose(averages[1], moved, rtol=1e-6)
    assert metrics["nonfinite"] == 1 and (averages[1] != before).any()


def test_many_steps_compile_once_and_give_up_the_old_state(caplog):
    mesh = make_mesh(MeshShape(data=4, fsdp=2))
    step = make_train_step(mean_over_rows(linear_loss), TX, learning_rate=SCHEDULE)
    with jax.set_mesh(mesh), jax.log_compiles(), caplog.at_level(logging.WARNING):
        state = jax.jit(lambda: init_state(init_params, TX, 0))()
        for seed in range(4):
            old = state
            state, _ = step(state, place_batch(mesh, linear_batch(seed)))
            assert old.params["kernel"].is_deleted()
            assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, old)
    messages = [record.getMessage() for record in caplog.records]
    assert sum("Finished XLA compilation of jit(train_step)" in text for text in messages) == 1


def test_the_captioner_trains_alike_on_one_device_and_on_a_mesh():
    config = CaptionerConfig(
        image_size=8,
        patch_size=4,
        width=16,
        depth=1,
        num_heads=2,
        mlp_dim=32,
        vocab_size=40,
        text_length=5,
    )
    model = Captioner(config)
    rng = np.random.default_rng(0)
    batches = [
        {
            "image": rng.integers(0, 256, (BATCH_SIZE, 8, 8, 3), np.uint8),
            "tokens": rng.integers(0, 40, (BATCH_SIZE, 5), np.int32),
            "position": np.arange(BATCH_SIZE, dtype=np.uint32) + BATCH_SIZE * step,
        }
        for step in range(3)
    ]
    params = jax.device_get(model.init(jax.random.key(0)))
    train = functools.partial(
        run,
        batches=batches,
        loss_fn=functools.partial(captioning_loss, model, parallel_fraction=0.5),
        params_and_specs=(params, model.param_specs()),
    )
    one, whole = train(ONE)
    many, split = train(MeshShape(data=2, fsdp=2, tensor=2), accumulation_steps=2)
    assert_trees_close(split, whole, 1e-4)
    assert_trees_close(many.params, one.params, 1e-3)
    np.testing.assert_allclose(whole[0]["loss"], np.log(40), rtol=1e-6)
    assert whole[2]["loss"] != whole[0]["loss"]
