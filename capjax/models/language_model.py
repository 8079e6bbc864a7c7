"""A language model of Llama's architecture, which can guide captions: texts without images.

RMSNorm, SwiGLU, `grouped_attention`, no biases; a function of what llama.cpp calls "llama". Its
parameters are replicated on a mesh: it is small beside what it guides.
"""

import dataclasses
import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from capjax.data.tokenizer import EOS_ID, PAD_ID
from capjax.dims import Array, Float, Int, Params
from capjax.errors import UserError
from capjax.mesh import BATCH, out_sharding
from capjax.models.attention import MASKED
from capjax.models.cache import LayerCache, ready
from capjax.models.functional import PureModel
from capjax.models.grouped_attention import GroupedAttention, LayerPrompt
from capjax.models.layers import Embedding, Projection
from capjax.models.parameters import lecun_normal, normal, ones, parameter, use
from capjax.models.stack import stack, unstack
from capjax.models.text_decoder import DecodeStep, pad_to_lanes

_PROMPT_STEP = 64  # prompts are padded to a multiple: few sizes, few compilations


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """Sizes and numerics of a language model, and what its ids mean to a caption.

    Attributes:
      num_kv_heads: heads of keys and values; a divisor of `num_heads`.
      text_length: positions, those of a prompt included.
      tied: the head is the token embedding.
      dtype: "float32" or "bfloat16" for the computation; parameters are always float32.
      start_id: what stands before a text, where there is no prompt.
      end_ids: ids whose probabilities together are that of a caption's end; 0 and 1 among them,
        which to a captioner are padding and the end. Empty: to this model they are too.
    """

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_dim: int
    text_length: int
    rotary_base: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = True
    dtype: str = "float32"
    start_id: int = PAD_ID
    end_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_kv_heads={self.num_kv_heads}: expected a divisor of "
                f"num_heads={self.num_heads}"
            )
        if self.head_width % 2:
            raise UserError(f"head_width={self.head_width}: rotary positions need an even one")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype={self.dtype!r}: choose one of ('float32', 'bfloat16')")
        if self.end_ids and not {PAD_ID, EOS_ID} <= set(self.end_ids):
            raise UserError(f"end_ids={self.end_ids}: expected {PAD_ID} and {EOS_ID} among them")
        for token in (self.start_id, *self.end_ids):
            if not 0 <= token < self.vocab_size:
                raise UserError(f"token {token}: expected 0 to {self.vocab_size - 1}")


class Prompt(NamedTuple):
    """What stands before all texts: keys and values of its tokens but the last, by layer.

    Attributes:
      length: positions in use of the P, beyond which there is padding.
      last: its last token, the first input of every text.
    """

    key_XNPK: Float[Array, "X N P K"]
    value_XNPK: Float[Array, "X N P K"]
    length: Int[Array, ""]
    last: Int[Array, ""]

    def layers(self) -> LayerPrompt:
        """Those of all layers, with a leading layer axis."""
        depth = len(self.key_XNPK)
        return LayerPrompt(self.key_XNPK, self.value_XNPK, jnp.full(depth, self.length))


class RMSNorm(nnx.Module):
    """Division by the root mean square over the last axis, in float32, and a scale."""

    def __init__(self, width: int, eps: float):
        self.scale = parameter(ones, (width,))
        self.eps = eps

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        x32_BLD = x_BLD.astype(jnp.float32)
        square_BL1 = jnp.mean(jnp.square(x32_BLD), -1, keepdims=True)
        y_BLD = x32_BLD * lax.rsqrt(square_BL1 + self.eps) * self.scale[...][None, None, :]
        return y_BLD.astype(x_BLD.dtype)


