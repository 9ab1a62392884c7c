"""What kernels that quantize have in common: a format in numbers, and a tile of numbers put on its grid.

`formats` defines all of it. The result may differ from it in a number near the middle between two elements, because
numbers are multiplied by the inverse of their scale.

Shapes: tiles (A, B), in groups (A, G, W) of W neighbours.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinfold.kernels import Elements
from spinfold.kernels.fake_quant_float import block_scale
from spinfold.kernels.rounding import nearest_element, round_even

__all__ = [
    "Codes",
    "FloatGrid",
    "Grid",
    "IntGrid",
    "float_grid",
    "near_largest",
    "one",
    "outer_of",
    "processors",
    "put_on_grid",
    "room_for",
    "row_extent",
    "shared_memory",
]

_MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2^23
_MAGIC_BITS = tl.constexpr(0x4B400000)
_EXPONENT = tl.constexpr(0x7F800000)


class IntGrid(NamedTuple):
    """`formats.IntFormat` in numbers: a grid for each `width` neighbours, or for the row if that is 0."""

    bits: int
    width: int
    q_low: int
    q_high: int
    symmetric: bool
    floating: bool = False
    by_row: bool = False


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


@triton.jit
def _grid(low, high, outer, clip, grid: tl.constexpr):
    """Scale and second number of groups whose numbers lie between `low` and `high`."""
    # What isn't finite fills the whole row on its way through the map. min and max with 0 would drop NaN.
    spoilt = (high + low) * 0.0
    low = tl.minimum(low, 0.0) * clip
    high = tl.maximum(high, 0.0) * clip
    if grid.by_row:
        scale = nearest_element(
            tl.maximum(high, -low) * (outer / grid.largest),
            tl.constexpr(grid.s_steps), tl.constexpr(grid.s_smallest), tl.constexpr(grid.s_largest),
        )  # fmt: skip
        second = outer
    elif grid.floating:
        scale = block_scale(
            tl.maximum(high, -low), 1.0, tl.constexpr(grid.rule), tl.constexpr(grid.first),
            tl.constexpr(grid.behind), tl.constexpr(grid.even), tl.constexpr(grid.largest),
            tl.constexpr(grid.s_steps), tl.constexpr(grid.s_smallest), tl.constexpr(grid.s_largest),
        )  # fmt: skip
        second = outer
    elif grid.symmetric:
        span = tl.maximum(high, -low)
        scale = tl.div_rn(span, tl.zeros_like(span) + grid.q_high)
        scale = tl.where(scale == 0.0, 1.0, scale)
        second = outer
    else:
        span = high - low
        scale = tl.div_rn(span, tl.zeros_like(span) + grid.q_high)
        scale = tl.where(scale == 0.0, 1.0, scale)
        second = tl.minimum(tl.maximum(round_even(tl.div_rn(-low, scale)), grid.q_low), grid.q_high)
    return scale + spoilt, second


@triton.jit
def _elements(z, per_step, second, grid: tl.constexpr):
    """The elements nearest to z · per_step, and their codes, which for integers start at the lowest one.

    Floating point: times a power of two, the smallest normal element is fp32's. Then fp32's bits, cut behind the
    element's mantissa, are the code, subnormals included. Integers: a number plus 1.5 · 2^23 is rounded to whole steps,
    and their count is in its last bits.
    """
    if grid.floating:
        x = z * per_step
        cut: tl.constexpr = 23 - grid.mantissa_bits
        whole = (tl.minimum(tl.abs(x), grid.largest) * 2.0 ** (grid.depth - 126)).to(tl.int32, bitcast=True)
        code = (whole + ((1 << (cut - 1)) - 1) + ((whole >> cut) & 1)) >> cut
        sign = x.to(tl.int32, bitcast=True) & -2147483648
        size = (code << cut).to(tl.float32, bitcast=True) * 2.0 ** (126 - grid.depth)
        q = (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        code = code | ((sign >> (32 - grid.bits)) & (1 << (grid.bits - 1)))
    else:
        middle = second * 0.0 + _MAGIC
        if not grid.symmetric:
            middle = second + _MAGIC
        total = tl.fma(z, per_step, middle)
        total = tl.minimum(tl.maximum(total, _MAGIC + grid.q_low), _MAGIC + grid.q_high)
        q = total - middle
        code = total.to(tl.int32, bitcast=True) - _MAGIC_BITS
        if grid.symmetric and grid.bits == 4:
            code -= grid.q_low
    return q, code


@triton.jit
def _float_code(q, MANTISSA_BITS: tl.constexpr, DEPTH: tl.constexpr):
    """Exponent and mantissa of elements whose smallest normal number is 2^-DEPTH, without the sign; int32."""
    size = q.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    normal = (size >> (23 - MANTISSA_BITS)) - ((126 - DEPTH) << MANTISSA_BITS)
    subnormal = (tl.abs(q) * 2.0 ** (MANTISSA_BITS + DEPTH)).to(tl.int32)
    return tl.where(tl.abs(q) < 2.0**-DEPTH, subnormal, normal)


@triton.jit
def _stored_scale(scale, grid: tl.constexpr):
    """Scales as they are stored: the exponent of a power of two, an FP8 number's code, else fp32."""
    if not grid.floating or grid.rule == "real":
        stored = scale
    elif grid.rule == "e4m3" or grid.rule == "e5m2":
        not_a_number: tl.constexpr = 0x7F
        code = _float_code(scale, 3 if grid.rule == "e4m3" else 2, 6 if grid.rule == "e4m3" else 14)
        stored = tl.where(scale == scale, code, not_a_number).to(tl.uint8)
    else:
        stored = (scale.to(tl.int32, bitcast=True) >> 23 & 0xFF).to(tl.uint8)
    return stored


