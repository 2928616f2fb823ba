"""What people write into params.yaml and on the command line: which names, words and prompt templates are taken.

Names and class words become folders, file names and parts of commands, so nothing else than what is allowed here gets there.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from svdiff.errors import SvdiffError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
CLASS_WORD = re.compile(r"[^\W_]+(?:[ '’-][^\W_]+)*")  # `teddy bear`, `child's toy`
TOKEN = re.compile(r"[^\W_]{1,40}")
PLACEHOLDER = re.compile(r"\{[^{}]*\}|[{}]")  # also a brace without its partner


def check_name(name: str) -> str:
    """A name of an entry or of a start, which is a folder of every stage. Raises ValueError saying what is allowed."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"name '{name}': expected letters, digits, '-' and '_', at most 100, beginning with a letter or digit"
        )
    return name


def check_class_word(word: str) -> str:
    """A class in plain words, which is a folder as well. Raises ValueError saying what is allowed."""
    if not CLASS_WORD.fullmatch(word) or len(word) > 60:
        raise ValueError(
            f"class word '{word}': expected words of letters and digits with single spaces, hyphens or apostrophes "
            "between them, such as teddy bear"
        )
    return word


def check_token(token: str) -> str:
    """A special token: one word. Raises ValueError saying what is allowed."""
    if not TOKEN.fullmatch(token):
        raise ValueError(f"token '{token}': expected one rare word of letters and digits, such as sks")
    return token


def check_template(template: str, allowed: Iterable[str] = (), needed: Iterable[str] = ()) -> str:
    """A prompt in which only placeholders such as {subject} stand in braces. Raises ValueError for another."""
    allowed, needed = tuple(allowed), tuple(needed)
    if not template.strip():
        raise ValueError(f"prompt '{template}' says nothing; expected some words")
    for found in PLACEHOLDER.findall(template):
        if found.strip("{}") not in allowed or len(found) < 3:
            known = " or ".join(f"{{{name}}}" for name in allowed) or "nothing"
            raise ValueError(f"prompt '{template}' has '{found}'; {known} may stand in braces here")
    for name in needed:
        if f"{{{name}}}" not in template:
            raise ValueError(f"prompt '{template}' lacks {{{name}}}")
    return template


def is_folder(model: str) -> bool:
    """Whether a model's name means a folder, here or missing, and not a name of the Hub such as owner/name."""
    return Path(model).is_dir() or model.startswith((".", "/", "models/")) or model.count("/") > 1


def fill(template: str, **words: str) -> str:
    """The template with each placeholder replaced by its words. Raises SvdiffError if there is another one."""
    try:
        check_template(template, allowed=words)
    except ValueError as error:
        raise SvdiffError(str(error)) from None
    return PLACEHOLDER.sub(lambda found: words[found[0][1:-1]], template)


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """'; did you mean …?' where something similar is known, else the end of the sentence."""
    lowered = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(wrong.casefold(), lowered, n=1, cutoff=0.6)
    return f"; did you mean '{lowered[near[0]]}'?" if near else "."


def word_pattern(word: str) -> re.Pattern[str]:
    """Finds `word` where it stands by itself, beside punctuation as well."""
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)")


def file_stem(text: str) -> str:
    """A file name for any text: its words, and a few digits of its hash where those alone would not tell it from others.

    Disks exist that do not tell upper case from lower.
    """
    stem = "-".join(re.findall(r"\w+", text))[:80]
    if stem and stem.replace("-", " ") == text.lower():
        return stem
    return f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}".lstrip("-")
