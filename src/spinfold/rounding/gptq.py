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
from spinfold.formats import ClipSearch, Grid, IntFormat, QuantizedWeight, fit_grid
from spinfold.formats.integer import compute_dtype, from_integers, nearest_integers
from spinfold.kernels import kernels_run_on
from spinfold.rounding.hessian import HessianAccumulator, inverse_factor

__all__ = ["GPTQReport", "HessianAccumulator", "gptq"]


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
    fmt: IntFormat,
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
    _check(w_OI, hessian_II, fmt, act_order, static_groups)
    w_OI = w_OI.to(compute_dtype(w_OI))
    h_II = hessian_II.to(w_OI.device, torch.float64)
    num_columns = w_OI.shape[1]

    dead_I = h_II.diagonal() == 0
    num_dead = int(dead_I.sum())
    if num_dead == num_columns:  # Nothing is known about the inputs: no reason to delete the weights.
        dead_I, num_dead = torch.zeros_like(dead_I), 0
    w_OI = w_OI.masked_fill(dead_I, 0)
    grid = fit_grid(w_OI, fmt, search=search, scale_dtype=scale_dtype)
    nearest_OI = grid.dequantize(grid.quantize(w_OI), w_OI.dtype)

    # A dead input is uncoupled, so its H_ii is free: with the mean of the others the damping stays as it is.
    diagonal_I = torch.where(dead_I, h_II.diagonal().sum() / (num_columns - num_dead), h_II.diagonal())
    order_I = torch.arange(num_columns, device=w_OI.device)
    if act_order:
        order_I = torch.argsort(diagonal_I, descending=True, stable=True)
    ordered_II = h_II[order_I][:, order_I]
    ordered_II.diagonal().copy_(diagonal_I[order_I])
    factor = inverse_factor(ordered_II, damp)

    refit = partial(fit_grid, fmt=replace(fmt, group_size=None), search=search, scale_dtype=scale_dtype)
    with precision("fp32", w_OI.device):
        u_II = factor.u_II.to(w_OI.dtype).contiguous()
        rounded = _round_columns(w_OI, u_II, grid, order_I, block_size, None if static_groups else refit)
        error_OI, nearest_error_OI = w_OI - rounded.dequantize(w_OI.dtype), w_OI - nearest_OI
        error, nearest_error, total = (_energy(x_OI, h_II) for x_OI in (error_OI, nearest_error_OI, w_OI))
    return rounded, GPTQReport(
        error=error / total if total else 0.0,
        nearest_error=nearest_error / total if total else 0.0,
        damping=factor.damping,
        diagonal=factor.diagonal,
        dead_columns=num_dead,
    )


def _check(w_OI: Tensor, hessian_II: Tensor, fmt: IntFormat, act_order: bool, static_groups: bool) -> None:
    size = w_OI.shape[1]
    if hessian_II.shape != (size, size):
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
    if act_order and not static_groups and fmt.group_of(size) < size:
        raise SpinfoldError(
            "GPTQ cannot refit the groups' grids in activation order.",
            "A group's columns are then not visited one after the other.",
            "Use static groups, or turn act_order off.",
        )


def _energy(x_OI: Tensor, h_II: Tensor) -> float:
    """tr(X H Xᵀ)."""
    return float(((x_OI @ h_II.to(x_OI.dtype)) * x_OI).sum(dtype=torch.float64))


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
    zero_GO = None if grid.zero_OG is None else _columns(grid.zero_OG, w_OI.dtype)

    span = group_size if refit else size
    for start in range(0, size, span):
        if refit:
            group = refit(w_IO[start : start + span].T)
            scale_GO[start // span] = group.scale_OG[:, 0]
            if zero_GO is not None and group.zero_OG is not None:
                zero_GO[start // span] = group.zero_OG[:, 0]
        for low in range(start, start + span, block_size):
            high = min(low + block_size, start + span)
            group_B = group_I[low:high]
            zero_BO = None if zero_GO is None else zero_GO[group_B]
            e_BO = _round_block(w_IO[low:high], u_II[low:high, low:high], scale_GO[group_B], zero_BO, fmt)
            w_IO[high:].addmm_(u_II[low:high, high:].T, e_BO, alpha=-1)

    q_OI = torch.empty_like(w_OI, dtype=fmt.dtype)
    q_OI[:, order_I] = w_IO.T.to(fmt.dtype)
    scale_OG = scale_GO.T.to(grid.scale_OG.dtype).contiguous()
    zero_OG = None if zero_GO is None else zero_GO.T.to(fmt.dtype).contiguous()
    return QuantizedWeight(q_OI, scale_OG, zero_OG, fmt)


def _columns(t_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """A transposed copy whose rows are contiguous."""
    return t_OG.T.to(dtype).clone(memory_format=torch.contiguous_format)


def _round_block(w_BO: Tensor, u_BB: Tensor, scale_BO: Tensor, zero_BO: Tensor | None, fmt: IntFormat) -> Tensor:
    """`round_block`, or its kernel."""
    if kernels_run_on(w_BO):
        from spinfold.kernels.gptq_block import MAX_BLOCK, gptq_block

        if len(w_BO) <= MAX_BLOCK:
            return gptq_block(w_BO, u_BB, scale_BO, zero_BO, fmt.low, fmt.high)
    return round_block(w_BO, u_BB, scale_BO, zero_BO, fmt)


def round_block(w_BO: Tensor, u_BB: Tensor, scale_BO: Tensor, zero_BO: Tensor | None, fmt: IntFormat) -> Tensor:
    """Overwrite the weights of one block with their integers, and return the errors e_i as `e_BO`."""
    e_BO = torch.empty_like(w_BO)
    for i, (w_O, e_O, scale_O) in enumerate(zip(w_BO, e_BO, scale_BO, strict=True)):
        zero_O = None if zero_BO is None else zero_BO[i]
        q_O = nearest_integers(w_O, scale_O, zero_O, fmt)
        torch.sub(w_O, from_integers(q_O.clone(), scale_O, zero_O), out=e_O)
        e_O.div_(u_BB[i, i])
        w_BO[i + 1 :].addr_(u_BB[i, i + 1 :], e_O, alpha=-1)
        w_O.copy_(q_O)
    return e_BO
