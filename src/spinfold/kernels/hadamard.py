"""A Hadamard map and dynamic quantization in one pass over the rows: each number is read once and written once.

    y = x diag(s) (H_a ⊗ H_b) / √n,  n = a b        each row as the matrix X (A, B):  Y = (H_aᵀ (X ∘ S)) H_b / √n
    then y on the grid of its row, or of each group of neighbours: as numbers again, or as codes and scales

Both products run on the tensor cores, and a row never leaves the chip between them. The left one comes first: then a
row of the result needs no other one, the power of two that brings H_aᵀ X near fp16's largest number is that of its row,
and each warp goes from one product to the next with what is in its registers. Entries of ±1 are exact in any dtype, so
only the numbers they meet are rounded: X not at all if it has 16 bits; H_aᵀ X to the 11 bits of fp16; sums are in fp32.
For an fp32 x, both are cut in two fp16 numbers, 22 bits together. Between map and grid nothing is rounded.
`maps.hadamard` and `formats` define the result.

A tile has a power of two of rows, so X is loaded in several: 172 = 128 + 32 + 12, in 128, 32 and 16.

Shapes: T rows of N = A B numbers; a tile of D rows of X, of R rows of the result; G groups of W neighbours.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,misc"
# ruff: noqa: RUF005 (Triton's tuples grow by addition only)
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from spinfold.kernels.grids import (
    Codes,
    Grid,
    aligned,
    extremes,
    near_largest,
    one,
    outer_of,
    over_all,
    processors,
    put_on_grid,
    room_for,
    store,
    to_cache,
)
from spinfold.kernels.signs import from_words, load_words, packed_signs
from spinfold.kernels.threads import in_order, interleaved, neighbours, of_a_thread, stores, swapped, swapped_rows

__all__ = [
    "AHEAD",
    "MEASURED",
    "MEASURED_FEW",
    "MEASURED_WHOLE",
    "Tiling",
    "best_tiling",
    "hadamard",
    "stored_left",
    "stored_right",
    "tilings",
]


_MEMORY = 227 * 1024
"""Bytes of shared memory that a program can have on an H100."""


class Tiling(NamedTuple):
    """How the work is cut: b, parts of the columns in the right product (1, or 2 if b is a power of two), rows of a
    tile of the result, warps of a program, rows in flight, programs per SM, registers of a thread at most: fewer let
    more programs run on an SM at once; whether the left product takes both parts at once, which saves instructions
    and costs registers; and whether H_aᵀ is bits in registers (`kernels.signs`), which costs instructions and leaves
    shared memory to more programs.
    """

    columns: int
    parts: int
    rows: int
    num_warps: int
    num_stages: int
    programs: int
    registers: int = 255
    at_once: bool = False
    bits: bool = False


@triton.jit
def _load(
    ptr, FIRST, COLUMN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, A: tl.constexpr, B: tl.constexpr
):
    """A tile of a matrix `(A, B)` from one of its rows and columns on, zero beyond it."""
    a_R1 = FIRST + tl.arange(0, ROWS)[:, None]
    b_1B = COLUMN + tl.arange(0, COLUMNS)[None, :]
    if COLUMN + COLUMNS > B:
        return tl.load(ptr + a_R1 * B + b_1B, mask=(a_R1 < A) & (b_1B < B), other=0.0)
    return tl.load(ptr + a_R1 * B + b_1B, mask=a_R1 < A, other=0.0)


@triton.jit
def _block(ptr, ROW: tl.constexpr, COLUMN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr):
    """A block of a stored matrix with SIZE columns, from one of its rows and columns on."""
    return tl.load(ptr + (ROW + tl.arange(0, ROWS)[:, None]) * SIZE + COLUMN + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _largest(x):
    return tl.max(tl.max(tl.abs(x), axis=1), axis=0)


@triton.jit
def _left_product(
    lefts, turn, xs, up, ROWS: tl.constexpr, COUNT: tl.constexpr, SPLIT: tl.constexpr, IN_BITS: tl.constexpr
):
    """Some rows of H_aᵀ X in fp32; an fp32 X times `up` as two numbers of 16 bits."""
    y_RC = tl.zeros((ROWS, xs[0].shape[1]), tl.float32)
    for i in tl.static_range(COUNT):
        x_DC = xs[i]
        left_RD = lefts[i]
        if IN_BITS:
            left_RD = from_words(left_RD, turn, x_DC.shape[0], tl.float16 if SPLIT else x_DC.dtype)
        if SPLIT:
            x_DC = x_DC * up
            high_DC = x_DC.to(tl.float16)
            y_RC = tl.dot(left_RD, (x_DC - high_DC.to(tl.float32)).to(tl.float16), y_RC)
            x_DC = high_DC
        y_RC = tl.dot(left_RD, x_DC, y_RC)
    return y_RC


@triton.jit
def _right_product(y_RC, right, SPLIT: tl.constexpr):
    """Rows of H_aᵀ X, near fp16's largest number, times `right`."""
    high_RC = y_RC.to(tl.float16)
    z_RC = tl.dot(high_RC, right)
    if SPLIT:
        z_RC = tl.dot((y_RC - high_RC.to(tl.float32)).to(tl.float16), right, z_RC)
    return z_RC


