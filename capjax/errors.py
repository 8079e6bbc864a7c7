"""The exceptions that are answers: the input is wrong, or the run was asked to stop."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is one line: what was expected, what came, and the way out.

    `capjax` prints it without a traceback and exits with `status`.
    """

    status = 2


class StorageError(UserError, OSError):
    """Storage failed longer than it was tried again; the same command may be run again later."""

    status = 75


class RunAgain(BaseException):
    """A process was asked to stop before its end; the same command goes on from what it kept.

    `capjax` prints the message and exits with `status`: 75 (EX_TEMPFAIL of sysexits, "try again"),
    upon which launchers start it anew, or 130 after ^C. No `Exception`: a signal may raise it
    within any line, and nobody there is to take it for an error of theirs.
    """

    status = 75

    def __init__(self, line: str, status: int = 75):
        self.status = status
        super().__init__(line)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`; did you mean X?` for the choice nearest to `word`; nothing where none is near."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {near[0]}?" if near else ""
