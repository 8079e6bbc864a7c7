"""The one exception that means: the user's input is wrong, and here is the mend."""


class UserError(Exception):
    """Bad input. The message is one line: what was expected, what came, and the way out.

    `capjax` prints it without a traceback and exits with status 2.
    """
