"""Captions from images in one compiled loop with a key/value cache and early exit."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from capjax.data.tokenizer import EOS_ID, PAD_ID
from capjax.decoding import sampling
from capjax.dims import Array, Bool, Float, Int, Params, PRNGKeyArray
from capjax.errors import UserError
from capjax.mesh import act_B, act_BL, reshard
from capjax.models.captioner import Captioner
from capjax.models.coca import CoCa
from capjax.models.text_decoder import DecoderCache


class Generated(NamedTuple):
    """Captions as ids. Rows that `mask_B` leaves out are all padding, of length 0."""

    tokens_BL: Int[Array, "B L"]  # PAD after the first EOS
    logprobs_BL: Float[Array, "B L"]  # of each token as it was drawn; 0 after the first EOS
    num_tokens_B: Int[Array, "B"]  # EOS included
    finished_B: Bool[Array, "B"]  # EOS seen; else the caption was cut at max_length


class _Carry(NamedTuple):
    step: Int[Array, ""]
    last_B: Int[Array, "B"]
    done_B: Bool[Array, "B"]
    tokens_BL: Int[Array, "B L"]
    logprobs_BL: Float[Array, "B L"]
    cache: DecoderCache


def generate(
    model: Captioner | CoCa,
    params: Params,
    inputs: Array,
    *,
    max_length: int,
    temperature: float = 0.0,
    index_B: Int[Array, "B"] | None = None,
    key: PRNGKeyArray | None = None,
    mask_B: Bool[Array, "B"] | None = None,
    min_length: int = 0,
) -> Generated:
    """Captions of at most `max_length` tokens (EOS included): greedy at temperature 0, else drawn.

    Args:
      inputs: images [B, H, W, C], or what `model.encode` made of them [B, P, D].
      temperature: divides the logits; log-probabilities are of the tempered distribution (at 0,
        of the model's own). Any positive value runs the same executable.
      index_B: the rows' indices in the whole input. The draws depend on `key`, index and position
        only, so not on the batch or the mesh. Default 0 .. B-1.
      key: default `jax.random.key(0)`.
      mask_B: False marks rows that only fill the batch; they do not hold up the early exit.
      min_length: tokens before the first EOS may be drawn.

    The loop stops when every row of the global batch has its EOS. Raises as `check_options`.
    """
    check_options(model, max_length, temperature)
    num_rows = inputs.shape[0]
    return _generate(
        model,
        params,
        inputs,
        jnp.arange(num_rows) if index_B is None else index_B,
        jnp.ones(num_rows, bool) if mask_B is None else mask_B,
        jax.random.key(0) if key is None else key,
        jnp.float32(temperature or 1.0),
        min_length,
        max_length=max_length,
        is_greedy=temperature == 0,
    )


def check_options(model: Captioner | CoCa, max_length: int, temperature: float) -> None:
    """Raises `UserError` for a max_length beyond the model's positions or a bad temperature."""
    if not 1 <= max_length <= model.config.text_length:
        raise UserError(
            f"max_length={max_length}: expected 1 to {model.config.text_length}, "
            "the text length that the model was trained with"
        )
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature={temperature}: expected 0 (greedy) or a positive number")


@functools.partial(jax.jit, static_argnames=("model", "max_length", "is_greedy"))
def _generate(
    model, params, inputs, index_B, mask_B, key, temperature, min_length, *, max_length, is_greedy
) -> Generated:
    patches_BPD = model.encode(params, inputs) if inputs.ndim == 4 else inputs
    num_rows = patches_BPD.shape[0]
    key_B = sampling.row_keys(key, reshard(index_B, act_B))

    def advance(carry: _Carry) -> _Carry:
        logits_BV, cache = model.decode_step(params, carry.last_B, carry.step, carry.cache)
        logits_BV = reshard(logits_BV, act_BL)  # whole rows: they may be split over `tensor`
        logprobs_BV = sampling.choosable(
            sampling.log_distribution(logits_BV, model.config.vocab_size, temperature),
            ban_eos=carry.step < min_length,
        )
        if is_greedy:
            token_B, logprob_B = sampling.greedy(logprobs_BV)
        else:
            token_B, logprob_B = sampling.sample(logprobs_BV, sampling.step_keys(key_B, carry.step))
        token_B = jnp.where(carry.done_B, PAD_ID, token_B)
        logprob_B = jnp.where(carry.done_B, 0.0, logprob_B)
        write = functools.partial(jax.lax.dynamic_update_index_in_dim, index=carry.step, axis=1)
        return _Carry(
            step=carry.step + 1,
            last_B=token_B,
            done_B=carry.done_B | (token_B == EOS_ID),
            tokens_BL=write(carry.tokens_BL, token_B),
            logprobs_BL=write(carry.logprobs_BL, logprob_B),
            cache=cache,
        )

    start = _Carry(
        step=jnp.int32(0),
        last_B=reshard(jnp.full(num_rows, PAD_ID, jnp.int32), act_B),  # PAD doubles as BOS
        done_B=~reshard(mask_B, act_B),
        tokens_BL=reshard(jnp.full((num_rows, max_length), PAD_ID, jnp.int32), act_BL),
        logprobs_BL=reshard(jnp.zeros((num_rows, max_length), jnp.float32), act_BL),
        cache=model.start_cache(params, patches_BPD, max_length),
    )
    end = jax.lax.while_loop(
        lambda carry: (carry.step < max_length) & ~jnp.all(carry.done_B), advance, start
    )
    is_token_BL = end.tokens_BL != PAD_ID  # PAD is never drawn
    return Generated(
        tokens_BL=end.tokens_BL,
        logprobs_BL=end.logprobs_BL,
        num_tokens_B=jnp.sum(is_token_BL, axis=1, dtype=jnp.int32),
        finished_B=jnp.any(end.tokens_BL == EOS_ID, axis=1),
    )
