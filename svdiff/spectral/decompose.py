"""The singular value decomposition of one weight (Sec. 3.2), fast and checked.

`torch.linalg.svd` on a 1280 x 11520 convolution takes four times as long as the eigenvectors of its smaller Gram
matrix in float64 and is less exact. What the Gram matrix loses are small singular values: it squares them. So
directions far below the largest are decomposed again on their own, level by level, and what is zero at the end
is completed to an orthonormal set.
"""

from __future__ import annotations

import torch
from torch import Tensor

# One Gram matrix in float64 (eps 2e-16) leaves V orthonormal to about eps / ratio^2 down to this ratio.
_LEVEL = 1e-4
# Below this fraction of the largest singular value a direction is empty: fp32 weights carry 1e-7.
_EMPTY = 1e-11
# Leading directions are found when their residual is below this fraction of the largest singular value.
_SETTLED = 1e-7


def as_matrix(weight: Tensor, *, transposed: bool = False) -> Tensor:
    """Reshape a weight to `(c_out, rest)` as in Sec. 3.2; `transposed` for ConvTranspose's `(c_in, c_out, ...)`."""
    return (weight.transpose(0, 1) if transposed else weight).reshape(weight.shape[int(transposed)], -1)


def from_matrix(matrix: Tensor, shape: torch.Size, *, transposed: bool = False) -> Tensor:
    """Undo `as_matrix` for a weight of `shape`, or for several: `(C, M, N) -> (C, *shape)`."""
    several = matrix.shape[:-2]
    if not transposed:
        return matrix.reshape(*several, *shape)
    swapped = matrix.reshape(*several, shape[1], shape[0], *shape[2:])
    return swapped.transpose(len(several), len(several) + 1).contiguous()


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD in float64: `U (M, K)`, `sigma (K,)` descending, `Vh (K, N)` with `K = min(M, N)`."""
    matrix = matrix.detach().to(torch.float64)
    if matrix.shape[0] > matrix.shape[1]:
        v, sigma, uh = _svd_wide(matrix.T)
        return uh.T, sigma, v.T
    return _svd_wide(matrix)


def leading_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `rank` singular triplets, as `svd` finds them: by block power iterations where that is less work.

    Iterations go on until `Wv = σ u` and `Wᵀu = σ v` to `_SETTLED` of the largest singular value; where they do not
    get there, as with singular values that hardly differ, the whole decomposition is made and cut.
    """
    block = 2 * rank + 16
    if 4 * block < min(matrix.shape):
        matrix = matrix.detach().to(torch.float64)
        for iterations in (8, 32):
            u, sigma, v = (part[..., :rank] for part in _power_iterations(matrix, block, iterations))
            # One of the two is exact by construction; which one, depends on the shape.
            left = torch.cat([matrix @ v - u * sigma, matrix.T @ u - v * sigma]).norm(dim=0)
            if left.max() <= _SETTLED * sigma[0]:
                return u, sigma, v.T
    u, sigma, vh = svd(matrix)
    return u[:, :rank], sigma[:rank], vh[:rank]


def _power_iterations(matrix: Tensor, block: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """`U (M, block)`, `sigma (block,)`, `V (N, block)` of a float64 `matrix (M, N)` (Halko et al. 2011, Alg. 4.4 and 5.1).

    As `torch.svd_lowrank`, which starts from the generator that all threads share: this start is the same everywhere.
    """
    random = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], block, dtype=matrix.dtype, generator=random).to(matrix.device)
    q = torch.linalg.qr(matrix @ start).Q
    for _ in range(iterations):
        q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ q).Q).Q
    u, sigma, vh = torch.linalg.svd(q.T @ matrix, full_matrices=False)
    return q @ u, sigma, vh.T


def _svd_wide(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of a float64 `w (M, N)`, M <= N, by eigenvectors of `W Wᵀ`."""
    largest = float(torch.linalg.matrix_norm(w))
    u, sigma, vh = w.new_zeros(w.shape[0], 0), w.new_zeros(0), w.new_zeros(0, w.shape[1])
    left, rows = None, w  # left @ rows is what is still to do; None stands for the identity
    while len(rows):
        values, vectors = torch.linalg.eigh(_gram(rows))
        s, vectors = values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
        if s[0] <= _EMPTY * largest:
            break
        sound = int((s > _LEVEL * s[0]).sum())
        in_place = vectors if left is None else left @ vectors
        u, left = torch.cat([u, in_place[:, :sound]], 1), in_place[:, sound:]
        sigma = torch.cat([sigma, s[:sound]])
        vh = torch.cat([vh, (vectors[:, :sound] / s[:sound]).T @ rows])
        rows = _without(vectors[:, sound:].T @ rows, vh)
    missing = w.shape[0] - len(sigma)
    if missing:
        # Both sides are completed by a fixed recipe, so that another machine finds the same empty directions.
        u, vh = _complete(u.T, missing).T, _complete(vh, missing)
        sigma = torch.cat([sigma, sigma.new_zeros(missing)])
    if (sigma.diff() <= 0).all():
        return u, sigma, vh
    order = sigma.argsort(descending=True, stable=True)  # levels may overlap by rounding
    return u[:, order], sigma[order], vh[order]


def _gram(rows: Tensor) -> Tensor:
    """`rows @ rows.T` at half the multiplications: what lies above the diagonal lies below it too."""
    if len(rows) < 256:
        return rows @ rows.T
    upper, lower = rows.chunk(2)
    corner = upper @ lower.T
    return torch.cat([torch.cat([_gram(upper), corner], 1), torch.cat([corner.T, _gram(lower)], 1)])


def _without(rows: Tensor, basis: Tensor) -> Tensor:
    """Remove from `rows` their components along the orthonormal rows of `basis` (twice, for rounding)."""
    for _ in range(2):
        rows = rows - (rows @ basis.T) @ basis
    return rows


def _complete(basis: Tensor, count: int) -> Tensor:
    """Add `count` orthonormal rows to the orthonormal rows of `basis`."""
    generator = torch.Generator().manual_seed(0)
    fresh = torch.randn(count, basis.shape[1], generator=generator, dtype=torch.float64).to(basis)
    q, r = torch.linalg.qr(_without(fresh, basis).T)
    fresh = (q * r.diagonal().sign()).T
    return torch.cat([basis, fresh])
