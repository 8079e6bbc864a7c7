"""Runs and sources so small that measuring them takes no time; the runs were not trained."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from array_record.python import array_record_module

from capjax.checkpoint import Checkpointer, RunInfo
from capjax.commands.defaults import default_config
from capjax.commands.settings import resolved_dict
from capjax.data.records import Caption, Example, encode_example
from capjax.models.towers import Towers
from capjax.models.two_towers import TwoTowers, TwoTowersConfig
from tests.evaluation import tiny

WITHOUT_CAPTION = 7
WORDS = ("a", "dark", "thing", "grey", "the", "bright", "of", "them")


def some_captions(index: int) -> tuple[Caption, ...]:
    """One to three, a few of which several images have."""
    rng = np.random.default_rng(index)
    texts = [" ".join(rng.choice(WORDS, 3)) for _ in range(1 + index % 3)]
    texts += ["the dark thing"] * (index % 5 == 0)
    return () if index == WITHOUT_CAPTION else tuple(Caption(text, "human") for text in texts)


def write_source(directory: Path, count: int, seed: int) -> None:
    """The labelled pictures of the other tests with captions; a lost one is no image here."""
    images = tiny.LabelledImages(count, seed)
    directory.mkdir()
    writer = array_record_module.ArrayRecordWriter(
        str(directory / "a.array_record"), "group_size:1"
    )
    for index in range(count):
        lost = Example(f"lost/{index}", b"none")
        example = lost if index == tiny.LOST else images[index]
        writer.write(encode_example(example._replace(captions=some_captions(index))))
    writer.close()


def write_run(directory: Path, towers: Towers, params) -> None:
    config = default_config()
    config.objective.captioning.weight = 0.0
    config.objective.coca.update(weight=1.0, image_dropout=0.1)
    config.data.text_length = 8
    config.preprocessing.update(dataclasses.asdict(tiny.PREPROCESSING))
    info = RunInfo(
        config=resolved_dict(config) | {"model": towers.to_dict()},
        preprocessing=dataclasses.asdict(tiny.PREPROCESSING),
        tokenizer_model=tiny.tokenizer().model_bytes,
    )
    with Checkpointer(directory / "checkpoints", info) as checkpointer:
        checkpointer.save(3, {"params": params}, {"examples_seen": 0})


def judge() -> tuple[Towers, dict]:
    """Two towers that the captions were not made by."""
    fields = {"image_size": 8, "patch_size": 4, "width": 16, "depth": 1, "num_heads": 2}
    fields |= {"mlp_dim": 16, "pool": "gap", "text_length": 8}
    config = TwoTowersConfig(**fields, vocab_size=tiny.tokenizer().vocab_size)
    rng = np.random.default_rng(2)
    towers = Towers(two_towers=TwoTowers(config))
    draw = lambda x: jnp.asarray(rng.normal(0, 0.25, x.shape), jnp.float32)  # noqa: E731
    return towers, jax.tree.map(draw, towers.abstract_params())
