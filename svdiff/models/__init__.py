"""Base models: loading one, and what differs between their families (`family`), which nothing else knows."""

from svdiff.models.family import Conditions, Family, family_of
from svdiff.models.loading import (
    check_layout,
    is_distilled,
    load_pipeline,
    load_words,
    native_size,
    picture_grid,
    scratch,
)

__all__ = [
    "Conditions",
    "Family",
    "check_layout",
    "family_of",
    "is_distilled",
    "load_pipeline",
    "load_words",
    "native_size",
    "picture_grid",
    "scratch",
]
