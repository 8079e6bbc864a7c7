"""The settings of the captioning objective."""

import dataclasses
import math

from capjax.errors import UserError
from capjax.objectives.parallel_draw import causal_rows_of_group


@dataclasses.dataclass(frozen=True)
class CaptioningObjective:
    """What captioning minimises, and in which modes.

    Attributes:
      weight: of this loss in the sum of objectives; 0 leaves it out.
      parallel_fraction: probability of the parallel mode (0: Cap).
      parallel_draw: "bernoulli" draws the mode of each row by itself, as big_vision does; "fixed"
        draws which rows of each few consecutive ones are causal. Each row has the same probability
        either way, hence the loss and its gradient the same expectation, and "fixed" is cheaper:
        parallel rows need no mask, and what precedes their first cross-attention is done once.
      masking_ratio: share of the positions of a parallel row that are masked.
      score_visible: whether parallel rows are scored where they are not masked too. If so, the
        share is of all positions, as in big_vision; if not, of the caption's tokens (at least one).
      image_dropout: probability that an image's captions are predicted without it.
      label_smoothing: spread evenly over the ids other than the label.
      z_loss: weight of the squared log of the softmax's denominator.
      normalization: "caption": the mean over captions of their mean over tokens; "token": the mean
        over the scored tokens of the global batch.
      smile_weight: share of SMILE in this loss, of likelihood the rest (see `smile_nll`); it needs
        causal rows alone. SMILE's authors fine-tune with 1 and with 0.99.
      smile_first_token: the first position is scored by likelihood all the same, because it must
        choose among all words.
      smile_subset: among which ids SMILE chooses: those of the "label", or in "reverse" all others.
    """

    weight: float = 1.0
    parallel_fraction: float = 0.75
    parallel_draw: str = "bernoulli"
    masking_ratio: float = 1.0
    score_visible: bool = True
    image_dropout: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    normalization: str = "caption"
    smile_weight: float = 0.0
    smile_first_token: bool = True
    smile_subset: str = "label"

    def __post_init__(self):
        fraction = self.parallel_fraction
        _check("weight", self.weight, 0 <= self.weight < math.inf, "0 or more")
        _check("parallel_fraction", fraction, 0 <= fraction <= 1, "0 (Cap) to 1")
        _check_choice("parallel_draw", self.parallel_draw, ("bernoulli", "fixed"))
        if self.parallel_draw == "fixed":
            causal_rows_of_group(fraction)
        ratio = self.masking_ratio
        _check("masking_ratio", ratio, 0 < ratio <= 1, "more than 0, to 1")
        _check("image_dropout", self.image_dropout, 0 <= self.image_dropout <= 1, "0 to 1")
        smoothing = self.label_smoothing
        _check("label_smoothing", smoothing, 0 <= smoothing < 1, "0 to less than 1")
        _check("z_loss", self.z_loss, 0 <= self.z_loss < math.inf, "0 or more")
        _check_choice("normalization", self.normalization, ("caption", "token"))
        _check("smile_weight", self.smile_weight, 0 <= self.smile_weight <= 1, "0 to 1")
        _check_choice("smile_subset", self.smile_subset, ("label", "reverse"))
        if self.smile_weight and fraction:
            raise UserError(
                f"objective.captioning.smile_weight={self.smile_weight} with parallel_fraction="
                f"{fraction}: SMILE is for causal rows; set parallel_fraction=0"
            )

    @property
    def is_mixed(self) -> bool:
        """Whether both modes occur."""
        return 0 < self.parallel_fraction < 1

    @property
    def group_causal(self) -> int:
        """Causal rows of a group of the fixed draw."""
        return causal_rows_of_group(self.parallel_fraction)[0]

    @property
    def group_size(self) -> int:
        """Rows of a group of the fixed draw."""
        return causal_rows_of_group(self.parallel_fraction)[1]

    def rows_together(self, captions_per_image: int = 1) -> int:
        """So many consecutive images must share a microbatch and a device."""
        if self.parallel_draw == "bernoulli" or not self.is_mixed:
            return 1
        return self.group_size // math.gcd(self.group_size, captions_per_image)


def _check(name: str, value: float, is_right: bool, expected: str) -> None:
    if not is_right:
        raise UserError(f"objective.captioning.{name}={value}: expected {expected}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"objective.captioning.{name}={value!r}: choose {' or '.join(choices)}")
