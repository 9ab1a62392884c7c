"""OSAQ (arXiv 2605.04738): before rounding, flatten each row by a step along inputs that the text hardly uses.

Let N have as rows the eigenvectors of H with the least eigenvalues, as many as hold at most a share `absorb` of H's
trace. Then W + B N gives nearly the output of W: tr(BN H (BN)ᵀ) ≤ λ_K |B|², with λ_K their largest eigenvalue, and
nothing at all changes where the inputs lie in the span of the others. Each row w is flattened where it is loudest,

    min over b:  Σ_j s_j (w_j + b n_j)² + μ |b|² + (b v)²          s = softmax(|w| / τ),  v = mean of the n_j
    b = -(Σ_j s_j n_j n_jᵀ + μ 1 + v vᵀ)⁻¹ Σ_j s_j w_j n_j          n_j column j of N

where (b v)² keeps the row's mean, as `rounds` of a reweighted least-squares fit of |w|_∞. A row takes the step only if
its largest weight falls, and the objective tr(E H Eᵀ) of rounding it to nearest with it.

The paper's constants are not known to us: τ is an eighth of the row's largest weight, μ a thousandth of the mean
diagonal of Σ_j s_j n_j n_jᵀ.

Shapes: O out features, R rows of a chunk, I in features, K directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spinfold.formats import ClipSearch, Format
from spinfold.rounding.gptq import live_problem
from spinfold.rounding.nearest import round_nearest

__all__ = ["absorb_outliers", "quiet_directions"]

_TEMPERATURE, _RIDGE, _ROUNDS = 1 / 8, 1e-3, 3
_CHUNK = 1 << 25
"""Numbers in the largest intermediate tensor."""


def quiet_directions(hessian_II: Tensor, share: float) -> Tensor:
    """N `(K, I)`, fp64: the eigenvectors of the least eigenvalues, whose sum is at most `share` of the trace."""
    values_I, vectors_II = torch.linalg.eigh(hessian_II.double())
    energy_I = values_I.clamp(min=0).cumsum(0)
    return vectors_II[:, energy_I <= share * energy_I[-1]].T


@torch.no_grad()
def absorb_outliers(
    w_OI: Tensor,
    hessian_II: Tensor,
    fmt: Format,
    *,
    share: float = 1e-4,
    search: ClipSearch | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight to round in place of `w_OI`: same shape and dtype, and nearly the same output on inputs with E[xᵀx] =
    `hessian_II`. Raises SpinfoldError for statistics that are not finite or have another shape."""
    wide_OI, h_II, _ = live_problem(w_OI, hessian_II)
    wide_OI = wide_OI.double()
    n_KI = quiet_directions(h_II, share)
    flat_OI = wide_OI
    for _ in range(_ROUNDS if len(n_KI) else 0):
        rows = max(1, _CHUNK // n_KI.numel())
        flat_OI = torch.cat([_step(v_RI, w_RI, n_KI) for v_RI, w_RI in _pairs(flat_OI, wide_OI, rows)])

    def nearest_loss_O(x_OI: Tensor) -> Tensor:
        """The objective row by row, against the original weights."""
        rounded = round_nearest(x_OI.to(w_OI.dtype), fmt, search, scale_dtype=scale_dtype)
        e_OI = wide_OI - rounded.dequantize(torch.float64)
        return ((e_OI @ h_II) * e_OI).sum(1)

    lower_O = flat_OI.abs().amax(1) < wide_OI.abs().amax(1)
    better_O = lower_O & (nearest_loss_O(flat_OI) < nearest_loss_O(wide_OI))
    return torch.where(better_O[:, None], flat_OI.to(w_OI.dtype), w_OI)


def _pairs(one_OI: Tensor, other_OI: Tensor, rows: int) -> zip[tuple[Tensor, Tensor]]:
    return zip(one_OI.split(rows), other_OI.split(rows), strict=True)


def _step(loud_RI: Tensor, w_RI: Tensor, n_KI: Tensor) -> Tensor:
    """W + B N, the columns weighted by how loud they are in `loud_RI`."""
    peak_R1 = loud_RI.abs().amax(1, keepdim=True).clamp(min=torch.finfo(loud_RI.dtype).tiny)
    s_RI = torch.softmax(loud_RI.abs() / (_TEMPERATURE * peak_R1), 1)
    a_RKK = (n_KI * s_RI[:, None]) @ n_KI.T
    ridge_R = _RIDGE * a_RKK.diagonal(dim1=1, dim2=2).mean(1)
    mean_K = n_KI.mean(1)
    a_RKK += torch.outer(mean_K, mean_K) + ridge_R[:, None, None] * torch.eye(len(n_KI)).to(n_KI)
    b_RK = torch.linalg.solve(a_RKK, -(s_RI * w_RI) @ n_KI.T)
    return w_RI + b_RK @ n_KI
