"""The one exception that users are meant to read."""

from svdiff.secrets import redacted


class SvdiffError(ValueError):
    """Bad input or a state that a person can mend.

    The message names the thing, the value found, what was expected and the fix; the command line prints it
    without a traceback. Passwords and tokens in it are hidden, whatever it quotes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))
