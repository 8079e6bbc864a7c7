"""Adafactor: big_vision's own steps, its layout and ours, the original, every mesh.

`tests/fixtures/big_vision_adafactor.npz` was written by google-research/big_vision itself:
gradients and what its optimizer made of the parameters, for leaves of all kinds (`adafactor`) and
for the CapPa whose parameters are in `big_vision_cappa.npz` (`cappa/opt`).
"""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from capjax.interop.big_vision import read, to_arrays
from capjax.mesh import MeshShape, make_mesh, place_tree
from capjax.models import Captioner, CaptionerConfig
from capjax.training.adafactor import clip_by_rms, scale_by_factored_rms, scale_by_parameter_rms
from capjax.training.layout import layouts
from capjax.training.optimizer import OptimizerConfig, make_optimizer
from capjax.training.patterns import by_name

FIXTURES = Path(__file__).parents[1] / "fixtures"
CAPPA = "big_vision_cappa.npz"
ADAFACTOR = "big_vision_adafactor.npz"
# Large enough for factored moments (from 32 on); of the two padded vocabularies the embedding's is
# in use up to row 32, the head's up to column 31.
CONFIG = CaptionerConfig(
    image_size=24,
    patch_size=4,
    width=64,
    depth=2,
    num_heads=2,
    mlp_dim=48,
    vocab_size=31,
    text_length=8,
    decoder_width=72,
    decoder_num_heads=2,
)
MODEL = Captioner(CONFIG)
OURS = (
    "encoder/patch_embedding/kernel",
    "encoder/blocks/attention/qkv/kernel",
    "encoder/blocks/attention/qkv/bias",
    "encoder/blocks/attention/out/kernel",
    "decoder/blocks/cross_attention/key_value/kernel",
    "decoder/token_embedding/embedding",
    "decoder/head/kernel",
)
THEIRS = (
    r"encoder/embedding/kernel|.*(DotProductAttention_0/(query|key|value)|LogitsDense)/kernel|"
    r".*DotProductAttention_0/((query|key|value)/bias|out/kernel)|.*CrossAttn/(key|value)/kernel|"
    r"decoder/EmbedTargets/embedding"
)
BIG_VISION = OptimizerConfig(
    name="big_vision_adafactor", weight_decay=0.01, schedule="constant", learning_rate=1e-3
)


def below(file: str, prefix: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / file) as f:
        return {k.removeprefix(f"{prefix}/"): f[k] for k in f.files if k.startswith(f"{prefix}/")}


def tree(arrays: dict) -> dict:
    nested: dict = {}
    for name, x in arrays.items():
        *parents, last = name.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = x
    return nested


def reference_config(case: str) -> tuple[OptimizerConfig, int]:
    with np.load(FIXTURES / ADAFACTOR) as f:
        theirs = json.loads(str(f[f"{case}/config"]))
    config = OptimizerConfig(
        name="big_vision_adafactor",
        learning_rate=theirs["lr"],
        weight_decay=theirs["wd"],
        b2=theirs["optax"]["beta2_cap"],
        grad_clip_norm=theirs["grad_clip_norm"],
        schedule=theirs["schedule"]["decay_type"],
        warmup_steps=theirs["schedule"]["warmup_steps"],
    )
    return config, theirs["total_steps"]


def descend(tx, params, gradients):
    """The parameters after each of the steps."""

    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state, after = jax.jit(tx.init)(params), []
    for gradient in gradients:
        params, state = step(params, state, gradient)
        after.append(params)
    return after


def assert_near(got: dict, want: dict, tolerance: float):
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert np.shape(got[name]) == np.shape(x)
        assert np.max(np.abs(np.asarray(got[name]) - x)) < tolerance, name


