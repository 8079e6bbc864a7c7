"""Self-speculative decoding: the parallel mode drafts a caption, causal passes verify it.

A CapPa model predicts all tokens at once from masks, or one after the other. One parallel pass
drafts the whole caption; a causal pass over the next W positions then yields every token up to the
first that differs from the draft, and that one itself. Captions are those of the causal model
alone: the same tokens where greedy, and when sampling of the same distribution, by the rule of
Leviathan et al. 2023 ("Fast inference from transformers via speculative decoding", algorithm 1): a
drafted token stays with probability min(1, p / q), else one is drawn from max(p - q, 0). The draft
of a position does not depend on what is written before it, so the rest of it remains of use.

Rows need not go in step, so when one is done its slot can take the next image. Letters beyond
`capjax.dims`: W the window, C the slots, I all images.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Key

from capjax.data.tokenizer import EOS_ID, PAD_ID
from capjax.decoding import processors, sampling
from capjax.decoding.options import DecodingOptions
from capjax.decoding.texts import ABSENT, END, LENGTH
from capjax.dims import Array, Bool, Float, Int, Params, PRNGKeyArray
from capjax.errors import UserError
from capjax.mesh import act_B, act_BL, act_BSV, out_sharding, reshard
from capjax.models.block_decoding import Caches, Seen, place_window, start_block_decoding
from capjax.models.captioner import Captioner

DRAFT, ACCEPT, OTHER = range(3)  # what a row's random numbers are for
REFILL = 8  # done captions make room when they are an eighth of the slots


class Rules(NamedTuple):
    """What is compiled."""

    max_length: int
    width: int  # positions verified at once: drafted tokens and what follows them
    num_slots: int  # captions written at once; where images are more, done ones make room
    is_sampling: bool
    top_k: int
    has_top_p: bool
    has_min_p: bool


class Numbers(NamedTuple):
    """What may change without a new executable."""

    temperature: Array
    min_length: Array
    top_p: Array
    min_p: Array


class Draft(NamedTuple):
    """What the parallel mode proposes."""

    token_BL: Int[Array, "B L"]
    hidden_BLE: Float[Array, "B L E"] | None  # of what they were drawn from; None: the likeliest


class Written(NamedTuple):
    """Texts so far."""

    tokens_BL: Int[Array, "B L"]
    logprobs_BL: Float[Array, "B L"]
    entropies_BL: Float[Array, "B L"]
    num_B: Int[Array, "B"]
    finish_B: Int[Array, "B"]  # an index of FINISH_REASONS
    num_passes_B: Int[Array, "B"]  # causal passes that it took


class _Slots(NamedTuple):
    """The captions under way, and what each needs."""

    image_C: Int[Array, "C"]  # the number of images stands for none
    written: Written
    draft: Draft
    key_C: Key[Array, "C"]
    seen: Seen


class _Carry(NamedTuple):
    slots: _Slots
    caches: Caches
    done: Written  # of all images
    next_image: Int[Array, ""]


def write_by_rows(
    model: Captioner,
    params: Params,
    inputs: Array,
    index_B: Int[Array, "B"],
    mask_B: Bool[Array, "B"],
    key: PRNGKeyArray,
    max_length: int,
    options: DecodingOptions,
) -> Written:
    """`generate` of options that are `is_by_rows`; the arguments are those there."""
    numbers = Numbers(
        temperature=jnp.float32(options.temperature or 1.0),
        min_length=jnp.int32(options.min_length),
        top_p=jnp.float32(options.top_p),
        min_p=jnp.float32(options.min_p),
    )
    rules = Rules(
        max_length=max_length,
        width=min(options.draft_length + 1, max_length),
        num_slots=options.num_slots or len(inputs),
        is_sampling=options.method == "sample",
        top_k=options.top_k,
        has_top_p=options.top_p < 1,
        has_min_p=options.min_p > 0,
    )
    return _encode_and_write(model, params, inputs, index_B, mask_B, key, numbers, rules)


@functools.partial(jax.jit, static_argnames=("model", "rules"))
def _encode_and_write(model, params, inputs, index_B, mask_B, key, numbers, rules) -> Written:
    memory_BPD = model.encode(params, inputs) if inputs.ndim == 4 else inputs
    key_B = sampling.row_keys(key, reshard(index_B, act_B))[:, 0]
    return _write(model, params, memory_BPD, key_B, reshard(mask_B, act_B), numbers, rules)


def _write(
    model: Captioner,
    params: Params,
    memory_BPD: Float[Array, "B P D"],
    key_B: Key[Array, "B"],
    mask_B: Bool[Array, "B"],
    numbers: Numbers,
    rules: Rules,
) -> Written:
    """Captions of all images, each by its own key; rows that the mask leaves out stay empty.

    Raises `UserError` for fewer slots than images on a mesh.
    """
    batch = len(memory_BPD)
    num_slots = min(rules.num_slots, batch)
    if num_slots < batch and not jax.sharding.get_abstract_mesh().empty:
        raise UserError(
            f"num_slots={num_slots} for a batch of {batch} on a mesh: a slot of one device cannot "
            "take another's images; leave it out, or run on one device"
        )
    draft = _draft(model, params, memory_BPD, key_B, numbers, rules)
    read, seen, caches = start_block_decoding(
        model, params, memory_BPD, batch=num_slots, length=rules.max_length, width=rules.width
    )
    nothing = _nothing(draft.token_BL, mask_B)
    images = _Slots(jnp.arange(batch), nothing, draft, key_B, seen)

    def advance(slots: _Slots, caches: Caches) -> tuple[_Slots, Caches]:
        inputs_CW = _window(_inputs(slots), slots.written.num_B, rules.width)
        logits_CWV, caches = read(inputs_CW, slots.written.num_B, slots.seen, caches)
        logits_CWV = reshard(logits_CWV, act_BSV)  # whole rows: they may be split over `tensor`
        logprobs_CWV = sampling.log_distribution(
            logits_CWV, model.config.vocab_size, numbers.temperature
        )
        written = _verify(model, params, logprobs_CWV, slots, numbers, rules)
        return slots._replace(written=written), caches

    if num_slots == batch:
        slots, _ = lax.while_loop(
            lambda carry: ~jnp.all(_is_over(carry[0].written)),
            lambda carry: advance(*carry),
            (images, caches),
        )
        return slots.written

    def go_on(carry: _Carry) -> _Carry:
        slots, caches = advance(carry.slots, carry.caches)
        carry = carry._replace(slots=slots, caches=caches)
        # Making room moves the memories of all slots, so it waits until it serves several.
        num_over = jnp.sum(_is_over(slots.written))
        is_worth_it = (num_over * REFILL >= num_slots) & (carry.next_image < batch)
        return lax.cond(is_worth_it, lambda x: _refill(x, images), lambda x: x, carry)

    first = jax.tree.map(lambda x: x[:num_slots], images)
    start = _Carry(first, caches, nothing, jnp.int32(num_slots))
    end = lax.while_loop(
        lambda c: (c.next_image < batch) | ~jnp.all(_is_over(c.slots.written)), go_on, start
    )
    return _refill(end, images).done


def _draft(
    model: Captioner, params: Params, memory_BPD, key_B, numbers: Numbers, rules: Rules
) -> Draft:
    """What the parallel mode would write, all positions at once; nothing where none is verified."""
    if rules.width == 1:
        shape = (len(memory_BPD), rules.max_length)
        return Draft(jnp.full(shape, PAD_ID, jnp.int32, out_sharding=out_sharding(act_BL)), None)
    hidden_BLE = model.parallel_hidden(params, memory_BPD, rules.max_length)
    position_1L = jnp.arange(rules.max_length)[None]
    if not rules.is_sampling:
        logits_BLV = reshard(model.logits(params, hidden_BLE), act_BSV)
        return Draft(sampling.greedy(_scores(logits_BLV, position_1L, numbers, rules)), None)
    logq_BLV = _proposed(model, params, hidden_BLE, position_1L, numbers, rules)
    return Draft(sampling.draw(logq_BLV, _keys(key_B, position_1L, DRAFT)), hidden_BLE)


def _proposed(
    model: Captioner, params: Params, hidden_CWE, position_CW, numbers: Numbers, rules: Rules
) -> Float[Array, "C W V"]:
    """The distributions that drafted tokens are drawn from.

    Made anew for each window: those of all positions would be kept for the whole loop.
    """
    logprobs_CWV = sampling.log_distribution(
        reshard(model.logits(params, hidden_CWE), act_BSV),
        model.config.vocab_size,
        numbers.temperature,
    )
    return jax.nn.log_softmax(_scores(logprobs_CWV, position_CW, numbers, rules), axis=-1)


def _verify(
    model: Captioner,
    params: Params,
    logprobs_CWV: Array,
    slots: _Slots,
    numbers: Numbers,
    rules: Rules,
) -> Written:
    """The texts with what the window yields: tokens up to the first that is not the draft's."""
    written, width = slots.written, rules.width
    position_CW = written.num_B[:, None] + jnp.arange(width)[None]
    scores_CWV = _scores(logprobs_CWV, position_CW, numbers, rules)
    drafted_CW = _window(slots.draft.token_BL, written.num_B, width)
    if not rules.is_sampling:
        token_CW = sampling.greedy(scores_CWV)
    elif slots.draft.hidden_BLE is None:
        token_CW = sampling.draw(scores_CWV, _keys(slots.key_C, position_CW))
    else:
        hidden_CWE = _window(slots.draft.hidden_BLE, written.num_B, width)
        logq_CWV = _proposed(model, params, hidden_CWE, position_CW, numbers, rules)
        token_CW = _accept_or_draw(scores_CWV, logq_CWV, drafted_CW, slots.key_C, position_CW)
    goes_on_CW = (token_CW == drafted_CW) & (token_CW != EOS_ID)
    is_open_CW = jnp.cumsum(~goes_on_CW, axis=1) - ~goes_on_CW == 0
    is_open_CW &= (position_CW < rules.max_length) & ~_is_over(written)[:, None]
    num_new_C = jnp.sum(is_open_CW, axis=1, dtype=jnp.int32)
    put = functools.partial(place_window, start_B=written.num_B, num_new_B=num_new_C)
    has_end_C = jnp.any(is_open_CW & (token_CW == EOS_ID), axis=1)
    return Written(
        tokens_BL=put(written.tokens_BL, token_CW),
        logprobs_BL=put(written.logprobs_BL, sampling.pick(logprobs_CWV, token_CW)),
        entropies_BL=put(written.entropies_BL, sampling.entropy(logprobs_CWV)),
        num_B=written.num_B + num_new_C,
        finish_B=jnp.where(has_end_C, END, written.finish_B),
        num_passes_B=written.num_passes_B + (num_new_C > 0),
    )


