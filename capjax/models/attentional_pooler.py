"""The attentional pooler: a fixed number of learned queries read a sequence of any length."""

from flax import nnx

from capjax.dims import Array, Float
from capjax.mesh import act_BLNK, embedding_LD
from capjax.models.attention import CrossAttention
from capjax.models.image_encoder import ImageEncoderConfig
from capjax.models.layers import LayerNorm
from capjax.models.parameters import broadcast, lecun_normal, normal, parameter, use


class AttentionalPooler(nnx.Module):
    """One cross-attention of learned queries to (B, P, D), and LayerNorm: (B, Q, D).

    Source: Yu et al., "CoCa: Contrastive Captioners are Image-Text Foundation Models" (2022),
    section 3.2. There is no residual connection and no MLP.
    """

    def __init__(self, num_queries: int, config: ImageEncoderConfig):
        width = config.width
        # As large as what they are compared with: smaller ones would all take the same mean.
        self.queries = parameter(normal(1.0), (num_queries, width), embedding_LD)
        self.attention = CrossAttention(
            width, width, config.num_heads, lecun_normal, implementation=config.attention
        )
        self.norm = LayerNorm(width, eps=config.norm_eps)

    def __call__(self, x_BPD: Float[Array, "B P D"]) -> Float[Array, "B Q D"]:
        # Projected before they are repeated: they are the same for every image.
        query_1QNK = self.attention.project_query(use(self.queries, x_BPD.dtype)[None])
        query_BQNK = broadcast(query_1QNK, (len(x_BPD), *query_1QNK.shape[1:]), act_BLNK)
        return self.norm(self.attention.attend(query_BQNK, self.attention.project_memory(x_BPD)))


def pooler_flops(num_queries: int, length: int, width: int) -> float:
    """Matmul FLOPs (2mnk) of an `AttentionalPooler` for one sequence of this length, forward."""
    projections = 2 * length * 2 * width**2 + 2 * num_queries * width**2
    return float(projections + 4 * num_queries * length * width)