def test_leaves_of_all_kinds_follow_big_vision():
    config, total_steps = reference_config("adafactor")
    params = tree(below(ADAFACTOR, "adafactor/params_0"))
    gradients = [tree(below(ADAFACTOR, f"adafactor/grads_{i}")) for i in range(1, 6)]
    tx, schedule = make_optimizer(config, total_steps, params)
    state = tx.init(params)
    factored = optax.tree.get(state, "row")
    assert factored.keys() == {"a/kernel", "attn/query/kernel", "emb/embedding"}
    assert factored["attn/query/kernel"].shape == (1, 4, 36)
    assert optax.tree.get(state, "column")["attn/query/kernel"].shape == (40, 4, 1)
    with np.load(FIXTURES / ADAFACTOR) as f:
        expected = f["adafactor/schedule"]
    rates = [schedule(i) / config.learning_rate for i in range(total_steps + 1)]
    np.testing.assert_allclose(rates, expected, atol=1e-6)
    for i, after in enumerate(descend(tx, params, gradients), 1):
        assert_near(by_name(after), below(ADAFACTOR, f"adafactor/params_{i}"), 1e-6)
        if i == 1:  # the schedule begins at 0, for the weight decay too
            jax.tree.map(np.testing.assert_array_equal, after, params)


def test_a_captioner_follows_big_vision():
    config, total_steps = reference_config("cappa/opt")
    model_config, params = read(below(CAPPA, "cappa/params"))[1:3]
    model = Captioner(model_config)
    gradients = [read(below(ADAFACTOR, f"cappa/opt/grads_{i}")).params for i in (1, 2, 3)]
    tx, _ = make_optimizer(config, total_steps, model.unpadded_params())
    after = jax.tree.map(np.asarray, descend(tx, params, gradients)[-1])
    got = to_arrays(model_config, after)
    assert_near(got, below(ADAFACTOR, "cappa/opt/params_after_3"), 1e-6)


def random_like(seed: int, scale: float = 1.0):
    """Some parameters in our layout and, split into big_vision's arrays, in theirs.

    Rows and columns are of different sizes, so that a mean over the wrong axis shows; what pads a
    vocabulary is zero.
    """
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), MODEL.abstract_params())
    rng = np.random.default_rng(seed)
    for view in to_arrays(CONFIG, params).values():  # views of `params`
        view[...] = scale * np.linspace(0.1, 2, view.shape[-1]) * rng.standard_normal(view.shape)
    return some(params), theirs(some(params))


def some(params: dict) -> dict:
    """Leaves of every kind; all of them take a minute to compile."""
    return tree({name: by_name(params)[name] for name in OURS})


def theirs(params: dict) -> dict[str, np.ndarray]:
    """In big_vision's layout, the leaves that `some` has."""
    empty = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), MODEL.abstract_params())
    arrays = to_arrays(CONFIG, tree(by_name(empty) | by_name(params)))
    return {name: np.array(x) for name, x in arrays.items() if re.fullmatch(THEIRS, name)}


USED = some(MODEL.unpadded_params())
SPECS = some(MODEL.param_specs())


