"""LDLQ (QuIP, arXiv 2307.13304): each column rounded with feedback from the errors of all columns before it.

With the damped H = M D Mᵀ, M unit upper triangular, D diagonal, and E = W - Ŵ

    tr(E H Eᵀ) = Σ_k D_k |E_k + Σ_{j<k} E_j M_jk|²       so       Ŵ_k = Q(W_k + Σ_{j<k} E_j M_jk)

makes every term a rounding error of its own. GPTQ in the same order gives the same integers: with H⁻¹ = UᵀU it is
M = U⁻¹ diag(U), and its running weights are W_k + Σ_{j<k} E_j M_jk. What LDLQ adds here are QuIP#'s passes of
coordinate descent behind it. One column's best weight, all others held, is where the derivative 2 (E H)_k vanishes:

    Ŵ_k ← Q(Ŵ_k + (E H)_k / H_kk)

which never raises the objective, as the nearest grid point is the best one of a parabola.

Shapes: O out features, I in features; the last axis 1 is one column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spinfold.compute import precision
from spinfold.formats import ClipSearch, Format, Grid, QuantizedWeight, fit_grid
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
    damped_II = h_II + factor.damping * h_II.diagonal().abs().mean() * torch.eye(len(h_II)).to(h_II)
    with precision("fp32", w_OI.device):
        q_OI, rounded_OI = _feed_back(w_OI, m_II, grid)
        for _ in range(0 if factor.diagonal else passes):
            _descend(w_OI, damped_II.to(w_OI.dtype), grid, q_OI, rounded_OI)
    rounded = QuantizedWeight(q_OI, grid.scale_OG, grid.second_OG, fmt)
    return rounded, report_of(w_OI, h_II, rounded_OI, nearest_OI, factor, num_dead)


def _feed_back(w_OI: Tensor, m_II: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The integers and the weights that they stand for."""
    e_IO = torch.zeros_like(w_OI.T, memory_format=torch.contiguous_format)
    q_OI, rounded_OI = torch.empty_like(w_OI, dtype=grid.format.dtype), torch.empty_like(w_OI)
    for k, w_O in enumerate(w_OI.T):
        _put(k, w_O + m_II[:k, k] @ e_IO[:k], grid, q_OI, rounded_OI)
        e_IO[k] = w_O - rounded_OI[:, k]
    return q_OI, rounded_OI


def _descend(w_OI: Tensor, h_II: Tensor, grid: Grid, q_OI: Tensor, rounded_OI: Tensor) -> None:
    """One pass of coordinate descent, in place."""
    e_OI = w_OI - rounded_OI
    for k in range(w_OI.shape[1]):
        _put(k, rounded_OI[:, k] + e_OI @ h_II[:, k] / h_II[k, k], grid, q_OI, rounded_OI)
        e_OI[:, k] = w_OI[:, k] - rounded_OI[:, k]


def _put(k: int, target_O: Tensor, grid: Grid, q_OI: Tensor, rounded_OI: Tensor) -> None:
    """Make column k the grid's nearest to `target_O`."""
    fmt, group = grid.format, k // grid.format.group_of(q_OI.shape[1])
    second_O = None if grid.second_OG is None else grid.second_OG[:, group].to(target_O.dtype)
    column = grid.scale_OG[:, group].to(target_O.dtype), second_O
    element_O = fmt.nearest(target_O, *column)
    q_OI[:, k] = fmt.encode(element_O)
    rounded_OI[:, k] = fmt.values(element_O, *column)