def _accept_or_draw(scores_CWV, logq_CWV, drafted_CW, key_C, position_CW) -> Int[Array, "C W"]:
    """The drafted token with probability min(1, p / q), else one from max(p - q, 0)."""
    logp_CWV = jax.nn.log_softmax(scores_CWV, axis=-1)
    ratio_CW = jnp.exp(sampling.pick(logp_CWV, drafted_CW) - sampling.pick(logq_CWV, drafted_CW))
    uniform_CW = jax.vmap(jax.vmap(jax.random.uniform))(_keys(key_C, position_CW, ACCEPT))
    rest_CWV = jnp.maximum(jnp.exp(logp_CWV) - jnp.exp(logq_CWV), 0.0)
    has_rest_CW1 = jnp.any(rest_CWV > 0, axis=-1, keepdims=True)  # none where p is q
    others_CWV = jnp.where(has_rest_CW1, jnp.log(rest_CWV), logp_CWV)
    other_CW = sampling.draw(others_CWV, _keys(key_C, position_CW, OTHER))
    return jnp.where(uniform_CW < ratio_CW, drafted_CW, other_CW)


def _scores(logprobs_CWV, position_CW, numbers: Numbers, rules: Rules) -> Float[Array, "C W V"]:
    """The same of every position that `generate` has of one."""
    is_end_V = jnp.arange(logprobs_CWV.shape[-1]) == EOS_ID
    is_early_CW = position_CW < numbers.min_length
    scores_CWV = processors.ban(logprobs_CWV, is_end_V[None, None] & is_early_CW[:, :, None])
    return sampling.truncate(processors.ban_padding(scores_CWV), numbers, rules)


