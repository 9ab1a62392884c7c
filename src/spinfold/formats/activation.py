"""Dynamic fake quantization of activations and of the KV cache, with straight-through gradients.

Each token's row (or group of neighbours) gets its own grid from its own range (formulas: `integer.py`),
and is put on it at once: x̂ = s (q - z). Two gradients are offered:

    published (SpinQuant, arXiv 2405.16406)    dx̂/dx = 1: scale constant, identity through round and clamp
    scale_gradient=True                        round' = 1, everything else exact: clamp blocks clipped
                                               elements, and s and z are functions of min and max

Shapes: x (..., I) with groups (..., G, g); a KV format is the same thing with I = head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spinfold.formats.integer import IntFormat, compute_dtype, extent, from_integers, nearest_integers, scale_and_zero
from spinfold.kernels import kernels_run_on

__all__ = ["fake_quantize"]


def fake_quantize(x: Tensor, fmt: IntFormat, *, scale_gradient: bool = False) -> Tensor:
    """`x (..., I)` on the grid of each row or group along the last axis: same shape, same dtype.

    Computed in fp32 (fp64 for fp64). NaN or infinity makes its whole group NaN: it never turns into a number.
    Raises SpinfoldError if groups do not fit.
    """
    if scale_gradient and not _has_kernel(x, fmt):
        return _differentiable(x, fmt)
    quantized: Tensor = (_RangeAware if scale_gradient else _StraightThrough).apply(x, fmt)
    return quantized


def _has_kernel(x: Tensor, fmt: IntFormat) -> bool:
    return kernels_run_on(x) and fmt.group_of(x.shape[-1]) <= 2**15


class _StraightThrough(torch.autograd.Function):
    """Forward `_on_grid`, backward identity, so nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fmt: IntFormat) -> Tensor:
        if _has_kernel(x, fmt):
            from spinfold.kernels.fake_quant import fake_quant

            return fake_quant(x, fmt.group_of(x.shape[-1]), fmt.low, fmt.high, fmt.clip, fmt.symmetric)
        return _on_grid(x, fmt)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _RangeAware(torch.autograd.Function):
    """`_differentiable` in one kernel forward and one backward, which recomputes instead of saving."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fmt: IntFormat) -> Tensor:
        ctx.save_for_backward(x)
        ctx.fmt = fmt
        return _StraightThrough.forward(ctx, x, fmt)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        from spinfold.kernels.fake_quant import fake_quant_gradient

        (x,), fmt = ctx.saved_tensors, ctx.fmt
        width = fmt.group_of(x.shape[-1])
        return fake_quant_gradient(x, grads[0], width, fmt.low, fmt.high, fmt.clip, fmt.symmetric), None


def _on_grid(x: Tensor, fmt: IntFormat) -> Tensor:
    """The definition of dynamic fake quantization; the Triton kernel gives the same bits."""
    x_Gg = fmt.split(x.to(compute_dtype(x)))
    scale_G1, zero_G1 = scale_and_zero(*extent(x_Gg), fmt)
    q_Gg = nearest_integers(x_Gg, scale_G1, zero_G1, fmt)
    return from_integers(q_Gg, scale_G1, zero_G1).flatten(-2).to(x.dtype)


class _Round(torch.autograd.Function):
    """Round half to even with derivative 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _round_straight_through(x: Tensor) -> Tensor:
    rounded: Tensor = _Round.apply(x)
    return rounded


def _differentiable(x: Tensor, fmt: IntFormat) -> Tensor:
    """`_on_grid` for autograd: the same bits, with only the two roundings straight-through."""
    x_Gg = fmt.split(x.to(compute_dtype(x)))
    scale_G1, zero_G1 = scale_and_zero(*extent(x_Gg), fmt, round_even=_round_straight_through)
    q_Gg = _round_straight_through(x_Gg / scale_G1)
    if zero_G1 is None:
        return (q_Gg.clamp(fmt.low, fmt.high) * scale_G1).flatten(-2).to(x.dtype)
    return (((q_Gg + zero_G1).clamp(fmt.low, fmt.high) - zero_G1) * scale_G1).flatten(-2).to(x.dtype)
