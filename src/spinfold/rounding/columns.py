"""Columns rounded one after the other, each on what the errors before it have made of it.

    w_i → ŵ_i, its nearest element      w_j ← w_j - U_ij e_i   for all j > i

    GPTQ      e_i = (w_i - ŵ_i) / U_ii
    others    e_i = ŵ_i - base_i, what the column is away from where it stood

A block's columns are rounded by a kernel where there is one; its errors reach the columns behind it in one product.
On a CPU GPTQ rounds integers of whole rows in units of their steps (`_round_in_steps`).

Shapes: O out features, I in features (in processing order), B the columns of a block, G groups.
        Weights are transposed (w_IO), so that a column is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spinfold.formats import FloatFormat, Format, Grid, IntFormat, QuantizedWeight
from spinfold.kernels import kernels_run_on

__all__ = ["round_block", "round_columns"]

_COLUMNS_AT_ONCE = 16


def round_columns(
    w_OI: Tensor,
    u_II: Tensor,
    grid: Grid,
    *,
    base_OI: Tensor | None = None,
    order_I: Tensor | None = None,
    block_size: int = 128,
    refit: Callable[[Tensor, int], Grid] | None = None,
) -> QuantizedWeight:
    """Round the columns in `order_I`, the order of `u_II` (None: as they stand).

    `refit(w_Og, group)` finds a group's grid anew from its columns as they are when the first one's turn has come; then
    the order has each group's columns together. `base_OI` are those that errors count from; without it they are GPTQ's.
    """
    fmt, size = grid.format, w_OI.shape[1]
    group_size = fmt.group_of(size)
    order_I = torch.arange(size, device=w_OI.device) if order_I is None else order_I
    group_I = order_I // group_size
    u_II, w_IO = u_II.contiguous(), _ordered(w_OI, order_I)
    base_IO = None if base_OI is None else _ordered(base_OI, order_I)
    scale_GO = _columns(grid.scale_OG, w_OI.dtype)
    second_GO = None if grid.second_OG is None else _columns(grid.second_OG, w_OI.dtype)
    plain = len(scale_GO) == 1 and refit is None and base_OI is None and not kernels_run_on(w_OI)
    if in_steps := plain and isinstance(fmt, IntFormat):
        w_IO.div_(scale_GO).add_(0 if second_GO is None else second_GO)
        u_II = u_II / u_II.diagonal()[:, None]

    span = group_size if refit else size
    for start in range(0, size, span):
        if refit:
            index = int(group_I[start])
            group = refit(w_IO[start : start + span].T, index)
            scale_GO[index] = group.scale_OG[:, 0]
            if second_GO is not None and group.second_OG is not None:
                second_GO[index] = group.second_OG[:, 0]
        for low in range(start, start + span, block_size):
            high = min(low + block_size, start + span)
            group_B = group_I[low:high]
            second_BO = None if second_GO is None else second_GO[group_B]
            base_BO = None if base_IO is None else base_IO[low:high]
            block_BB = u_II[low:high, low:high]
            scale_BO = None if in_steps else scale_GO[group_B]
            e_BO = _round_block(w_IO[low:high], block_BB, scale_BO, second_BO, fmt, base_BO)
            w_IO[high:].addmm_(u_II[low:high, high:].T, e_BO, alpha=-1)

    q_OI = fmt.encode(w_IO).index_select(0, order_I.argsort()).T.contiguous()
    scale_OG = scale_GO.T.to(grid.scale_OG.dtype).contiguous()
    second_OG = None
    if second_GO is not None and grid.second_OG is not None:
        second_OG = second_GO.T.to(grid.second_OG.dtype).contiguous()
    return QuantizedWeight(q_OI, scale_OG, second_OG, fmt)


def _ordered(w_OI: Tensor, order_I: Tensor) -> Tensor:
    """A transposed copy in the order of processing."""
    return w_OI.T.contiguous().index_select(0, order_I)


def _columns(t_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """A transposed copy whose rows are contiguous."""
    return t_OG.T.to(dtype).clone(memory_format=torch.contiguous_format)


def round_block(
    w_BO: Tensor,
    u_BB: Tensor,
    scale_BO: Tensor,
    second_BO: Tensor | None,
    fmt: Format,
    base_BO: Tensor | None = None,
) -> Tensor:
    """Overwrite the weights of one block with their elements, and return the errors e_i as `e_BO`."""
    e_BO = torch.empty_like(w_BO)
    for i, (w_O, e_O, scale_O) in enumerate(zip(w_BO, e_BO, scale_BO, strict=True)):
        grid = scale_O, None if second_BO is None else second_BO[i]
        q_O = fmt.nearest(w_O, *grid)
        rounded_O = fmt.values(q_O.clone(), *grid)
        if base_BO is None:
            torch.sub(w_O, rounded_O, out=e_O)
            e_O.div_(u_BB[i, i])
        else:
            torch.sub(rounded_O, base_BO[i], out=e_O)
        w_BO[i + 1 :].addr_(u_BB[i, i + 1 :], e_O, alpha=-1)
        w_O.copy_(q_O)
    return e_BO


def _round_in_steps(w_BO: Tensor, u_BB: Tensor, fmt: IntFormat) -> Tensor:
    """`round_block` for integers, with weights and errors in steps of the grid (and from its zero), and U_ii = 1.

    Then w_i - U_ii e_i is ŵ_i itself, without an error: one product of a row of U and e_i rounds the column and tells
    those behind it. Columns are short: what counts is how few operations each one takes.
    """
    e_BO, q_O = torch.empty_like(w_BO), torch.empty_like(w_BO[0])
    for w_O, e_O, u_B in zip(w_BO.unbind(), e_BO.unbind(), u_BB.unbind(), strict=True):
        torch.sub(w_O, torch.round(w_O, out=q_O).clamp_(fmt.low, fmt.high), out=e_O)
        w_BO.addr_(u_B, e_O, alpha=-1)
    return e_BO


def _round_block(
    w_BO: Tensor,
    u_BB: Tensor,
    scale_BO: Tensor | None,
    second_BO: Tensor | None,
    fmt: Format,
    base_BO: Tensor | None,
) -> Tensor:
    """`round_block`, by its kernel where that runs, or, without scales, `_round_in_steps`."""
    if scale_BO is not None and kernels_run_on(w_BO):
        from spinfold.kernels.gptq_block import MAX_BLOCK

        if len(w_BO) <= MAX_BLOCK:
            return round_block_by_kernel(w_BO, u_BB, scale_BO, second_BO, fmt, base_BO)
    parts = []
    for low in range(0, len(w_BO), _COLUMNS_AT_ONCE):  # the fewer, the less a column's error has to be added to
        at = slice(low, low + _COLUMNS_AT_ONCE)
        if scale_BO is None:
            assert isinstance(fmt, IntFormat)
            parts.append(_round_in_steps(w_BO[at], u_BB[at, at], fmt))
        else:
            second, base = (None if t_BO is None else t_BO[at] for t_BO in (second_BO, base_BO))
            parts.append(round_block(w_BO[at], u_BB[at, at], scale_BO[at], second, fmt, base))
        w_BO[at.stop :].addmm_(u_BB[at, at.stop :].T, parts[-1], alpha=-1)
    return torch.cat(parts)


def round_block_by_kernel(
    w_BO: Tensor, u_BB: Tensor, scale_BO: Tensor, second_BO: Tensor | None, fmt: Format, base_BO: Tensor | None = None
) -> Tensor:
    """`round_block` on a GPU, for at most `MAX_BLOCK` columns in fp32."""
    from spinfold.kernels.gptq_block import gptq_block

    if isinstance(fmt, IntFormat):
        return gptq_block(w_BO, u_BB, scale_BO, second_BO, (fmt.low, fmt.high), base_BO)
    assert isinstance(fmt, FloatFormat)
    if fmt.outer and second_BO is not None:
        scale_BO, second_BO = scale_BO / second_BO, None
    return gptq_block(w_BO, u_BB, scale_BO, second_BO, fmt.elements.for_kernels, base_BO)