def _inputs(slots: _Slots) -> Int[Array, "C L"]:
    """The decoder's inputs: what is written and the draft behind it, shifted right."""
    tokens_CL, drafted_CL = slots.written.tokens_BL, slots.draft.token_BL
    is_written_CL = jnp.arange(tokens_CL.shape[1])[None] < slots.written.num_B[:, None]
    text_CL = jnp.where(is_written_CL, tokens_CL, drafted_CL)
    return jnp.pad(text_CL[:, :-1], ((0, 0), (1, 0)), constant_values=PAD_ID)


def _window(x_CL: Array, start_C: Int[Array, "C"], width: int) -> Array:
    """`width` places of `x` [C, L, ...] from start[c] on; beyond its end, the last."""
    index_CW = start_C[:, None] + jnp.arange(width)[None]
    index_CW = jnp.minimum(index_CW, x_CL.shape[1] - 1)
    return jnp.take_along_axis(
        x_CL, index_CW.reshape(*index_CW.shape, *(1,) * (x_CL.ndim - 2)), axis=1
    )


def _keys(
    key_C: Key[Array, "C"], position_CW: Int[Array, "_ W"], purpose: int | None = None
) -> Key[Array, "C W"]:
    """One key for each position of each row and each purpose; without one, that of `step_keys`."""
    if purpose is not None:
        key_C = jax.vmap(lambda key: jax.random.fold_in(key, purpose))(key_C)
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    if len(position_CW) == 1:
        return jax.vmap(fold, in_axes=(0, None))(key_C, position_CW[0])
    return jax.vmap(fold)(key_C, position_CW)


