"""SVDiff: personalise diffusion models by shifting the singular values of their weights (Han et al. 2023)."""

__version__ = "0.1.0"
