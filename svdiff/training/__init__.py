"""Training: losses, the loop, methods, and the `train` stage."""

from svdiff.training.train import train

__all__ = ["train"]