def reference_optimizer() -> optax.GradientTransformation:
    """What big_vision makes, of optax's parts."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_factored_rms(
            min_dim_size_to_factor=32,
            decay_rate_fn=lambda i, exponent: jnp.minimum(0.999, 1 - (i + 1.0) ** -exponent),
        ),
        optax.ema(0.9, debias=False, accumulator_dtype=jnp.bfloat16),
        optax.scale(1e-3),
        optax.add_decayed_weights(0.01, mask=lambda p: {k: k.endswith("/kernel") for k in p}),
        optax.scale(-1.0),
    )


def test_stacked_fused_and_padded_parameters_are_those_of_big_vision():
    params, their_params = random_like(0)
    gradients = [random_like(i, scale=0.01 * i) for i in (1, 2, 3)]
    tx, _ = make_optimizer(BIG_VISION, 10, USED)
    rows = optax.tree.get(jax.eval_shape(tx.init, params), "row")
    assert rows["encoder/blocks/attention/qkv/kernel"].shape == (2, 1, 2, 3, 32)
    assert rows["decoder/blocks/cross_attention/key_value/kernel"].shape == (2, 1, 2, 2, 36)
    assert "decoder/token_embedding/embedding" in rows and "decoder/head/kernel" not in rows
    ours = descend(tx, params, [ours for ours, _ in gradients])[-1]
    expected = descend(reference_optimizer(), their_params, [theirs for _, theirs in gradients])[-1]
    assert sum(x.size for x in expected.values()) == sum(x.size for x in jax.tree.leaves(USED))
    assert_near(theirs(ours), expected, 5e-6)
    for name, x in by_name(ours).items():
        used = x[tuple(map(slice, by_name(USED)[name].shape))]
        assert jnp.count_nonzero(x) == jnp.count_nonzero(used), name  # padding stays zero


def test_the_true_sizes_decide_what_is_factored():
    """So the test above sees the padding (of means over a factored axis the size cancels)."""
    params, gradient = random_like(0)[0], random_like(1, scale=0.01)[0]
    unpadded = make_optimizer(BIG_VISION, 10, USED)[0]
    padded = make_optimizer(BIG_VISION, 10)[0]
    moved = [by_name(descend(tx, params, [gradient])[0]) for tx in (unpadded, padded)]
    differ = {n for n in moved[0] if np.max(np.abs(moved[0][n] - moved[1][n])) > 1e-6}
    assert differ == {"decoder/head/kernel"}


@pytest.mark.parametrize(
    ("name", "shape"), [("big_vision_adafactor", (1, 2, 2, 2)), ("adafactor", (1, 1, 4, 2))]
)
def test_every_mesh_gives_the_same(name, shape):
    params, gradients = random_like(0)[0], [random_like(i)[0] for i in (1, 2)]
    config = OptimizerConfig(name=name, schedule="constant", weight_decay=0.01)
    tx, _ = make_optimizer(config, 10, USED)
    alone = descend(tx, params, gradients)[-1]
    mesh = make_mesh(MeshShape(*shape))
    with jax.set_mesh(mesh):
        placed = [place_tree(mesh, x, SPECS) for x in (params, *gradients)]
        split = descend(tx, placed[0], placed[1:])[-1]
    assert_near(by_name(split), by_name(alone), 1e-6)
    for x, spec in zip(jax.tree.leaves(split), jax.tree.leaves(SPECS), strict=True):
        assert x.sharding.spec == spec or x.sharding.is_fully_replicated


def test_the_original_is_optax_s_of_every_matrix():
    """Of the parts of optax.adafactor, on each layer's and each projection's own array."""
    rng = np.random.default_rng(0)
    shapes = {"blocks/attention/qkv/kernel": (2, 160, 2, 3, 130), "blocks/norm/scale": (2, 160)}
    params = {n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in shapes.items()}
    gradients = [
        {n: jnp.asarray(rng.standard_normal(s) * 3**i, jnp.float32) for n, s in shapes.items()}
        for i in range(3)
    ]
    parts = layouts(tree(shapes_of(params)), {})
    tx = optax.chain(
        scale_by_factored_rms(parts, min_size=128),
        clip_by_rms(parts, 1.0),
        scale_by_parameter_rms(parts),
        optax.scale(-0.1),
    )
    one, other = "blocks/attention/qkv/kernel", "blocks/norm/scale"

    def slices(arrays):
        return {f"{x}{i}": arrays[one][x, :, :, i] for x in range(2) for i in range(3)} | {
            f"norm{x}": arrays[other][x] for x in range(2)
        }

    reference = optax.adafactor(0.1)
    ours = descend(tx, params, gradients)[-1]
    theirs = descend(reference, slices(params), [slices(g) for g in gradients])[-1]
    assert_near(slices(ours), theirs, 1e-5)


def shapes_of(arrays):
    return {name: jnp.zeros(x.shape) for name, x in arrays.items()}
