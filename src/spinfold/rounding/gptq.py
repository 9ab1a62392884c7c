"""GPTQ (arXiv 2210.17323): round column by column and let the later columns make up for each error.

Minimises tr((W - Ŵ) H (W - Ŵ)ᵀ), the mean squared output error for inputs with E[xᵀx] = H. With
H⁻¹ = Uᵀ U (U upper triangular), for columns i = 1 … I:

    e_i = (w_i - Q(w_i)) / U_ii            w_j ← w_j - U_ij e_i   for all j > i

Why: when w_i moves by -U_ii e_i, the best answer of the columns j > i, under the Hessian of the columns not
yet rounded, is -U_ij e_i; row i of U is what Gaussian elimination of columns < i leaves of H⁻¹ (scaled by
its pivot), so one factorisation serves all steps. The total is tr((W - Ŵ) H (W - Ŵ)ᵀ) = Σ_i |e_i|².

Shapes: O out features, I in features (in processing order), B the columns of a block, G groups.
        Inside, weights are transposed (w_IO), so that a column is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from spinfold.compute import precision
from spinfold.errors import SpinfoldError
from spinfold.formats import ClipSearch, FloatFormat, Format, Grid, IntFormat, QuantizedWeight, fit_grid
from spinfold.formats.base import compute_dtype
from spinfold.kernels import kernels_run_on
from spinfold.rounding.hessian import HessianAccumulator, InverseFactor, energy, inverse_factor

__all__ = ["GPTQReport", "HessianAccumulator", "gptq", "live_problem", "report_of"]


@dataclass(frozen=True)
class GPTQReport:
    """How well it went.

    `error`: tr(E H Eᵀ) / tr(W H Wᵀ) with E = W - Ŵ; `nearest_error`: the same for rounding to nearest on
    the grid of the original weights. `damping`: the multiple of mean(diag H) that was added to H.
    `diagonal`: H was so indefinite that only its diagonal was used (the result is rounding to nearest).
    `dead_columns`: inputs that were always zero, whose weights were set to zero.
    """

    error: float
    nearest_error: float
    damping: float
    diagonal: bool
    dead_columns: int


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
    `static_groups`: grids fitted to the original weights; otherwise each group's grid is fitted when
    its first column is reached (needs `act_order=False`). `block_size` changes the speed only.

    Computed in fp32 (fp64 if the weights are), the factorisation in fp64. Inputs are not modified.
    Raises SpinfoldError for weights or a Hessian that are not finite, shapes or groups that do not fit.
    """
    if act_order and not static_groups and fmt.group_of(w_OI.shape[1]) < w_OI.shape[1]:
        raise SpinfoldError(
            "GPTQ cannot refit the groups' grids in activation order.",
            "A group's columns are then not visited one after the other.",
            "Use static groups, or turn act_order off.",
        )
    if not static_groups and isinstance(fmt, FloatFormat) and fmt.outer:
        raise SpinfoldError(
            "GPTQ cannot refit scales that have a scale in common.",
            "The common one comes from weights that are not rounded yet.",
            "Use static groups.",
        )
    w_OI, h_II, num_dead = live_problem(w_OI, hessian_II)
    grid = fit_grid(w_OI, fmt, search=search, scale_dtype=scale_dtype)
    nearest_OI = grid.dequantize(grid.quantize(w_OI), w_OI.dtype)
    order_I = torch.arange(w_OI.shape[1], device=w_OI.device)
    if act_order:
        order_I = torch.argsort(h_II.diagonal(), descending=True, stable=True)
    factor = inverse_factor(h_II[order_I][:, order_I], damp)

    refit = partial(fit_grid, fmt=replace(fmt, group_size=None), search=search, scale_dtype=scale_dtype)
    with precision("fp32", w_OI.device):
        u_II = factor.u_II.to(w_OI.dtype).contiguous()
        rounded = _round_columns(w_OI, u_II, grid, order_I, block_size, None if static_groups else refit)
    return rounded, report_of(w_OI, h_II, rounded.dequantize(w_OI.dtype), nearest_OI, factor, num_dead)


