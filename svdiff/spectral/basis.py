"""The decomposition of a module's weights, and the hash that says which weights they were."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svdiff.errors import SvdiffError
from svdiff.spectral.decompose import as_matrix, svd

# The recipe of `decompose.svd`: a change that moves singular vectors changes this name and so every basis id.
ALGORITHM = "gram-eigh-float64-1"

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Factors:
    """`W = u @ diag(sigma) @ vh` of one weight: `u (M, K)`, `sigma (K,)` descending, `vh (K, N)`, all float32.

    `weight` is the weight itself, bit for bit, in its own shape. With a cache all four live in the mapped file
    and take memory only while they are read. `fingerprint` changes when a singular direction does, and hardly
    at all by rounding.
    """

    u: Tensor
    sigma: Tensor
    vh: Tensor
    weight: Tensor
    fingerprint: float
    digest: str
    weight_digest: str | None = None  # of the cached copy; None where `weight` is the module's own

    def restored(self) -> Tensor:
        """A copy of the weight, bit for bit; raises SvdiffError if its cached copy was changed on disk."""
        if self.weight_digest and hashlib.sha256(raw_bytes(self.weight)).hexdigest() != self.weight_digest:
            raise SvdiffError("the cached copy of a base weight was changed on disk: reload the base model")
        return self.weight.clone()


class Basis(Mapping[str, Factors]):
    """Factors of every weight of two dimensions or more, by name (`"conv_in.weight"`)."""

    def __init__(self, factors: Mapping[str, Factors], base_hash: str) -> None:
        self._factors = dict(factors)
        self.base_hash = base_hash
        lines = "".join(f"{name}\0{self._factors[name].digest}\n" for name in sorted(self._factors))
        self.id = f"{ALGORITHM}:{hashlib.sha256(lines.encode()).hexdigest()[:32]}"

    def __getitem__(self, name: str) -> Factors:
        try:
            return self._factors[name]
        except KeyError:
            raise SvdiffError(f"the basis has no weight {name!r}: it was made for another model") from None

    def __contains__(self, name: object) -> bool:
        return name in self._factors

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order (no copy if it is a contiguous one in main memory)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over the sorted `(name, dtype, shape, bytes)` of the module's state dict: which base this is."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def matrix_weights(module: nn.Module) -> dict[str, tuple[nn.Module, Tensor]]:
    """Every weight with a decomposition, by name, with the module that owns it."""
    return {
        f"{path}.weight" if path else "weight": (owner, owner.weight)
        for path, owner in module.named_modules()
        if isinstance(owner._parameters.get("weight"), Tensor) and owner.weight.ndim > 1
    }


def factorise(owner: nn.Module, weight: Tensor) -> Factors:
    """Decompose one weight (any float dtype; the work is done in float64)."""
    u, sigma, vh = (
        part.to(torch.float32).contiguous()
        for part in svd(as_matrix(weight.detach(), transposed=isinstance(owner, TRANSPOSED)))
    )
    return Factors(u, sigma, vh, weight.detach(), fingerprint(u, vh), factors_digest(u, sigma, vh))


def factors_digest(u: Tensor, sigma: Tensor, vh: Tensor) -> str:
    """SHA-256 of the three factors' bytes."""
    digest = hashlib.sha256()
    for part in (u, sigma, vh):
        digest.update(raw_bytes(part))
    return digest.hexdigest()


def fingerprint(u: Tensor, vh: Tensor) -> float:
    """`sum_i r_i (aᵀu_i)(v_iᵀb) / sqrt(K)` for fixed random a, b and signs r: same directions, same number.

    The sign of a pair (u_i, v_i) does not matter to Eq. 2 and not here either.
    """
    generator = torch.Generator().manual_seed(len(u) * 1_000_003 + vh.shape[1])
    a = torch.randn(len(u), generator=generator)
    b = torch.randn(vh.shape[1], generator=generator)
    r = torch.randint(0, 2, (len(vh),), generator=generator) * 2.0 - 1
    return float(((a @ u.cpu()) * (vh.cpu() @ b) * r).sum() / len(vh) ** 0.5)
