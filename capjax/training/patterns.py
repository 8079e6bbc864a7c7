"""Parameters by name, and the patterns that choose among them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax import lax

from capjax.dims import Params
from capjax.errors import UserError, did_you_mean


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a nested dict by their names, joined by "/": `encoder/blocks/mlp/up/kernel`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `by_name` for nested dicts: `{"a/b": x}` -> `{"a": {"b": x}}`."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def compiled(pattern: str, field: str) -> re.Pattern:
    """A pattern of a config's `field`, which matches a whole name or all that lies under it.

    So "encoder" and "encoder/.*" choose the same, and "decoder" leaves `decoder_norm` alone.
    """
    try:
        return re.compile(f"(?:{pattern})(?:/.*)?")
    except re.error as error:
        raise UserError(f"{field}={pattern!r}: not a regular expression ({error})") from error


def matching(patterns: Iterable[str], names: Iterable[str], field: str) -> set[str]:
    """The names that one of the patterns matches. Raises `UserError` for one that matches none."""
    names, matched = list(names), set()
    for pattern in patterns:
        expression = compiled(pattern, field)
        found = {name for name in names if expression.fullmatch(name)}
        if not found:
            parents = {"/".join(name.split("/")[:i]) for name in names for i in range(1, 9)}
            raise UserError(
                f"{field}={pattern!r} matches no parameter{did_you_mean(pattern, sorted(parents))}"
                f"; the names begin with {', '.join(sorted({n.split('/')[0] for n in names}))}"
            )
        matched |= found
    return matched


def frozen_names(params: Params, freeze: Iterable[str]) -> set[str]:
    """The names of the parameters that `freeze` holds fast. Raises `UserError` where all are."""
    names = by_name(params)
    frozen = matching(freeze, names, "optimizer.freeze")
    if names and len(frozen) == len(names):
        raise UserError(f"optimizer.freeze={tuple(freeze)} leaves nothing to train; freeze less")
    return frozen


def stop_gradients(params: Params, freeze: Iterable[str]) -> Params:
    """`params`, of which no gradient flows into the frozen ones, nor is computed for them."""
    frozen = frozen_names(params, freeze)
    leaves = [lax.stop_gradient(x) if n in frozen else x for n, x in by_name(params).items()]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)
