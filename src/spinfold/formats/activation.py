"""Dynamic fake quantization of activations and of the KV cache, with straight-through gradients.

Each token's row (or group of neighbours) gets its own grid from its own range (formulas: `integer.py`),
and is put on it at once: x̂ = s (q - z). Two gradients are offered:

    published (SpinQuant, arXiv 2405.16406)    dx̂/dx = 1: scale constant, identity through round and clamp
    scale_gradient=True                        round' = 1, everything else exact: clamp blocks clipped
                                               elements, and s and z are functions of min and max

Shapes: x (..., I) with groups (..., G, g); a KV format is the same thing with I = head size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spinfold.formats.integer import IntFormat, compute_dtype, extent, from_integers, nearest_integers, scale_and_zero
from spinfold.kernels import kernels_run_on

__all__ = ["fake_quantize"]


def fake_quantize(x: Tensor, fmt: IntFormat, *, scale_gradient: bool = False, clip: Tensor | None = None) -> Tensor:
    """`x (..., I)` on the grid of each row or group along the last axis: same shape, same dtype.

    `clip`, one number as a tensor, stands in for the format's clip ratio; it gets a gradient if `scale_gradient` is on.
    Computed in fp32 (fp64 for fp64). NaN or infinity makes its whole group NaN: it never turns into a number.
    Raises SpinfoldError if groups do not fit.
    """
    ratio = torch.full((), fmt.clip, dtype=compute_dtype(x), device=x.device) if clip is None else clip
    quantized: Tensor = (_RangeAware if scale_gradient else _StraightThrough).apply(x, ratio, fmt)
    return quantized


def _has_kernel(x: Tensor, fmt: IntFormat) -> bool:
    return kernels_run_on(x) and fmt.group_of(x.shape[-1]) <= 2**15


class _StraightThrough(torch.autograd.Function):
    """Forward `_on_grid`, backward identity, so nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, fmt: IntFormat) -> Tensor:
        if _has_kernel(x, fmt):
            from spinfold.kernels.fake_quant import fake_quant

            return fake_quant(x, clip, fmt.group_of(x.shape[-1]), fmt.low, fmt.high, fmt.symmetric)
        return _on_grid(x, clip, fmt)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


class _RangeAware(torch.autograd.Function):
    """Forward `_on_grid`, backward `_range_gradient`, which recomputes what it needs from x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, fmt: IntFormat) -> Tensor:
        ctx.save_for_backward(x, clip)
        ctx.fmt = fmt
        return _StraightThrough.forward(ctx, x, clip, fmt)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, clip), fmt = ctx.saved_tensors, ctx.fmt
        if _has_kernel(x, fmt):
            from spinfold.kernels.fake_quant import fake_quant_gradient

            width = fmt.group_of(x.shape[-1])
            return *fake_quant_gradient(x, grads[0], clip, width, fmt.low, fmt.high, fmt.symmetric), None
        return *_range_gradient(x, grads[0], clip, fmt), None


def _grid_of(x_Gg: Tensor, clip: Tensor, fmt: IntFormat) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A row's extremes, and scale and zero point of the grid on their clipped range."""
    low_G1, high_G1 = extent(x_Gg)
    ratio = clip.to(x_Gg.dtype)
    return low_G1, high_G1, *scale_and_zero(ratio * low_G1, ratio * high_G1, replace(fmt, clip=1.0))


def _on_grid(x: Tensor, clip: Tensor, fmt: IntFormat) -> Tensor:
    """The definition of dynamic fake quantization; the Triton kernel gives the same bits."""
    x_Gg = fmt.split(x.to(compute_dtype(x)))
    *_, scale_G1, zero_G1 = _grid_of(x_Gg, clip, fmt)
    q_Gg = nearest_integers(x_Gg, scale_G1, zero_G1, fmt)
    return from_integers(q_Gg, scale_G1, zero_G1).flatten(-2).to(x.dtype)


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
    for extreme_G1, by_G1 in ((high_G1, by_high_G1), (low_G1, by_low_G1)):  # ties share, as in torch's amax
        there_Gg = (x_Gg == extreme_G1) & (extreme_G1 != 0)
        d_Gg += there_Gg * (clip * by_G1 / there_Gg.sum(-1, keepdim=True).clamp(min=1))
    by_clip = (high_G1 * by_high_G1 + low_G1 * by_low_G1).sum()
    return d_Gg.flatten(-2).to(x.dtype), by_clip.to(clip.dtype)
