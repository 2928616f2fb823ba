"""Editing of a single picture (Sec. 3.4, 4.3): train on it, invert it, sample other prompts."""

from pathlib import Path

EDITS = Path("out/edit")  # where the stage `edit` writes, a folder an edit