class LanguageBlock(nnx.Module):
    """Pre-norm self-attention and a gated MLP."""

    def __init__(self, config: LanguageModelConfig):
        width, hidden = config.width, config.mlp_dim
        self.attention_norm = RMSNorm(width, config.norm_eps)
        self.attention = GroupedAttention(
            width, config.num_heads, config.num_kv_heads, config.head_width, config.rotary_base
        )
        self.mlp_norm = RMSNorm(width, config.norm_eps)
        law, whole = lecun_normal, P(None, None)
        self.gate = Projection((width,), (hidden,), whole, law(width, hidden), use_bias=False)
        self.up = Projection((width,), (hidden,), whole, law(width, hidden), use_bias=False)
        self.down = Projection((hidden,), (width,), whole, law(hidden, width), use_bias=False)

    def __call__(self, x_BLD: Array, prompt: LayerPrompt) -> tuple[Array, LayerPrompt]:
        """As `GroupedAttention`."""
        found_BLD, kept = self.attention(self.attention_norm(x_BLD), prompt)
        return self._after(x_BLD + found_BLD), kept

    def decode_step(
        self,
        x_BSD: Array,
        index: Array,
        cache: LayerCache,
        ancestors_BSL: Array | None,
        prompt: LayerPrompt,
    ) -> tuple[Array, LayerCache]:
        """As `GroupedAttention.decode_step`."""
        found_BSD, cache = self.attention.decode_step(
            self.attention_norm(x_BSD), index, cache, ancestors_BSL, prompt
        )
        return self._after(x_BSD + found_BSD), cache

    def _after(self, x_BLD: Array) -> Array:
        normed_BLD = self.mlp_norm(x_BLD)
        gate_BLF = jax.nn.silu(self.gate(normed_BLD).astype(jnp.float32)).astype(x_BLD.dtype)
        return x_BLD + self.down(gate_BLF * self.up(normed_BLD))


