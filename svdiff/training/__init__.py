"""Training: losses, the loop, methods, and the `train` stage."""

from svdiff.training.stage import train

__all__ = ["train"]
