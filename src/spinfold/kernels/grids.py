"""What kernels that quantize have in common: a format in numbers, and a tile of numbers put on its grid.

`formats` defines all of it. The result may differ from it in a number near the middle between two elements, because
numbers are multiplied by the inverse of their scale.

Shapes: tiles (A, B), in groups (A, G, W) of W neighbours.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import math
import os
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from spinfold.kernels import Elements
from spinfold.kernels.fake_quant_float import block_scale
from spinfold.kernels.rounding import round_even

__all__ = [
    "Codes",
    "FloatGrid",
    "Grid",
    "IntGrid",
    "extremes",
    "float_grid",
    "in_hardware",
    "near_largest",
    "one",
    "outer_of",
    "over_all",
    "processors",
    "put_on_grid",
    "room_for",
    "shared_memory",
    "store",
    "to_cache",
]

_MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2^23
_EXPONENT = tl.constexpr(0x7F800000)
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# Four pairs of codes at once, of integers.
_INTEGER_PAIRS = tl.constexpr("""{
    .reg .b16 %a, %b;
    .reg .b32 %e, %o;
    cvt.rn.satfinite.e4m3x2.f32 %a, $2, $1;
    cvt.rn.satfinite.e4m3x2.f32 %b, $4, $3;
    mov.b32 %e, {%a, %b};
    cvt.rn.satfinite.e4m3x2.f32 %a, $6, $5;
    cvt.rn.satfinite.e4m3x2.f32 %b, $8, $7;
    mov.b32 %o, {%a, %b};
    shl.b32 %o, %o, 4;
    or.b32 $0, %e, %o; }""")


def _fp4_pairs() -> str:
    """The same of FP4 elements times 2^-14: then fp16's smallest normal number is theirs, and their codes are fp16's
    bits 9 to 11, rounded. Two numbers in a register share each step: 6 at most, half a step more, the code in the
    half's upper four bits with the sign; where lop3 … 0xCA takes bits of its second operand where the first, a mask,
    has them. A number cut off is still on its side of the middle between two elements; the middle goes to the larger.
    """
    pairs = (("$1", "$3"), ("$5", "$7"), ("$2", "$4"), ("$6", "$8"))  # numbers i and i + 4 of eight
    lines = ["{ .reg .b32 %p, %m, %c, %largest;", "mov.b32 %largest, 0x0E000E00;"]
    for index, (low, high) in enumerate(pairs):
        lines += [
            f"cvt.rz.f16x2.f32 %p, {high}, {low};",
            "abs.f16x2 %m, %p;",
            "min.f16x2 %m, %m, %largest;",
            "mad.lo.u32 %m, %m, 8, 0x08000800;",
            "lop3.b32 %m, %p, 0x80008000, %m, 0xEA;",
        ]
        lines += ["mov.b32 %c, %m;"] if index == 0 else ["shr.b32 %c, %c, 4;", "lop3.b32 %c, 0xF000F000, %m, %c, 0xCA;"]
    return "\n".join([*lines, "mov.b32 $0, %c; }"])


_FP4_PAIRS = tl.constexpr(_fp4_pairs())
# The elements themselves, times 2^-14.
_FP4_ELEMENTS = tl.constexpr("""{
    .reg .b16 %a, %b;
    .reg .b32 %p, %m, %largest;
    mov.b32 %largest, 0x0E000E00;
    cvt.rz.f16x2.f32 %p, $3, $2;
    abs.f16x2 %m, %p;
    min.f16x2 %m, %m, %largest;
    add.u32 %m, %m, 0x01000100;
    lop3.b32 %m, %largest, %m, %p, 0xCA;
    and.b32 %m, %m, 0x8E008E00;
    mov.b32 {%a, %b}, %m;
    cvt.f32.f16 $0, %a;
    cvt.f32.f16 $1, %b; }""")
# By one thread.
_FETCH = tl.constexpr("""{
    .reg .pred %p;
    .reg .b32 %t;
    mov.u32 %t, %tid.x;
    setp.eq.u32 %p, %t, 0;
    @%p cp.async.bulk.prefetch.L2.global [$1], $2;
    mov.u32 $0, 0; }""")
_LAST_BYTES = tl.constexpr("""{
    .reg .b32 %a, %b;
    prmt.b32 %a, $1, $2, 0x0040;
    prmt.b32 %b, $3, $4, 0x0040;
    prmt.b32 $0, %a, %b, 0x5410; }""")


class IntGrid(NamedTuple):
    """`formats.IntFormat` in numbers: a grid for each `width` neighbours, or for the row if that is 0."""

    bits: int
    width: int
    q_low: int
    q_high: int
    symmetric: bool
    floating: bool = False
    by_row: bool = False
    rule: str = "real"


class FloatGrid(NamedTuple):
    """`formats.FloatFormat` without `by_sign` in numbers; `by_row`: the scales have a scale, one for each row."""

    bits: int
    width: int
    rule: str
    by_row: bool
    mantissa_bits: int
    depth: int
    largest: float
    first: float
    behind: float
    even: float
    s_steps: float
    s_smallest: float
    s_largest: float
    floating: bool = True


def float_grid(width: int, rule: str, by_row: bool, bits: int, element: Elements, scale: Elements) -> FloatGrid:
    """The grid of a floating-point format; `scale` is the kind of number that scales by the rules e4m3 and e5m2 are."""
    last = 2.0 ** (math.frexp(element.largest)[1] - 1)
    return FloatGrid(
        bits, width, rule, by_row, element.mantissa_bits, -round(math.log2(element.smallest_normal)),
        element.largest, element.largest / last, 1 / last, 2 - 0.5 ** (element.mantissa_bits + 1),
        2.0**scale.mantissa_bits, scale.smallest_normal, scale.largest,
    )  # fmt: skip


Grid = IntGrid | FloatGrid


class Codes(NamedTuple):
    """Codes, two to a byte if they have four bits (the first in the low half), scales and second numbers as stored."""

    codes: Tensor
    scale: Tensor
    second: Tensor | None


@triton.jit
def near_largest(most):
    """The power of two that brings `most` near fp16's largest number; and its inverse."""
    exponent = tl.minimum((14 + 254) - ((most.to(tl.int32, bitcast=True) & _EXPONENT) >> 23), 253)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.constexpr_function
