"""`python -m svdiff.base`: the same as `svdiff base`."""

from svdiff.base.cli import app

if __name__ == "__main__":
    app()
