"""Dynamic fake quantization of activations and of the KV cache, with straight-through gradients.

Each token's row (or group of neighbours) gets its own grid from its own range (formulas: `integer.py`,
`microscaling.py`), and is put on it at once. Two gradients are offered:

    published (SpinQuant, arXiv 2405.16406)    dx̂/dx = 1: scale constant, identity through round and clamp
    scale_gradient=True                        round' = 1, everything else exact: clamp blocks clipped
                                               elements, and the grid is a function of min and max

Shapes: x (..., I) with groups (..., G, g); a KV format is the same thing with I = head size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spinfold.formats.base import Format, compute_dtype, extent
from spinfold.formats.integer import IntFormat
from spinfold.formats.microscaling import ELEMENTS, FloatFormat
from spinfold.kernels import kernels_run_on

__all__ = ["fake_quantize", "through_extremes"]


def fake_quantize(x: Tensor, fmt: Format, *, scale_gradient: bool = False, clip: Tensor | None = None) -> Tensor:
    """`x (..., I)` on the grid of each row or group along the last axis: same shape, same dtype.

    `clip`, one number as a tensor, stands in for the format's clip ratio; it gets a gradient if `scale_gradient` is on.
    Computed in fp32 (fp64 for fp64). NaN or infinity makes its whole group NaN (with an outer
    scale, all that shares it): it never turns into a number.
    Raises SpinfoldError if groups do not fit.
    """
    quantized: Tensor = (_RangeAware if scale_gradient else _StraightThrough).apply(x, clip, fmt)
    return quantized


def _ratio(clip: Tensor | None, x: Tensor, fmt: Format) -> Tensor:
    """The clip ratio as a tensor."""
    return torch.full((), fmt.clip, dtype=compute_dtype(x), device=x.device) if clip is None else clip


def _has_kernel(x: Tensor, fmt: Format) -> bool:
    return kernels_run_on(x) and fmt.group_of(x.shape[-1]) <= 2**15


class _StraightThrough(torch.autograd.Function):
    """Forward `_on_grid`, backward identity, so nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor | None, fmt: Format) -> Tensor:
        if not _has_kernel(x, fmt):
            return _on_grid(x, _ratio(clip, x, fmt), fmt)
        ratio, width = fmt.clip if clip is None else clip, fmt.group_of(x.shape[-1])
        if isinstance(fmt, IntFormat):
            from spinfold.kernels.fake_quant import fake_quant

            return fake_quant(x, ratio, width, fmt.low, fmt.high, fmt.symmetric)
        assert isinstance(fmt, FloatFormat)
        return _on_blocks(x, ratio, fmt)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


class _RangeAware(torch.autograd.Function):
    """Forward `_on_grid`, backward its range gradient, which recomputes what it needs from x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor | None, fmt: Format) -> Tensor:
        ctx.save_for_backward(x, clip)
        ctx.fmt = fmt
        return _StraightThrough.forward(ctx, x, clip, fmt)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (x, clip), fmt = ctx.saved_tensors, ctx.fmt
        by_x, by_clip = _gradient(x, grads[0], clip, fmt)
        return by_x, None if clip is None else by_clip, None


def _gradient(x: Tensor, grad: Tensor, clip: Tensor | None, fmt: Format) -> tuple[Tensor, Tensor]:
    """Those of `_on_grid` by x and clip."""
    if isinstance(fmt, FloatFormat):
        return _block_gradient(x, grad, _ratio(clip, x, fmt), fmt)
    assert isinstance(fmt, IntFormat)
    if not _has_kernel(x, fmt):
        return _range_gradient(x, grad, _ratio(clip, x, fmt), fmt)
    from spinfold.kernels.fake_quant import fake_quant_gradient

    ratio = fmt.clip if clip is None else clip
    return fake_quant_gradient(x, grad, ratio, fmt.group_of(x.shape[-1]), fmt.low, fmt.high, fmt.symmetric)


def _on_blocks(x: Tensor, clip: Tensor | float, fmt: FloatFormat) -> Tensor:
    """`_on_grid` by the kernel for floating-point formats."""
    from spinfold.kernels.fake_quant_float import fake_quant_float

    element, scale = (one.for_kernels for one in (fmt.elements, ELEMENTS.get(fmt.scale, fmt.elements)))
    width = fmt.group_of(x.shape[-1])
    return fake_quant_float(x, clip, width, fmt.scale, fmt.by_sign, fmt.outer, element, scale)


def _grid_of(x_Gg: Tensor, clip: Tensor, fmt: Format) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A row's extremes, and the grid on their clipped range."""
    low_G1, high_G1 = extent(x_Gg)
    ratio, whole_G1 = clip.to(x_Gg.dtype), fmt.whole_of(low_G1, high_G1)
    return low_G1, high_G1, *replace(fmt, clip=1.0).grid(ratio * low_G1, ratio * high_G1, whole=whole_G1)


def _on_grid(x: Tensor, clip: Tensor, fmt: Format) -> Tensor:
    """The definition of dynamic fake quantization; the Triton kernels give the same bits."""
    x_Gg = fmt.split(x.to(compute_dtype(x)))
    *_, scale_G1, second_G1 = _grid_of(x_Gg, clip, fmt)
    return fmt.values(fmt.nearest(x_Gg, scale_G1, second_G1), scale_G1, second_G1).flatten(-2).to(x.dtype)


