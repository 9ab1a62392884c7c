"""LDLQ (QuIP, arXiv 2307.13304): each column rounded with feedback from the errors of all columns before it.

With the damped H = M D Mᵀ, M unit upper triangular, D diagonal, and E = W - Ŵ

    tr(E H Eᵀ) = Σ_k D_k |E_k + Σ_{j<k} E_j M_jk|²       so       Ŵ_k = Q(W_k + Σ_{j<k} E_j M_jk)

makes every term a rounding error of its own. GPTQ in the same order gives the same integers: with H⁻¹ = UᵀU it is
M = U⁻¹ diag(U), and its running weights are W_k + Σ_{j<k} E_j M_jk. What LDLQ adds here are QuIP#'s passes of
coordinate descent behind it. One column's best weight, all others held, is where the derivative 2 (E H)_k vanishes:

    Ŵ_k ← Q(Ŵ_k + (E H)_k / H_kk)

which never raises the objective, as the nearest grid point is the best one of a parabola. Both are `round_columns` with
errors e_k = Ŵ_k - W_k, or the step that Ŵ_k takes.

Shapes: O out features, I in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spinfold.compute import precision
from spinfold.formats import ClipSearch, Format, QuantizedWeight, fit_grid
from spinfold.rounding.columns import round_columns
from spinfold.rounding.gptq import GPTQReport, live_problem, report_of
from spinfold.rounding.hessian import inverse_factor

__all__ = ["ldlq"]


@torch.no_grad()
def ldlq(
    w_OI: Tensor,
    hessian_II: Tensor,
    fmt: Format,
    *,
    passes: int = 0,
    damp: float = 0.01,
    search: ClipSearch | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[QuantizedWeight, GPTQReport]:
    """Round `w_OI` against `hessian_II` in the order of its columns, then improve it in `passes` over them.

    The grid is that of the original weights; damping, precision and errors are those of `gptq`.
    """
    w_OI, h_II, num_dead = live_problem(w_OI, hessian_II)
    grid = fit_grid(w_OI, fmt, search=search, scale_dtype=scale_dtype)
    nearest_OI = grid.dequantize(grid.quantize(w_OI), w_OI.dtype)
    factor = inverse_factor(h_II, damp)
    u_II = factor.u_II
    m_II = torch.linalg.solve_triangular(u_II, u_II.diagonal().diag(), upper=True).to(w_OI.dtype)
    with precision("fp32", w_OI.device):
        rounded = round_columns(w_OI, m_II, grid, base_OI=w_OI)
        if passes and not factor.diagonal:
            damped_II = h_II.clone()
            damped_II.diagonal().add_(factor.damping * h_II.diagonal().abs().mean())
            damped_II = damped_II.to(w_OI.dtype)
            for _ in range(passes):
                rounded = _descend(w_OI, damped_II, rounded)
    return rounded, report_of(w_OI, h_II, rounded.dequantize(w_OI.dtype), nearest_OI, factor, num_dead)


def _descend(w_OI: Tensor, h_II: Tensor, rounded: QuantizedWeight) -> QuantizedWeight:
    """One pass of coordinate descent: a step from Ŵ_k by -e takes e H_kj / H_jj from what column j aims at."""
    rounded_OI, diagonal_I = rounded.dequantize(w_OI.dtype), h_II.diagonal()
    aim_OI = rounded_OI + (w_OI - rounded_OI) @ h_II / diagonal_I
    return round_columns(aim_OI, h_II / diagonal_I, rounded.grid, base_OI=rounded_OI)
