"""A text that every caption of a run stands behind: given to the decoder, and no part of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp

from capjax.dims import Array, Int

if TYPE_CHECKING:
    from capjax.decoding.loaded_model import LoadedModel


def prefix_ids(loaded: "LoadedModel") -> tuple[int, ...]:
    """The ids of `sampling.prefix` in the config of a reinforced captioner; none of any other."""
    text = loaded.config.get("sampling", {}).get("prefix", "")
    return tuple(loaded.token_ids(text)) if text else ()


def forced(ids: Sequence[int], batch: int) -> Int[Array, "B P"] | None:
    """The ids for each of `batch` rows, as `generate` takes them; None of none."""
    return jnp.broadcast_to(jnp.array(ids, jnp.int32)[None], (batch, len(ids))) if ids else None