def _block_gradient(x: Tensor, grad: Tensor, clip: Tensor, fmt: FloatFormat) -> tuple[Tensor, Tensor]:
    """The gradients of `_on_grid` by x and clip, all roundings straight-through, that of the scale too.

    With x^ = X RNE(x / X), an element inside has dx^ = dx + (q - x / X) dX; a saturated one has dx^ = q dX. A scale
    follows the largest number a of those that share it in proportion, dX = X da / a; NVFP4's scale of the scales
    cancels out of that.
    """
    x_Gg, g_Gg = fmt.split(x.to(compute_dtype(x))), fmt.split(grad.to(compute_dtype(x)))
    low_G1, high_G1, scale_G1, second_G1 = _grid_of(x_Gg, clip, fmt)
    step_Gg = fmt.step_of(x_Gg, scale_G1, second_G1)
    ratio_Gg = x_Gg / step_Gg.masked_fill(step_Gg == 0, torch.inf)
    q_Gg = fmt.elements.nearest(ratio_Gg)
    beyond_Gg = ratio_Gg.abs() > fmt.elements.largest
    slope_Gg = torch.where(beyond_Gg, q_Gg, q_Gg - ratio_Gg)
    d_Gg = g_Gg.masked_fill(beyond_Gg, 0)
    by_log_Gg = g_Gg * slope_Gg * step_Gg  # by log X
    if fmt.by_sign:
        below_Gg = x_Gg.signbit()
        by_log_high_G1 = by_log_Gg.masked_fill(below_Gg, 0).sum(-1, keepdim=True)
        by_log_low_G1 = by_log_Gg.masked_fill(~below_Gg, 0).sum(-1, keepdim=True)
    else:
        upper_G1, by_log_G1 = high_G1 >= -low_G1, by_log_Gg.sum(-1, keepdim=True)
        by_log_high_G1, by_log_low_G1 = by_log_G1 * upper_G1, by_log_G1 * ~upper_G1
    by_high_G1, by_low_G1 = (
        by_log_G1 / (clip * end_G1).masked_fill(end_G1 == 0, 1)
        for by_log_G1, end_G1 in ((by_log_high_G1, high_G1), (by_log_low_G1, low_G1))
    )
    return through_extremes(x, x_Gg, d_Gg, clip, (high_G1, by_high_G1), (low_G1, by_low_G1))


def through_extremes(
    x: Tensor, x_Gg: Tensor, d_Gg: Tensor, clip: Tensor, *ends: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Add to `d` what reaches each extreme, a pair of it and the gradient by clip times it; and the gradient by clip.

    Overwrites `d`. Ties share, as in torch's amax.
    """
    for extreme_G1, by_G1 in ends:
        there_Gg = torch.eq(x_Gg, extreme_G1, out=torch.empty_like(d_Gg))  # as numbers: a CPU takes eight times longer
        share_G1 = clip * by_G1 / there_Gg.sum(-1, keepdim=True).clamp(min=1)
        d_Gg.addcmul_(there_Gg, share_G1.masked_fill(extreme_G1 == 0, 0))
    by_clip = torch.stack([(extreme_G1 * by_G1).sum() for extreme_G1, by_G1 in ends]).sum()
    return d_Gg.flatten(-2).to(x.dtype), by_clip.to(clip.dtype)


def _range_gradient(x: Tensor, grad: Tensor, clip: Tensor, fmt: IntFormat) -> tuple[Tensor, Tensor]:
    """The gradients of `_on_grid` by x and clip, both roundings straight-through; the Triton kernel gives the same.

    With s = (high - low) / levels and z = -low / s (rounded) an element inside has x^ = s round(x / s), so
    dx^ = dx + (round(x / s) - x / s) ds; one beyond an end of the grid has x^ = s (end - z), so
    dx^ = (end - z - low / s) ds + dlow. A symmetric grid has s = max(high, -low) / levels and no z. `low` and `high`
    are clip times the row's extremes, so the clip ratio gets what they get, times the extremes.
    """
    x_Gg, g_Gg = fmt.split(x.to(compute_dtype(x))), fmt.split(grad.to(compute_dtype(x)))
    low_G1, high_G1, scale_G1, zero_G1 = _grid_of(x_Gg, clip, fmt)
    ratio_Gg = x_Gg / scale_G1
    q_Gg = ratio_Gg.round()
    zero = 0 if zero_G1 is None else zero_G1
    ends_Gg = (q_Gg + zero).clamp_(fmt.low, fmt.high) - zero
    slope_Gg = ends_Gg - ratio_Gg  # dx^ / ds inside
    d_Gg, rest_G1 = g_Gg, None
    beyond_Gg = ends_Gg != q_Gg
    if bool(beyond_Gg.any()):
        drift = 0 if zero_G1 is None else clip * low_G1 / scale_G1
        slope_Gg = torch.where(beyond_Gg, ends_Gg - drift, slope_Gg)
        d_Gg = g_Gg.masked_fill(beyond_Gg, 0)
        rest_G1 = (g_Gg - d_Gg).sum(-1, keepdim=True)
    by_scale_G1 = (g_Gg * slope_Gg).sum(-1, keepdim=True) / fmt.high
    if fmt.symmetric:
        upper_G1 = high_G1 >= -low_G1
        by_high_G1, by_low_G1 = by_scale_G1 * upper_G1, -by_scale_G1 * ~upper_G1
    else:
        by_high_G1, by_low_G1 = by_scale_G1, -by_scale_G1 if rest_G1 is None else rest_G1 - by_scale_G1
    d_Gg = d_Gg.clone() if d_Gg is g_Gg else d_Gg
    return through_extremes(x, x_Gg, d_Gg, clip, (high_G1, by_high_G1), (low_G1, by_low_G1))