def _nothing(like_BL: Int[Array, "B L"], mask_B: Bool[Array, "B"]) -> Written:
    zeros_BL, zeros_B = jnp.zeros_like(like_BL), jnp.zeros_like(like_BL[:, 0])
    none_BL = zeros_BL.astype(jnp.float32)
    finish_B = jnp.where(mask_B, zeros_B + LENGTH, ABSENT)
    return Written(zeros_BL + PAD_ID, none_BL, none_BL, zeros_B, finish_B, zeros_B)


def _is_over(written: Written) -> Bool[Array, "B"]:
    return (written.finish_B != LENGTH) | (written.num_B >= written.tokens_BL.shape[1])


def _refill(carry: _Carry, images: _Slots) -> _Carry:
    """Files what is done, and gives its slots the next images."""
    slots, batch = carry.slots, len(images.image_C)
    is_over_C = _is_over(slots.written)
    filed_C = jnp.where(is_over_C, slots.image_C, batch)  # beyond the end: dropped
    done = jax.tree.map(
        lambda old, new: old.at[filed_C].set(new, mode="drop"), carry.done, slots.written
    )
    next_C = jnp.where(is_over_C, carry.next_image + jnp.cumsum(is_over_C) - 1, slots.image_C)

    def take(old, new):
        is_new = is_over_C.reshape(-1, *(1,) * (old.ndim - 1))
        return jnp.where(is_new, new[jnp.minimum(next_C, batch - 1)], old)

    taken = jax.tree.map(take, slots, images)
    finish_C = jnp.where(next_C < batch, taken.written.finish_B, ABSENT)
    taken = taken._replace(
        image_C=jnp.minimum(next_C, batch), written=taken.written._replace(finish_B=finish_C)
    )
    return carry._replace(
        slots=taken, done=done, next_image=carry.next_image + jnp.sum(is_over_C, dtype=jnp.int32)
    )
