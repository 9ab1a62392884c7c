"""Dynamic fake quantization of blocks of floating-point elements in one pass: `formats.microscaling` defines it, this
gives the same bits.

Shapes: N blocks of W numbers under one scale, or two by sign; a program holds a tile of whole blocks.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinfold.kernels import Elements
from spinfold.kernels.groups import MOST_NUMBERS, clip_argument, extremes, largest, tile, warps
from spinfold.kernels.rounding import nearest_element, power_below

__all__ = ["block_scale", "fake_quant_float"]


@triton.jit
def block_scale(
    most, outer, RULE: tl.constexpr, FIRST: tl.constexpr, BEHIND: tl.constexpr, EVEN: tl.constexpr,
    LARGEST: tl.constexpr, S_STEPS: tl.constexpr, S_SMALLEST: tl.constexpr, S_LARGEST: tl.constexpr,
):  # fmt: skip
    """`FloatFormat._scale`. BEHIND = 2^-emax, FIRST = largest / 2^emax, EVEN = the mantissa that rounds up to 2."""
    if RULE == "floor" or RULE == "even" or RULE == "ceil":
        power = power_below(most)
        mantissa = tl.div_rn(most, tl.where(power == 0.0, 1.0, power))
        if RULE == "even":
            power = tl.where(mantissa >= EVEN, 2.0 * power, power)
        elif RULE == "ceil":
            power = tl.where(mantissa > FIRST, 2.0 * power, power)
        # 2^-127 by its bits: as a number, too small for a normal one, it would be an fp64 constant.
        least = (tl.zeros_like(power).to(tl.int32, bitcast=True) + (1 << 22)).to(tl.float32, bitcast=True)
        scale = tl.minimum(tl.maximum(power * BEHIND, least), 2.0**127)
    else:
        scale = tl.div_rn(most, tl.zeros_like(most) + LARGEST)
        if RULE != "real":
            scale = nearest_element(outer * scale, S_STEPS, S_SMALLEST, S_LARGEST)
    return scale


@triton.jit
def _fake_quant_float(
    x_ptr, y_ptr, clip_ptr, whole_ptr, clip, num_blocks, width, blocks_per_row,
    LOAD_CLIP: tl.constexpr, RULE: tl.constexpr, BY_SIGN: tl.constexpr, OUTER: tl.constexpr,
    STEPS: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr,
    FIRST: tl.constexpr, BEHIND: tl.constexpr, EVEN: tl.constexpr,
    S_STEPS: tl.constexpr, S_SMALLEST: tl.constexpr, S_LARGEST: tl.constexpr,
    TILE_N: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    if LOAD_CLIP:
        clip = tl.load(clip_ptr)
    if OUTER == "row":  # a program has the blocks of one row
        col_W, block_N = tl.arange(0, TILE_W), tl.arange(0, TILE_N)
        row_offset = tl.program_id(0).to(tl.int64) * blocks_per_row * width
        offset_NW = row_offset + block_N[:, None] * width + col_W[None, :]
        mask_NW = (block_N < blocks_per_row)[:, None] & (col_W < width)[None, :]
    else:
        block_N, offset_NW, mask_NW = tile(num_blocks, width, TILE_N, TILE_W)
    x_NW = tl.load(x_ptr + offset_NW, mask=mask_NW, other=0.0).to(tl.float32)

    if BY_SIGN:
        low_N, high_N, spoilt_N = extremes(x_NW)
        low_N, high_N = tl.minimum(low_N, 0.0) * clip, tl.maximum(high_N, 0.0) * clip
        one_N = tl.zeros_like(high_N) + 1.0
        above_N = block_scale(high_N, one_N, RULE, FIRST, BEHIND, EVEN, LARGEST, S_STEPS, S_SMALLEST, S_LARGEST)
        below_N = block_scale(-low_N, one_N, RULE, FIRST, BEHIND, EVEN, LARGEST, S_STEPS, S_SMALLEST, S_LARGEST)
        negative_NW = x_NW.to(tl.int32, bitcast=True) < 0
        step_NW = tl.where(negative_NW, (below_N + spoilt_N)[:, None], (above_N + spoilt_N)[:, None])
        ratio_NW = tl.div_rn(x_NW, tl.where(step_NW == 0.0, float("inf"), step_NW))
    else:
        most_N = largest(x_NW)
        spoilt_N = most_N * 0.0
        outer_N = tl.zeros_like(most_N) + 1.0
        if OUTER != "none":
            if OUTER == "row":
                whole_N = tl.max(most_N.to(tl.int32, bitcast=True), axis=0).to(tl.float32, bitcast=True) * outer_N
            else:
                whole_N = tl.load(whole_ptr + block_N // blocks_per_row, mask=block_N < num_blocks, other=1.0)
            outer_N = tl.div_rn(outer_N * (S_LARGEST * LARGEST), whole_N)
            outer_N = tl.where(outer_N == float("inf"), 1.0, outer_N)
            spoilt_N += whole_N * 0.0
        step_N = block_scale(most_N * clip, outer_N, RULE, FIRST, BEHIND, EVEN, LARGEST, S_STEPS, S_SMALLEST, S_LARGEST)
        step_N += spoilt_N
        if OUTER != "none":
            step_N = tl.div_rn(step_N, outer_N)
        step_NW = tl.broadcast_to(step_N[:, None], (TILE_N, TILE_W))
        if RULE == "floor" or RULE == "even" or RULE == "ceil":  # powers of two, whose reciprocals are exact
            ratio_NW = x_NW * tl.div_rn(tl.zeros_like(step_N) + 1.0, step_N)[:, None]
        else:
            ratio_NW = tl.div_rn(x_NW, tl.where(step_NW == 0.0, float("inf"), step_NW))
    y_NW = nearest_element(ratio_NW, STEPS, SMALLEST, LARGEST) * step_NW
    tl.store(y_ptr + offset_NW, y_NW.to(y_ptr.dtype.element_ty), mask=mask_NW)


def fake_quant_float(
    x: Tensor,
    clip: Tensor | float,
    width: int,
    rule: str,
    by_sign: bool,
    outer: str | None,
    element: Elements,
    scale: Elements,
) -> Tensor:
    """Fake-quantize each block of `width` neighbours of `x` (fp32, bf16 or fp16; width divides the last axis).

    `clip` is a number, or one fp32 number on the device. `outer`: the scales of a "row", or of the whole "tensor", have
    a scale in common. `scale` is the kind of number that scales by the rules e4m3 and e5m2 are; it plays no part in the
    others.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    num_blocks, per_row = x.numel() // width, x.shape[-1] // width
    tile_w = triton.next_power_of_2(width)
    tile_n, whole = max(1, 2048 // tile_w), x
    programs = triton.cdiv(num_blocks, tile_n)
    if outer == "row" and (row_tile := triton.next_power_of_2(per_row)) * tile_w <= MOST_NUMBERS:
        tile_n, programs = row_tile, num_blocks // per_row
    elif outer:
        low, high = torch.aminmax(x, dim=-1) if outer == "row" else torch.aminmax(x)
        whole = torch.maximum(high, -low).float().expand(x.shape[:-1]).contiguous()
        outer = "given"
    last = 2.0 ** (math.frexp(element.largest)[1] - 1)
    # Fused multiply-add would round once where the definition rounds twice.
    _fake_quant_float[(programs,)](
        x, y, whole_ptr=whole, num_blocks=num_blocks, width=width, blocks_per_row=per_row,
        RULE=rule, BY_SIGN=by_sign, OUTER=outer or "none",
        STEPS=2.0**element.mantissa_bits, SMALLEST=element.smallest_normal, LARGEST=element.largest,
        FIRST=element.largest / last, BEHIND=1 / last, EVEN=2 - 0.5 ** (element.mantissa_bits + 1),
        S_STEPS=2.0**scale.mantissa_bits, S_SMALLEST=scale.smallest_normal, S_LARGEST=scale.largest,
        TILE_N=tile_n, TILE_W=tile_w, num_warps=warps(tile_n * tile_w), enable_fp_fusion=False,
        **clip_argument(clip, x),
    )  # fmt: skip
    return y
