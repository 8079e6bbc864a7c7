"""The one exception that means: the user's input is wrong, and here is the mend."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is one line: what was expected, what came, and the way out.

    `capjax` prints it without a traceback and exits with status 2.
    """


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`; did you mean X?` for the choice nearest to `word`; nothing where none is near."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {near[0]}?" if near else ""
