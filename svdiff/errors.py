"""The one exception that users are meant to read."""

from __future__ import annotations

import errno

from svdiff.secrets import redacted


class SvdiffError(ValueError):
    """Bad input or a state that a person can mend.

    The message names the thing, the value found, what was expected and the fix; the command line prints it
    without a traceback. Passwords and tokens in it are hidden, whatever it quotes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


DISK = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}


def for_people(error: SvdiffError | OSError) -> str:
    """One sentence about an error and its fix. An OSError that is not about a disk that refuses is raised again."""
    if isinstance(error, SvdiffError):
        return str(error)
    if error.errno not in DISK:
        raise error
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    fix = "free some space" if full else "work in a checkout of your own that can be written, or mend the permissions"
    return f"{error.filename or 'a file'}: {error.strerror}; {fix}. Nothing finished is lost"
