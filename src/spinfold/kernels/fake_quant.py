"""Dynamic fake quantization of rows in one pass: `formats.activation` defines it, this gives the same bits.

Shapes: R rows of W numbers, one grid per row; a program holds a tile of whole rows.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinfold.kernels.groups import clip_argument, extremes, largest, tile, warps
from spinfold.kernels.rounding import round_even

__all__ = ["fake_quant", "fake_quant_gradient"]


@triton.jit
def _fake_quant(
    x_ptr, y_ptr, clip_ptr, clip, num_rows, width, q_low, q_high,
    LOAD_CLIP: tl.constexpr, SYMMETRIC: tl.constexpr, TILE_R: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    if LOAD_CLIP:
        clip = tl.load(clip_ptr)
    _, offset_RW, mask_RW = tile(num_rows, width, TILE_R, TILE_W)
    x_RW = tl.load(x_ptr + offset_RW, mask=mask_RW, other=0.0).to(tl.float32)

    if SYMMETRIC:
        span_R = largest(x_RW) * clip
        spoilt_R = span_R * 0.0
    else:
        low_R, high_R, spoilt_R = extremes(x_RW)
        low_R, high_R = tl.minimum(low_R, 0.0) * clip, tl.maximum(high_R, 0.0) * clip
        span_R = high_R - low_R
    scale_R = tl.div_rn(span_R, tl.zeros_like(span_R) + q_high)
    scale_R = tl.where(scale_R == 0.0, 1.0, scale_R) + spoilt_R

    q_RW = round_even(tl.div_rn(x_RW, tl.broadcast_to(scale_R[:, None], (TILE_R, TILE_W))))
    if SYMMETRIC:
        q_RW = tl.minimum(tl.maximum(q_RW, q_low), q_high)
    else:
        zero_R = tl.minimum(tl.maximum(round_even(tl.div_rn(-low_R, scale_R)), q_low), q_high)
        q_RW = tl.minimum(tl.maximum(q_RW + zero_R[:, None], q_low), q_high) - zero_R[:, None]
    y_RW = q_RW * scale_R[:, None]
    tl.store(y_ptr + offset_RW, y_RW.to(y_ptr.dtype.element_ty), mask=mask_RW)


def fake_quant(x: Tensor, clip: Tensor | float, width: int, q_low: int, q_high: int, symmetric: bool) -> Tensor:
    """Fake-quantize each run of `width` neighbours of `x` (fp32, bf16 or fp16; width divides the last axis).

    `clip` is a number, or one fp32 number on the device.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    num_rows = x.numel() // width
    if num_rows == 0:
        return y
    tile_w = triton.next_power_of_2(width)
    tile_r = max(1, 2048 // tile_w)
    # Fused multiply-add would round once where the definition rounds twice.
    _fake_quant[(triton.cdiv(num_rows, tile_r),)](
        x, y, num_rows=num_rows, width=width, q_low=float(q_low), q_high=float(q_high), SYMMETRIC=symmetric,
        TILE_R=tile_r, TILE_W=tile_w, num_warps=warps(tile_w), enable_fp_fusion=False, **clip_argument(clip, x),
    )  # fmt: skip
    return y


@triton.jit
def _gradient(
    x_ptr, g_ptr, d_ptr, by_clip_ptr, clip_ptr, clip, num_rows, width, q_low, q_high,
    LOAD_CLIP: tl.constexpr, SYMMETRIC: tl.constexpr, TILE_R: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    if LOAD_CLIP:
        clip = tl.load(clip_ptr)
    row_R, offset_RW, mask_RW = tile(num_rows, width, TILE_R, TILE_W)
    x_RW = tl.load(x_ptr + offset_RW, mask=mask_RW, other=0.0).to(tl.float32)
    g_RW = tl.load(g_ptr + offset_RW, mask=mask_RW, other=0.0).to(tl.float32)

    min_R, max_R = tl.min(x_RW, axis=1), tl.max(x_RW, axis=1)
    low_R, high_R = tl.minimum(min_R, 0.0) * clip, tl.maximum(max_R, 0.0) * clip
    span_R = tl.maximum(high_R, -low_R) if SYMMETRIC else high_R - low_R
    scale_R = span_R / q_high
    scale_R = tl.where(scale_R == 0.0, 1.0, scale_R)
    ratio_RW = x_RW / scale_R[:, None]
    q_RW = round_even(ratio_RW)
    if SYMMETRIC:
        above_RW, below_RW = q_RW > q_high, q_RW < q_low
    else:
        zero_R = tl.minimum(tl.maximum(round_even(-low_R / scale_R), q_low), q_high)
        above_RW, below_RW = q_RW + zero_R[:, None] > q_high, q_RW + zero_R[:, None] < q_low
    clipped_RW = above_RW | below_RW
    d_RW = tl.where(clipped_RW, 0.0, g_RW)
    # Inside, x^ = s round(x / s); at an end, x^ = s (end - z) with z straight through round(-low / s).
    by_scale_R = tl.sum(d_RW * (q_RW - ratio_RW), axis=1) / q_high
    above_R, below_R = tl.sum(tl.where(above_RW, g_RW, 0.0), axis=1), tl.sum(tl.where(below_RW, g_RW, 0.0), axis=1)
    if SYMMETRIC:
        by_span_R = by_scale_R + above_R + below_R * (q_low / q_high)
        upper_R = high_R >= -low_R
        by_high_R, by_low_R = tl.where(upper_R, by_span_R, 0.0), tl.where(upper_R, 0.0, -by_span_R)
    else:
        by_scale_R += above_R - (above_R + below_R) * (zero_R + low_R / scale_R) / q_high
        by_high_R, by_low_R = by_scale_R, above_R + below_R - by_scale_R
    is_max_RW = (x_RW == max_R[:, None]) & (max_R > 0.0)[:, None] & mask_RW
    is_min_RW = (x_RW == min_R[:, None]) & (min_R < 0.0)[:, None] & mask_RW
    d_RW += tl.where(
        is_max_RW, (clip * by_high_R / tl.maximum(tl.sum(is_max_RW.to(tl.float32), axis=1), 1.0))[:, None], 0.0
    )
    d_RW += tl.where(
        is_min_RW, (clip * by_low_R / tl.maximum(tl.sum(is_min_RW.to(tl.float32), axis=1), 1.0))[:, None], 0.0
    )
    tl.store(d_ptr + offset_RW, d_RW.to(d_ptr.dtype.element_ty), mask=mask_RW)
    by_clip_R = by_high_R * tl.maximum(max_R, 0.0) + by_low_R * tl.minimum(min_R, 0.0)
    tl.store(by_clip_ptr + row_R, by_clip_R, mask=row_R < num_rows)


def fake_quant_gradient(
    x: Tensor, grad: Tensor, clip: Tensor | float, width: int, q_low: int, q_high: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """The gradients with respect to `x` and `clip` of `fake_quant` with range-dependent scales, roundings
    straight-through.
    """
    x, grad = x.contiguous(), grad.contiguous()
    out = torch.empty_like(x)
    num_rows = x.numel() // width
    by_clip_R = torch.empty(num_rows, device=x.device)
    if num_rows == 0:
        return out, by_clip_R.sum()
    tile_w = triton.next_power_of_2(width)
    tile_r = max(1, 2048 // tile_w)
    _gradient[(triton.cdiv(num_rows, tile_r),)](
        x, grad, out, by_clip_R, num_rows=num_rows, width=width, q_low=float(q_low), q_high=float(q_high),
        SYMMETRIC=symmetric, TILE_R=tile_r, TILE_W=tile_w, num_warps=warps(tile_w), **clip_argument(clip, x),
    )  # fmt: skip
    return out, by_clip_R.sum()
