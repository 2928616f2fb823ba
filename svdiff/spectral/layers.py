"""Layers whose weight is `W_δ = U diag(ReLU(σ + δ)) Vᵀ` (Eq. 2), or `w + δ` where the weight is 1-D.

A spectral layer takes the place of the layer it was made from and computes the same function at δ = 0. How it
applies W_δ is in `functions`. Two kinds of it stand in one class:

- all directions: U and V take the place of W, which need not stay in memory;
- the leading k (`rank`, Fig. 25): W stays, and `U_k ((s − σ) ⊙ V_kᵀ x)` is added. Exact for such shifts, for 2k/N more
  memory, whatever W is made of: half precision or quantised.

`LAYERS` says which torch layers have a spectral one; add to it to open more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdiff.errors import SvdiffError
from svdiff.spectral.basis import TRANSPOSED, Factors
from svdiff.spectral.batch import Batch, Given
from svdiff.spectral.cpu import Geometry, batched_product, mix_channels, product
from svdiff.spectral.decompose import as_matrix, from_matrix
from svdiff.spectral.functions import FactoredConv, FactoredLinear, SpectralWeight, materialising_is_cheaper

T = TypeVar("T")
# Numbers of the pictures' weights that a layer holds while a batch of several concepts is drawn: 16 MB.
_HELD = 1 << 22


class SpectralLayer(nn.Module):
    """Base of all spectral layers: the shift, and what was not decomposed of the original layer.

    `delta` is a float32 parameter of shape `(K,)`, or `(C, K)` for C concepts, of which `batch` gives each picture one.
    It belongs to `SpectralShifts` and is left out of the module tree on purpose: the model's `parameters()` and
    `dtype` stay those of the base, and casting the model to half precision leaves the shifts in float32.
    """

    original: nn.Module
    delta: nn.Parameter
    bias: nn.Parameter | None
    # Tensors that follow the model to another device but never to another dtype.
    _float32: ClassVar[tuple[str, ...]] = ("delta",)

    def __init__(self, original: nn.Module, shape: torch.Size, size: int) -> None:
        super().__init__()
        self.training = original.training
        self.shape = shape
        self.batch = Batch()
        device = original._parameters["weight"].device  # type: ignore[union-attr]
        self._outside_tree("delta", nn.Parameter(torch.zeros(size, device=device)))
        self._hold(original)

    def _hold(self, original: nn.Module) -> None:
        """Take the bias; the rest of the original waits outside of the model."""
        self.bias = original._parameters.get("bias")
        self._outside_tree("original", original)

    def __getattr__(self, name: str) -> Any:
        """What else is asked of the layer is a fact of the original's, such as `in_features`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "original" or name.startswith("_"):
                raise
            return getattr(self.original, name)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the shift looks into a tensor of all layers' shifts, which need not come along."""
        return {**self.__dict__, "delta": nn.Parameter(self.delta.detach().clone(), self.delta.requires_grad)}

    def _outside_tree(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> SpectralLayer:
        super()._apply(fn, recurse)
        self.batch.made.pop(self, None)
        self.batch.given.pop(self, None)
        for name in self._float32:
            constant: Tensor = getattr(self, name)
            moved = constant.data.to(fn(constant.data).device)
            if moved.is_meta == constant.is_meta:
                constant.data = moved  # the same tensor as before, which an optimiser may hold
            else:
                self._outside_tree(name, nn.Parameter(moved) if isinstance(constant, nn.Parameter) else moved)
        return self

    def _pictures(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input, and the row of the shifts that each of its pictures takes (None: one for all)."""
        rows = self.batch.rows
        if self.delta.ndim == 1:
            return x, None
        if rows is None:
            raise SvdiffError(
                f"the layer has shifts of {len(self.delta)} concepts, and nothing says which picture takes which: "
                "assign an index, one entry a picture"
            )
        if len(x) == 1 and len(rows) > 1:  # one for all, such as positions
            x = x.expand(len(rows), *x.shape[1:])
        if len(x) != len(rows):
            raise SvdiffError(f"a layer is called with a batch of {len(x)} in a batch of {len(rows)} pictures")
        return x, rows.to(x.device)

    @property
    def _holds(self) -> bool:
        """Whether what is made of the shifts may stay for the next step of a batch: where nobody asks for gradients."""
        return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or self.delta.is_inference())

    def _for_pictures(self, rows: Tensor, dtype: torch.dtype, make: Callable[[], T]) -> T:
        """What `make` makes of the shifts for the pictures of `rows`; made anew where those or the shifts are others."""
        if not self._holds:
            return make()
        key = (len(rows), dtype, self.delta._version)
        known = self.batch.made.get(self)
        if known is None or known[0] != key:
            known = self.batch.made[self] = (key, make())
        made: T = known[1]
        return made

    @property
    def weight(self) -> Tensor:
        """The current weight, differentiable, in the shape and dtype of the original's."""
        raise NotImplementedError

    def base_weight(self) -> Tensor:
        """The base's weight, bit for bit, in the layer's present dtype and on its device."""
        raise NotImplementedError

    def shifted_weight(self) -> Tensor:
        """The weight with the present shift, without gradient: for fusing and saving; the base's where δ = 0."""
        self.check_single()
        return self._shifted(self.delta.detach()) if self.is_shifted else self.base_weight()

    @property
    def full_size(self) -> int:
        """Number of shifts in a delta: one for each singular value or element, whatever the rank here."""
        return self.shape.numel()

    @property
    def is_shifted(self) -> bool:
        """Whether any shift is not zero."""
        return not self.delta.is_meta and bool(self.delta.any())

    def _shifted(self, delta: Tensor) -> Tensor:
        raise NotImplementedError

    def check_single(self) -> None:
        """Raise SvdiffError where the layer has no single weight."""
        if self.delta.ndim > 1:
            raise SvdiffError(
                f"the model holds {len(self.delta)} concepts at once, so it has no single weights to read, save or fuse: "
                "choose one concept first"
            )

    # To the outside the model is a plain one, with the weights that it computes with.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.shifted_weight()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        weight = state_dict.pop(f"{prefix}weight", None)
        if weight is not None and not torch.equal(weight.to(present := self.shifted_weight()), present):
            raise SvdiffError(
                f"{prefix}weight differs from the one that the model computes with, which is made of singular values "
                "and shifts: detach the shifts before loading other weights"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    # In and out of a model.

    def take_weight(self) -> None:
        """From here on the weight is in the basis (on disk, with a cache) and not in memory."""
        self.original._parameters["weight"] = None

    def give_back(self, *, shifted: bool) -> nn.Module:
        """The original layer, with the shifted weight or that of the base."""
        weight = self.shifted_weight() if shifted and self.is_shifted else self.base_weight().clone()
        self.original._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        if "bias" in self.original._parameters:
            self.original._parameters["bias"] = self.bias
        return self.original.train(self.training)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"weight={tuple(self.shape)}, shifts={tuple(self.delta.shape)}"


class SpectralNorm(SpectralLayer):
    """LayerNorm, GroupNorm, RMSNorm or any other layer whose 1-D weight is shifted element by element (Sec. 3.2)."""

    def __init__(self, original: nn.Module, factors: None = None, rank: int | None = None) -> None:
        weight: Tensor = original.weight  # type: ignore[assignment]
        super().__init__(original, weight.shape, weight.numel())
        self.base = nn.Buffer(weight.detach(), persistent=False)

    @property
    def weight(self) -> Tensor:
        """`w + δ`, without ReLU, added in float32; a row for each concept."""
        return (
            (self.base.float() + self.delta.to(self.base.device).view(-1, *self.shape)).to(self.base.dtype).squeeze(0)
        )

    def base_weight(self) -> Tensor:
        """The base's weight."""
        return self.base

    def _shifted(self, delta: Tensor) -> Tensor:
        return self.weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` as the original layer does, each picture with its own weight."""
        x, rows = self._pictures(x)
        norm = self.original
        if rows is None:
            weight = self.weight
            if type(norm) is nn.LayerNorm:
                return F.layer_norm(x, self.shape, weight, self.bias, norm.eps)
            if type(norm) is nn.GroupNorm:
                return F.group_norm(x, norm.num_groups, weight, self.bias, norm.eps)
            return self._as_original(weight, x)
        weight, bias = self._for_pictures(rows, x.dtype, lambda: self._of_pictures(rows))
        if type(norm) is nn.LayerNorm:
            y = F.layer_norm(x, self.shape, eps=norm.eps)
            weight = weight.to(y.dtype).view(len(x), *[1] * (x.ndim - 1 - len(self.shape)), *self.shape)
            if torch.is_grad_enabled():
                return y * weight if self.bias is None else torch.addcmul(self.bias.to(y.dtype), y, weight)
            return y.mul_(weight) if self.bias is None else torch.addcmul(self.bias.to(y.dtype), y, weight, out=y)
        if type(norm) is nn.GroupNorm:
            # The pictures side by side as channels of one: each of their groups is normalised on its own anyway.
            side_by_side = x.reshape(1, -1, *x.shape[2:])
            return F.group_norm(side_by_side, len(x) * norm.num_groups, weight.flatten(), bias, norm.eps).view(x.shape)
        return torch.vmap(lambda w, one: self._as_original(w, one[None])[0])(weight, x)

    def _of_pictures(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights `(B, *shape)`, and the bias as often, one after the other."""
        bias = None if self.bias is None else self.bias.flatten().repeat(len(rows))
        return self.weight.view(-1, *self.shape)[rows], bias

    def _as_original(self, weight: Tensor, x: Tensor) -> Tensor:
        tensors = {"weight": weight} | ({} if self.bias is None else {"bias": self.bias})
        y: Tensor = torch.func.functional_call(self.original, tensors, (x,))
        return y


class SpectralMatrix(SpectralLayer):
    """A layer whose weight is decomposed."""

    contraction: ClassVar[Literal["auto", "factored", "materialised"]] = "auto"
    _float32 = ("delta", "sigma")
    sigma: Tensor
    factors: Factors
    _base: nn.Parameter | None = None  # W of a layer that keeps it, while a fused weight is in its place

    def __init__(self, original: nn.Module, factors: Factors, rank: int | None = None) -> None:
        # Whether W stays and the factors add a change to it.
        self.keeps_weight = rank is not None and rank < factors.full_rank
        size = factors.full_rank if rank is None else min(rank, factors.full_rank)
        super().__init__(original, factors.shape, size)
        weight: Tensor = original.weight  # type: ignore[assignment]
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        self.u = nn.Buffer(factors.u[:, :size].to(weight.device, dtype).contiguous(), persistent=False)
        self.vh = nn.Buffer(factors.vh[:size].to(weight.device, dtype), persistent=False)
        self.transposed = isinstance(original, TRANSPOSED)
        self._cast: tuple[Tensor, Tensor] | None = None
        self._outside_tree("sigma", factors.sigma[:size].to(weight.device))
        self._outside_tree("factors", factors)

    @property
    def full_size(self) -> int:
        """Number of singular values."""
        return self.factors.full_rank

    def _hold(self, original: nn.Module) -> None:
        if not self.keeps_weight:
            return super()._hold(original)
        self.original = original
        self._outside_tree("bias", original._parameters.get("bias"))

    def _apply(self, fn: Any, recurse: bool = True) -> SpectralMatrix:
        self._cast = None
        super()._apply(fn, recurse)
        return self

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """U and Vᵀ in the dtype of this call; under autocast they are cast once and not at every call."""
        if dtype == self.u.dtype:
            return self.u, self.vh
        if self._cast is None or self._cast[0].dtype != dtype:
            self._cast = (self.u.to(dtype), self.vh.to(dtype))
        return self._cast

    def _shift(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """δ and σ where the input is: offloading moves parameters and buffers alone."""
        return self.delta.to(device), self.sigma.to(device)

    @property
    def weight(self) -> Tensor:
        """`W_δ` of Eq. 2, differentiable; a full matrix product, so ask for `shape` where that is enough.

        Of several concepts there is none: models read its shape and dtype, so it has these, and no numbers (NaN).
        """
        if self.delta.ndim > 1:
            return self.u.new_full((), torch.nan).expand(self.shape)
        return self._built(self.u.dtype)

    def base_weight(self) -> Tensor:
        """The base's weight, from the basis where it was not left in memory."""
        if self.keeps_weight:
            return self.original.weight  # type: ignore[return-value]
        return self.factors.base_weight().to(self.u)

    def _shifted(self, delta: Tensor) -> Tensor:
        base = self.base_weight() if self.keeps_weight else self.factors.base_weight()
        shifts = delta.to(self.factors.sigma.device)
        return self.factors.shifted_weight(shifts, base, transposed=self.transposed).to(self.u)

    def check_single(self) -> None:
        """Raise SvdiffError where the layer has no single weight, or none that can be shifted."""
        super().check_single()
        if self.keeps_weight and self.is_shifted and is_quantised(self.base_weight()):
            raise SvdiffError(
                "shifts cannot be put into a quantised weight: to read, save or fuse them, load the base in a float dtype"
            )

    def _built(self, dtype: torch.dtype) -> Tensor:
        """Eq. 2, for one concept or each: `(*shape)` or `(C, *shape)`."""
        u, vh = self._factors(dtype)
        vh = as_matrix(vh, transposed=self.transposed and vh.ndim > 2)
        matrix = SpectralWeight.apply(*self._shift(u.device), u, vh, self.keeps_weight)
        weight = from_matrix(matrix, self.shape, transposed=self.transposed)
        return self.base_weight().to(dtype) + weight if self.keeps_weight else weight

    def _materialise(self, x: Tensor, tokens: int) -> bool:
        if self.keeps_weight or self.contraction != "auto":
            return not self.keeps_weight and self.contraction == "materialised"
        m, n = len(self.u), self.vh[0].numel()
        if self._held(len(x), tokens):  # built once, for the steps so far and those to come
            tokens = self.batch.seen[self] = self.batch.seen.get(self, 0) + tokens
        grad = torch.is_grad_enabled() and self.delta.requires_grad
        concepts = 1 if self.delta.ndim == 1 else len(self.delta)
        return materialising_is_cheaper(tokens, m, n, grad=grad, input_grad=x.requires_grad, concepts=concepts)

    def _held(self, pictures: int, tokens: int) -> bool:
        """Whether the weights of all pictures, once they are built, stay in memory for the next step.

        Only those that are nearly square, of which factors do nearly twice the work, or smaller than what they are multiplied
        with: reading others takes longer than factors (`python -m benchmarks.catalogue`).
        """
        m, n = len(self.u), self.vh[0].numel()
        several, read = self.delta.ndim > 1 and self._holds, pictures * m * n
        square = 3 * max(m, n) <= 5 * min(m, n)
        return several and read <= _HELD * self.batch.copies and (square or read <= tokens * (m + n))

    def _weights(self, rows: Tensor | None, dtype: torch.dtype, tokens: int) -> Tensor:
        """W_δ `(*shape)`, or that of each picture `(B, *shape)`; those that are held once for all copies of the pictures."""
        if rows is None:
            return self._built(dtype)
        if not self._held(len(rows), tokens):
            return self._built(dtype)[rows]
        own = rows[: len(rows) // self.batch.copies]
        return self._for_pictures(own, dtype, lambda: self._built(dtype)[own])

    def _compute(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Input and bias in the dtype of this call: autocast's, or that of the layer."""
        if _autocast(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None or self.keeps_weight else self.bias.to(x.dtype)
        return x, bias

    # A layer that keeps W.

    def take_weight(self) -> None:
        """Drop the weight, or take the base's back after fusing."""
        if not self.keeps_weight:
            super().take_weight()
        elif self._base is not None:
            self.original._parameters["weight"] = self._base
            self._outside_tree("_base", None)

    def give_back(self, *, shifted: bool) -> nn.Module:
        """The original layer, with the shifted weight or that of the base."""
        if not self.keeps_weight:
            return super().give_back(shifted=shifted)
        self.take_weight()
        if shifted and self.is_shifted:
            weight = nn.Parameter(self.shifted_weight(), requires_grad=False)
            self._outside_tree("_base", self.original._parameters["weight"])
            self.original._parameters["weight"] = weight
        return self.original.train(self.training)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """That of a plain layer, with the weight that it computes with."""
        if not self.keeps_weight:
            return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        found = self.original.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        found[f"{prefix}weight"] = self.shifted_weight()
        for hook in self._state_dict_hooks.values():
            hook(self, found, prefix, {})
        return found

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.keeps_weight:
            for name in [name for name in state_dict if name.startswith(prefix) and name != f"{prefix}weight"]:
                state_dict[f"{prefix}original.{name.removeprefix(prefix)}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.keeps_weight:
            state_dict[f"{prefix}original.weight"] = self.base_weight()


class SpectralLinear(SpectralMatrix):
    """Linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        """`x (..., N) -> (..., M)`.

        What every step of a batch of several concepts brings again, as a text is, is multiplied in the first two alone.
        """
        if self.delta.ndim == 1 or not self._holds or x.is_inference() or _autocast(x):
            return self._multiply(x)
        last = self.batch.given.get(self)
        again = last is not None and last.repeats(x, self.delta)
        if last is not None and again and last.answer is not None and last.answer._version == last.answered:
            return last.answer
        y = self._multiply(x)
        kept = y if again else None  # of what comes once, nothing is kept
        self.batch.given[self] = Given(weakref.ref(x), (x._version, self.delta._version), kept, y._version)
        return y

    def _multiply(self, x: Tensor) -> Tensor:
        x, rows = self._pictures(x)
        base = self.original(x) if self.keeps_weight else None
        x, bias = self._compute(x)
        tokens = x.numel() // x.shape[-1]
        if self._materialise(x, tokens):
            weight = self._weights(rows, x.dtype, tokens)
            if rows is None:
                return product(x.reshape(-1, x.shape[-1]), weight.T, bias).view(*x.shape[:-1], len(weight))
            y = batched_product(x.reshape(len(rows), -1, x.shape[-1]), weight.mT, bias)
            return y.view(*x.shape[:-1], len(self.u))
        u, vh = self._factors(x.dtype)
        delta, sigma = self._shift(x.device)
        save = torch.is_grad_enabled()
        y = FactoredLinear.apply(x, delta, bias, sigma, u, vh, rows, self.keeps_weight, save)
        return y if base is None else base + y


class SpectralEmbedding(SpectralMatrix):
    """Embedding: the scaled rows of U times `Vᵀ`."""

    def forward(self, index: Tensor) -> Tensor:
        """`index (...) -> (..., N)`."""
        index, rows = self._pictures(index)
        delta, sigma = self._shift(index.device)
        scale = F.relu(sigma + delta) - (sigma if self.keeps_weight else 0)
        scale = scale.to(self.u.dtype)
        if rows is not None:
            scale = scale[rows].view(len(index), *[1] * (index.ndim - 1), -1)
        y = (F.embedding(index, self.u) * scale) @ self.vh
        return self.original(index) + y if self.keeps_weight else y


class SpectralConv(SpectralMatrix):
    """Convolution in one or two dimensions, plain or transposed; grouped ones by building the weight."""

    def __init__(self, original: Any, factors: Factors, rank: int | None = None) -> None:
        super().__init__(original, factors, rank)
        padding, self.pad, self.pad_mode = original.padding, None, "constant"
        if isinstance(padding, str) or original.padding_mode != "zeros":
            self.pad = list(original._reversed_padding_repeated_twice)
            self.pad_mode = "constant" if original.padding_mode == "zeros" else original.padding_mode
            padding = (0,) * len(original.stride)
        self.geometry = Geometry(
            original.stride, padding, original.dilation, self.transposed,
            original.output_padding, original.groups,
        )  # fmt: skip
        if original.groups == 1:
            self.vh = nn.Buffer(_as_kernel(self.vh, self.shape, self.transposed), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x (B, C, *S) -> (B, M, *S')`."""
        if x.ndim == len(self.shape) - 1:
            return self.forward(x[None])[0]  # a picture without batch dimension
        x, rows = self._pictures(x)
        grouped = self.geometry.groups != 1
        base = self.original(x) if self.keeps_weight and not grouped else None
        x, bias = self._compute(x)
        if self.pad:
            x = F.pad(x, self.pad, mode=self.pad_mode)
        pointwise = self.geometry.pointwise and self.shape[2:].numel() == 1
        tokens = x.numel() // x.shape[1] if pointwise else 0
        if grouped or self._materialise(x, tokens):
            if grouped and self.keeps_weight and self.bias is not None:
                bias = self.bias.to(x.dtype)
            return self._convolve(x, self._weights(rows, x.dtype, tokens), bias, rows, pointwise)
        u, vh = self._factors(x.dtype)
        delta, sigma = self._shift(x.device)
        save = torch.is_grad_enabled()
        y = FactoredConv.apply(x, delta, bias, sigma, u, vh, self.geometry, rows, self.keeps_weight, save)
        return y if base is None else base + y

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, pointwise: bool) -> Tensor:
        """With W_δ, one or one a picture."""
        if pointwise:
            return mix_channels(x, weight.flatten(-len(self.shape) + 1), bias)
        if rows is None:
            return torch.convolution(x, weight, bias, *self.geometry)
        # The pictures side by side as groups of one.
        weight = weight.repeat(len(x) // len(weight), *[1] * len(self.shape))
        bias = None if bias is None else bias.repeat(len(x))
        geometry = self.geometry._replace(groups=len(x) * self.geometry.groups)
        y = torch.convolution(x.reshape(1, -1, *x.shape[2:]), weight.flatten(0, 1), bias, *geometry)
        return y.view(len(x), -1, *y.shape[2:])


def _autocast(x: Tensor) -> bool:
    """Whether autocast is on where `x` is."""
    device = x.device.type
    # Where there is none, as on the meta device, asking whether it is on is an error.
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight holds codes, or is a tensor of another class that decodes itself."""
    return not weight.is_floating_point() or type(weight.data) is not Tensor


def _as_kernel(vh: Tensor, shape: torch.Size, transposed: bool) -> Tensor:
    """`Vᵀ (K, N)` as the kernel of a convolution from the layer's input to K channels."""
    if transposed:
        return from_matrix(vh, torch.Size([shape[0], len(vh), *shape[2:]]), transposed=True)
    return vh.view(len(vh), *shape[1:])


LAYERS: dict[type[nn.Module], type[SpectralMatrix]] = {
    nn.Linear: SpectralLinear,
    nn.Conv1d: SpectralConv,
    nn.Conv2d: SpectralConv,
    nn.ConvTranspose1d: SpectralConv,
    nn.ConvTranspose2d: SpectralConv,
    nn.Embedding: SpectralEmbedding,
}
"""Spectral layers of torch layers whose weight is decomposed; every layer with a 1-D weight is a `SpectralNorm`."""


def make_layer(name: str, original: nn.Module, factors: Factors | None, rank: int | None) -> SpectralLayer:
    """The spectral layer for `original`, whose weight is called `name`; refuses kinds that have none."""
    if factors is None:
        return SpectralNorm(original)
    keeps_weight = rank is not None and rank < factors.full_rank
    for base, kind in LAYERS.items():
        # A subclass computes what its base does (such as diffusers' compatible layers), or goes on doing so itself.
        itself = keeps_weight and is_quantised(original._parameters["weight"])  # type: ignore[arg-type]
        same = isinstance(original, base) and (type(original).forward is base.forward or itself)
        if same and getattr(original, "max_norm", None) is None:
            if factors.partial and not keeps_weight:
                raise SvdiffError(
                    f"the basis has the leading {len(factors.sigma)} directions of {name!r} alone: attach with a rank"
                )
            return kind(original, factors, rank)
    supported = ", ".join(kind.__name__ for kind in LAYERS)
    raise SvdiffError(
        f"{name!r} belongs to a {type(original).__name__}, which has no spectral layer (there are some for "
        f"{supported} and for 1-D weights): choose a subset without this weight, or add the layer to "
        "svdiff.spectral.layers.LAYERS"
    )
