"""The second-order statistics of a linear's inputs, and the factor of their inverse that GPTQ needs.

    H = (1/N) Σ xᵀx        H⁻¹ = Uᵀ U,  U upper triangular

Shapes: I in features, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spinfold.compute import precision
from spinfold.errors import SpinfoldError

__all__ = ["HessianAccumulator", "InverseFactor", "inverse_factor"]


class HessianAccumulator:
    """Sums xᵀx over calibration tokens: products in fp32, over at most 8192 tokens each, running sum in fp64."""

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self._sum_II = torch.zeros(size, size, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, x_TI: Tensor) -> None:
        """Count the tokens of `x (..., I)`, the linear's input as it is at run time (online maps applied)."""
        size = self._sum_II.shape[0]
        x_TI = x_TI.reshape(-1, size)
        with precision("fp32", self._sum_II.device):  # TF32 would lose more than the 1 % damping hides
            for part_TI in torch.split(x_TI, 8192):
                part_TI = part_TI.to(self._sum_II.device, torch.float32)
                self._sum_II += part_TI.T @ part_TI
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
