"""One layer of a text decoder, and which positions see which."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from capjax.dims import Array, Bool, Float, Int
from capjax.mesh import act_BLD
from capjax.models.attention import MASKED, CrossAttention, SelfAttention, causal_bias
from capjax.models.cache import LayerCache, ProjectedMemory, attend_to_cache, attend_to_memory
from capjax.models.layers import LayerNorm, Mlp
from capjax.models.parameters import broadcast, lecun_normal


def attention_bias(
    length: int,
    is_parallel_B: Bool[Array, " B"] | None,
    is_padding_BL: Bool[Array, "B L"] | None = None,
) -> Float[Array, "#B 1 L L"]:
    """0 where position i may see position j, `MASKED` elsewhere.

    A causal row sees what is not after i and is no padding, a parallel row everything.
    """
    bias_B1LL = causal_bias(length, length)
    if is_padding_BL is not None:
        bias_B1LL = jnp.where(is_padding_BL[:, None, None, :], MASKED, bias_B1LL)
    if is_parallel_B is not None:
        bias_B1LL = jnp.where(is_parallel_B[:, None, None, None], 0.0, bias_B1LL)
    return bias_B1LL


class DecoderBlock(nnx.Module):
    """Pre-norm self-attention, cross-attention and MLP."""

    def __init__(
        self,
        width: int,
        memory_width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        use_bias: bool,
        qk_norm: bool = False,
        rotary: bool = False,
        activation: str = "gelu_tanh",
        norm_eps: float = 1e-6,
        implementation: str = "auto",
    ):
        self.self_norm = LayerNorm(width, use_bias=use_bias, eps=norm_eps)
        self.self_attention = SelfAttention(
            width,
            num_heads,
            lecun_normal,
            use_bias=False,
            qk_norm=qk_norm,
            rotary=rotary,
            implementation=implementation,
            norm_eps=norm_eps,
        )
        self.cross_norm = LayerNorm(width, use_bias=use_bias, eps=norm_eps)
        self.cross_attention = CrossAttention(
            width,
            memory_width,
            num_heads,
            lecun_normal,
            qk_norm=qk_norm,
            implementation=implementation,
            norm_eps=norm_eps,
        )
        self.mlp_norm = LayerNorm(width, use_bias=use_bias, eps=norm_eps)
        self.mlp = Mlp(width, mlp_dim, use_bias=use_bias, activation=activation)

    def __call__(
        self,
        x_BLE: Float[Array, "B L E"],
        memory_BPD: Float[Array, "B P D"],
        bias_B1LL: Float[Array, "#B 1 L L"] | None = None,
        *,
        is_causal: bool = False,
    ) -> Float[Array, "B L E"]:
        x_BLE, query_BLNK = self.before_memory(x_BLE, bias_B1LL, is_causal=is_causal)
        memory = self.cross_attention.project_memory(memory_BPD)
        return self.from_memory(x_BLE, query_BLNK, memory)

    def before_memory(
        self, x_BLE: Array, bias_B1LL: Array | None = None, *, is_causal: bool = False
    ) -> tuple[Float[Array, "B L E"], Float[Array, "B L N K"]]:
        """What does not depend on the memory: the sequence, and its queries of the memory."""
        normed_BLE = self.self_norm(x_BLE)
        x_BLE = x_BLE + self.self_attention(normed_BLE, bias_B1LL, is_causal=is_causal)
        return x_BLE, self.cross_attention.project_query(self.cross_norm(x_BLE))

    def from_memory(
        self, x_BLE: Array, query_BLNK: Array, memory: Sequence[Array]
    ) -> Float[Array, "B L E"]:
        """The rest, given the memory's keys and values."""
        x_BLE = x_BLE + self.cross_attention.attend(query_BLNK, memory)
        return x_BLE + self.mlp(self.mlp_norm(x_BLE))

    def decode_step(
        self,
        x_BRE: Float[Array, "B R E"],
        index: Int[Array, ""],
        cache: LayerCache,
        memories: Sequence[ProjectedMemory | Array],
        ancestors_BSL: Int[Array, "B S L"] | None,
    ) -> tuple[Float[Array, "B R E"], LayerCache]:
        """One position of every row, and the cache with its keys and values written in.

        The rows are those of one group after another; `memories` has what each group sees.
        """
        num_groups = len(memories)
        found_BRE, cache = attend_to_cache(
            self.self_attention, self.self_norm(x_BRE), index, cache, num_groups, ancestors_BSL
        )
        x_BRE = x_BRE + found_BRE
        groups = jnp.split(self.cross_norm(x_BRE), num_groups, axis=1)
        found = [
            self._look(group_BSE, memory)
            for group_BSE, memory in zip(groups, memories, strict=True)
        ]
        x_BRE = x_BRE + jnp.concatenate(found, axis=1)
        return x_BRE + self.mlp(self.mlp_norm(x_BRE)), cache

    def project_memory(self, memory_BPD: Float[Array, "B P D"]) -> ProjectedMemory:
        """The memory's keys and values as `decode_step` reads them."""
        return ProjectedMemory(
            *(x.transpose(0, 2, 1, 3) for x in self.cross_attention.project_memory(memory_BPD))
        )

    def find_constant(self, vector_D: Float[Array, "D"]) -> Float[Array, "1 1 E"]:
        """What any query finds in a memory whose vectors are all this one: its value."""
        _, value_11NK = self.cross_attention.project_memory(vector_D[None, None])
        return self.cross_attention.out(value_11NK)

    def _look(self, x_BSE: Array, memory: ProjectedMemory | Array) -> Float[Array, "B S E"]:
        if not isinstance(memory, ProjectedMemory):
            return broadcast(memory, x_BSE.shape, act_BLD)
        query_BSNK = self.cross_attention.project_query(x_BSE)
        return self.cross_attention.out(attend_to_memory(query_BSNK, memory))
