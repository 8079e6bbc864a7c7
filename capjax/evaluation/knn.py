"""k-nearest-neighbour classification of frozen features.

Source: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers": the k
training images of the greatest cosine vote for their class, each with weight exp(cosine / 0.07);
k = 20. Letters: N training rows, M rows to classify, D features, C classes, K neighbours.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from capjax.dims import Array, Float, Int
from capjax.errors import UserError
from capjax.evaluation.every_row import map_rows, place
from capjax.mesh import replicated

BLOCK = 16_384  # training rows compared at a time


def knn_scores(
    train_ND: Float[np.ndarray, "N D"],
    labels_N: Int[np.ndarray, " N"],
    test_MD: Float[np.ndarray, "M D"],
    num_classes: int,
    *,
    mesh: Mesh,
    k: int = 20,
    temperature: float = 0.07,
    batch_size: int = 4096,
) -> Float[np.ndarray, "M C"]:
    """The share of the votes that each class gets for each row of `test_MD`; float32.

    Rows to classify are split over the mesh, training rows stand on every device and are compared
    in blocks. Of equal cosines the earlier training row counts. With fewer than k training rows all
    of them vote. Raises `UserError` for k < 1 and a temperature of 0 or less.
    """
    if k < 1 or temperature <= 0:
        raise UserError(f"k={k}, temperature={temperature}: expected at least 1, and above 0")
    train_ND, test_MD = _unit(train_ND), _unit(test_MD)
    size = min(BLOCK, len(train_ND))
    num_blocks = -(-len(train_ND) // size)
    filled_ND = np.pad(train_ND, ((0, num_blocks * size - len(train_ND)), (0, 0)))
    train_XND = place(mesh, filled_ND.reshape(num_blocks, size, -1), replicated)
    found = map_rows(
        lambda rows: _nearest(rows["test"], train_XND, len(train_ND), min(k, size)),
        {"test": test_MD},
        mesh=mesh,
        batch_size=batch_size,
    )
    cosine_MK, index_MK = (x.reshape(len(test_MD), -1) for x in found)
    order_MK = np.argsort(-cosine_MK, axis=1, kind="stable")[:, : min(k, len(train_ND))]
    cosine_MK, index_MK = (np.take_along_axis(x, order_MK, 1) for x in (cosine_MK, index_MK))
    # Less the greatest, which changes no share and keeps the powers within range.
    weight_MK = np.exp((cosine_MK - cosine_MK[:, :1]) / temperature)
    scores_MC = np.zeros((len(test_MD), num_classes), np.float32)
    np.add.at(scores_MC, (np.arange(len(test_MD))[:, None], labels_N[index_MK]), weight_MK)
    return scores_MC / scores_MC.sum(1, keepdims=True)


@functools.partial(jax.jit, static_argnames=("num_rows", "k"))
def _nearest(test_BD: Array, train_XND: Array, num_rows: int, k: int) -> tuple[Array, Array]:
    """The cosines and numbers of the k nearest rows of every block, [B, X, K] each."""
    num_blocks, size, _ = train_XND.shape

    def of_block(block):
        first, train_ND = block
        cosine_BN = jnp.einsum("BD,ND->BN", test_BD, train_ND, precision=lax.Precision.HIGHEST)
        is_row_N = first + jnp.arange(size) < num_rows
        cosine_BK, at_BK = lax.top_k(jnp.where(is_row_N[None], cosine_BN, -2.0), k)
        return cosine_BK, first + at_BK

    found = lax.map(of_block, (size * jnp.arange(num_blocks), train_XND))
    cosine_BXK, index_BXK = (x.swapaxes(0, 1) for x in found)
    return cosine_BXK, index_BXK


def _unit(x_ND: np.ndarray) -> np.ndarray:
    x_ND = x_ND.astype(np.float32)
    return x_ND / (np.linalg.norm(x_ND, axis=1, keepdims=True) + 1e-8)
