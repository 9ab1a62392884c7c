"""Changes of basis that are cheap to apply: the identity but for a subspace of r dimensions.

    M = I + U K Uᵀ        x M = x + ((x U) K) Uᵀ        4 N r + 2 r² + N flops,  N r + r² parameters

The family is closed, with G = UᵀU:

    Mᵀ  = I + U Kᵀ Uᵀ
    M⁻¹ = I - U (I + K G)⁻¹ K Uᵀ        (Woodbury: multiply out, and (I + K G) K' = -K makes all but I cancel)

so it holds every I + U Vᵀ whose V = U Kᵀ spans the same subspace, orthogonal ones among them, and reads half the
bytes of two separate factors.

    low_rank_rotation(T, r)    the orthogonal matrix of this form that is nearest to T
    chain_of_bases(R, r)       bases near R_0, R_1, … whose neighbours differ by exactly such a matrix

Source: the correction of ReSpinQuant, arXiv 2604.11080. The chain and its exactness are our own.

Shapes: N size of the map, R rank, ... any leading axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from spinfold.errors import Verdict
from spinfold.maps.base import Cost, Map
from spinfold.maps.linear import Identity, Orthogonal, check_width, compute_dtype, without_autocast
from spinfold.maps.manifold import project

__all__ = ["LowRankCorrection", "chain_of_bases", "low_rank_rotation"]

_AT_REST = 1e-12  # |T - I| and 1 - cos θ up to here are rounding


class LowRankCorrection(Map):
    """M = I + U K Uᵀ. Orthogonal exactly when K + Kᵀ + K UᵀU Kᵀ = 0 on the span of U."""

    def __init__(self, U_NR: Tensor, K_RR: Tensor) -> None:
        size, rank = U_NR.shape
        if not 1 <= rank <= size or K_RR.shape != (rank, rank):
            raise ValueError(f"U is (N, R) and K (R, R) with 1 <= R <= N, not {tuple(U_NR.shape)} {tuple(K_RR.shape)}")
        self.U_NR, self.K_RR = U_NR, K_RR
        self.size, self.rank = size, rank
        self._factors: tuple[Any, tuple[Tensor, Tensor]] | None = None

    def apply(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        x_TN = check_width(x, self.size).to(dtype)
        U_NR, K_RR = self.U_NR.to(dtype).contiguous(), self.K_RR.to(dtype).contiguous()
        with without_autocast(x.device):
            return (x_TN + ((x_TN @ U_NR) @ K_RR) @ U_NR.T).to(x.dtype)

    def two_factors(self, dtype: torch.dtype, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """U and `factor` K Uᵀ in `dtype`, with which x M = x + (x U) (K Uᵀ); kept until U or K change."""
        key = dtype, factor, self.U_NR._version, self.K_RR._version
        if self._factors is None or self._factors[0] != key:
            with torch.no_grad():
                V_RN = factor * self.K_RR.double() @ self.U_NR.double().T
                self._factors = key, (self.U_NR.detach().to(dtype), V_RN.to(dtype))
        return self._factors[1]

    def inverse(self) -> LowRankCorrection:
        return LowRankCorrection(self.U_NR, -torch.linalg.solve(self._inner(), self.K_RR))

    def transpose(self) -> LowRankCorrection:
        return LowRankCorrection(self.U_NR, self.K_RR.T)

    def cost(self) -> Cost:
        parameters = self.U_NR.numel() + self.K_RR.numel()
        flops = 4 * self.U_NR.numel() + 2 * self.K_RR.numel() + self.size
        return Cost(flops, parameters * self.U_NR.element_size())

    def explain(self, atol: float = 1e-6) -> Verdict:
        if not (self.U_NR.isfinite().all() and self.K_RR.isfinite().all()):
            return Verdict(False, "The correction has entries that are not finite.", "Fit it with a smaller step.")
        # det M = det (I + K G), so what M has no inverse for lies in these r dimensions.
        smallest = float(torch.linalg.svdvals(self._inner().detach().double())[-1])
        if smallest > atol:
            return Verdict(True)
        return Verdict(
            False, f"The correction has no inverse: I + K UᵀU has a singular value {smallest:.1e}.", "Scale K."
        )

    def tensors(self) -> dict[str, Tensor]:
        return {"U": self.U_NR.contiguous(), "K": self.K_RR.contiguous()}

    def config(self) -> dict[str, Any]:
        return {"kind": "low_rank", "size": self.size}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        return type(self)(self.U_NR.to(device=device, dtype=dtype), self.K_RR.to(device=device, dtype=dtype))

    @property
    def orthogonal(self) -> bool:
        """M Mᵀ - I = U (K + Kᵀ + K G Kᵀ) Uᵀ, entry by entry."""
        U_NR, K_RR = self.U_NR.detach().double(), self.K_RR.detach().double()
        excess_RR = K_RR + K_RR.T + K_RR @ (U_NR.T @ U_NR) @ K_RR.T
        return bool((U_NR @ excess_RR @ U_NR.T).abs().max() <= 1e-6)

    def _inner(self) -> Tensor:
        """I + K G, `(R, R)`."""
        inner_RR = self.K_RR @ (self.U_NR.T @ self.U_NR)
        return inner_RR + torch.eye(self.rank, dtype=inner_RR.dtype, device=inner_RR.device)


def low_rank_rotation(T_NN: Tensor, rank: int) -> Map:
    """The orthogonal C nearest to the orthogonal T in Frobenius norm, among those with rank(C - I) at most `rank`.

    T turns planes by angles θ, so T - I is normal with the singular values 2 sin(θ/2), each twice, and no matrix with
    rank(C - I) ≤ r is nearer to T than what leaves out all but the r largest (Eckart-Young). Keeping the r/2 planes
    with the largest angles attains this bound and is orthogonal. These planes span the eigenvectors Q of (T + Tᵀ)/2
    with the r smallest eigenvalues cos θ, whence C = I + Q (QᵀTQ - I) Qᵀ. An odd r cuts a plane in two; the polar
    factor of QᵀTQ, which is QᵀTQ itself otherwise, is then the best that Q allows.

    Planes at rest are left out, so the rank may be lower. Rank 0 is an `Identity`, full rank an `Orthogonal`.
    """
    T_NN = T_NN.double()
    eye_NN = torch.eye(len(T_NN), dtype=T_NN.dtype, device=T_NN.device)
    if rank == 0 or (T_NN - eye_NN).abs().max() <= _AT_REST:
        return Identity(len(T_NN))
    if rank >= len(T_NN):
        return Orthogonal(project(T_NN))
    cosine_N, Q_NN = torch.linalg.eigh((T_NN + T_NN.T) / 2)
    rank = max(1, min(rank, int((1 - cosine_N > _AT_REST).sum())))
    Q_NR = Q_NN[:, :rank].contiguous()
    turn_RR = project(Q_NR.T @ T_NN @ Q_NR)
    return LowRankCorrection(Q_NR, turn_RR - eye_NN[:rank, :rank])


def chain_of_bases(R: Sequence[Tensor], rank: int) -> tuple[list[Tensor], list[Map]]:
    """Orthogonal bases B_i near the R_i `(N, N)`, and maps C_i with B_{i+1} = B_i C_i exactly, rank(C_i - I) <= rank.

    B_0 = R_0 and C_i is the `low_rank_rotation` of B_iᵀ R_{i+1}: since ‖B_i C - R_{i+1}‖ = ‖C - B_iᵀ R_{i+1}‖, each
    basis is the nearest that its predecessor lets it be, and what one step can't reach is left to the next. Rank 0
    gives one basis for all; full rank the R_i themselves. All in fp64.
    """
    bases, changes = [project(R[0].double())], list[Map]()
    for target_NN in R[1:]:
        changes.append(low_rank_rotation(bases[-1].T @ target_NN.double(), rank))
        bases.append(changes[-1].apply(bases[-1]).clone())  # a file can't hold one tensor under two names
    return bases, changes
