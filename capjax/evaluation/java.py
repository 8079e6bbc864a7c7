"""The reference programs of caption metrics that are Java: the PTB tokenizer and METEOR 1.5.

The package pycocoevalcap carries them (`pip install 'capjax[eval]'`). Its own Python wrappers write
into the installed package and stop when a program says too much; so the programs are run from here.
"""

import contextlib
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from capjax.errors import UserError

_PTB_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
_METEOR_JAR = "meteor/meteor-1.5.jar"


def package() -> Path | None:
    """The directory of pycocoevalcap; None where it is not installed."""
    spec = importlib.util.find_spec("pycocoevalcap")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def why_missing() -> str:
    """Why the Java programs cannot run here; "" where they can."""
    if package() is None:
        return "needs pycocoevalcap (pip install 'capjax[eval]')"
    if shutil.which("java") is None:
        return "needs Java 8 or newer (Debian: apt-get install default-jre-headless)"
    return ""


def require() -> Path:
    """The directory of pycocoevalcap. Raises `UserError` where its programs cannot run."""
    place, reason = package(), why_missing()
    if place is None or reason:
        raise UserError(f"the reference's tokenizer and METEOR: {reason}; or choose treebank")
    return place


def ptb_tokenize(lines: Sequence[str]) -> list[str]:
    """The PTB tokens of each line, lower case, with spaces between; punctuation is still there.

    Raises `ValueError` where a line holds a line break, `UserError` where the program is missing,
    `RuntimeError` where it fails.
    """
    command = ["java", "-cp", str(require() / _PTB_JAR), "edu.stanford.nlp.process.PTBTokenizer"]
    check_lines(lines)
    ran = subprocess.run(
        [*command, "-preserveLines", "-lowerCase", "-encoding", "utf-8"],
        input="".join(line + "\n" for line in lines).encode(),
        capture_output=True,
    )
    found = ran.stdout.decode().split("\n")[:-1]
    if ran.returncode or len(found) != len(lines):
        said = ran.stderr.decode(errors="replace").strip()[-300:]
        raise RuntimeError(f"the PTB tokenizer gave {len(found)} of {len(lines)} lines: {said}")
    return found


def check_lines(lines: Sequence[str]) -> None:
    """Raises `ValueError` where a line holds a break, which would shift those after it."""
    for line in lines:
        if len(line.splitlines()) > 1:
            raise ValueError(f"{line!r} holds a line break; expected one line")


class Meteor:
    """METEOR 1.5 for as long as a `with` block lasts: the program takes some seconds to start.

    Entering raises `UserError` where the program is missing.
    """

    def __enter__(self) -> "Meteor":
        jar = require() / _METEOR_JAR
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

    def score(
        self, candidates: Sequence[str], references: Sequence[Sequence[str]]
    ) -> tuple[float, np.ndarray]:
        """METEOR of tokenised captions: of the whole set, and float64 [N] of each, in [0, 1].

        The first is computed from all matches together and is not the mean of the second. Raises
        `RuntimeError` where the program fails.
        """
        try:
            matches = [
                self._ask("SCORE", *map(_plain, known), _plain(candidate))
                for candidate, known in zip(candidates, references, strict=True)
            ]
            scores = [self._ask("EVAL", *matches), *(self._answer() for _ in candidates)]
        except (OSError, EOFError) as error:
            self._process.kill()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip()[-300:]
            raise RuntimeError(f"METEOR stopped: {said or error}") from error
        return float(scores[-1]), np.array([float(score) for score in scores[:-1]])

    def _ask(self, *parts: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(" ||| ".join(parts) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EOFError("no answer")
        return line.strip()


def _plain(text: str) -> str:
    """A caption without what separates captions in METEOR's lines."""
    return text.replace("|||", "").replace("  ", " ")
