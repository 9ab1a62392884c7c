"""Dynamic fake quantization of blocks of floating-point elements in one pass: `formats.microscaling` defines it, this
gives the same bits.

Shapes: N blocks of W numbers under one scale, or two by sign; a program holds a tile of whole blocks.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinfold.kernels.rounding import round_even

__all__ = ["Elements", "fake_quant_float"]

_EXPONENT = tl.constexpr(0x7F800000)
_SQUARE = tl.constexpr(254 << 23)
"""The bits of 2^e and those of 2^-e add up to this."""


class Elements(NamedTuple):
    """A kind of floating-point number: the bits of its mantissa, 2^(1 - bias), and the largest number."""

    mantissa_bits: int
    smallest_normal: float
    largest: float


@triton.jit
def _power_below(x):
    """2^floor(log2 |x|); 0 below the normal numbers."""
    return (x.to(tl.int32, bitcast=True) & _EXPONENT).to(tl.float32, bitcast=True)


@triton.jit
def _nearest(x, STEPS: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr):
    """The nearest element of a kind with `STEPS` = 2^mantissa_bits steps per power of two, saturating."""
    x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    power = tl.maximum(_power_below(x), SMALLEST)
    inverse = (-power.to(tl.int32, bitcast=True) + _SQUARE).to(tl.float32, bitcast=True)
    return round_even(x * inverse * STEPS) * (power / STEPS)


@triton.jit
def _scale(
    most, outer, RULE: tl.constexpr, FIRST: tl.constexpr, BEHIND: tl.constexpr, EVEN: tl.constexpr,
    LARGEST: tl.constexpr, S_STEPS: tl.constexpr, S_SMALLEST: tl.constexpr, S_LARGEST: tl.constexpr,
):  # fmt: skip
    """`FloatFormat._scale`. BEHIND = 2^-emax, FIRST = largest / 2^emax, EVEN = the mantissa that rounds up to 2."""
    if RULE == "floor" or RULE == "even" or RULE == "ceil":
        power = _power_below(most)
        mantissa = tl.div_rn(most, tl.where(power == 0.0, 1.0, power))
        if RULE == "even":
            power = tl.where(mantissa >= EVEN, 2.0 * power, power)
        elif RULE == "ceil":
            power = tl.where(mantissa > FIRST, 2.0 * power, power)
        return tl.minimum(tl.maximum(power * BEHIND, 2.0**-127), 2.0**127)
    scale = tl.div_rn(most, tl.zeros_like(most) + LARGEST)
    if RULE == "real":
        return scale
    return _nearest(outer * scale, S_STEPS, S_SMALLEST, S_LARGEST)


@triton.jit
def _fake_quant_float(
    x_ptr, y_ptr, clip_ptr, whole_ptr, num_blocks, width, blocks_per_row,
    RULE: tl.constexpr, BY_SIGN: tl.constexpr, OUTER: tl.constexpr,
    STEPS: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr,
    FIRST: tl.constexpr, BEHIND: tl.constexpr, EVEN: tl.constexpr,
    S_STEPS: tl.constexpr, S_SMALLEST: tl.constexpr, S_LARGEST: tl.constexpr,
    TILE_N: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    clip = tl.load(clip_ptr)
    block_N = tl.program_id(0).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    col_W = tl.arange(0, TILE_W)
    offset_NW = block_N[:, None] * width + col_W[None, :]
    mask_NW = (block_N < num_blocks)[:, None] & (col_W < width)[None, :]
    x_NW = tl.load(x_ptr + offset_NW, mask=mask_NW, other=0.0).to(tl.float32)

    low_N = tl.minimum(tl.min(x_NW, axis=1), 0.0) * clip
    high_N = tl.maximum(tl.max(x_NW, axis=1), 0.0) * clip
    # min and max skip NaN here, unlike torch's: 0·x is 0, or NaN if x is NaN or infinite, and spoils the block.
    spoilt_N = tl.abs(tl.sum(x_NW * 0.0, axis=1))
    outer_N = tl.zeros_like(high_N) + 1.0
    if OUTER:
        whole_N = tl.load(whole_ptr + block_N // blocks_per_row, mask=block_N < num_blocks, other=1.0)
        outer_N = tl.div_rn(outer_N * (S_LARGEST * LARGEST), whole_N)
        outer_N = tl.where(outer_N == float("inf"), 1.0, outer_N)
        spoilt_N += whole_N * 0.0
    if BY_SIGN:
        above_N = _scale(high_N, outer_N, RULE, FIRST, BEHIND, EVEN, LARGEST, S_STEPS, S_SMALLEST, S_LARGEST)
        below_N = _scale(-low_N, outer_N, RULE, FIRST, BEHIND, EVEN, LARGEST, S_STEPS, S_SMALLEST, S_LARGEST)
        negative_NW = x_NW.to(tl.int32, bitcast=True) < 0
        step_NW = tl.where(negative_NW, (below_N + spoilt_N)[:, None], (above_N + spoilt_N)[:, None])
    else:
        most_N = tl.maximum(high_N, -low_N)
        step_N = _scale(most_N, outer_N, RULE, FIRST, BEHIND, EVEN, LARGEST, S_STEPS, S_SMALLEST, S_LARGEST)
        step_N += spoilt_N
        if OUTER:
            step_N = tl.div_rn(step_N, outer_N)
        step_NW = tl.broadcast_to(step_N[:, None], (TILE_N, TILE_W))
    ratio_NW = tl.div_rn(x_NW, tl.where(step_NW == 0.0, float("inf"), step_NW))
    y_NW = _nearest(ratio_NW, STEPS, SMALLEST, LARGEST) * step_NW
    tl.store(y_ptr + offset_NW, y_NW.to(y_ptr.dtype.element_ty), mask=mask_NW)


def fake_quant_float(
    x: Tensor,
    clip: Tensor,
    whole: Tensor | None,
    width: int,
    rule: str,
    by_sign: bool,
    element: Elements,
    scale: Elements,
) -> Tensor:
    """Fake-quantize each block of `width` neighbours of `x` (fp32, bf16 or fp16; width divides the last axis).

    `clip` is one fp32 number on the device. `whole`, fp32 and one for each row of `x`, is the largest |x| of what has
    an outer scale in common. `scale` is the kind of number that scales by the rules e4m3 and e5m2 are; it
    plays no part in the others.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    num_blocks = x.numel() // width
    if num_blocks == 0:
        return y
    tile_w = triton.next_power_of_2(width)
    tile_n = max(1, 2048 // tile_w)
    last = 2.0 ** (math.frexp(element.largest)[1] - 1)
    # Fused multiply-add would round once where the definition rounds twice.
    _fake_quant_float[(triton.cdiv(num_blocks, tile_n),)](
        x, y, clip, x if whole is None else whole.contiguous(), num_blocks, width, x.shape[-1] // width,
        RULE=rule, BY_SIGN=by_sign, OUTER=whole is not None,
        STEPS=2.0**element.mantissa_bits, SMALLEST=element.smallest_normal, LARGEST=element.largest,
        FIRST=element.largest / last, BEHIND=1 / last, EVEN=2 - 0.5 ** (element.mantissa_bits + 1),
        S_STEPS=2.0**scale.mantissa_bits, S_SMALLEST=scale.smallest_normal, S_LARGEST=scale.largest,
        TILE_N=tile_n, TILE_W=tile_w, num_warps=min(16, max(4, tile_w // 1024)), enable_fp_fusion=False,
    )  # fmt: skip
    return y
