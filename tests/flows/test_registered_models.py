"""Every method and kind of entry through the real registry: register, load, predict, score again, reproduce; and what is sent."""

from __future__ import annotations

import io
import math
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from champions import Champions
from PIL import Image

from flows.monitoring.round import Round
from flows.monitoring.rule import Verdict
from flows.pipeline.results import read_results
from flows.registry.concepts import fetch, find
from flows.registry.overrides import promote_manually
from flows.registry.register import register
from svdiff.errors import SvdiffError
from svdiff.evaluation.score import score
from svdiff.files import sha256_file
from svdiff.sampling.stage import sample_entry
from svdiff.training import stage as training

METHODS = {
    "svdiff": {},
    "svdiff with the token": {"train_token": True, "token_init": "distribution"},
    "full": {"method": "full", "lr": 0.01},
    "lora": {"method": "lora", "lr": 0.05},
    "custom-diffusion": {"method": "custom-diffusion", "lr": 0.05},
}
TRAIN = {"steps": 2, "batch_size": 1, "prior_weight": 0.0, "lr": 0.1, "validate_every": 2, "validation_seeds": [0]}
FEW = {"steps": 2, "guidance": 2.0}


class Catalogue(Champions):
    """A checkout whose entries are really trained, sampled, scored and registered."""

    def go(self, name: str, *, delta_only: bool = False) -> str:
        """All stages of an entry; the delta's hash."""
        delta = training.train(self.config, name)
        if not delta_only:
            sample_entry(self.config, name)
            score(self.config, name)
            done = register(self.tracking, self.config, read_results(self.config, name, self.root))
            if done.role != "champion":
                promote_manually(self.tracking, name, done.version, "for the test")
        return sha256_file(delta)

    def load(self, name: str) -> Any:
        """The champion as anybody loads it."""
        return mlflow.pyfunc.load_model(f"models:/{name}@champion")


def make(project, tiny_base: Path, train: dict[str, Any], **sections: Any) -> Catalogue:
    sections = {"train": TRAIN | train, "mix": {"mixes": 2, "prompts": ["a {first} beside a {second}"]}} | sections
    made = Catalogue(project.root, tiny_base, "dog", "cat", tracking={"live": "none"}, **sections)
    two = {"dog": {"class_word": "dog", "token": "sks"}, "cat": {"class_word": "dog", "token": "zwx"}}
    made.sections |= {"concepts": two, "pairs": {"both": {"concepts": ["dog", "cat"]}}}
    made.change()
    return made


def picture(frame: pd.DataFrame, row: int = 0) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(frame["image"][row])), dtype=int)


def alike(drawn: np.ndarray, stored: Image.Image) -> bool:
    """Whether two pictures are the same but for rounding: one was drawn alone, the other in a batch."""
    return bool(np.abs(drawn - np.asarray(stored, dtype=int)).max() <= 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["concept", "pair"])
@pytest.mark.parametrize("method", METHODS)
def test_whatever_is_registered_can_be_loaded_drawn_scored_again_and_reproduced(
    project, tiny_base: Path, tiny_evaluators: None, method: str, kind: str
) -> None:
    made = make(project, tiny_base, METHODS[method])
    name = "dog" if kind == "concept" else "both"
    if kind == "pair":
        from svdiff.data.mixes import make_mixes

        shutil.copytree("data/concepts/dog", "out/prior/dog")
        make_mixes(made.config, name)
    registered = made.go(name)

    model = made.load(name)
    answer = model.predict(["a {subject}", "a dog"], params=FEW)
    assert picture(answer).shape == (16, 16, 3)
    # The same pictures as the stage `sample` drew: what was scored is what is served.
    drawn = pd.read_csv(f"out/sample/{name}/images.csv")
    row = drawn[drawn["model"] == "trained"].iloc[0]
    again = model.predict({"prompt": [row["prompt"]]}, params={"seed": int(row["seed"])})
    with Image.open(f"out/sample/{name}/{row['file']}") as sampled:
        assert alike(picture(again), sampled)
    bare = model.predict([row["prompt"]], params={"seed": int(row["seed"]), "scale": 0.0})
    base = drawn[(drawn["model"] == "base") & (drawn["prompt"] == row["prompt"]) & (drawn["seed"] == row["seed"])]
    with Image.open(f"out/sample/{name}/{base.iloc[0]['file']}") as sampled:
        assert alike(picture(bare), sampled)
        assert not alike(picture(again), sampled)
    assert np.array_equal(picture(model.predict([row["prompt"]], params={"seed": int(row["seed"])})), picture(again))

    round_ = Round(made.tracking, made.config, made.root)
    result = round_.reevaluate(name)
    assert result.verdict is Verdict.UNCHANGED, result.reason

    shutil.rmtree(made.root / ".svdiff")
    assert made.go(name, delta_only=True) == registered
    version = find(made.tracking, name)
    assert sha256_file(fetch(made.tracking, version, made.root / "fetched")[0]) == registered


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, empty_store: bytes) -> Any:
    """A registered concept on the tiny base, loaded once."""
    from miniature import Project, write_params

    root = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        (root / "mlruns").mkdir()
        (root / "mlruns" / "mlflow.db").write_bytes(empty_store)
        shutil.copytree(tiny_base, root / "models" / "base")
        write_params(root, "dog", base={"model": "models/base"})
        return serve(Project(root))


