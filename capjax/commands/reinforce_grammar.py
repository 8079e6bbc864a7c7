"""The grammar reward of a run: its head, and the text tower where that learns along."""

import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from capjax.decoding.load import load
from capjax.decoding.loaded_model import LoadedModel
from capjax.dims import Params
from capjax.errors import UserError
from capjax.mesh import MeshShape, make_mesh, place_tree
from capjax.rewards.grammar import has_tower, read_grammar_head, write_grammar_head
from capjax.rewards.grammar_tower import (
    fit_grammar_tower,
    read_grammar_tower,
    text_arrays,
    with_text,
    write_grammar_tower,
)
from capjax.rewards.grammar_training import fit_grammar_head
from capjax.rl.reward_terms import Grammar
from capjax.training.workdir import write_atomic

References = Callable[[], list[list[str]]]
BEGINNING = "rewards.grammar"  # in the file of what a run began with


class OpenedGrammar(NamedTuple):
    """The head, and the parameters by name that the towers' text side has learnt with it."""

    head: Params
    text: dict[str, np.ndarray]

    def placed(self, towers: LoadedModel, mesh: Mesh) -> tuple[LoadedModel, Params]:
        """The towers, which lie on the mesh, with that text side, and the head on the mesh."""
        specs = jax.tree.map(lambda x: P(*(None,) * x.ndim), self.head)
        return with_text(towers, self.text), place_tree(mesh, self.head, specs)


def open_grammar(
    term: Grammar,
    towers: LoadedModel,
    references: References,
    image_ND: np.ndarray | None,
    prompt: str,
    root: epath.Path,
    say: Callable[[str], None],
) -> OpenedGrammar:
    """What the file that is named holds, or the one in the workdir, which is made if need be.

    It learns from the references, and from the same captions broken (Cho et al. 2022); with
    `train_tower` also from their images' embeddings `image_ND`. `towers` are this process's own.
    Every process has what the first has, which writes it. Raises `UserError` where the file is none
    for these towers.
    """
    path = grammar_file(term, root)
    is_there = multihost_utils.process_allgather(np.array(path.exists())).all()
    text: dict[str, Any] = {}
    with jax.set_mesh(towers.mesh):
        if is_there and (term.train_tower or has_tower(str(path))):
            trained, head = read_grammar_tower(str(path), towers)
            text = text_arrays(trained)
        elif is_there:
            head = read_grammar_head(str(path), towers.text_features(["a"]).shape[1])
        elif term.train_tower:
            head, text = _trained_tower(term, towers, references, image_ND, prompt, path, say)
        else:
            head = _trained_head(towers, references, prompt, path, say)
    opened = OpenedGrammar(*jax.device_get((head, text)))
    return multihost_utils.broadcast_one_to_all(opened) if jax.process_count() > 1 else opened


def own_towers(path: str) -> LoadedModel:
    """Towers on one of this process's devices, where every process makes the same of them."""
    return load(path).on_mesh(make_mesh(MeshShape(), devices=jax.local_devices()[:1]))


def _trained_tower(term, towers, references, image_ND, prompt, path, say):
    assert image_ND is not None  # there are towers
    say(
        f"the towers' text side learns grammar: {term.tower.steps} steps of "
        f"{term.tower.batch_size} captions"
    )
    made = fit_grammar_tower(towers, references(), image_ND, term.tower, prompt=prompt)
    for name, value in made.after.items():
        say(f"held-out captions: {name} {made.before[name]:.3f} before, {value:.3f} after")
    if jax.process_index() == 0:
        write_grammar_tower(str(path), made.towers, made.head)
    return made.head, text_arrays(made.towers)


def _trained_head(towers, references, prompt, path, say):
    head, found = fit_grammar_head(
        lambda texts: towers.text_features([prompt + text for text in texts], 256),
        [text for captions in references() for text in captions],
    )
    say("trained a grammar head: " + ", ".join(f"{name} {x:.3f}" for name, x in found.items()))
    if jax.process_index() == 0:
        write_grammar_head(str(path), head)
    return head


def grammar_file(term: Grammar, root: epath.Path) -> epath.Path:
    """What the reward is read from: the file that is named, or the one that the run keeps."""
    kept = root / ("grammar_tower.npz" if term.train_tower else "grammar_head.npz")
    return epath.Path(term.head) if term.head else kept


def grammar_beginning(term: Grammar, root: epath.Path) -> dict[str, dict[str, Any]]:
    """The digest of that file, by name; nothing where there is none or no such reward."""
    path = grammar_file(term, root)
    if not term.weight or not path.exists():
        return {}
    return {BEGINNING: {"digest": hashlib.sha256(path.read_bytes()).hexdigest()}}


def check_grammar_beginning(term: Grammar, root: epath.Path, then: dict[str, Any]) -> None:
    """Raises `UserError` where a run that goes on would read another file than it began with."""
    if term.weight and grammar_beginning(term, root).get(BEGINNING) != then:
        raise UserError(
            f"{grammar_file(term, root)} is not what this run began with: put that file back, or "
            "choose another --workdir"
        )


def write_grammar_beginning(term: Grammar, root: epath.Path, beginnings: epath.Path) -> None:
    """Adds that digest to what the run began with."""
    if jax.process_index() != 0:
        return
    kept = json.loads(beginnings.read_text())
    if BEGINNING not in kept:
        text = json.dumps(kept | grammar_beginning(term, root), indent=2) + "\n"
        write_atomic(beginnings, text)