@triton.jit
def _halves(x_RC):
    """The first half of the columns and the second."""
    x = tl.reshape(x_RC, (x_RC.shape[0], 2, x_RC.shape[1] // 2))
    return tl.split(tl.permute(x, (0, 2, 1)))


@triton.jit
def _rows_of_result(
    lefts, turn, xs, right, up, factor,
    ROWS: tl.constexpr, COUNT: tl.constexpr, PARTS: tl.constexpr, SPLIT: tl.constexpr, IN_BITS: tl.constexpr,
):  # fmt: skip
    """Some rows of H_aᵀ X H_b, in one part or in halves of the columns: then H_b is H_2 ⊗ `right`. And what each row is
    to be multiplied by.
    """
    ys = ()
    sums = ()
    for j in tl.static_range(len(xs)):
        y_RC = _left_product(lefts, turn, xs[j], up, ROWS, COUNT, SPLIT, IN_BITS)
        ys = ys + (y_RC,)
        sums = sums + (tl.sum(tl.abs(y_RC), axis=1),)
    # A row's sum of absolute values is little more than its largest one for a floating-point number, and cheaper.
    up_R, down_R = near_largest(sums[0] if len(xs) == 1 else sums[0] + sums[1])
    if len(xs) < PARTS:
        ys = _halves(ys[0])
    ws = (_right_product(ys[0] * up_R[:, None], right, SPLIT),)
    if PARTS == 2:
        other_RC = _right_product(ys[1] * up_R[:, None], right, SPLIT)
        ws = (ws[0] + other_RC, ws[0] - other_RC)
    return ws, down_R * factor


@triton.constexpr_function
def _before(sizes, index):
    return sum(list(sizes)[:index])


@triton.jit
def _row_on_grid(
    zs, ranges, unscales, clip, y_ptr, codes_ptr, scale_ptr, second_ptr, row,
    A: tl.constexpr, B: tl.constexpr, RS: tl.constexpr, PARTS: tl.constexpr, grid: tl.constexpr, PACKED: tl.constexpr,
    STORES: tl.constexpr,
):  # fmt: skip
    """Put all tiles of a row, as a matrix `(A, B)`, on its grid, or on grids whose scales have one in common."""
    low, high = over_all(ranges, grid)
    outer = 1.0
    if grid.by_row:
        outer = outer_of(low, high, grid)
    for i in tl.static_range(len(zs)):
        if grid.width:
            low, high = ranges[i]
        put_on_grid(zs[i], unscales[i // PARTS], low, high, outer, clip, y_ptr, codes_ptr, scale_ptr, second_ptr,
                    row * A + _before(RS, i // PARTS), A - _before(RS, i // PARTS), row, i == 0,
                    i % PARTS * zs[i].shape[1], B, grid, PACKED, STORES)  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _hadamard(
    x_ptr, y_ptr, codes_ptr, scale_ptr, second_ptr, scratch_ptr, left_ptr, right_ptr, signs_ptr, clip_ptr,
    num_rows, factor,
    A: tl.constexpr, B: tl.constexpr, DS: tl.constexpr, RS: tl.constexpr, TILE_B: tl.constexpr, PARTS: tl.constexpr,
    XS: tl.constexpr, SHARED: tl.constexpr, TILE_G: tl.constexpr, grid: tl.constexpr, PACKED: tl.constexpr,
    SIGNS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
    IN_BITS: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = len(DS)
    C: tl.constexpr = TILE_B // PARTS
    N: tl.constexpr = A * B
    begin = tl.program_id(1) * RS[0] if SHARED else 0
    left_ptr += begin * (4 * COUNT if IN_BITS else _before(DS, COUNT))
    BITS: tl.constexpr = grid.bits if PACKED else y_ptr.dtype.element_ty.primitive_bitwidth
    RUN: tl.constexpr = neighbours(C, 8 if PACKED else 16)
    STORES: tl.constexpr = stores(C, RUN, BITS) if C <= 64 else 1
    right_CC = swapped(_block(right_ptr, 0, 0, C, C, TILE_B), 4, RUN // 2, 2)
    lefts = ()
    for r in tl.static_range(len(RS)):
        blocks = ()
        for d in tl.static_range(COUNT):
            if IN_BITS:
                block = load_words(left_ptr, _before(RS, r), d, RS[r], 4 * COUNT, interleaved(RS[r], WARPS, RUN, BITS))
            else:
                block = _block(left_ptr, _before(RS, r), _before(DS, d), RS[r], DS[d], _before(DS, COUNT))
                block = swapped_rows(block, 2, interleaved(RS[r], WARPS, RUN, BITS))
            blocks = blocks + (block,)
        lefts = lefts + (blocks,)
    clip = tl.load(clip_ptr)
    for row in tl.range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0), num_stages=STAGES):
        xs = ()
        most = 0.0
        for j in tl.static_range(XS):
            part = ()
            for d in tl.static_range(COUNT):
                x_DC = _load(x_ptr + row * N, _before(DS, d), j * TILE_B // XS, DS[d], TILE_B // XS, A, B)
                if SIGNS == "before":
                    signs_DC = _load(signs_ptr, _before(DS, d), j * TILE_B // XS, DS[d], TILE_B // XS, A, B)
                    x_DC = x_DC * signs_DC.to(x_DC.dtype)
                if SPLIT:
                    most = tl.maximum(most, _largest(x_DC))
                part = part + (x_DC,)
            xs = xs + (part,)
        if AHEAD:
            # One instruction for the whole row, so that no thread waits for memory when its turn comes.
            to_cache(x_ptr, row + AHEAD * tl.num_programs(0), num_rows, N, N)
        up = 1.0
        down = factor
        if SPLIT:
            up, back = near_largest(most)
            down = factor * back
        zs = ()
        ranges = ()
        unscales = ()
        for r in tl.static_range(len(RS)):
            first = begin + _before(RS, r)
            ws, unscale_R = _rows_of_result(lefts[r], row, xs, right_CC, up, down, RS[r], COUNT, PARTS, SPLIT, IN_BITS)
            if grid is None or TILE_G:
                for j in tl.static_range(PARTS):
                    z_RC = in_order(ws[j] * unscale_R[:, None], RUN, interleaved(RS[r], WARPS, RUN, BITS))
                    if SIGNS == "after":
                        z_RC = z_RC * _load(signs_ptr, first, j * C, RS[r], C, A, B).to(tl.float32)
                    if TILE_G:
                        place = scratch_ptr + tl.program_id(0) * N
                        store(place, z_RC, first, A - first, j * C, B, 1)
                    else:
                        store(y_ptr, z_RC, row * A + first, A - first, j * C, B, STORES)
            else:
                unscale_R = tl.reshape(
                    swapped_rows(unscale_R[:, None], interleaved(RS[r], WARPS, RUN, BITS), 2), (RS[r],)
                )
                for j in tl.static_range(PARTS):
                    z_RC = in_order(ws[j], RUN, interleaved(RS[r], WARPS, RUN, BITS))
                    if grid.width == 0 or grid.by_row:
                        ranges = ranges + (extremes(z_RC, unscale_R, grid, of_a_thread(RS[r], C, WARPS)),)
                        zs = zs + (z_RC,)
                    else:
                        low, high = extremes(z_RC, unscale_R, grid, C)
                        put_on_grid(z_RC, unscale_R, low, high, 1.0, clip, y_ptr, codes_ptr, scale_ptr, second_ptr,
                                    row * A + first, A - first, row, False, j * C, B, grid, PACKED, STORES)  # fmt: skip
                unscales = unscales + (unscale_R,)
        if TILE_G:
            # Groups that cross rows of the matrix: the row comes back from the cache with a group in each line.
            LINES: tl.constexpr = N // grid.width
            tl.debug_barrier()
            z_GW = _load(scratch_ptr + tl.program_id(0) * N, 0, 0, TILE_G, grid.width, LINES, grid.width)
            tl.debug_barrier()
            one_G = tl.full((TILE_G,), 1.0, tl.float32)
            ranges = (extremes(z_GW, one_G, grid, grid.width),)
            _row_on_grid((z_GW,), ranges, (one_G,), clip, y_ptr, codes_ptr, scale_ptr, second_ptr, row, LINES,
                         grid.width, (TILE_G,), 1, grid, PACKED, 1)  # fmt: skip
        elif grid is not None:  # noqa: SIM102 (without a grid the next line does not compile)
            if grid.width == 0 or grid.by_row:
                _row_on_grid(zs, ranges, unscales, clip, y_ptr, codes_ptr, scale_ptr, second_ptr, row, A, B, RS, PARTS,
                             grid, PACKED, STORES)  # fmt: skip


def hadamard(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    tiling: Tiling,
    size: int,
    *,
    signs: Tensor | None = None,
    signs_after: bool = False,
    grid: Grid | None = None,
    clip: Tensor | None = None,
    packed: bool = False,
) -> Tensor | Codes:
    """Each row of `x (..., N)`, N a multiple of `size`, through a Hadamard map of that size and onto a grid.

    `left` is `stored_left` of H_aᵀ in the dtype of an x of 16 bits, else in fp16, `right` `stored_right` of H_b in
    fp16. `signs`, int8, come before the product or after it. Without a `grid`, the rotated x; with one, the numbers on
    it in x's dtype or, `packed`, their codes. `clip` is an fp32 number on the device; None stands for 1.

    Where rows are few and their tiles need nothing of each other, each tile has a program to itself.
    """
    x = x.contiguous()
    num_rows, height = x.numel() // size, size // tiling.columns
    lines = 0
    if grid is not None and tiling.columns // tiling.parts % max(grid.width, 1):
        lines = triton.next_power_of_2(size // grid.width)
    shared = num_rows <= FEW and (grid is None or (grid.width > 0 and not grid.by_row and not lines))
    if shared:
        tiling = tiling._replace(parts=1, rows=16, num_warps=4)
    columns, parts, rows, num_warps, num_stages, programs, registers, at_once, bits = tiling
    heights = _heights(height, rows)
    assert grid is None or x.shape[-1] == size
    y, codes, scale, second = room_for(x, grid, packed)
    clip = one(x.device) if clip is None else clip
    if num_rows:
        count = min(num_rows, programs * processors(x.device))
        stages = 1 if lines or count == num_rows else num_stages
        result = "codes" if packed else "numbers" if grid else "map"
        ahead = _ahead(size, result, stages) if count < num_rows and aligned(x) else 0
        _hadamard[(count, len(heights) if shared else 1)](
            x, y, codes, scale, second, x.new_empty(count * size, dtype=torch.float32) if lines else x,
            left, right, x if signs is None else signs, clip, num_rows, size**-0.5,
            height, columns, _depths(height), heights[:1] if shared else heights, right.shape[0], parts,
            1 if at_once else parts, shared,
            lines, grid, packed,
            "none" if signs is None else "after" if signs_after else "before",
            x.dtype == torch.float32, stages, num_warps, ahead, bits,
            num_warps=num_warps,
            enable_fp_fusion=False, **({} if registers == 255 else {"maxnreg": registers}),
        )  # fmt: skip
    return Codes(codes, scale, None if second is x else second) if packed else y


def _ahead(size: int, result: str, stages: int) -> int:
    """How many turns ahead a program has a row brought to the L2 cache, if at all: where no row but its own is in
    flight, and where it was measured to help.
    """
    return stages if stages == 1 or result in AHEAD.get(size, ()) else 0


def _depths(height: int) -> tuple[int, ...]:
    """Powers of two from 16 on that cover the rows of X."""
    whole = -(-height // 16) * 16
    return tuple(1 << bit for bit in reversed(range(4, whole.bit_length())) if whole >> bit & 1)


def _heights(height: int, rows: int) -> tuple[int, ...]:
    """Tiles of `rows` rows of the result, and one for the rest: of 16, or 64 as the tensor cores like them best."""
    whole, rest = divmod(height, rows)
    last = 16 if rest <= 16 else min(rows, 64) if rest <= 64 else rows
    return (rows,) * whole + (last,) * (rest > 0)


def _padded(tiling: Tiling, size: int) -> tuple[int, int, int]:
    """Rows and columns of H_aᵀ as it is stored, and rows of H_b."""
    height = size // tiling.columns
    return sum(_heights(height, tiling.rows)), sum(_depths(height)), _width(tiling.columns)


def _width(columns: int) -> int:
    return max(16, triton.next_power_of_2(columns))


def stored_left(left_AA: Tensor, tiling: Tiling) -> Tensor:
    """H_aᵀ with zeros up to the tiles' rows and columns; in bits, with its first row again up to the tiles' rows: what
    comes of that is not stored, and no further from zero than what comes of the first one.
    """
    height = len(left_AA)
    depths = _depths(height)
    below, beside = sum(_heights(height, tiling.rows)) - height, sum(depths) - height
    if not tiling.bits:
        return F.pad(left_AA, (0, beside, 0, below)).contiguous()
    return packed_signs(F.pad(torch.cat([left_AA, left_AA[:1].expand(below, -1)]), (0, beside)), depths)


def stored_right(right_BB: Tensor) -> Tensor:
    """H_b with zeros up to a tile's columns."""
    beyond = _width(len(right_BB)) - len(right_BB)
    return F.pad(right_BB, (0, beyond, 0, beyond)).contiguous()


def best_tiling(
    orders: tuple[int, ...],
    width: int = 0,
    num_rows: int = 1024,
    num_bytes: int = 2,
    memory: int = _MEMORY,
    *,
    whole: bool = False,
) -> Tiling | None:
    """How rows of a Hadamard map with factors of these `orders` are cut, for groups of `width` neighbours.

    `num_bytes` is the size of a number, `memory` that of an SM's shared memory; `whole`: nothing is written before all
    of a row is known. None if there is no way: then there is no kernel for these rows.
    """
    size = math.prod(orders)
    measured = (MEASURED_FEW if num_rows <= FEW else MEASURED_WHOLE if whole else MEASURED).get(size)
    found = [measured] if measured is not None else []
    found += sorted((_usual(columns, size) for columns in _cuts(orders)), key=lambda tiling: _work(tiling, size))
    if width & (width - 1):  # a tile divides into powers of two only
        return None
    found.sort(key=lambda tiling: width > 0 and tiling.columns // tiling.parts % width > 0)
    return next(filter(None, (_within(memory, tiling, size, num_bytes) for tiling in found)), None)


def _within(memory: int, tiling: Tiling, size: int, num_bytes: int) -> Tiling | None:
    """The tiling with as many rows in flight as shared memory holds beside both matrices, an fp32 row's two pieces, and
    room to reorder a tile of the result. An fp32 row may take all registers, which were counted for 16 bits.
    """
    height, depth, columns = _padded(tiling, size)
    part = columns // tiling.parts
    matrices = 2 * (part**2 + (0 if tiling.bits else height * depth))
    beside = matrices + num_bytes * part * tiling.rows + 4 * depth * columns * (num_bytes == 4)
    num_stages = min(tiling.num_stages, (memory - beside) // (num_bytes * columns * depth))
    registers = 255 if num_bytes == 4 else tiling.registers
    return tiling._replace(num_stages=num_stages, registers=registers) if num_stages > 0 else None


def tilings(orders: tuple[int, ...]) -> list[Tiling]:
    """All that are worth a measurement: the two cuts with least work, each in several ways, and those measured best."""
    size = math.prod(orders)
    cuts = sorted(_cuts(orders), key=lambda columns: _work(_usual(columns, size), size))[:2]
    found = [
        _within(_MEMORY, Tiling(columns, parts, rows, num_warps, num_stages, programs, 255, at_once, bits), size, 2)
        for columns in cuts
        for parts, at_once in (((1, False), (2, False), (2, True)) if columns == 128 else ((1, False),))
        for rows in (16, 32, 64, 128)
        for num_warps in {rows // 16, 4}
        for num_stages in (1, 2)
        for programs in (1, 2, 3, 4, 6, 8, 12, 16)
        for bits in (False, True)
        if rows < max(32, 2 * size // columns)
        and programs * num_warps <= 32
        and (not bits or (rows >= 64 and _larger_than_a_row(columns, size)))
    ]
    found += [_within(_MEMORY, table[size], size, 2) for table in (MEASURED, MEASURED_WHOLE) if size in table]
    return sorted({tiling for tiling in found if tiling is not None})


def _larger_than_a_row(columns: int, size: int) -> bool:
    """Is H_a, so that as bits it would leave room for other rows? Words of 32 bits are for blocks of 128 columns."""
    height = size // columns
    return height > columns and _depths(height)[0] <= 128


def _cuts(orders: tuple[int, ...]) -> list[int]:
    """b for every way to see H_{k_1} ⊗ … as H_a ⊗ H_b: it is a product of the last factors.

    Powers of two come apart into twos, which is what Sylvester's matrices are made of.
    """
    factors = [f for order in orders for f in ([2] * (order.bit_length() - 1) if order & (order - 1) == 0 else [order])]
    cuts = (math.prod(factors[index:]) for index in range(len(factors) + 1))
    return [columns for columns in cuts if 16 <= columns <= 128 and math.prod(orders) // columns <= 256]


def _usual(columns: int, size: int) -> Tiling:
    """A tiling with 16 rows for each warp, and as many programs as registers allow."""
    rows = min(64, max(16, triton.next_power_of_2(size // columns)))
    return Tiling(columns, 1, rows, rows // 16, 2, 192 // rows)


def _work(tiling: Tiling, size: int) -> float:
    """A measure of what a row costs: multiplications, and numbers that are moved."""
    height, depth, columns = _padded(tiling, size)
    return height * columns * (depth + columns + 300)


FEW = 64
"""Up to so many rows, the time of one counts rather than how many run at once."""

MEASURED: dict[int, Tiling] = {
    576: Tiling(48, 1, 16, 1, 2, 16),
    1536: Tiling(32, 1, 16, 1, 2, 24),
    3072: Tiling(64, 1, 16, 1, 2, 16),
    4096: Tiling(64, 1, 64, 4, 2, 16),
    5120: Tiling(64, 1, 64, 4, 2, 5, 96),
    8192: Tiling(128, 2, 64, 4, 2, 16),
    9728: Tiling(128, 2, 64, 4, 2, 3, 168),
    11008: Tiling(64, 1, 64, 4, 1, 2),
    14336: Tiling(128, 2, 128, 8, 2, 4, 128, True),
    18944: Tiling(128, 2, 64, 4, 1, 2, 255, True),
}
MEASURED_WHOLE: dict[int, Tiling] = {
    576: Tiling(48, 1, 16, 1, 2, 16),
    1536: Tiling(32, 1, 32, 1, 2, 16, 104),
    3072: Tiling(64, 1, 16, 1, 2, 16),
    4096: Tiling(64, 1, 64, 4, 2, 16),
    5120: Tiling(64, 1, 64, 4, 2, 5, 96),
    8192: Tiling(128, 2, 64, 4, 2, 16),
    9728: Tiling(128, 2, 64, 4, 2, 3, 168, True),
    11008: Tiling(64, 1, 64, 4, 1, 2),
    14336: Tiling(128, 2, 128, 8, 2, 2, 128, True),
    18944: Tiling(128, 2, 64, 4, 1, 4, 255, True),
}
MEASURED_FEW: dict[int, Tiling] = {
    576: Tiling(48, 1, 16, 4, 1, 1),
    1536: Tiling(32, 1, 64, 4, 1, 1),
    3072: Tiling(64, 1, 64, 4, 1, 1),
    4096: Tiling(64, 1, 64, 4, 1, 1),
    5120: Tiling(64, 1, 128, 8, 1, 1),
    8192: Tiling(64, 1, 128, 8, 1, 1),
    9728: Tiling(128, 2, 128, 8, 1, 1, 255, True),
    11008: Tiling(64, 1, 64, 4, 1, 1),
    14336: Tiling(128, 2, 128, 8, 1, 1, 255, True),
    18944: Tiling(128, 2, 256, 8, 1, 1, 255, True),
}
"""The best of `tilings`, with fewer registers if that helps, on an H100, by size (`benchmarks/transforms.py`); WHOLE:
for grids that need all of a row.
"""

AHEAD: dict[int, tuple[str, ...]] = {
    576: ("map", "numbers", "codes"),
    5120: ("numbers", "codes"),
    9728: ("numbers", "codes"),
    14336: ("codes",),
}
"""By size, for which results rows beyond those in flight are brought to the cache too. What moves as many bytes as a
copy in little more time, such as the map alone, gets slower by it, and sizes with many programs on an SM gain nothing.
"""
