"""Commands compute with the threads that params.yaml says, not with as many as the machine happens to have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

READ = "from svdiff.cli.arguments import read; from pathlib import Path; read(Path('params.yaml'))"
THREADS = "import torch; print(torch.get_num_threads())"
PARAMS = "classes: [dog]\nconcepts: {rex: {class_word: dog}}\nsample: {prompts: ['a {subject}']}\n"


@pytest.mark.parametrize("program", [f"{READ}; {THREADS}", f"import torch; {READ}; {THREADS}"], ids=["before", "after"])
@pytest.mark.parametrize(("written", "threads"), [("threads: 3\n", "3"), ("", "2")])
def test_threads_of_params_are_used_whenever_torch_is_imported(
    tmp_path: Path, program: str, written: str, threads: str
) -> None:
    (tmp_path / "params.yaml").write_text(PARAMS + written)
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    environment.pop("MKL_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == threads
