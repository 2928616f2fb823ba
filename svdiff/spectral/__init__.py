"""The spectral parameter space of SVDiff (Sec. 3.2): decomposition, layers, deltas and their arithmetic.

basis = load_basis(unet, cache="…")          # once per base, then mapped from disk
shifts = attach(unet, basis, subset="UNet")  # zero shifts: the same function
…train shifts.parameters_spectral(), shifts.parameters_1d()…
shifts.delta(concept="teapot").save("teapot.safetensors")
shifts.detach()                              # the base again, bit for bit
"""

from svdiff.spectral.basis import Basis, Factors
from svdiff.spectral.cache import list_cache, load_basis, prune_cache
from svdiff.spectral.delta import SpectralDelta, combine, cosine_similarity, interpolate, mix_by_layer
from svdiff.spectral.export import export_lora, fused_state_dict
from svdiff.spectral.hashing import weights_hash
from svdiff.spectral.legacy import import_spectral_shifts
from svdiff.spectral.pipeline import SpectralPipeline
from svdiff.spectral.shifts import SpectralShifts, attach
from svdiff.spectral.subsets import SUBSETS, select

__all__ = [
    "SUBSETS",
    "Basis",
    "Factors",
    "SpectralDelta",
    "SpectralPipeline",
    "SpectralShifts",
    "attach",
    "combine",
    "cosine_similarity",
    "export_lora",
    "fused_state_dict",
    "import_spectral_shifts",
    "interpolate",
    "list_cache",
    "load_basis",
    "mix_by_layer",
    "prune_cache",
    "select",
    "weights_hash",
]
