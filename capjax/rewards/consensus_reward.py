"""CIDEr-D of sampled captions on the host, as a reward: exact, on words.

Vedantam, Zitnick and Parikh 2015; as a reward Rennie et al. 2017, "Self-critical Sequence Training
for Image Captioning". N-grams weigh as the whole training set has them, not the batch at hand. The
end of a caption is its last token, in candidates and references: without it the reward pays for
captions that break off ("a cat on a"). Letters: B images, K captions an image.
"""

import dataclasses
import string
from collections.abc import Callable, Sequence

import numpy as np

from capjax.rewards.consensus import DocumentFrequencies, cider_d, document_frequencies

END = ""  # no word is empty

Tokenize = Callable[[str], Sequence[str]]


def words(text: str) -> list[str]:
    """Lower-cased, split at white space, without punctuation around words."""
    stripped = (word.strip(string.punctuation) for word in text.lower().split())
    return [word for word in stripped if word]


@dataclasses.dataclass(frozen=True)
class ConsensusReward:
    """Scores sampled captions against their images' references.

    Attributes:
      frequencies: of the n-grams of the training set's references, ends included: `train` makes it.
      tokenize: a text's words, none of them empty.
    """

    frequencies: DocumentFrequencies
    tokenize: Tokenize = words

    @classmethod
    def train(
        cls, references: Sequence[Sequence[str]], tokenize: Tokenize = words
    ) -> "ConsensusReward":
        """With the frequencies of `references`: of each training image, its captions.

        Raises `ValueError` where there is no image.
        """
        counted = [[[*tokenize(text), END] for text in image] for image in references]
        return cls(document_frequencies(counted), tokenize)

    def __call__(
        self,
        texts: Sequence[Sequence[str]],
        references: Sequence[Sequence[str]],
        is_ended_BK: np.ndarray | None = None,
    ) -> np.ndarray:
        """CIDEr-D of K captions of each of B images, in [0, 10].

        Args:
          references: of each image; one without any, as of a row that fills the batch, scores 0.
          is_ended_BK: bool [B, K]: whether the caption ended, or was cut at the largest length and
            so has no end to be paid for. Default: all ended.

        Returns float32 [B, K]. Raises `ValueError` where the lists do not match.
        """
        size = len(texts[0]) if texts else 0
        if len(texts) != len(references) or any(len(image) != size for image in texts):
            raise ValueError(
                f"captions of {len(texts)} images (of the first {size}), references of "
                f"{len(references)}: expected as many images, and as many captions of each"
            )
        found_BK = np.zeros((len(texts), size), np.float32)
        rows = [row for row, image in enumerate(references) if image]
        if is_ended_BK is None:
            is_ended_BK = np.ones_like(found_BK, bool)
        candidates = [
            [*self.tokenize(text), END] if is_ended else self.tokenize(text)
            for row in rows
            for text, is_ended in zip(texts[row], is_ended_BK[row], strict=True)
        ]
        known = [[[*self.tokenize(text), END] for text in references[row]] for row in rows]
        places = np.repeat(np.arange(len(rows)), size)
        scores = cider_d(candidates, known, self.frequencies, rows=places)
        found_BK[rows] = scores.reshape(len(rows), size)
        return found_BK
