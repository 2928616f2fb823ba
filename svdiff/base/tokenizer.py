"""A CLIPTokenizer with the world's own vocabulary: one token a word, single characters for everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from svdiff.base.captions import vocabulary
from svdiff.files import atomic_dir

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MAX_TOKENS = 40


def _bytes_to_unicode() -> list[str]:
    """The 256 printable characters by which byte-level BPE writes the bytes, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shifted = [256 + n for n in range(256 - len(printable))]
    return [chr(n) for n in (*printable, *shifted)]


def files(words: list[str]) -> tuple[dict[str, int], list[str]]:
    """vocab.json and merges.txt in which every word of `words` is one token and any other text still tokenises.

    A word is joined letter by letter from its left end; CLIP marks a word's last letter with `</w>`.
    """
    letters = _bytes_to_unicode()
    tokens = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters)])
    merges: dict[str, None] = {}
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        # From the right: a suffix ends in </w>, so that joining it cannot break another word's beginning.
        joined = pieces[-1]
        for piece in reversed(pieces[:-1]):
            merges[f"{piece} {joined}"] = None
            joined = piece + joined
            tokens[joined] = None
    names = [*tokens, "<|startoftext|>", "<|endoftext|>"]
    return {name: index for index, name in enumerate(names)}, list(merges)


def save(folder: Path, names: int) -> None:
    """Write the tokenizer's files to `folder`, with as many made-up names, in the layout that `CLIPTokenizer.from_pretrained` reads."""
    vocab, merges = files(vocabulary(names))
    with atomic_dir(folder) as target:
        (target / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
        (target / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        config = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": MAX_TOKENS,
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "do_lower_case": True,
        }
        (target / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def load(folder: Path) -> CLIPTokenizer:
    """The tokenizer of `folder`."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
