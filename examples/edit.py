"""Edit a single picture from Python (Sec. 3.4): train on it, invert it (Eq. 6), sample another prompt.

In a checkout:

    python examples/edit.py cat.png "a cat on a blue background" "a cat on a red background"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from svdiff.config import load_config
from svdiff.editing.stage import edit_any
from svdiff.threads import use_threads


def main() -> None:
    """Edit the picture and print where the sheet is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("prompt", help="what it shows")
    parser.add_argument("target", nargs="+", help="what it shall show")
    parser.add_argument("--output", type=Path, default=Path("pictures"))
    asked = parser.parse_args()
    config = load_config()
    use_threads(config.threads)
    print(edit_any(config, asked.picture, asked.prompt, asked.target, output=asked.output) / "sheet.png")


if __name__ == "__main__":
    main()
