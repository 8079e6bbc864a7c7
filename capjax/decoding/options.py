"""How captions are written: every choice in one frozen value, checked before anything compiles."""

import dataclasses
import math
from collections.abc import Sequence

from capjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """What to ask of `generate`, by Hugging Face's names and in its meanings where it has them.

    The method follows from the fields: beam search where `num_beams` > 1, contrastive search where
    `penalty_alpha` > 0, sampling where `temperature` > 0, else greedy.

    Attributes:
      max_length: tokens of a caption, its end and its prefix included; None: the model's.
      min_length: tokens before the first end may be written.
      num_captions: captions an image: draws, or the best of the beams.
      temperature: 0 is greedy; above it, divides the logits of what is drawn from.
      top_k: only the k most probable tokens; 0: all. In contrastive search the candidates.
      top_p: only the fewest most probable tokens that together have this probability.
      min_p: only tokens at least this fraction as probable as the most probable one.
      num_beams: beams an image.
      num_beam_groups: beams in this many groups, which avoid each other's tokens (diverse beam
        search, Vijayakumar et al. 2018).
      diversity_penalty: off a token's log-probability, once for each earlier group that took it at
        this position.
      length_penalty: finished beams are ranked by log-probability / length ** length_penalty; the
        length is that of the whole caption, its end and its prefix included.
      early_stopping: True: a beam search stops when it has num_beams finished captions; False: when
        the best beam under way, were it to end now, is not better than the worst of them; "never":
        when none can become better.
      penalty_alpha: contrastive search (Su et al. 2022): weight of the likeness to earlier states.
      repetition_penalty: multiplies the log-probability of tokens that the caption has already.
      no_repeat_ngram_size: no n-gram of this many tokens twice; 0: no such rule.
      guidance_scale: classifier-free guidance (Kornblith et al. 2023): 1 is none, 0 without image.
        A sequence is a schedule over positions, its last value kept. Needs a model trained with
        `image_dropout`.
      draft_length: self-speculative decoding: the parallel mode of a CapPa model drafts the whole
        caption, and this many of its tokens are verified at once. Captions remain those of greedy
        search, or draws from the same distribution. 0: none.
      num_slots: captions of a batch under way at once, where one that is done makes room for the
        next; fewer than the batch has, on one device. 0: all of it, which waits for the longest.
      banned: texts that may not be written, in the tokens that the tokenizer cuts them into.
      stop: texts, in their tokens likewise, after which a caption ends.
    """

    max_length: int | None = None
    min_length: int = 0
    num_captions: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    num_beams: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    penalty_alpha: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    guidance_scale: float | Sequence[float] = 1.0
    draft_length: int = 0
    num_slots: int = 0
    banned: Sequence[str] = ()
    stop: Sequence[str] = ()

    def __post_init__(self):
        if isinstance(self.guidance_scale, Sequence):
            object.__setattr__(self, "guidance_scale", tuple(map(float, self.guidance_scale)))
        for name in ("banned", "stop"):
            if isinstance(getattr(self, name), str):
                raise UserError(f"{name}={getattr(self, name)!r}: expected a list of texts")
            if not all(map(str.strip, getattr(self, name))):
                raise UserError(f"{name}={list(getattr(self, name))}: a text in it is blank")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, is_good, expected in self._rules():
            if not is_good:
                raise UserError(f"{name}={getattr(self, name)}: expected {expected}")
        self._check_method()

    @property
    def method(self) -> str:
        """ "beam", "contrastive", "sample" or "greedy"."""
        if self.num_beams > 1:
            return "beam"
        if self.penalty_alpha > 0:
            return "contrastive"
        return "sample" if self.temperature > 0 else "greedy"

    @property
    def guidance_scales(self) -> tuple[float, ...]:
        """The schedule over positions."""
        scale = self.guidance_scale
        return tuple(scale) if isinstance(scale, Sequence) else (float(scale),)

    @property
    def is_guided(self) -> bool:
        """Whether the logits without image are needed."""
        return any(scale != 1 for scale in self.guidance_scales)

    @property
    def is_by_rows(self) -> bool:
        """Whether captions are written each at its own pace (`speculative`), not in step."""
        return self.draft_length > 0 or self.num_slots > 0

    def _rules(self) -> list[tuple[str, bool, str]]:
        finite = all(map(math.isfinite, self.guidance_scales))
        return [
            ("max_length", self.max_length is None or self.max_length >= 1, "at least 1"),
            ("min_length", self.min_length >= 0, "at least 0"),
            ("num_captions", self.num_captions >= 1, "at least 1"),
            (
                "temperature",
                self.temperature == 0 or 1e-6 <= self.temperature < math.inf,
                "0 (greedy) or a number from 1e-6 on",
            ),
            ("top_k", self.top_k >= 0, "at least 1, or 0 for all tokens"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, up to 1 (all tokens)"),
            ("min_p", 0 <= self.min_p <= 1, "0 (all tokens) to 1"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
            (
                "num_beam_groups",
                self.num_beam_groups >= 1 and self.num_beams % self.num_beam_groups == 0,
                f"a divisor of num_beams={self.num_beams}",
            ),
            ("diversity_penalty", 0 <= self.diversity_penalty < math.inf, "at least 0"),
            (
                "early_stopping",
                self.early_stopping in (True, False, "never"),
                'True, False or "never"',
            ),
            ("length_penalty", math.isfinite(self.length_penalty), "a finite number"),
            ("penalty_alpha", 0 <= self.penalty_alpha <= 1, "0 to 1"),
            (
                "repetition_penalty",
                0 < self.repetition_penalty < math.inf,
                "a positive number (1: none)",
            ),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "at least 1, or 0 for none"),
            ("draft_length", self.draft_length >= 0, "at least 1, or 0 for none"),
            ("num_slots", self.num_slots >= 0, "at least 1, or 0 for all of the batch"),
            (
                "guidance_scale",
                finite and len(self.guidance_scales) > 0,
                "a finite number, or a list of such",
            ),
        ]

    def _check_method(self) -> None:
        method = self.method
        if method != "sample":
            wants = {"top_p": 1.0, "min_p": 0.0}
            if method != "contrastive":
                wants["top_k"] = 0
            for name, default in wants.items():
                if getattr(self, name) != default:
                    raise UserError(
                        f"{name}={getattr(self, name)} is of sampling; set temperature (1, say) "
                        "and neither num_beams nor penalty_alpha"
                    )
        if method in ("beam", "contrastive") and self.temperature > 0:
            raise UserError(
                f"temperature={self.temperature} is of sampling, but "
                f"{'num_beams' if method == 'beam' else 'penalty_alpha'} asks for a search; "
                "set one of them"
            )
        if method == "beam" and self.penalty_alpha > 0:
            raise UserError("num_beams > 1 and penalty_alpha > 0 are two methods; set one of them")
        if method != "beam":
            for name in (
                *("num_beam_groups", "diversity_penalty"),
                *("early_stopping", "length_penalty"),
            ):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise UserError(f"{name}={getattr(self, name)} is of beams; set num_beams")
        if method == "beam" and self.num_captions > self.num_beams:
            raise UserError(
                f"num_captions={self.num_captions}: expected at most num_beams={self.num_beams}"
            )
        if method == "contrastive" and self.top_k < 2:
            raise UserError(
                f"top_k={self.top_k}: contrastive search weighs candidates; set it to 4, say"
            )
        if method in ("greedy", "contrastive") and self.num_captions > 1:
            raise UserError(
                f"num_captions={self.num_captions}: {method} search has one caption an image; "
                "set temperature (1, say) for draws, or num_beams"
            )
        if self.is_by_rows:
            self._check_plain("draft_length" if self.draft_length else "num_slots")
        if (self.diversity_penalty > 0) != (self.num_beam_groups > 1):
            raise UserError(
                f"diversity_penalty={self.diversity_penalty} with num_beam_groups="
                f"{self.num_beam_groups}: they are set together, above 0 and above 1"
            )

    def _check_plain(self, asked: str) -> None:
        """Raises `UserError` unless the next token depends on the text before it alone."""
        if self.method not in ("greedy", "sample"):
            raise UserError(
                f"{asked}={getattr(self, asked)} is of greedy search and sampling; leave out "
                f"{'num_beams' if self.method == 'beam' else 'penalty_alpha'}"
            )
        for name in (
            *("num_captions", "guidance_scale", "repetition_penalty", "no_repeat_ngram_size"),
            *("banned", "stop"),
        ):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UserError(
                    f"{name}={getattr(self, name)} does not go together with {asked}; "
                    "leave out one of them"
                )


GREEDY = DecodingOptions()