def serve(project) -> Any:
    from svdiff.models import load_pipeline
    from svdiff.spectral import attach, load_basis

    results = project.results("dog")
    unet = load_pipeline(project.config.base).unet
    shifts = attach(unet, load_basis(unet, cache=None, progress=False))
    with torch.no_grad():
        for parameter in shifts.parameters_spectral():
            parameter += 0.3
    shifts.delta(concept="dog").save(results.delta)
    register(project.tracking, project.config, read_results(project.config, "dog", project.root))
    model = mlflow.pyfunc.load_model("models:/dog@champion")
    model.folder = Path(mlflow.artifacts.download_artifacts("models:/dog@champion"))
    return model


TWO = ["a sks dog", "a red sks dog"]


@pytest.mark.parametrize(
    "sent",
    [
        TWO,
        tuple(TWO),
        np.array(TWO),
        pd.Series(TWO),
        pd.DataFrame(TWO),
        pd.DataFrame({"prompt": TWO}),
        pd.DataFrame({"id": [7, 8], "prompt": TWO}),
        pd.DataFrame({"prompt": TWO, "customer": ["a", "b"]}, index=["x", "y"]),
        {"prompt": TWO},
        {"prompt": np.array(TWO)},
        [{"prompt": prompt} for prompt in TWO],
        [{"id": 1, "prompt": prompt} for prompt in TWO],
    ],
)
def test_prompts_are_taken_in_whatever_people_send_them(served: Any, sent: Any) -> None:
    assert served.predict(sent, params=FEW)["prompt"].tolist() == TWO


def test_one_text_and_one_dictionary_are_one_prompt(served: Any) -> None:
    for sent in ("a {subject}", {"prompt": "a {subject}"}):
        assert served.predict(sent, params=FEW)["prompt"].tolist() == ["a sks dog"]


def test_seeds_stand_beside_prompts_in_params_or_count_up(served: Any) -> None:
    frame = pd.DataFrame({"seed": [5, 5], "prompt": TWO})
    assert served.predict(frame, params=FEW)["seed"].tolist() == [5, 5]
    assert served.predict(TWO, params=FEW | {"seed": 3})["seed"].tolist() == [3, 4]
    assert served.predict(TWO, params=FEW | {"seeds": [9, 1]})["seed"].tolist() == [9, 1]


