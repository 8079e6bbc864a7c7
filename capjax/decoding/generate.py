"""Captions from images in one compiled loop with a key/value cache and early exit.

The loop is the same for every method. A method is a module with `start`, `advance` and `finish`:
`single` (greedy and sampling), `beam`, `contrastive`. Only where captions are written each at its
own pace is there another loop, in `speculative`.
"""

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from capjax.data.tokenizer import PAD_ID
from capjax.decoding import beam, contrastive, guidance, processors, sampling, single, speculative
from capjax.decoding.options import GREEDY, DecodingOptions
from capjax.decoding.texts import FINISH_REASONS, Position, Texts
from capjax.dims import Array, Bool, Float, Int, Params, PRNGKeyArray, UInt
from capjax.errors import UserError
from capjax.mesh import act_B, act_BL, act_BSV, reshard
from capjax.models.captioner import Captioner
from capjax.models.coca import CoCa
from capjax.models.text_decoder import pad_to_lanes

__all__ = ["FINISH_REASONS", "Generated", "LanguageGuidance", "LanguageModel", "generate"]

NOT_BY_ROWS = "draft_length and num_slots take no prefix, contrast or language model"
METHODS = {"greedy": single, "sample": single, "beam": beam, "contrastive": contrastive}


class Generated(NamedTuple):
    """Captions as ids, S an image: draws, or beams with the best first.

    Rows that `mask_B` leaves out are all padding, of length 0.
    """

    tokens_BSL: Int[Array, "B S L"]  # PAD after the end
    logprobs_BSL: Float[Array, "B S L"]  # of the guided, tempered distribution; 0 where forced
    entropies_BSL: Float[Array, "B S L"]  # of that distribution, in nats
    num_tokens_BS: Int[Array, "B S"]  # the end and the prefix included
    finish_BS: Int[Array, "B S"]  # an index of FINISH_REASONS
    score_BS: Float[Array, "B S"]  # what captions are ranked by: the sum; of beams, by length


class LanguageModel(Protocol):
    """Anything autoregressive over the captioner's vocabulary."""

    @property
    def vocab_size(self) -> int:
        """Must be the captioner's."""
        ...

    def start_decoding(self, params: Any, *, batch: int, length: int, num_rows: int) -> tuple:
        """As `Captioner.start_decoding`: a step whose logits are [B, S, V], and its cache."""
        ...


class LanguageGuidance(NamedTuple):
    """Scores are log q(x) + alpha * log p(x|image) - beta * log p(x) (Kornblith et al. 2023).

    `newline_id`: its probability is moved to the end of the caption.
    """

    model: LanguageModel
    params: Any
    alpha: float = 1.0
    beta: float = 1.0
    newline_id: int | None = None


class _Carry(NamedTuple):
    index: Int[Array, ""]
    state: Any
    cache: tuple
    language_cache: tuple


class _Numbers(NamedTuple):
    """What may change without a new executable."""

    temperature: Array
    min_length: Array
    top_p: Array
    min_p: Array
    repetition_penalty: Array
    length_penalty: Array
    diversity_penalty: Array
    penalty_alpha: Array
    guidance_scale_G: Array
    alpha: Array
    beta: Array


class _Rules(NamedTuple):
    """What is compiled: which parts of the loop there are."""

    method: str
    max_length: int
    num_rows: int
    num_beam_groups: int
    early_stopping: bool | str
    top_k: int
    has_top_p: bool
    has_min_p: bool
    has_repetition_penalty: bool
    no_repeat_ngram_size: int
    is_guided: bool
    language_model: Any
    newline_id: int | None