@triton.jit
def put_on_grid(
    z, unscale, low, high, outer, clip, y_ptr, codes_ptr, scale_ptr, second_ptr, start, count, row, first,
    COLUMN: tl.constexpr, B: tl.constexpr, grid: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Put the numbers z · unscale of a tile on their grids and store them, or their codes.

    The tile is the `count` lines from `start` on of an array with B columns, from COLUMN on, and part of row `row`.
    That row's extremes are `low` and `high`, and `outer` the scale of its scales; groups find their extremes
    themselves. What there is one of for a row is stored if `first`.
    """
    TILE_A: tl.constexpr = z.shape[0]
    TILE_B: tl.constexpr = z.shape[1]
    W: tl.constexpr = grid.width if grid.width else TILE_B
    G: tl.constexpr = TILE_B // W
    z_AGW = tl.reshape(z, (TILE_A, G, W))
    if grid.width:
        low_AG, high_AG = _extent(z_AGW, 2, grid)
        low_AG = low_AG * unscale
        high_AG = high_AG * unscale
        scale_AG, second_AG = _grid(low_AG, high_AG, outer, clip, grid)
        scale = scale_AG[:, :, None]
        second = outer
        if not grid.floating and not grid.symmetric:
            second = second_AG[:, :, None]
    else:
        scale, second = _grid(low, high, outer, clip, grid)
    step = scale
    if grid.by_row:
        step = scale * (1.0 / outer)
    # One division for a group, and not an exact one: a tie may fall the other way.
    per_step = unscale / tl.where(step == 0.0, float("inf"), step)
    q_AGW, code_AGW = _elements(z_AGW, per_step, second, grid)
    if PACKED:
        code_AB = tl.reshape(code_AGW, (TILE_A, TILE_B))
        if grid.bits == 4:
            low_AB, high_AB = tl.split(tl.reshape(code_AB, (TILE_A, TILE_B // 2, 2)))
            _store(codes_ptr, low_AB | high_AB << 4, start, count, COLUMN // 2, B // 2)
        else:
            _store(codes_ptr, code_AB, start, count, COLUMN, B)
        zeros: tl.constexpr = not grid.floating and not grid.symmetric
        if grid.width:
            _store(scale_ptr, _stored_scale(scale_AG, grid), start, count, COLUMN // W, B // W)
            if zeros:
                _store(second_ptr, second_AG, start, count, COLUMN // W, B // W)
        elif first:
            tl.store(scale_ptr + row, _stored_scale(scale, grid))
            if zeros:
                tl.store(second_ptr + row, second.to(tl.uint8))
        if grid.by_row and first:
            tl.store(second_ptr + row, outer)
    else:
        _store(y_ptr, tl.reshape(q_AGW * step, (TILE_A, TILE_B)), start, count, COLUMN, B)


@triton.jit
def _store(ptr, x, start, count, COLUMN: tl.constexpr, B: tl.constexpr):
    """A tile as `count` lines from `start` on of an array with B columns, from COLUMN on."""
    a_A1 = tl.arange(0, x.shape[0])[:, None]
    b_1B = COLUMN + tl.arange(0, x.shape[1])[None, :]
    tl.store(ptr + start * B + a_A1 * B + b_1B, x.to(ptr.dtype.element_ty), mask=(a_A1 < count) & (b_1B < B))


@triton.jit
def _extent(z, axis: tl.constexpr, grid: tl.constexpr):
    """Smallest and largest number along an axis; the same distance from zero if the grid wants no more."""
    if grid.floating or grid.symmetric:
        high = tl.max(tl.abs(z), axis=axis)
        low = -high
    else:
        low = tl.min(z, axis=axis)
        high = tl.max(z, axis=axis)
    return low, high


@triton.jit
def row_extent(z, grid: tl.constexpr):
    """`_extent` of a whole tile."""
    low, high = _extent(z, 1, grid)
    return tl.min(low, axis=0), tl.max(high, axis=0)


@triton.jit
def outer_of(low, high, grid: tl.constexpr):
    """The scale of a row's scales, from its extremes."""
    most = tl.maximum(high, -low)
    outer = tl.div_rn(most * 0.0 + grid.s_largest * grid.largest, most)
    return tl.where(outer == float("inf"), 1.0, outer)


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
