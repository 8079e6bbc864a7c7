"""N equal blocks as one: run by `lax.scan` or unrolled, with rematerialisation by name."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

Block = TypeVar("Block", bound=nnx.Module)

# What the backward pass recomputes from each block's input.
REMAT_POLICIES = ("none", "full", "dots")
MATMUL = "matmul"  # by which `checkpoint_name` marks what "dots" keeps


def stack(block: Block, depth: int) -> Block:
    """`depth` blocks like this one as one, every parameter declared with a leading layer axis."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((depth, *x.shape), x.dtype), block)


def _with_remat(body: Callable, remat: str, *, in_scan: bool) -> Callable:
    checkpoint = functools.partial(jax.checkpoint, prevent_cse=not in_scan)
    if remat == "full":
        return checkpoint(body)
    if remat == "dots":
        policy = jax.checkpoint_policies.save_only_these_names(MATMUL)
        return checkpoint(body, policy=policy)
    return body


def run_stack(
    body: Callable[[Any, Any], Any],
    carry: Any,
    layers: Any,
    *,
    scan: bool,
    remat: str = "none",
    first: Callable[[Any, Any], Any] | None = None,
) -> Any:
    """`carry = body(carry, layer)` over the leading axis of `layers`, any tree of arrays.

    Args:
      first: what is run in place of `body` for the first layer. Under `scan` the other layers'
        parameters are then copied out of the stack, and their gradients into it.
      scan: one traced body under `lax.scan` (compiles in constant time) or `depth` copies of it.
      remat: one of `REMAT_POLICIES`: "none" keeps what the backward pass needs, "full" only each
        layer's input, "dots" the results of matmuls with a parameter.
    """
    if first is not None:
        layer, layers = _take_first(layers)
        carry = _with_remat(first, remat, in_scan=False)(carry, layer)
    body = _with_remat(body, remat, in_scan=scan)
    if scan:
        return lax.scan(lambda carry, layer: (body(carry, layer), None), carry, layers)[0]
    for layer in unstack(layers):
        carry = body(carry, layer)
    return carry


def _take_first(layers: Any) -> tuple[Any, Any]:
    """The first layer, and the stack of the others."""
    leaves, treedef = jax.tree.flatten(layers)
    parts = [lax.split(leaf, (1, leaf.shape[0] - 1)) for leaf in leaves]
    first = jax.tree.unflatten(treedef, [jnp.squeeze(part[0], 0) for part in parts])
    return first, jax.tree.unflatten(treedef, [part[1] for part in parts])


def unstack(layers: Any) -> list[Any]:
    """The layers one by one; `split`, because its gradient is one concatenation."""
    leaves, treedef = jax.tree.flatten(layers)
    depth = leaves[0].shape[0]
    parts = [lax.split(leaf, (1,) * depth) for leaf in leaves]
    return [
        jax.tree.unflatten(treedef, [jnp.squeeze(part[i], 0) for part in parts])
        for i in range(depth)
    ]