def generate(
    model: Captioner | CoCa,
    params: Params,
    inputs: Array,
    options: DecodingOptions = GREEDY,
    *,
    index_B: Int[Array, "B"] | UInt[Array, "B"] | None = None,
    key: PRNGKeyArray | None = None,
    mask_B: Bool[Array, "B"] | None = None,
    forced_BL: Int[Array, "B L"] | None = None,
    banned_MW: Int[Array, "M W"] | None = None,
    stop_MW: Int[Array, "_ _"] | None = None,
    contrast: Array | None = None,
    language: LanguageGuidance | None = None,
) -> Generated:
    """Captions as `options` says, whose texts (`banned`, `stop`) are given here as ids.

    Args:
      inputs: images [B, H, W, C], or what `model.encode` made of them [B, P, D].
      index_B: the rows' indices in the whole input. The draws depend on `key`, index, row and
        position only, so not on the batch or the mesh. Default 0 .. B-1.
      key: default `jax.random.key(0)`.
      mask_B: False marks rows that only fill the batch; they do not hold up the early exit.
      forced_BL: ids that must stand at their position, PAD where the caption is free. A prefix is
        forced at the first positions. The width is at most max_length.
      banned_MW: sequences of ids that may not be written, aligned at the right (`pad_sequences`).
      stop_MW: sequences after which a caption ends.
      contrast: what guidance leads away from: other images, as `inputs`. Default: no image.
      language: guidance by a language model beside, or in place of, `guidance_scale`.

    The loop stops when every row of the global batch is done. Raises as `check_options`.
    """
    max_length = check_options(model, options)
    if language is not None and language.model.vocab_size != model.config.vocab_size:
        raise UserError(
            f"the language model has {language.model.vocab_size} tokens, the captioner "
            f"{model.config.vocab_size}: guidance needs one vocabulary; rescore captions instead"
        )
    if contrast is not None and not options.is_guided and language is None:
        raise UserError("contrast: guidance_scale=1 leads away from nothing; set it above 1")
    batch = inputs.shape[0]
    key = jax.random.key(0) if key is None else key
    index_B = jnp.arange(batch) if index_B is None else index_B
    mask_B = jnp.ones(batch, bool) if mask_B is None else mask_B
    if options.is_by_rows and isinstance(model, Captioner):  # which `check_options` saw to
        if forced_BL is not None or contrast is not None or language is not None:
            raise UserError(NOT_BY_ROWS)
        written = speculative.write_by_rows(
            model, params, inputs, index_B, mask_B, key, max_length, options
        )
        score_B = jnp.sum(written.logprobs_BL, axis=-1)
        return Generated(*(x[:, None] for x in (*written[:5], score_B)))
    if forced_BL is not None:
        if forced_BL.shape[1] > max_length:
            raise UserError(
                f"a prefix of {forced_BL.shape[1]} tokens does not fit into max_length={max_length}"
            )
        forced_BL = jnp.pad(forced_BL, ((0, 0), (0, max_length - forced_BL.shape[1])))
    alpha, beta = (1.0, 0.0) if language is None else (language.alpha, language.beta)
    numbers = _Numbers(
        temperature=jnp.float32(options.temperature or 1.0),
        min_length=jnp.int32(options.min_length),
        top_p=jnp.float32(options.top_p),
        min_p=jnp.float32(options.min_p),
        repetition_penalty=jnp.float32(options.repetition_penalty),
        length_penalty=jnp.float32(options.length_penalty),
        diversity_penalty=jnp.float32(options.diversity_penalty),
        penalty_alpha=jnp.float32(options.penalty_alpha),
        guidance_scale_G=jnp.asarray(options.guidance_scales, jnp.float32),
        alpha=jnp.float32(alpha),
        beta=jnp.float32(beta),
    )
    method = options.method
    rows = {"beam": options.num_beams, "contrastive": options.top_k, "greedy": 1}
    rules = _Rules(
        method=method,
        max_length=max_length,
        num_rows=rows.get(method, options.num_captions),
        num_beam_groups=options.num_beam_groups,
        early_stopping=options.early_stopping,
        top_k=options.top_k if method == "sample" else 0,
        has_top_p=options.top_p < 1,
        has_min_p=options.min_p > 0,
        has_repetition_penalty=options.repetition_penalty != 1,
        no_repeat_ngram_size=options.no_repeat_ngram_size,
        is_guided=options.is_guided or (language is not None and beta != 0),
        language_model=None if language is None else language.model,
        newline_id=None if language is None else language.newline_id,
    )
    made = _generate(
        model,
        params,
        inputs,
        contrast,
        None if language is None else language.params,
        index_B,
        mask_B,
        forced_BL,
        banned_MW,
        stop_MW,
        key,
        numbers,
        rules=rules,
    )
    return jax.tree.map(lambda x: x[:, : options.num_captions], made)


