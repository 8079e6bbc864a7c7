"""The reward of a caption that tells its image from the others of a batch.

Gaur et al. 2024, "No Detail Left Behind", and Dessì et al. 2023, "Cross-Domain Image Captioning
with Discriminative Finetuning": a frozen pair of towers reads the caption and must pick its image.
"""

import jax
import jax.numpy as jnp

from capjax.dims import Array, Float


def self_retrieval(
    caption_BD: Float[Array, "B D"], image_BD: Float[Array, "B D"], scale: float | Array = 100.0
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """(log p(image i | caption i) among the batch's images, 1 where it alone is most similar).

    Embeddings are of length 1; `scale` multiplies their cosines (the towers' own; 100 for CLIP).
    The first is the reward; the second, recall at 1, misses on a tie.
    """
    cosine_BB = jnp.matmul(caption_BD, image_BD.T, preferred_element_type=jnp.float32)
    own_B1 = jnp.diagonal(cosine_BB)[:, None]
    hit_B = jnp.sum(cosine_BB >= own_B1, 1) == 1
    return jnp.diagonal(jax.nn.log_softmax(scale * cosine_BB)), hit_B.astype(jnp.float32)