@pytest.mark.parametrize(
    ("sent", "params", "message"),
    [
        (TWO, {"steps": 0}, r"params\.steps: .*greater than or equal to 1 \(found 0\)"),
        (TWO, {"steps": -1}, r"params\.steps"),
        (TWO, {"guidance": math.nan}, r"params\.guidance"),
        (TWO, {"eta": 2.0}, r"params\.eta"),
        (TWO, {"batch_size": 0}, r"params\.batch_size"),
        (TWO, {"scale": math.nan}, r"params\.scale is nan"),
        (TWO, {"scale": math.inf}, r"params\.scale is inf"),
        (TWO, {"seed": -1}, "seed -1: expected a whole number from 0"),
        (TWO, {"seeds": [1]}, "1 seeds for 2 prompts"),
        (TWO, {"step": 3}, r"params\.step is unknown; did you mean 'steps'"),
        (TWO, {"negative_prompt": "ugly"}, r"params\.negative_prompt is unknown"),
        (pd.DataFrame({"text": TWO}), {}, "expected texts, or a column `prompt`; found columns text"),
        (pd.DataFrame({"id": [1], "text": ["a dog"]}), {}, "found columns id, text"),
        ([{"text": "a dog"}], {}, "found columns text"),
        ([], {}, "input"),
        (["a dog", None], {}, "prompt (None|nan) is no text"),
        (["a dog", 3], {}, "prompt 3 is no text"),
        ([" "], {}, "prompt ' ' is no text"),
        (pd.DataFrame({"prompt": ["a dog", math.nan]}), {}, "prompt nan is no text"),
        ({"prompt": TWO, "seed": [1]}, {}, "columns of several lengths"),
        (pd.DataFrame({"prompt": TWO, "seed": [0.5, 1]}), {}, r"seed 0\.5"),
    ],
)
def test_the_rest_is_refused_by_name(served: Any, sent: Any, params: dict[str, Any], message: str) -> None:
    with pytest.raises(SvdiffError, match=message):
        served.predict(sent, params=FEW | params)


def test_requests_at_once_are_drawn_each_at_its_own_strength_and_steps(served: Any) -> None:
    def draw(params: dict[str, Any]) -> np.ndarray:
        return picture(served.predict("a {subject}", params=FEW | params))

    asked = [{"scale": scale, "steps": steps} for scale in (0.0, 1.0, 2.0, 3.0) for steps in (2, 3)]
    alone = [draw(params) for params in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        assert all(map(np.array_equal, alone, pool.map(draw, asked)))


def requirements(model: Any) -> list[str]:
    return (model.folder / "requirements.txt").read_text().split()


def test_requirements_are_public_packages_in_public_versions(served: Any) -> None:
    found = requirements(served)
    assert not [line for line in found if line.startswith("svdiff")]
    assert not [line for line in found if "+" in line or "==" not in line]


ALONE = """
import sys
from importlib.metadata import packages_distributions, requires, PackageNotFoundError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

def closure(names):
    found, todo = set(), [Requirement(name) for name in names]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        extras = [{"extra": extra} for extra in requirement.extras] or [{"extra": ""}]
        if name in found and not requirement.extras:
            continue
        found.add(name)
        try:
            wanted = requires(name) or []
        except PackageNotFoundError:
            continue
        for text in wanted:
            more = Requirement(text)
            if more.marker is None or any(more.marker.evaluate(extra) for extra in extras):
                todo.append(more)
    return found

allowed = closure(sys.argv[2].split(",")) | {"setuptools", "pip"}
owners = packages_distributions()

def refused(name):
    owned = owners.get(name.partition(".")[0], [])
    return name.partition(".")[0] != "svdiff" and owned and not any(canonicalize_name(o) in allowed for o in owned)

class Only:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if refused(name) else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Only(finder) for finder in sys.meta_path]
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
import svdiff
assert sys.argv[1] in svdiff.__file__, svdiff.__file__
assert len(model.predict(["a sks dog"], params={"steps": 1})["image"][0]) > 50
print("SERVED")
"""


@pytest.mark.slow
def test_it_serves_with_its_own_code_and_requirements_and_nothing_else(served: Any, tmp_path: Path) -> None:
    """Another folder, no checkout on the path, and only packages that its requirements bring."""
    import os

    copy = shutil.copytree(served.folder, tmp_path / "model")
    base = next(parent / "models/base" for parent in served.folder.parents if (parent / "models/base").is_dir())
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(copy), ",".join(requirements(served))],
        cwd=tmp_path, env=environment | {"SVDIFF_BASE_MODEL": str(base)}, capture_output=True, text=True,
    )  # fmt: skip
    assert "SERVED" in done.stdout, done.stderr[-3000:]