def live_problem(w_OI: Tensor, hessian_II: Tensor) -> tuple[Tensor, Tensor, int]:
    """Weights and fp64 Hessian to round with, and how many inputs were dead, always zero; their weights become zero.

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
    if not hessian_II.isfinite().all():
        raise SpinfoldError(
            f"The Hessian of a weight of shape {tuple(w_OI.shape)} contains NaN or infinity.",
            "An activation overflowed during calibration.",
            "Calibrate in fp32 or bf16, and check the checkpoint.",
        )
    w_OI, h_II = w_OI.to(compute_dtype(w_OI)), hessian_II.to(w_OI.device, torch.float64, copy=True)
    dead_I = h_II.diagonal() == 0
    num_dead = int(dead_I.sum())
    if num_dead == num_columns:
        return w_OI, h_II, 0
    h_II.diagonal()[dead_I] = h_II.diagonal().sum() / (num_columns - num_dead)
    return w_OI.masked_fill(dead_I, 0), h_II, num_dead


def report_of(
    w_OI: Tensor, h_II: Tensor, rounded_OI: Tensor, nearest_OI: Tensor, factor: InverseFactor, num_dead: int
) -> GPTQReport:
    """How far two ways to round `w_OI` are from it."""
    error, nearest_error, total = (energy(x_OI, h_II) for x_OI in (w_OI - rounded_OI, w_OI - nearest_OI, w_OI))
    return GPTQReport(
        error=error / total if total else 0.0,
        nearest_error=nearest_error / total if total else 0.0,
        damping=factor.damping,
        diagonal=factor.diagonal,
        dead_columns=num_dead,
    )


def _round_columns(
    w_OI: Tensor,
    u_II: Tensor,
    grid: Grid,
    order_I: Tensor,
    block_size: int,
    refit: Callable[[Tensor], Grid] | None,
) -> QuantizedWeight:
    """Round the columns in `order_I`, the order of `u_II`; a block's errors reach the columns behind it in one product.

    `refit` finds a group's grid anew from its columns as they are when the first one's turn has come.
    """
    fmt, size = grid.format, w_OI.shape[1]
    group_size = fmt.group_of(size)
    group_I = order_I // group_size
    w_IO = w_OI.T[order_I].contiguous()
    scale_GO = _columns(grid.scale_OG, w_OI.dtype)
    second_GO = None if grid.second_OG is None else _columns(grid.second_OG, w_OI.dtype)

    span = group_size if refit else size
    for start in range(0, size, span):
        if refit:
            group = refit(w_IO[start : start + span].T)
            scale_GO[start // span] = group.scale_OG[:, 0]
            if second_GO is not None and group.second_OG is not None:
                second_GO[start // span] = group.second_OG[:, 0]
        for low in range(start, start + span, block_size):
            high = min(low + block_size, start + span)
            group_B = group_I[low:high]
            second_BO = None if second_GO is None else second_GO[group_B]
            e_BO = _round_block(w_IO[low:high], u_II[low:high, low:high], scale_GO[group_B], second_BO, fmt)
            w_IO[high:].addmm_(u_II[low:high, high:].T, e_BO, alpha=-1)

    q_OI = torch.empty_like(w_OI, dtype=fmt.dtype)
    q_OI[:, order_I] = fmt.encode(w_IO.T)
    scale_OG = scale_GO.T.to(grid.scale_OG.dtype).contiguous()
    second_OG = None
    if second_GO is not None and grid.second_OG is not None:
        second_OG = second_GO.T.to(grid.second_OG.dtype).contiguous()
    return QuantizedWeight(q_OI, scale_OG, second_OG, fmt)


def _columns(t_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """A transposed copy whose rows are contiguous."""
    return t_OG.T.to(dtype).clone(memory_format=torch.contiguous_format)


def _round_block(w_BO: Tensor, u_BB: Tensor, scale_BO: Tensor, second_BO: Tensor | None, fmt: Format) -> Tensor:
    """`round_block`, or its kernel."""
    if kernels_run_on(w_BO) and isinstance(fmt, IntFormat):
        from spinfold.kernels.gptq_block import MAX_BLOCK, gptq_block

        if len(w_BO) <= MAX_BLOCK:
            return gptq_block(w_BO, u_BB, scale_BO, second_BO, fmt.low, fmt.high)
    return round_block(w_BO, u_BB, scale_BO, second_BO, fmt)


def round_block(w_BO: Tensor, u_BB: Tensor, scale_BO: Tensor, second_BO: Tensor | None, fmt: Format) -> Tensor:
    """Overwrite the weights of one block with their elements, and return the errors e_i as `e_BO`."""
    e_BO = torch.empty_like(w_BO)
    for i, (w_O, e_O, scale_O) in enumerate(zip(w_BO, e_BO, scale_BO, strict=True)):
        grid = scale_O, None if second_BO is None else second_BO[i]
        q_O = fmt.nearest(w_O, *grid)
        torch.sub(w_O, fmt.values(q_O.clone(), *grid), out=e_O)
        e_O.div_(u_BB[i, i])
        w_BO[i + 1 :].addr_(u_BB[i, i + 1 :], e_O, alpha=-1)
        w_O.copy_(q_O)
    return e_BO
