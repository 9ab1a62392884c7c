"""GPTQ (arXiv 2210.17323): round column by column and let the later columns make up for each error.

Minimises tr((W - Ŵ) H (W - Ŵ)ᵀ), the mean squared output error for inputs with E[xᵀx] = H. With
H⁻¹ = Uᵀ U (U upper triangular), for columns i = 1 … I:

    e_i = (w_i - Q(w_i)) / U_ii            w_j ← w_j - U_ij e_i   for all j > i

Why: when w_i moves by -U_ii e_i, the best answer of the columns j > i, under the Hessian of the columns not
yet rounded, is -U_ij e_i; row i of U is what Gaussian elimination of columns < i leaves of H⁻¹ (scaled by
its pivot), so one factorisation serves all steps. The total is tr((W - Ŵ) H (W - Ŵ)ᵀ) = Σ_i |e_i|².

Shapes: O out features, I in features, G groups of g.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from spinfold.compute import precision
from spinfold.errors import SpinfoldError
from spinfold.formats import ClipSearch, Format, Grid, QuantizedWeight, fit_grid
from spinfold.formats.base import compute_dtype, extent
from spinfold.rounding.columns import round_columns
from spinfold.rounding.hessian import HessianAccumulator, InverseFactor, energy_O, inverse_factor

__all__ = ["GPTQReport", "HessianAccumulator", "gptq", "live_problem", "report_of"]


@dataclass(frozen=True)
class GPTQReport:
    """How well it went.

    `error`: tr(E H Eᵀ) / tr(W H Wᵀ) with E = W - Ŵ; `nearest_error`: the same for rounding to nearest on
    the grid of the original weights; `energy_3O`: row by row, both numerators and the denominator. `damping`: the
    multiple of mean(diag H) that was added to H.
    `diagonal`: H was so indefinite that only its diagonal was used (the result is rounding to nearest).
    `dead_columns`: inputs that were always zero, whose weights were set to zero.
    """

    error: float
    nearest_error: float
    damping: float
    diagonal: bool
    dead_columns: int
    energy_3O: Tensor = field(compare=False, repr=False)


@torch.no_grad()
def gptq(
    w_OI: Tensor,
    hessian_II: Tensor,
    fmt: Format,
    *,
    search: ClipSearch | None = None,
    damp: float = 0.01,
    act_order: bool = True,
    block_size: int = 128,
    static_groups: bool = True,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[QuantizedWeight, GPTQReport]:
    """Round `w_OI` against the input statistics `hessian_II` (any positive multiple of E[xᵀx]).

    `damp` times the mean diagonal is added to H; ten times more, up to 1, while H is not positive definite.
    `act_order`: columns in order of decreasing H_ii; the result is in the original order.
    `static_groups`: grids fitted to the original weights; otherwise each group's grid is fitted when its first column
    is reached (a scale that all groups have in common stays), and `act_order` takes groups as a whole, in order of
    decreasing Σ H_ii. `block_size` changes the speed only.

    Computed in fp32 (fp64 if the weights are), the factorisation in fp64. Inputs are not modified.
    Raises SpinfoldError for weights or a Hessian that are not finite, shapes or groups that do not fit.
    """
    w_OI, h_II, num_dead = live_problem(w_OI, hessian_II)
    grid = fit_grid(w_OI, fmt, search=search, scale_dtype=scale_dtype)
    nearest_OI = grid.dequantize(grid.quantize(w_OI), w_OI.dtype)
    order_I = _order(h_II.diagonal(), fmt.group_of(w_OI.shape[1]), act_order, static_groups)
    factor = inverse_factor(h_II.index_select(0, order_I).gather(1, order_I.expand_as(h_II)), damp)
    whole_OG1 = fmt.whole_of(*extent(fmt.split(w_OI)))

    def refit(w_Og: Tensor, group: int) -> Grid:
        whole_O11 = None if whole_OG1 is None else whole_OG1[:, group : group + 1]
        alone = replace(fmt, group_size=None)
        return fit_grid(w_Og, alone, search=search, scale_dtype=scale_dtype, whole_OG1=whole_O11)

    with precision("fp32", w_OI.device):
        u_II = factor.u_II.to(w_OI.dtype).contiguous()
        rounded = round_columns(
            w_OI, u_II, grid, order_I=order_I, block_size=block_size, refit=None if static_groups else refit
        )
    return rounded, report_of(w_OI, h_II, rounded.dequantize(w_OI.dtype), nearest_OI, factor, num_dead)


def _order(diagonal_I: Tensor, group_size: int, act_order: bool, static_groups: bool) -> Tensor:
    """The order in which columns are rounded."""
    if not act_order:
        return torch.arange(len(diagonal_I), device=diagonal_I.device)
    order_I = torch.argsort(diagonal_I, descending=True, stable=True)
    if static_groups or group_size == len(diagonal_I):
        return order_I
    loudness_G = diagonal_I.view(-1, group_size).sum(1)
    rank_G = loudness_G.argsort(descending=True, stable=True).argsort()
    return order_I[rank_G[order_I // group_size].argsort(stable=True)]


def live_problem(w_OI: Tensor, hessian_II: Tensor) -> tuple[Tensor, Tensor, int]:
    """Weights and fp64 Hessian to round with, the given ones where they serve, and how many inputs were dead, always
    zero; their weights become zero.

    A dead input is uncoupled, so its H_ii is free: with the mean of the others the damping stays as it is. If all are
    dead, nothing is known about the inputs, which is no reason to delete the weights. Raises SpinfoldError for a
    Hessian that is not finite or has another shape.
    """
    num_columns = w_OI.shape[1]
    if hessian_II.shape != (num_columns, num_columns):
        raise SpinfoldError(
            f"A Hessian of shape {tuple(hessian_II.shape)} does not belong to a weight of shape {tuple(w_OI.shape)}.",
            "It has one row and one column for each input feature.",
            "Collect the statistics at the input of this linear.",
        )
    if not hessian_II.sum(dtype=torch.float64).isfinite():  # one pass, where to ask each entry takes several
        raise SpinfoldError(
            f"The Hessian of a weight of shape {tuple(w_OI.shape)} contains NaN or infinity.",
            "An activation overflowed during calibration.",
            "Calibrate in fp32 or bf16, and check the checkpoint.",
        )
    w_OI, h_II = w_OI.to(compute_dtype(w_OI)), hessian_II.to(w_OI.device, torch.float64)
    dead_I = h_II.diagonal() == 0
    num_dead = int(dead_I.sum())
    if num_dead in (0, num_columns):
        return w_OI, h_II, 0
    h_II = h_II.clone()
    h_II.diagonal()[dead_I] = h_II.diagonal().sum() / (num_columns - num_dead)
    return w_OI.masked_fill(dead_I, 0), h_II, num_dead


def report_of(
    w_OI: Tensor, h_II: Tensor, rounded_OI: Tensor, nearest_OI: Tensor, factor: InverseFactor, num_dead: int
) -> GPTQReport:
    """How far two ways to round `w_OI` are from it."""
    h_II = h_II.to(w_OI.dtype)
    energy_3O = torch.stack([energy_O(x_OI, h_II) for x_OI in (w_OI - rounded_OI, w_OI - nearest_OI, w_OI)])
    error, nearest_error, total = energy_3O.sum(1).tolist()
    return GPTQReport(
        error=error / total if total else 0.0,
        nearest_error=nearest_error / total if total else 0.0,
        damping=factor.damping,
        diagonal=factor.diagonal,
        dead_columns=num_dead,
        energy_3O=energy_3O,
    )
