"""METEOR 1.5 of tokenised captions: the reference program finds the matches, we score them.

Denkowski and Lavie, 2014. Stems, synonyms and paraphrases need the program's tables. The score is a
function of counts, so that any resampling of a set can be scored: that of a set is of the sums of
its items' counts, and is not the mean of theirs.
"""

import contextlib
import subprocess
import tempfile
from collections.abc import Sequence

import numpy as np

from capjax.evaluation import java

_JAR = "meteor/meteor-1.5.jar"
NUM_COUNTS = 23

# The parameters of the task "rank" for English, and the weights of the four kinds of match: exact,
# stem, synonym, paraphrase.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_KINDS = np.array([1.0, 0.6, 0.8, 0.6])


class Meteor:
    """The program, for as long as a `with` block lasts: it takes some seconds to start.

    Entering raises `UserError` where it is missing.
    """

    def __enter__(self) -> "Meteor":
        jar = java.require() / _JAR
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            ["java", "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            cwd=jar.parent,
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()  # it has no end of its own
        with contextlib.suppress(OSError):  # what it never read
            self._process.communicate()
        self._errors.close()

    def counts(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """float64 [N, 23]: the program's counts of each caption and the reference it is nearest to.

        Lengths and function words of both; of each kind of match, words of both that matched,
        content then function words; chunks; all matched words of both. Raises `RuntimeError` where
        the program fails.
        """
        rows = []
        for candidate, known in zip(candidates, references, strict=True):
            line = " ||| ".join(("SCORE", *map(_plain, known), _plain(candidate)))
            rows.append([float(count) for count in self._ask(line).split()])
        counts = np.array(rows, np.float64).reshape(len(rows), NUM_COUNTS)
        chunks, matched = counts[:, 20], counts[:, 21:23]
        # A caption that is its reference has no fragments, also in the sum of a set.
        chunks[(chunks == 1) & (matched == counts[:, 0:2]).all(1)] = 0
        return counts

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):  # a program that has ended answers nothing either
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        if answer := self._process.stdout.readline():
            return answer
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip()[-300:]
        raise RuntimeError(f"METEOR stopped: {said or 'it says nothing'}")


def score(sums: np.ndarray) -> np.ndarray | np.floating:
    """[...], in [0, 1]: METEOR of counts [..., 23], of one caption or summed over a set."""
    lengths, function_words = sums[..., 0:2], sums[..., 2:4]
    matches = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)
    content, function = matches[..., 0:2], matches[..., 2:4]
    chunks, matched = sums[..., 20], sums[..., 21:23]
    found = np.einsum("k,...ks->...s", _KINDS, _DELTA * content + (1 - _DELTA) * function)
    weight = _DELTA * (lengths - function_words) + (1 - _DELTA) * function_words
    precision, recall = np.moveaxis(_over(found, weight), -1, 0)
    mean = _over(precision * recall, _ALPHA * precision + (1 - _ALPHA) * recall)
    return mean * (1 - _GAMMA * _over(chunks, matched.mean(-1)) ** _BETA)


def _over(part: np.ndarray | np.floating, whole: np.ndarray | np.floating) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(np.shape(whole)), where=whole > 0)


def _plain(text: str) -> str:
    """A caption without what separates captions in METEOR's lines."""
    return text.replace("|||", "").replace("  ", " ")