def check_options(model: Captioner | CoCa, options: DecodingOptions) -> int:
    """The captions' max_length; `UserError` where it is beyond the model's positions."""
    most = model.config.text_length
    length = most if options.max_length is None else options.max_length
    if length > most:
        raise UserError(
            f"max_length={length}: expected 1 to {most}, the text length that the model was "
            "trained with"
        )
    columns = pad_to_lanes(model.config.vocab_size)
    for name, most in (("num_beams", columns // 2), ("top_k", columns)):
        if getattr(options, name) > most:
            raise UserError(f"{name}={getattr(options, name)}: at most {most} of this vocabulary")
    if options.is_by_rows and not isinstance(model, Captioner):
        raise UserError("draft_length and num_slots need a captioner; this model is a CoCa")
    if options.draft_length and not model.config.mask_token:
        raise UserError(
            f"draft_length={options.draft_length}: drafts need a model with a parallel mode "
            "(model.mask_token=true, objective.captioning.parallel_fraction above 0)"
        )
    if len(options.guidance_scales) > length:
        raise UserError(
            f"guidance_scale has {len(options.guidance_scales)} values for max_length={length}"
        )
    return length


@functools.partial(jax.jit, static_argnames=("model", "rules"))
def _generate(
    model,
    params,
    inputs,
    contrast,
    language_params,
    index_B,
    mask_B,
    forced_BL,
    banned_MW,
    stop_MW,
    key,
    numbers: _Numbers,
    *,
    rules: _Rules,
) -> Generated:
    method = METHODS[rules.method]
    memory_BPD = _memory(model, params, inputs)
    memories: list[Array | None] = [memory_BPD]
    if rules.is_guided:
        memories.append(None if contrast is None else _memory(model, params, contrast))
    sizes = {"batch": len(memory_BPD), "length": rules.max_length, "num_rows": rules.num_rows}
    step, cache = model.start_decoding(params, memories, **sizes)
    language_step, language_cache = None, ()
    if rules.language_model is not None:
        language_step, language_cache = rules.language_model.start_decoding(
            language_params, **sizes
        )
    keys_BS = sampling.row_keys(key, reshard(index_B, act_B), rules.num_rows)
    mask_B = reshard(mask_B, act_B)
    forced_BL = None if forced_BL is None else reshard(forced_BL, act_BL)

    def advance(carry: _Carry) -> _Carry:
        index, state = carry.index, carry.state
        inputs = (state.last_BS, index)
        logits_BRV, hidden_BRE, cache = step(*inputs, carry.cache, state.ancestors_BSL)
        logits_BRV = reshard(logits_BRV, act_BSV)  # whole rows: they may be split over `tensor`
        language_BSV, language_cache = None, carry.language_cache
        if language_step is not None:
            language_BSV, _, language_cache = language_step(
                *inputs, carry.language_cache, state.ancestors_BSL
            )
        logits_BSV = _joined(logits_BRV, language_BSV, index, numbers, rules)
        logprobs_BSV = sampling.log_distribution(
            logits_BSV, model.config.vocab_size, numbers.temperature
        )
        token_B = _forced_token(forced_BL, index, mask_B)
        scores_BSV = _allowed(logprobs_BSV, state.texts, index, numbers, rules, banned_MW)
        scores_BSV = sampling.truncate(scores_BSV, numbers, rules)
        if forced_BL is not None:
            scores_BSV = processors.force(scores_BSV, token_B)
        position = Position(
            index=index,
            logprobs_BSV=logprobs_BSV,
            scores_BSV=scores_BSV,
            hidden_BSE=hidden_BRE[:, : rules.num_rows],
            is_forced_B=token_B != PAD_ID,
            stop_MW=stop_MW,
        )
        state = method.advance(state, position, keys_BS, numbers, rules)
        return _Carry(index + 1, state, cache, language_cache)

    start = _Carry(
        index=jnp.int32(0),
        state=method.start(len(memory_BPD), rules, mask_B, model.config),
        cache=cache,
        language_cache=language_cache,
    )
    end = jax.lax.while_loop(
        lambda carry: (carry.index < rules.max_length) & ~jnp.all(method.is_over(carry.state)),
        advance,
        start,
    )
    texts, score_BS = method.finish(end.state, numbers, rules)
    return Generated(
        tokens_BSL=texts.tokens_BSL,
        logprobs_BSL=texts.logprobs_BSL,
        entropies_BSL=texts.entropies_BSL,
        num_tokens_BS=jnp.sum(texts.tokens_BSL != PAD_ID, axis=-1, dtype=jnp.int32),
        finish_BS=texts.finish_BS,
        score_BS=score_BS,
    )


def _memory(model, params, inputs: Array) -> Float[Array, "B P D"]:
    return model.encode(params, inputs) if inputs.ndim == 4 else inputs


def _joined(logits_BRV, language_BSV, index, numbers: _Numbers, rules: _Rules) -> Array:
    """The logits of all branches as one."""
    logits_BSV, contrast_BSV = logits_BRV[:, : rules.num_rows], logits_BRV[:, rules.num_rows :]
    if rules.is_guided:
        scales_G = numbers.guidance_scale_G
        scale = scales_G[jnp.minimum(index, len(scales_G) - 1)]
        guided_BSV = guidance.guided(logits_BSV, contrast_BSV, scale)
    else:
        guided_BSV, contrast_BSV = logits_BSV, jnp.zeros_like(logits_BSV)
    if language_BSV is None:
        return guided_BSV
    joined_BSV = guidance.language_model_guided(
        guided_BSV, contrast_BSV, reshard(language_BSV, act_BSV), numbers.alpha, numbers.beta
    )
    if rules.newline_id is None:
        return joined_BSV
    return guidance.newline_ends(joined_BSV, rules.newline_id)


def _forced_token(forced_BL, index, mask_B) -> Int[Array, "B"]:
    """What must be written at this position, or PAD."""
    if forced_BL is None:
        return jnp.zeros_like(mask_B, jnp.int32) + PAD_ID
    return jax.lax.dynamic_index_in_dim(forced_BL, index, axis=1, keepdims=False)


def _allowed(
    scores_BSV, texts: Texts, index, numbers: _Numbers, rules: _Rules, banned_MW
) -> Float[Array, "B S V"]:
    """Scores by the rules about what may be written."""
    if rules.has_repetition_penalty:
        scores_BSV = processors.penalize_repetition(
            scores_BSV, texts.tokens_BSL, numbers.repetition_penalty
        )
    if rules.no_repeat_ngram_size:
        scores_BSV = processors.ban_repeated_ngrams(
            scores_BSV, texts.tokens_BSL, index, rules.no_repeat_ngram_size
        )
    if banned_MW is not None:
        scores_BSV = processors.ban_sequences(scores_BSV, texts.tokens_BSL, index, banned_MW)
    scores_BSV = processors.ban_end(scores_BSV, index < numbers.min_length)
    return processors.ban_padding(scores_BSV)
