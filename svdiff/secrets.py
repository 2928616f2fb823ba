"""Takes passwords and tokens out of texts that are shown, logged or stored."""

from __future__ import annotations

import os
import re
import sys
import traceback
from types import TracebackType
from urllib.parse import unquote

USER_OF_URL = re.compile(r"(?<=://)[^\s/'\"]*(?=@)")  # with its password
OF_QUERY = re.compile(
    r"(?i)(?<=[?&])((?:[\w-]*(?:token|password|secret|signature|api_?key|access_?key)|sig)=)[^&\s'\"]+"
)
SECRET_NAME = re.compile(r"(?i)(^|_)(token|secret|password|passwd|api_?key|access_key|private_key|credentials?)(_|$)")
SHORTEST = 6  # characters of a secret that is looked for by its value: a shorter one would take ordinary words away
HIDDEN = "***"


def redacted(text: str) -> str:
    """`text` without users and passwords of addresses, and without the values of the environment's secrets."""
    for secret in sorted(_of_environment(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return OF_QUERY.sub(rf"\1{HIDDEN}", USER_OF_URL.sub(HIDDEN, text))


def _of_environment() -> set[str]:
    """Values of variables that are called token, password, secret or the like, and passwords of addresses in any."""
    found = {value for name, value in os.environ.items() if SECRET_NAME.search(name)}
    for value in os.environ.values():
        for user in USER_OF_URL.findall(value):
            password = user.partition(":")[2]
            found |= {password, unquote(password)}
    return {secret for secret in found if len(secret) >= SHORTEST and not os.path.exists(secret)}


def show_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """For `sys.excepthook`: the usual traceback, redacted."""
    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))
