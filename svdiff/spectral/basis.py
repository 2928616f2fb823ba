"""The decomposition of a module's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svdiff.errors import SvdiffError
from svdiff.spectral.cpu import product
from svdiff.spectral.decompose import as_matrix, from_matrix, leading_svd, svd
from svdiff.spectral.hashing import raw_bytes

# The recipe of `decompose.svd`: a change that moves singular vectors changes this name and so every basis id.
ALGORITHM = "gram-eigh-float64-1"

NORMS = (nn.LayerNorm, nn.GroupNorm)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Factors:
    """`W = u @ diag(sigma) @ vh` of one weight: `u (M, K)`, `sigma (K,)` descending, `vh (K, N)`, all float32.

    K is `min(M, N)`, or less in the basis of leading directions. `source` is the weight itself, bit for bit:
    mapped from the cache, or the caller's tensor; None where the layer keeps it. `fingerprint`
    changes when a singular direction does, and hardly at all by rounding; `digest` is the hash of the factors' bytes.
    """

    u: Tensor
    sigma: Tensor
    vh: Tensor
    shape: torch.Size
    source: Tensor | None
    fingerprint: float
    digest: str

    @property
    def full_rank(self) -> int:
        """Number of singular values of the weight: `min(M, N)`."""
        return min(len(self.u), self.vh.shape[1])

    @property
    def partial(self) -> bool:
        """Whether only leading directions are here."""
        return len(self.sigma) < self.full_rank

    def base_weight(self) -> Tensor:
        """The weight that was decomposed, in its own shape and dtype; it may be the caller's own, or mapped."""
        if self.source is None:
            raise SvdiffError("the basis of leading directions does not have the weights: they are in the model")
        return self.source

    def change(self, shifts: Tensor) -> Tensor:
        """`ReLU(σ + δ) − σ` for as many leading shifts as given; refuses shifts of directions that are not here."""
        if shifts[len(self.sigma) :].any():
            raise SvdiffError(
                f"the delta shifts more than the leading {len(self.sigma)} singular values, which the basis stops at: "
                "decompose with a larger rank, or limit the delta's rank"
            )
        sigma = self.sigma[: len(shifts)]
        return scales(shifts[: len(sigma)].to(sigma), sigma) - sigma

    def shifted_weight(self, shifts: Tensor, base: Tensor, *, transposed: bool = False) -> Tensor:
        """`W + U diag(ReLU(σ + δ) − σ) Vᵀ`: Eq. 2 on the weight itself, without a residual of the decomposition."""
        change = self.change(shifts)
        moved = change.nonzero().squeeze(1)
        if not len(moved):
            return base.clone()
        u, vh = (self.u, self.vh) if len(moved) == len(self.sigma) else (self.u[:, moved], self.vh[moved])
        matrix = as_matrix(base, transposed=transposed).to(u.device, torch.float32)
        matrix = product(u * change[moved], vh, matrix)
        return from_matrix(matrix, self.shape, transposed=transposed).to(base.device, base.dtype)

    def leading_fingerprint(self, rank: int | None) -> float:
        """The fingerprint of the leading `rank` directions: the same in every basis that has them."""
        if rank is None or rank >= len(self.sigma):
            return self.fingerprint
        return fingerprint(self.u[:, :rank], self.vh[:rank])


def scales(delta: Tensor, sigma: Tensor) -> Tensor:
    """`ReLU(σ + δ)` (Eq. 2), in float32 in all layers."""
    return (sigma + delta).clamp_min_(0)


class Basis(Mapping[str, Factors]):
    """Factors of weights of two dimensions or more, by name (`"conv_in.weight"`); `rank` where cut to leading ones."""

    def __init__(self, factors: Mapping[str, Factors], base_hash: str, rank: int | None = None) -> None:
        self._factors = dict(factors)
        self.base_hash, self.rank = base_hash, rank
        lines = "".join(f"{name}\0{self._factors[name].digest}\n" for name in sorted(self._factors))
        self.id = f"{ALGORITHM}:{hashlib.sha256(lines.encode()).hexdigest()[:32]}"

    def __getitem__(self, name: str) -> Factors:
        try:
            return self._factors[name]
        except KeyError:
            raise SvdiffError(
                f"the basis has no weight {name!r}: it was made for another model, or for other weights of it"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._factors

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)


def is_matrix(owner: nn.Module) -> bool:
    """Whether the layer's weight is decomposed, and not shifted element by element as a norm's."""
    weight = owner._parameters.get("weight")
    return weight is not None and weight.ndim > 1 and not isinstance(owner, NORMS)


def matrix_weights(module: nn.Module) -> dict[str, tuple[nn.Module, Tensor]]:
    """Every weight with a decomposition, by name, with the module that owns it."""
    return {
        f"{path}.weight" if path else "weight": (owner, owner.weight)
        for path, owner in module.named_modules()
        if is_matrix(owner)
    }


def full_rank(owner: nn.Module, weight: Tensor) -> int:
    """Number of singular values of a layer's weight: `min(M, N)`, which needs no numbers."""
    rows = weight.shape[int(isinstance(owner, TRANSPOSED))]
    return min(rows, weight.numel() // rows)


def factorise(owner: nn.Module, weight: Tensor, rank: int | None = None) -> Factors:
    """Decompose one weight (any float dtype; the work is done in float64), or find its leading `rank` directions."""
    weight = weight.detach()
    matrix = as_matrix(weight, transposed=isinstance(owner, TRANSPOSED))
    partial = rank is not None and rank < full_rank(owner, weight)
    found = leading_svd(matrix, rank) if partial and rank else svd(matrix)
    u, sigma, vh = (part.to(torch.float32).contiguous() for part in found)
    source = None if partial else weight
    return Factors(u, sigma, vh, weight.shape, source, fingerprint(u, vh), factors_digest(u, sigma, vh))


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
