"""Where the Java programs of caption metrics are, and the PTB tokenizer.

The package pycocoevalcap carries them (`pip install 'capjax[eval]'`). Its own Python wrappers write
into the installed package and hang where a program says too much; so the programs are run from
here.
"""

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from capjax.errors import UserError

_PTB_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"


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
