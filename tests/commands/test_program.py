"""The program of a config without data takes what the data pipeline delivers."""

import jax
import pytest

from capjax.commands.program import build_mesh, build_program, check_counts
from capjax.commands.settings import load_config
from capjax.data.pipeline import synthetic_batches
from capjax.errors import UserError
from capjax.mesh import place_batch


def program(captions_per_image=1):
    config = load_config("emoji_quickstart", ["batch_size=32", "mesh.data=2", "mesh.fsdp=4"])
    config.captions.per_image = captions_per_image
    mesh = build_mesh(config)
    check_counts(config, mesh)
    return build_program(config, mesh, vocab_size=512)


def test_the_abstract_batch_is_what_is_placed():
    made = program()
    config = made.config
    rows = synthetic_batches(
        image_size=config.preprocessing.image_size,
        text_length=config.data.text_length,
        vocab_size=512,
        batch_size=config.batch_size,
        seed=0,
    )
    placed, abstract = place_batch(made.mesh, next(rows)), made.abstract_batch()
    assert placed.keys() == abstract.keys()
    for name, array in placed.items():
        assert (array.shape, array.dtype) == (abstract[name].shape, abstract[name].dtype)
        assert array.sharding.is_equivalent_to(abstract[name].sharding, array.ndim)


def test_several_captions_an_image():
    assert program(3).abstract_batch()["tokens"].shape == (32, 3, program().config.data.text_length)


def test_the_state_lies_as_the_run_lays_it_out():
    made = program()
    state, _ = made.abstract_inputs()
    with jax.set_mesh(made.mesh):
        started = jax.eval_shape(jax.jit(made.init_state))
    for planned, real in zip(jax.tree.leaves(state), jax.tree.leaves(started), strict=True):
        assert (planned.shape, planned.dtype) == (real.shape, real.dtype)
        assert planned.sharding.spec == real.sharding.spec
        assert planned.sharding.mesh == made.mesh


def test_epochs_need_the_number_of_examples():
    config = load_config("emoji_quickstart")
    config.unlock()
    config.total_steps, config.total_epochs = None, 2
    with pytest.raises(UserError, match="total_epochs"):
        build_program(config, build_mesh(config), vocab_size=512)
    made = build_program(config, build_mesh(config), vocab_size=512, num_examples=100_000)
    assert made.total_steps == -(-200_000 // config.batch_size)