def in_hardware(major=8, minor=9):
    """Has the GPU this capability, and is the kernel compiled for it? The conversions are there since Ada, 8.9."""
    return not _INTERPRETED and cuda_capability_geq(major, minor)


@triton.constexpr_function
def _fetches_rows(num_bytes):
    return in_hardware(9, 0) and num_bytes % 16 == 0


@triton.jit
def to_cache(ptr, row, num_rows, STRIDE: tl.constexpr, N: tl.constexpr):
    """Have N numbers of a row, if there is one, brought to the L2 cache while the program does something else. Rows are
    STRIDE numbers apart, the first begins at a multiple of 16 bytes (`aligned`).
    """
    width: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    if _fetches_rows(N * width) and _fetches_rows(STRIDE * width):  # noqa: SIM102 (known when the kernel is compiled)
        if row < num_rows:
            tl.inline_asm_elementwise(
                _FETCH, "=r,l,r", [(ptr + row * STRIDE).to(tl.int64), tl.full((), N * width, tl.int32)],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip


# ── what the hardware has one instruction for, since Ada; and the same for older GPUs and the interpreter ──


@triton.jit
def _saturated(x, factor, offset):
    """x · factor + offset, no less than 0 and no more than 1."""
    if not in_hardware():
        y = tl.minimum(tl.maximum(x * factor + offset, 0.0), 1.0)
    else:
        y = tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [x, factor, offset], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def _last_bytes(x):
    """The last byte of each number, an int32."""
    if not in_hardware():
        y = x.to(tl.uint8)
    else:
        y = tl.inline_asm_elementwise(_LAST_BYTES, "=r,r,r,r,r", [x], dtype=tl.uint8, is_pure=True, pack=4)
    return y


@triton.jit
def _fp8_code(x, MANTISSA_BITS: tl.constexpr):
    """The codes of the FP8 numbers nearest to x, which saturate; ties to even, NaN stays NaN."""
    if not in_hardware():
        largest: tl.constexpr = 448.0 if MANTISSA_BITS == 3 else 57344.0
        bits = _nearest(x, MANTISSA_BITS, 6 if MANTISSA_BITS == 3 else 14, largest)
        code = (bits >> (23 - MANTISSA_BITS)) & 0x7F | (bits >> 24) & 0x80
        code = tl.where(x == x, code, 0x7F).to(tl.uint8)
    else:
        code = x.to(tl.float8e4nv if MANTISSA_BITS == 3 else tl.float8e5).to(tl.uint8, bitcast=True)
    return code


@triton.jit
def _fp8_number(code, MANTISSA_BITS: tl.constexpr):
    """The FP8 numbers that have these codes, none of them negative."""
    if not in_hardware():
        depth: tl.constexpr = 6 if MANTISSA_BITS == 3 else 14
        x = (code.to(tl.int32) << (23 - MANTISSA_BITS)).to(tl.float32, bitcast=True) * 2.0 ** (126 - depth)
        x = tl.where(code == 0x7F, float("nan"), x)
    else:
        x = code.to(tl.float8e4nv if MANTISSA_BITS == 3 else tl.float8e5, bitcast=True).to(tl.float32)
    return x


@triton.jit
def _two_integers_to_a_byte(first, second):
    """Bytes of two codes each, the first in the low half. A code is `first` or `second` · 2^9, rounded half to even,
    at most 15.

    Up to 16 · 2^-9, FP8 E4M3 numbers are as far apart as 2^-9, so their codes are the number of these steps.
    """
    if not in_hardware():
        codes = _fp8_code(first, 3) | _fp8_code(second, 3) << 4
    else:
        codes = tl.inline_asm_elementwise(
            _INTEGER_PAIRS, "=r,f,f,f,f,f,f,f,f", [first, second], dtype=tl.uint8, is_pure=True, pack=4
        )
    return codes


@triton.jit
def _two_fp4_to_a_byte(first, second):
    """Bytes of two codes each, the first in the low half: of the FP4 numbers nearest to `first` and `second` · 2^14."""
    if not in_hardware():
        low = _nearest(first * 2.0**14, 1, 0, 6.0)
        high = _nearest(second * 2.0**14, 1, 0, 6.0)
        codes = (low >> 22 & 7 | low >> 28 & 8 | (high >> 18 & 0x70 | high >> 24 & 0x80)).to(tl.uint8)
    else:
        codes = tl.inline_asm_elementwise(
            _FP4_PAIRS, "=r,f,f,f,f,f,f,f,f", [first, second], dtype=tl.uint8, is_pure=True, pack=4
        )
    return codes


@triton.jit
def _fp4_element(x):
    """The FP4 numbers nearest to x · 2^14, times 2^-14."""
    if not in_hardware():
        y = _nearest(x * 2.0**14, 1, 0, 6.0).to(tl.float32, bitcast=True) * 2.0**112
    else:
        y = tl.inline_asm_elementwise(_FP4_ELEMENTS, "=f,=f,f,f", [x], dtype=tl.float32, is_pure=True, pack=2)
    return y


# ── scales ─────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def extremes(z, unscale, grid: tl.constexpr, PIECE: tl.constexpr):
    """Smallest and largest number of each group of the lines of z, times `unscale`, one for each line; of each PIECE of
    a line if the grid is that of a row. The smallest is no more than 0, the largest no less; or both are as far from it
    as the largest absolute value where the grid wants no more.

    The largest bits are those of the largest positive number, or as unsigned numbers those of the smallest negative
    one; NaN is beyond all of them. Of integers, the hardware compares three at a time, and no sign has to be removed.
    """
    W: tl.constexpr = grid.width if grid.width else PIECE
    z_AGW = tl.reshape(z, (z.shape[0], z.shape[1] // W, W))
    high = tl.max(z_AGW.to(tl.int32, bitcast=True), axis=2).to(tl.float32, bitcast=True)
    low = tl.max(z_AGW.to(tl.uint32, bitcast=True), axis=2).to(tl.float32, bitcast=True)
    if grid.floating or grid.symmetric:
        high = tl.maximum(tl.abs(high), tl.abs(low), propagate_nan=tl.PropagateNan.ALL) * unscale[:, None]
        low = -high
    else:
        high = tl.where(high < 0.0, 0.0, high) * unscale[:, None]
        low = tl.where(low > 0.0, 0.0, low) * unscale[:, None]
    return low, high


@triton.jit
def _wider(low, high, other_low, other_high):
    return tl.minimum(low, other_low), tl.maximum(high, other_high)


@triton.jit
def over_all(ranges, grid: tl.constexpr):
    """Smallest and largest number of a row, from the `extremes` of all of its tiles. Those of one shape are compared
    number by number first: then warps meet once for all of them.
    """
    low, high = ranges[0]
    for i in tl.static_range(1, len(ranges)):
        if ranges[i][0].shape == ranges[0][0].shape:
            low, high = _wider(low, high, ranges[i][0], ranges[i][1])
    low, high = _over_tile((low, high), grid)
    for i in tl.static_range(1, len(ranges)):
        if ranges[i][0].shape != ranges[0][0].shape:
            low, high = _wider(low, high, *_over_tile(ranges[i], grid))
    return low, high


@triton.jit
def _over_tile(range, grid: tl.constexpr):
    if grid.floating or grid.symmetric:
        high = tl.max(tl.max(range[1], axis=1), axis=0)
        low = -high
    else:
        low, high = tl.reduce(tl.reduce(range, 1, _wider), 0, _wider)
    return low, high


@triton.jit
def outer_of(low, high, grid: tl.constexpr):
    """The scale of a row's scales, from its extremes."""
    most = tl.maximum(high, -low)
    outer = tl.div_rn(most * 0.0 + grid.s_largest * grid.largest, most)
    return tl.where(outer == float("inf"), 1.0, outer)


@triton.jit
def _divided(x, DIVISOR: tl.constexpr):
    """x / DIVISOR, rounded as a division is: the inverse, and one step of correction."""
    inverse: tl.constexpr = 1.0 / DIVISOR
    ratio = x * inverse
    return tl.fma(tl.fma(ratio, -DIVISOR, x), inverse, ratio)


@triton.jit
def _grid(low, high, outer, clip, grid: tl.constexpr):
    """Scale, step and second number of groups whose numbers lie between `low` and `high`, and the scale as it is
    stored: the exponent of a power of two, an FP8 number's code, else fp32.
    """
    # What isn't finite fills the whole row on its way through the map. min and max with 0 would drop NaN.
    spoilt = (high + low) * 0.0
    low = tl.minimum(low, 0.0) * clip
    high = tl.maximum(high, 0.0) * clip
    second = outer
    if grid.rule == "e4m3" or grid.rule == "e5m2":
        bits: tl.constexpr = 3 if grid.rule == "e4m3" else 2
        stored = _fp8_code(tl.maximum(high, -low) * (outer / grid.largest) + spoilt, bits)
        scale = _fp8_number(stored, bits)
    elif grid.rule != "real":
        scale = block_scale(
            tl.maximum(high, -low), 1.0, tl.constexpr(grid.rule), tl.constexpr(grid.first),
            tl.constexpr(grid.behind), tl.constexpr(grid.even), tl.constexpr(grid.largest),
            tl.constexpr(grid.s_steps), tl.constexpr(grid.s_smallest), tl.constexpr(grid.s_largest),
        )  # fmt: skip
        scale += spoilt
        stored = (scale.to(tl.int32, bitcast=True) >> 23 & 0xFF).to(tl.uint8)
    else:
        if grid.floating:
            scale = _divided(tl.maximum(high, -low), grid.largest)
        else:
            scale = _divided(tl.maximum(high, -low) if grid.symmetric else high - low, grid.q_high)
            scale = tl.where(scale == 0.0, 1.0, scale)
        scale += spoilt
        stored = scale
    step = scale
    if grid.by_row:
        step = scale * (1.0 / outer)
    # One division for a group, and not an exact one: a tie may fall the other way.
    per_step = 1.0 / tl.where(step == 0.0, float("inf"), step)
    if not grid.floating and not grid.symmetric:
        second = tl.minimum(tl.maximum(round_even(-low * per_step), grid.q_low), grid.q_high)
    return stored, step, per_step, second


# ── elements ───────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _nearest(x, MANTISSA_BITS: tl.constexpr, DEPTH: tl.constexpr, LARGEST: tl.constexpr):
    """The bits of the elements nearest to x, times a power of two: then their smallest normal number, 2^-DEPTH, is
    that of fp32, and cut behind the element's mantissa fp32's bits are the element's, subnormals included.
    """
    cut: tl.constexpr = 23 - MANTISSA_BITS
    bits = (tl.clamp(x, -LARGEST, LARGEST) * 2.0 ** (DEPTH - 126)).to(tl.int32, bitcast=True)
    return (bits + (((1 << (cut - 1)) - 1) + ((bits >> cut) & 1))) & -(1 << cut)


@triton.jit
def _numbers(z, per_step, step, second, grid: tl.constexpr):
    """The elements nearest to z · per_step, times `step`."""
    if grid.floating and grid.bits == 4:
        q = _fp4_element(z * (per_step * 2.0**-14)) * 2.0**14
    elif grid.floating:
        bits = _nearest(z * per_step, grid.mantissa_bits, grid.depth, grid.largest)
        q = bits.to(tl.float32, bitcast=True) * 2.0 ** (126 - grid.depth)
    else:
        span: tl.constexpr = grid.q_high - grid.q_low
        t = _share_of_span(z, per_step, second, grid)
        # A number plus 1.5 · 2^23 is rounded to an integer.
        if grid.symmetric:
            q = tl.fma(t, span, _MAGIC + grid.q_low) - _MAGIC
        else:
            q = tl.fma(t, span, _MAGIC + grid.q_low) - (second + _MAGIC)
    return q * step


@triton.jit
def _share_of_span(z, per_step, second, grid: tl.constexpr):
    """Where integers lie before they are rounded, between 0 for the lowest and 1 for the highest."""
    per_span: tl.constexpr = 1.0 / (grid.q_high - grid.q_low)
    if grid.symmetric:
        return _saturated(z, per_step * per_span, -grid.q_low * per_span)
    return _saturated(z, per_step * per_span, (second - grid.q_low) * per_span)


@triton.jit
def _codes(z, per_step, second, grid: tl.constexpr):
    """Bytes of codes of the elements nearest to z · per_step. z has neighbours on its last axis."""
    if grid.bits == 4:
        lead: tl.constexpr = z.shape[0] * z.shape[1]
        if grid.floating:
            x = z * (per_step * 2.0**-14)
        else:
            x = _share_of_span(z, per_step, second, grid) * ((grid.q_high - grid.q_low) * 2.0**-9)
        first, other = tl.split(tl.reshape(x, (lead, z.shape[2] // 2, 2)))
        code = _two_fp4_to_a_byte(first, other) if grid.floating else _two_integers_to_a_byte(first, other)
    elif grid.floating:
        code = _fp8_code(z * per_step, grid.mantissa_bits)
    else:
        share = _share_of_span(z, per_step, second, grid)
        total = tl.fma(share, grid.q_high - grid.q_low, _MAGIC + grid.q_low)
        code = _last_bytes(total.to(tl.int32, bitcast=True))
    return code


@triton.jit
def put_on_grid(
    z, unscale, low, high, outer, clip, y_ptr, codes_ptr, scale_ptr, second_ptr, start, count, row, first,
    COLUMN: tl.constexpr, B: tl.constexpr, grid: tl.constexpr, PACKED: tl.constexpr,
    STORES: tl.constexpr = 1,
):  # fmt: skip
    """Put the numbers of a tile, times `unscale` that each line has, on their grids and store them, or their codes.

    The tile is the `count` lines from `start` on of an array with B columns, from COLUMN on, and part of row `row`.
    `low` and `high` are the `extremes` of its groups, or those of the row, `outer` the scale of the row's scales. What
    there is one of for a row is stored if `first`. Numbers or codes are stored in `STORES` parts of the columns.
    """
    TILE_A: tl.constexpr = z.shape[0]
    TILE_B: tl.constexpr = z.shape[1]
    W: tl.constexpr = grid.width if grid.width else TILE_B
    z_AGW = tl.reshape(z, (TILE_A, TILE_B // W, W))
    stored, step, per_step, second = _grid(low, high, outer, clip, grid)
    zeros: tl.constexpr = not grid.floating and not grid.symmetric
    of_step, of_second = step, second
    if grid.width:
        of_step = step[:, :, None]
        per_step = (per_step * unscale[:, None])[:, :, None]
        if zeros:
            of_second = second[:, :, None]
    else:
        per_step = (per_step * unscale)[:, None, None]
    if PACKED:
        code = _codes(z_AGW, per_step, of_second, grid)
        bytes: tl.constexpr = 2 if grid.bits == 4 else 1
        code = tl.reshape(code, (TILE_A, TILE_B // bytes))
        store(codes_ptr, code, start, count, COLUMN // bytes, B // bytes, STORES)
        if grid.width:
            _store(scale_ptr, stored, start, count, COLUMN // W, B // W)
            if zeros:
                _store(second_ptr, second, start, count, COLUMN // W, B // W)
        elif first:
            tl.store(scale_ptr + row, stored)
            if zeros:
                tl.store(second_ptr + row, second.to(tl.uint8))
        if grid.by_row and first:
            tl.store(second_ptr + row, outer)
    else:
        q_AGW = _numbers(z_AGW, per_step, of_step, of_second, grid)
        store(y_ptr, tl.reshape(q_AGW, (TILE_A, TILE_B)), start, count, COLUMN, B, STORES)


@triton.jit
def store(ptr, x, start, count, COLUMN: tl.constexpr, B: tl.constexpr, STORES: tl.constexpr):
    """A tile as `count` lines from `start` on of an array with B columns, from COLUMN on; in several `STORES`, a
    power of two, if one would deal the columns out to other threads.
    """
    if STORES == 1:
        _store(ptr, x, start, count, COLUMN, B)
    else:
        HALF: tl.constexpr = x.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, HALF)), (0, 2, 1)))
        store(ptr, left, start, count, COLUMN, B, STORES // 2)
        store(ptr, right, start, count, COLUMN + HALF, B, STORES // 2)


@triton.jit
def _store(ptr, x, start, count, COLUMN: tl.constexpr, B: tl.constexpr):
    a_A1 = tl.arange(0, x.shape[0])[:, None]
    b_1B = COLUMN + tl.arange(0, x.shape[1])[None, :]
    if ptr.dtype.element_ty == tl.int8:
        x = x.to(tl.int8, bitcast=True)
    tl.store(ptr + start * B + a_A1 * B + b_1B, x.to(ptr.dtype.element_ty), mask=(a_A1 < count) & (b_1B < B))


def room_for(x: Tensor, grid: Grid | None, packed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for numbers like those of `x`, or for codes, scales and second numbers; `x` itself for what there is not."""
    if not packed:
        return torch.empty_like(x), x, x, x
    assert grid is not None
    return x, *_empty_codes(x, grid)


def _empty_codes(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    lead, size = x.shape[:-1], x.shape[-1]
    groups = (*lead, size // (grid.width or size))
    code_type = torch.int8 if isinstance(grid, IntGrid) and grid.symmetric and grid.bits == 8 else torch.uint8
    codes = x.new_empty((*lead, size // 2 if grid.bits == 4 else size), dtype=code_type)
    if isinstance(grid, FloatGrid):
        scale = x.new_empty(groups, dtype=torch.float32 if grid.rule == "real" else torch.uint8)
        return codes, scale, x.new_empty((*lead, 1), dtype=torch.float32) if grid.by_row else x
    return (
        codes,
        x.new_empty(groups, dtype=torch.float32),
        x if grid.symmetric else x.new_empty(groups, dtype=torch.uint8),
    )


def aligned(*tensors: Tensor) -> bool:
    """Do all begin at a multiple of 16 bytes?"""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


@cache
def one(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones((), device=device)


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program can have."""
    if device.type != "cuda":
        return 227 * 1024
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])
