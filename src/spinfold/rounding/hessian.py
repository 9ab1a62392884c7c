"""The second-order statistics of a linear's inputs, and the factor of their inverse that GPTQ needs.

    H = (1/N) Σ xᵀx        H⁻¹ = Uᵀ U,  U upper triangular        energy of X: tr(X H Xᵀ) = E|x Xᵀ|²

Shapes: I in features, O out features, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spinfold.compute import precision
from spinfold.errors import SpinfoldError

__all__ = ["HessianAccumulator", "InverseFactor", "energy", "inverse_factor"]


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
        with precision("fp32", device):  # TF32 would lose more than the 1 % damping hides
            for x_PI, y_PI in zip(x_TI.split(8192), y_TI.split(8192), strict=True):
                self._sum_II += y_PI.to(device, torch.float32).T @ x_PI.to(device, torch.float32)
        self.count += x_TI.shape[0]

    def value(self) -> Tensor:
        """H `(I, I)` in fp64, the mean over tokens. GPTQ's factor 2 is left out: scaling H changes no integer."""
        if not self.count:
            raise SpinfoldError(
                "There are no input statistics to round with.",
                "No calibration token reached this linear.",
                "Use more calibration text, or rounding `rtn`, which needs none.",
            )
        return self._sum_II / self.count


def energy(x_OI: Tensor, hessian_II: Tensor) -> float:
    """tr(X H Xᵀ), the mean squared output of a weight `x_OI`."""
    with precision("fp32", x_OI.device):
        return float(((x_OI @ hessian_II.to(x_OI.dtype)) * x_OI).sum(dtype=torch.float64))


@dataclass(frozen=True)
class InverseFactor:
    """`U_II` with (H + damping·mean(diag H)·1)⁻¹ = Uᵀ U; or U = 1 if `diagonal`."""

    u_II: Tensor
    damping: float
    diagonal: bool


def inverse_factor(hessian_II: Tensor, damp: float) -> InverseFactor:
    """Factor the inverse of a damped Hessian, in fp64.

    Let J reverse the order of indices and J H J = L Lᵀ be its Cholesky factorisation. Then
    H = V Vᵀ with V = J L J upper triangular, and H⁻¹ = V⁻ᵀ V⁻¹ = Uᵀ U with
    U = V⁻¹ = J L⁻¹ J: one factorisation and one triangular solve, and H⁻¹ itself is never formed.

    If H is not positive definite, the damping grows tenfold up to 1. If that does not help either
    (H is far from being a Hessian), U = 1: any diagonal U makes GPTQ round to nearest.
    """
    h_II = hessian_II.to(torch.float64)
    diagonal_I = h_II.diagonal()
    identity_II = torch.eye(h_II.shape[0], dtype=h_II.dtype, device=h_II.device)
    while True:
        damped_II = h_II + damp * diagonal_I.abs().mean() * identity_II
        l_II, failed_at = torch.linalg.cholesky_ex(damped_II.flip(0, 1))
        if not failed_at:
            u_II = torch.linalg.solve_triangular(l_II, identity_II, upper=False).flip(0, 1)
            if u_II.isfinite().all():
                return InverseFactor(u_II, damp, diagonal=False)
        if damp >= 1:
            return InverseFactor(identity_II, damp, diagonal=True)
        damp = min(1.0, max(0.001, damp) * 10)
