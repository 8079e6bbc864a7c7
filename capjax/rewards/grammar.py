"""The grammar reward: how surely a small head takes a caption for one that nobody broke.

Cho et al. 2022, "Fine-grained Image Captioning with CLIP Reward": two linear maps without bias, a
ReLU between them, on what a text tower makes of a caption before its projection.
`capjax.rewards.grammar_training` trains one.

Letters: N texts (or any leading axes), D width of the tower's feature, H of the hidden layer.
"""

import io
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from capjax.dims import Array, Float, Params, PRNGKeyArray
from capjax.errors import UserError
from capjax.training.workdir import write_atomic

TOWER = "image_side"  # in an archive with a text tower: the digest of all that is not the text's


def init_grammar_head(key: PRNGKeyArray, width: int, hidden_width: int = 0) -> Params:
    """float32 {"hidden": [D, H], "output": [H, 2]}."""
    hidden_width = hidden_width or width
    hidden_key, output_key = jax.random.split(key)
    return {
        "hidden": jax.random.normal(hidden_key, (width, hidden_width)) * width**-0.5,
        "output": jax.random.normal(output_key, (hidden_width, 2)) * hidden_width**-0.5,
    }


def grammar_logits(params: Params, feature_ND: Float[Array, "*N D"]) -> Float[Array, "*N 2"]:
    """Float32 logits of: broken, whole."""
    hidden = jax.nn.relu(_product(feature_ND.astype(jnp.float32), params["hidden"]))
    return _product(hidden, params["output"])


def grammar_score(params: Params, feature_ND: Float[Array, "*N D"]) -> Float[Array, "*N"]:
    """The probability, in [0, 1], that a caption of this feature is whole: the reward."""
    logits_N2 = grammar_logits(params, feature_ND)
    return jax.nn.sigmoid(logits_N2[..., 1] - logits_N2[..., 0])


def write_grammar_head(path: str, params: Params) -> None:
    """The head as a NumPy archive, `hidden` and `output`; a whole file, or the old one."""
    write_archive(path, params)


def read_grammar_head(path: str, width: int) -> Params:
    """What `write_grammar_head` wrote, float32 in NumPy.

    Raises `UserError` where the file is no such head, one for features of another width, or one
    that was trained along with a text tower.
    """
    archive = read_archive(path)
    if TOWER in archive:
        raise UserError(
            f"grammar head {path!r} belongs to the text tower that it was trained with, in the "
            "same file; read both with capjax.rewards.grammar_tower.read_grammar_tower"
        )
    params = {name: archive[name] for name in ("hidden", "output")}
    if params["hidden"].ndim != 2 or len(params["hidden"]) != width:
        raise UserError(
            f"grammar head {path!r} reads features of shape {params['hidden'].shape[:1]}, but the "
            f"towers' are {width} wide; train one on features of these towers"
        )
    return params


def has_tower(path: str) -> bool:
    """Whether the file holds a text tower beside the head. Raises `UserError` as `read_archive`."""
    return TOWER in read_archive(path)


def write_archive(path: str, arrays: Mapping[str, Any]) -> None:
    """Arrays by name as a NumPy archive; a whole file, or the old one."""
    content = io.BytesIO()
    np.savez(content, **{name: np.asarray(x) for name, x in arrays.items()})  # pyrefly: ignore
    write_atomic(path, content.getvalue())


def read_archive(path: str) -> dict[str, np.ndarray]:
    """What `write_archive` wrote. Raises `UserError` where that cannot be read, or has no head."""
    try:
        with epath.Path(path).open("rb") as file, np.load(file) as archive:
            return {name: archive[name] for name in ("hidden", "output", *archive.files)}
    except (OSError, EOFError, TypeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"grammar head {path!r} cannot be read ({error}); train one with "
            "capjax.rewards.grammar_training.fit_grammar_head and write_grammar_head"
        ) from error


def _product(x: Array, kernel: Array) -> Array:
    return jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)