class LanguageModelModule(nnx.Module):
    """Embedding, blocks and head; used through `LanguageModel`."""

    def __init__(self, config: LanguageModelConfig):
        columns = pad_to_lanes(config.vocab_size)
        self.token_embedding = Embedding(config.vocab_size, columns, config.width)
        self.blocks = stack(LanguageBlock(config), config.depth)
        self.norm = RMSNorm(config.width, config.norm_eps)
        law = normal(config.width**-0.5, config.vocab_size)
        self.head = None if config.tied else parameter(law, (columns, config.width), P(None, None))
        self.vocab_size = config.vocab_size

    def logits(self, hidden_BLD: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """See `LanguageModel.logits`."""
        table = self.token_embedding.embedding if self.head is None else self.head
        logits_BLV = jnp.einsum(
            "BLD,VD->BLV",
            hidden_BLD,
            use(table, hidden_BLD.dtype),
            preferred_element_type=jnp.float32,
            out_sharding=out_sharding(P(BATCH, None, None)),
        )
        is_token_V = jnp.arange(logits_BLV.shape[-1]) < self.vocab_size
        return jnp.where(is_token_V[None, None, :], logits_BLV, MASKED)


@dataclasses.dataclass(frozen=True)
class LanguageModel(PureModel):
    """A language model of one configuration. Methods are pure functions of `params`.

    With a `Prompt` under "prompt" in `params`, texts go on from it, else from `start_id`.
    """

    config: LanguageModelConfig
    module_class: ClassVar[type] = LanguageModelModule

    @property
    def vocab_size(self) -> int:
        """Tokens that can be predicted."""
        return self.config.vocab_size

    def read_prompt(self, params: Params, tokens_P: Int[np.ndarray, " P"]) -> Params:
        """`params` with these tokens (at least one) before every text.

        Raises `UserError` where they are more than the model has positions for.
        """
        num_kept = len(tokens_P) - 1
        self._check_length(len(tokens_P))
        padded = -(-num_kept // _PROMPT_STEP) * _PROMPT_STEP
        tokens_1P = np.full((1, padded), PAD_ID, np.int32)
        tokens_1P[0, :num_kept] = tokens_P[:-1]
        params = {name: x for name, x in params.items() if name != "prompt"}
        prompt = self.prompt(params)._replace(last=jnp.int32(tokens_P[-1]))
        if num_kept:
            key_XNPK, value_XNPK = _read(self, params, jnp.asarray(tokens_1P))
            prompt = Prompt(key_XNPK, value_XNPK, jnp.int32(num_kept), prompt.last)
        return params | {"prompt": prompt}

    def prompt(self, params: Params) -> Prompt:
        """The prompt in `params`, or `start_id` alone."""
        if "prompt" in params:
            return params["prompt"]
        c = self.config
        none_XNPK = jnp.zeros((c.depth, c.num_kv_heads, 0, c.head_width), c.dtype)
        return Prompt(none_XNPK, none_XNPK, jnp.int32(0), jnp.int32(c.start_id))

    def hidden(self, params: Params, tokens_BL: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """States after the final norm. The first input of a text is to be `prompt(params).last`."""
        return _run(self, params, tokens_BL)[0]

    def logits(self, params: Params, hidden_BLD: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Float32 logits of the padded vocabulary; padded columns hold the least float32."""
        return self.module(params).logits(hidden_BLD)

    def caption_logits(self, logits_BLV: Float[Array, "B L V"]) -> Float[Array, "B L V"]:
        """The logits in a captioner's ids: what `end_ids` have is the end's, padding has nothing.

        With newlines among them this is the rule for prompts of captions that two newlines part
        (Kornblith et al. 2023): a model that goes on to the next caption has ended this one.
        """
        if not self.config.end_ids:
            return logits_BLV
        end_BL = self.end_logit(logits_BLV)
        ids = np.arange(logits_BLV.shape[-1])
        is_gone_V = np.isin(ids, (PAD_ID, *self.config.end_ids))
        logits_BLV = jnp.where(is_gone_V[None, None, :], MASKED, logits_BLV)
        return jnp.where((ids == EOS_ID)[None, None, :], end_BL[:, :, None], logits_BLV)

    def end_logit(self, logits_BLV: Float[Array, "B L V"]) -> Float[Array, "B L"]:
        """log of the sum of the exponentials of the logits of `end_ids`."""
        return jax.nn.logsumexp(logits_BLV[:, :, np.array(self.config.end_ids)], axis=-1)

    def start_decoding(
        self, params: Params, *, batch: int, length: int, num_rows: int = 1
    ) -> tuple[DecodeStep, tuple[LayerCache, ...]]:
        """(step, cache), as `Captioner.start_decoding` without memories: R = num_rows.

        The first input, a captioner's 0, is taken for the prompt's last token. Logits are
        `caption_logits`. Raises `UserError` where prompt and `length` exceed `text_length`.
        """
        c, prompt = self.config, self.prompt(params)
        self._check_length(prompt.key_XNPK.shape[2] + length)
        module = self.module(params)
        layers = [ready(block, c.dtype) for block in unstack(module.blocks)]
        prompts = unstack(prompt.layers())

        def step(tokens_BS, index, cache, ancestors_BSL=None):
            index = jnp.asarray(index)
            tokens_BS = jnp.where(index == 0, prompt.last, tokens_BS)
            x_BSD = module.token_embedding(tokens_BS, c.dtype)
            after = []
            for layer, kept, before in zip(layers, cache, prompts, strict=True):
                x_BSD, kept = layer.decode_step(x_BSD, index, kept, ancestors_BSL, before)
                after.append(kept)
            hidden_BSD = module.norm(x_BSD)
            logits_BSV = self.caption_logits(module.logits(hidden_BSD))
            return logits_BSV, hidden_BSD, tuple(after)

        spec = out_sharding(P(BATCH, None, None, None, None))
        shape = (batch, c.num_kv_heads, num_rows, length, c.head_width)
        zeros_BNSLK = jnp.zeros(shape, c.dtype, out_sharding=spec)
        return step, (LayerCache(zeros_BNSLK, zeros_BNSLK),) * c.depth

    def _check_length(self, length: int) -> None:
        if length > self.config.text_length:
            raise UserError(
                f"{length} tokens with the prompt, but the language model reads at most "
                f"{self.config.text_length}; give fewer captions before the text"
            )


def _run(model: LanguageModel, params: Params, tokens_BL: Array) -> tuple[Array, LayerPrompt]:
    """Hidden states, and keys and values of the first text in every layer."""
    module = model.module(params)

    def body(x_BLD, layer):
        block, prompt = layer
        return block(x_BLD, prompt)

    x_BLD = module.token_embedding(tokens_BL, model.config.dtype)
    layers = (module.blocks, model.prompt(params).layers())
    x_BLD, kept = lax.scan(body, x_BLD, layers)
    return module.norm(x_BLD), kept


@functools.partial(jax.jit, static_argnums=0)
def _read(model: LanguageModel, params: Params, tokens_1P: Array) -> tuple[Array, Array]:
    """Keys and values of a prompt's tokens in every layer."""
    kept = _run(model, params, tokens_1P)[1]
    return kept.key_NPK, kept.value_NPK
