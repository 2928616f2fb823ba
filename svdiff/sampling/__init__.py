"""Sampling (Sec. 4: DDIM, η = 0 unless said otherwise)."""

from svdiff.sampling.images import Job, sample_images

__all__ = ["Job", "sample_images"]
