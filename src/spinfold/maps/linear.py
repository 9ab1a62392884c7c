"""The elementary linear maps. Each acts on the last axis, `x -> x M`, and is undone exactly by its inverse.

    map            M                                      inverse              cost per token
    Identity       I                                      I                    0
    Orthogonal     R, or B rotations on the diagonal      Rᵀ                   2 N² flops
    Diagonal       diag(s)                                diag(1/s)            N
    Permutation    y_j = x_{order_j}                      argsort(order)       a gather

Arithmetic is done in x's dtype, but never below fp32, not even under autocast. Every `apply` is
differentiable in x and in the tensors that define the map.

Shapes: N size of the map, B consecutive blocks of the last axis, T everything on the leading axes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor

from spinfold.errors import Verdict
from spinfold.maps.base import Cost, Map
from spinfold.maps.manifold import orthogonality_gap, qr_orthogonal

__all__ = [
    "Diagonal",
    "Identity",
    "Orthogonal",
    "Permutation",
    "check_width",
    "compute_dtype",
    "random_orthogonal",
    "without_autocast",
]


class Identity(Map):
    """M = I."""

    def __init__(self, size: int) -> None:
        self.size = size

    def apply(self, x: Tensor) -> Tensor:
        return check_width(x, self.size)

    def inverse(self) -> Identity:
        return self

    def cost(self) -> Cost:
        return Cost(0, 0)

    def explain(self, atol: float = 1e-6) -> Verdict:
        return Verdict(True)

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def config(self) -> dict[str, Any]:
        return {"kind": "identity", "size": self.size}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        return self


class Orthogonal(Map):
    """M = R with RᵀR = I. `R_NN` is `(N, N)`, or `(B, N, N)` for one rotation on each of B consecutive blocks.

    The tensor is never copied: an optimiser that holds it moves the map. Under autocast the product is computed and
    returned in autocast's dtype, as a linear layer's is; else in fp32 at least, and returned in x's.
    """

    def __init__(self, R_NN: Tensor) -> None:
        if R_NN.ndim not in (2, 3) or R_NN.shape[-1] != R_NN.shape[-2]:
            raise ValueError(f"a rotation is (N, N) or (B, N, N), not {tuple(R_NN.shape)}")
        self.R_NN = R_NN
        self.size = R_NN.shape[-1] * (R_NN.shape[0] if R_NN.ndim == 3 else 1)

    def apply(self, x: Tensor) -> Tensor:
        dtype, autocast = compute_dtype(x), torch.is_autocast_enabled(x.device.type)
        R_NN = self.R_NN.to(dtype).contiguous()  # one layout, so that a map read back from a file gives the same bits
        x_TN = check_width(x, self.size) if autocast else check_width(x, self.size).to(dtype)
        if R_NN.ndim == 2:
            y_TN = x_TN @ R_NN
        else:
            x_TBN = x_TN.reshape(*x.shape[:-1], R_NN.shape[0], R_NN.shape[-1])
            y_TN = torch.einsum("...bn,bnm->...bm", x_TBN, R_NN).flatten(-2)
        return y_TN if autocast else y_TN.to(x.dtype)

    def inverse(self) -> Orthogonal:
        return Orthogonal(self.R_NN.mT)

    def cost(self) -> Cost:
        return Cost(2 * self.R_NN.numel(), self.R_NN.numel() * self.R_NN.element_size())

    def explain(self, atol: float = 1e-6) -> Verdict:
        if not self.R_NN.isfinite().all():
            return Verdict(False, "The rotation has entries that are not finite.", "Fit it again with a smaller step.")
        gap = orthogonality_gap(self.R_NN.detach().double())
        return Verdict(
            gap <= atol,
            "" if gap <= atol else f"RᵀR differs from I by {gap:.1e} (allowed {atol:.0e}).",
            "" if gap <= atol else "Bring the matrix back with spinfold.maps.project(R).",
        )

    def tensors(self) -> dict[str, Tensor]:
        return {"R": self.R_NN.contiguous()}

    def config(self) -> dict[str, Any]:
        return {"kind": "orthogonal", "size": self.size}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        return type(self)(self.R_NN.to(device=device, dtype=dtype))


class Diagonal(Map):
    """M = diag(s), every scale finite and not zero. Orthogonal exactly when all |s| are 1."""

    def __init__(self, scale_N: Tensor) -> None:
        if scale_N.ndim != 1:
            raise ValueError(f"scales are a vector, not {tuple(scale_N.shape)}")
        self.scale_N = scale_N
        self.size = scale_N.shape[0]

    def apply(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        return (check_width(x, self.size).to(dtype) * self.scale_N.to(dtype)).to(x.dtype)

    def inverse(self) -> Diagonal:
        return Diagonal(1 / self.scale_N)

    def transpose(self) -> Diagonal:
        return self

    def cost(self) -> Cost:
        return Cost(self.size, self.size * self.scale_N.element_size())

    def explain(self, atol: float = 1e-6) -> Verdict:
        usable = self.scale_N.isfinite() & (self.scale_N != 0)
        if usable.all():
            return Verdict(True)
        channel = int((~usable).nonzero()[0])
        return Verdict(
            False,
            f"Channel {channel} has scale {self.scale_N[channel].item()}: the map has no inverse.",
            "Clamp the scales away from zero before building the map.",
        )

    def tensors(self) -> dict[str, Tensor]:
        return {"scale": self.scale_N}

    def config(self) -> dict[str, Any]:
        return {"kind": "diagonal", "size": self.size}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        return type(self)(self.scale_N.to(device=device, dtype=dtype))

    @property
    def orthogonal(self) -> bool:
        return bool(((self.scale_N.detach().abs() - 1).abs() <= 1e-6).all())


class Permutation(Map):
    """`y_j = x_{order_j}`: entry j of the result comes from entry `order_N[j]` of the input."""

    def __init__(self, order_N: Tensor) -> None:
        if order_N.ndim != 1 or order_N.dtype.is_floating_point:
            raise ValueError("an order is a vector of integers")
        self.order_N = order_N.long()
        self.size = order_N.shape[0]

    def apply(self, x: Tensor) -> Tensor:
        return check_width(x, self.size).index_select(-1, self.order_N.to(x.device))

    def inverse(self) -> Permutation:
        return Permutation(self.order_N.argsort())

    def cost(self) -> Cost:
        return Cost(0, self.size * self.order_N.element_size())

    def explain(self, atol: float = 1e-6) -> Verdict:
        if self.order_N.sort().values.equal(torch.arange(self.size, device=self.order_N.device)):
            return Verdict(True)
        return Verdict(
            False,
            f"The order does not name each of the {self.size} channels exactly once.",
            "Build it with argsort or randperm.",
        )

    def tensors(self) -> dict[str, Tensor]:
        return {"order": self.order_N}

    def config(self) -> dict[str, Any]:
        return {"kind": "permutation", "size": self.size}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        return type(self)(self.order_N.to(device=device))


def random_orthogonal(size: int, seed: int, dtype: torch.dtype = torch.float64) -> Orthogonal:
    """A rotation from the Haar measure: Q of a Gaussian matrix, signs fixed (Mezzadri, arXiv math-ph/0609050)."""
    generator = torch.Generator().manual_seed(seed)
    return Orthogonal(
        qr_orthogonal(torch.randn(size, size, generator=generator, dtype=torch.float64)).to(dtype).contiguous()
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which x is multiplied: its own, but at least fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block in which products keep their dtype: autocast would round both operands to 16 bits."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def check_width(x: Tensor, size: int) -> Tensor:
    """x, if its last axis has `size` channels; ValueError otherwise."""
    if x.shape[-1] != size:
        raise ValueError(f"the map acts on {size} channels, x has {x.shape[-1]}")
    return x
