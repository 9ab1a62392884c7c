"""The second-order statistics of a linear's inputs, and the factor of their inverse that GPTQ needs.

    H = (1/N) Σ xᵀx        H⁻¹ = Uᵀ U,  U upper triangular        energy of X: tr(X H Xᵀ) = E|x Xᵀ|²

Shapes: I in features, the first half J and the second K, O out features, T tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor

from spinfold.compute import exact_products, precision, square
from spinfold.distributed import summed
from spinfold.errors import SpinfoldError

__all__ = ["HessianAccumulator", "InverseFactor", "energy", "energy_O", "inverse_factor"]

K = TypeVar("K", bound=Hashable)


class HessianAccumulator:
    """Sums xᵀx, or yᵀx, over calibration tokens: products in fp32 of at most 8192 tokens each, the sum in fp64."""

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self._sum_II = torch.zeros(size, size, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, x_TI: Tensor, y_TI: Tensor | None = None) -> None:
        """Count the tokens of `x (..., I)`, the linear's input as it is at run time (online maps applied).

        With `y`, of the same shape, their products with it are summed: yᵀx.
        """
        size, device = self._sum_II.shape[0], self._sum_II.device
        x_TI = x_TI.reshape(-1, size)
        y_TI = x_TI if y_TI is None else y_TI.reshape(-1, size)
        dtype = torch.promote_types(x_TI.dtype, y_TI.dtype)
        with precision("fp32", device), exact_products(dtype, device):  # TF32 loses more than the 1 % damping hides
            for x_PI, y_PI in zip(x_TI.split(8192), y_TI.split(8192), strict=True):
                x_PI = x_PI.to(device, torch.float32)
                self._sum_II += square(x_PI) if y_TI is x_TI else y_PI.to(device, torch.float32).T @ x_PI
        self.count += x_TI.shape[0]

    @classmethod
    def joined(cls, parts: Mapping[K, Self]) -> dict[K, Self]:
        """What all processes have counted, by key; `parts` are used up."""
        sums = summed({key: part._sum_II for key, part in parts.items()})
        counts = summed({key: torch.tensor(part.count) for key, part in parts.items()})
        whole: dict[K, Self] = {}
        for key, sum_II in sums.items():
            whole[key] = cls(0)
            whole[key].count, whole[key]._sum_II = int(counts[key]), sum_II
        return whole

    def value(self) -> Tensor:
        """H `(I, I)` in fp64, the mean over tokens. GPTQ's factor 2 is left out: scaling H changes no integer."""
        if not self.count:
            raise SpinfoldError(
                "There are no input statistics to round with.",
                "No calibration token reached this linear.",
                "Use more calibration text, or rounding `rtn`, which needs none.",
            )
        return self._sum_II / self.count


def energy_O(x_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """The diagonal of X H Xᵀ, fp64: the mean squares of the outputs of a weight `x_OI`.

    On a CPU without the blocks of H below its diagonal, which count as those above.
    """
    size, h_II = len(hessian_II), hessian_II.to(x_OI.dtype)
    step = max(1, size if x_OI.is_cuda else -(-size // 4))
    sums_O = torch.zeros(len(x_OI), dtype=torch.float64, device=x_OI.device)
    with precision("fp32", x_OI.device):
        for low in range(0, size, step):
            y_OJ = x_OI[:, low : low + step] @ h_II[low : low + step, low:]
            y_OJ[:, :step] /= 2
            sums_O += y_OJ.mul_(x_OI[:, low:]).sum(1)
    sums_O *= 2
    return sums_O


def energy(x_OI: Tensor, hessian_II: Tensor) -> float:
    """tr(X H Xᵀ), their sum."""
    return float(energy_O(x_OI, hessian_II).sum())


@dataclass(frozen=True)
class InverseFactor:
    """`U_II` with (H + damping·mean(diag H)·1)⁻¹ = Uᵀ U; or U = 1 if `diagonal`."""

    u_II: Tensor
    damping: float
    diagonal: bool


def inverse_factor(hessian_II: Tensor, damp: float) -> InverseFactor:
    """Factor the inverse of a damped Hessian, in fp64; H⁻¹ itself is never formed.

    If H is not positive definite, the damping grows tenfold up to 1. If that does not help either
    (H is far from being a Hessian), U = 1: any diagonal U makes GPTQ round to nearest.
    """
    h_II = hessian_II.to(torch.float64)
    mean = h_II.diagonal().abs().mean()
    while True:
        u_II = _inverse(h_II, damp * mean)
        if u_II is not None and u_II.sum().isfinite():
            return InverseFactor(u_II, damp, diagonal=False)
        if damp >= 1:
            return InverseFactor(_identity(h_II), damp, diagonal=True)
        damp = min(1.0, max(0.001, damp) * 10)


def _inverse(h_II: Tensor, damping: Tensor) -> Tensor | None:
    """The upper triangular U with (H + damping)⁻¹ = Uᵀ U, None where that is not positive definite.

    Let J reverse the order of indices and J H J = L Lᵀ be its Cholesky factorisation. Then H = V Vᵀ with V = J L J
    upper triangular, and H⁻¹ = V⁻ᵀ V⁻¹ = Uᵀ U with U = V⁻¹ = J L⁻¹ J: one factorisation and one triangular solve.
    A CPU multiplies more than twice as fast as it does either, so there large matrices are taken apart:

        H = [[A, B], [Bᵀ, C]],  V = [[V₁, X], [0, V₂]]:    V₂ V₂ᵀ = C,  X = B U₂ᵀ,  V₁ V₁ᵀ = A - X Xᵀ
        U = [[U₁, -U₁ X U₂], [0, U₂]]
    """
    half = len(h_II) // 2
    if half < 48 or h_II.is_cuda:
        # Of a model with 70 billion weights each of these matrices has 6.6 GB: none is kept longer than it is needed.
        l_II = h_II.flip(0, 1)
        l_II.diagonal().add_(damping)
        l_II, failed_at = torch.linalg.cholesky_ex(l_II)
        if failed_at:
            return None
        u_II = torch.linalg.solve_triangular(l_II, _identity(l_II), upper=False)
        del l_II
        return u_II.flip(0, 1)
    if (u2_KK := _inverse(h_II[half:, half:], damping)) is None:
        return None
    x_JK = h_II[:half, half:] @ u2_KK.T
    if (u1_JJ := _inverse(h_II[:half, :half] - x_JK @ x_JK.T, damping)) is None:
        return None
    u_II = torch.zeros_like(h_II)
    u_II[:half, :half], u_II[half:, half:] = u1_JJ, u2_KK
    u_II[:half, half:] = (u1_JJ @ (x_JK @ u2_KK)).neg_()
    return u_II


def _identity(like_II: Tensor) -> Tensor:
    return torch.eye(len(like_II), dtype=like_II.dtype, device=like_II.device)
