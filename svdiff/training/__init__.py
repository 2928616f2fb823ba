"""Training: losses, the loop, methods, and the `train` stage."""

from svdiff.training.stage import train, train_together

__all__ = ["train", "train_together"]
