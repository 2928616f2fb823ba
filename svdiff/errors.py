"""The one exception that users are meant to read."""


class SvdiffError(ValueError):
    """Bad input or a state that a person can mend.

    The message names the thing, the value found, what was expected and the fix; the command line prints it
    without a traceback.
    """
