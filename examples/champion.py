"""Draw pictures with the registered champion of a concept, in a process that knows MLflow and nothing of this project.

python examples/champion.py scarf-cat "a {subject} on a pink background" --uri sqlite:///mlruns/mlflow.db
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mlflow


def main() -> None:
    """Load the champion from the registry, and write a picture a prompt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a registered concept")
    parser.add_argument("prompt", nargs="+")
    parser.add_argument("--uri", default="sqlite:///mlruns/mlflow.db", help="MLflow's tracking URI")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("pictures"))
    asked = parser.parse_args()

    mlflow.set_tracking_uri(asked.uri)
    model = mlflow.pyfunc.load_model(f"models:/{asked.name}@champion")
    table = model.predict(asked.prompt, params={"seed": asked.seed})
    asked.output.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(table.itertuples()):
        path = asked.output / f"{asked.name}-{number}.png"
        path.write_bytes(row.image)
        print(f"{path}: {row.prompt}, seed {row.seed}")


if __name__ == "__main__":
    main()
