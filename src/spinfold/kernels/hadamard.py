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

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from spinfold.kernels import tilings
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
from spinfold.kernels.tilings import Tiling, depths_of, heights_of, padded
from spinfold.kernels.turns import answer, ask, counter_for, put_back

__all__ = ["hadamard", "stored_left", "stored_right"]


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


@triton.jit
def _loaded_row(
    x_ptr, signs_ptr, row, A: tl.constexpr, B: tl.constexpr, DS: tl.constexpr, TILE_B: tl.constexpr, XS: tl.constexpr,
    SIGNS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A row as the tiles of X that the left product takes, in XS parts of the columns; and, of an fp32 one, its largest
    number.
    """
    xs = ()
    most = 0.0
    for j in tl.static_range(XS):
        part = ()
        for d in tl.static_range(len(DS)):
            x_DC = _load(x_ptr + row * (A * B), _before(DS, d), j * TILE_B // XS, DS[d], TILE_B // XS, A, B)
            if SIGNS == "before":
                signs_DC = _load(signs_ptr, _before(DS, d), j * TILE_B // XS, DS[d], TILE_B // XS, A, B)
                x_DC = x_DC * signs_DC.to(x_DC.dtype)
            if SPLIT:
                most = tl.maximum(most, _largest(x_DC))
            part = part + (x_DC,)
        xs = xs + (part,)
    return xs, most


@triton.jit
def _finish_row(
    xs, most, lefts, right, clip, row, begin, factor, outs, signs_ptr,
    A: tl.constexpr, B: tl.constexpr, RS: tl.constexpr, PARTS: tl.constexpr, TILE_G: tl.constexpr, grid: tl.constexpr,
    PACKED: tl.constexpr, SIGNS: tl.constexpr, SPLIT: tl.constexpr, WARPS: tl.constexpr, IN_BITS: tl.constexpr,
):  # fmt: skip
    """Both products of a row that was loaded, and what becomes of it, in tiles of its matrix from row `begin` on."""
    y_ptr, codes_ptr, scale_ptr, second_ptr, scratch_ptr = outs
    C: tl.constexpr = right.shape[0]
    N: tl.constexpr = A * B
    BITS: tl.constexpr = grid.bits if PACKED else y_ptr.dtype.element_ty.primitive_bitwidth
    RUN: tl.constexpr = neighbours(C, 8 if PACKED else 16)
    STORES: tl.constexpr = stores(C, RUN, BITS) if C <= 64 else 1
    turn = tl.cast(row, tl.int32)
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
        ws, unscale_R = _rows_of_result(lefts[r], turn, xs, right, up, down, RS[r], len(xs[0]), PARTS, SPLIT, IN_BITS)
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
            unscale_R = tl.reshape(swapped_rows(unscale_R[:, None], interleaved(RS[r], WARPS, RUN, BITS), 2), (RS[r],))
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


@triton.jit(do_not_specialize=["num_rows"])
def _hadamard(
    x_ptr, y_ptr, codes_ptr, scale_ptr, second_ptr, scratch_ptr, left_ptr, right_ptr, signs_ptr, clip_ptr,
    counter_ptr, num_rows, factor,
    A: tl.constexpr, B: tl.constexpr, DS: tl.constexpr, RS: tl.constexpr, TILE_B: tl.constexpr, PARTS: tl.constexpr,
    XS: tl.constexpr, SHARED: tl.constexpr, TILE_G: tl.constexpr, grid: tl.constexpr, PACKED: tl.constexpr,
    SIGNS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
    IN_BITS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = len(DS)
    C: tl.constexpr = TILE_B // PARTS
    begin = tl.program_id(1) * RS[0] if SHARED else 0
    left_ptr += begin * (4 * COUNT if IN_BITS else _before(DS, COUNT))
    BITS: tl.constexpr = grid.bits if PACKED else y_ptr.dtype.element_ty.primitive_bitwidth
    RUN: tl.constexpr = neighbours(C, 8 if PACKED else 16)
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
    outs = (y_ptr, codes_ptr, scale_ptr, second_ptr, scratch_ptr)
    if TURNS:
        turn = tl.program_id(0)
        number_T = ask(counter_ptr, WARPS)
        while turn < num_rows:
            row = turn.to(tl.int64)
            xs, most = _loaded_row(x_ptr, signs_ptr, row, A, B, DS, TILE_B, XS, SIGNS, SPLIT)
            turn = tl.num_programs(0) + answer(number_T)
            number_T = ask(counter_ptr, WARPS)
            if AHEAD:
                to_cache(x_ptr, turn.to(tl.int64), num_rows, A * B, A * B)
            _finish_row(xs, most, lefts, right_CC, clip, row, begin, factor, outs, signs_ptr, A, B, RS, PARTS, TILE_G,
                        grid, PACKED, SIGNS, SPLIT, WARPS, IN_BITS)  # fmt: skip
        put_back(counter_ptr)
    else:
        for row in tl.range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0), num_stages=STAGES):
            xs, most = _loaded_row(x_ptr, signs_ptr, row, A, B, DS, TILE_B, XS, SIGNS, SPLIT)
            if AHEAD:
                # One instruction for the whole row, so that no thread waits for memory when its turn comes.
                to_cache(x_ptr, row + AHEAD * tl.num_programs(0), num_rows, A * B, A * B)
            _finish_row(xs, most, lefts, right_CC, clip, row, begin, factor, outs, signs_ptr, A, B, RS, PARTS, TILE_G,
                        grid, PACKED, SIGNS, SPLIT, WARPS, IN_BITS)  # fmt: skip


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
    shared = num_rows <= tilings.FEW and (grid is None or (grid.width > 0 and not grid.by_row and not lines))
    if shared:
        tiling = tiling._replace(parts=1, rows=16, num_warps=4)
    columns, parts, rows, num_warps, num_stages, programs, registers, at_once, bits, rest, ahead, turns = tiling
    heights = heights_of(height, rows, rest)
    assert grid is None or x.shape[-1] == size
    y, codes, scale, second = room_for(x, grid, packed)
    clip = one(x.device) if clip is None else clip
    if num_rows:
        count = min(num_rows, programs * processors(x.device))
        stages = 1 if lines or count == num_rows else num_stages
        # A program that has no other row in flight would wait for the next one.
        ahead = (ahead or stages == 1) and count < num_rows and aligned(x)
        # Of two rows each there is not much to share out.
        counter = counter_for(x.device) if turns and stages == 1 and 2 * count < num_rows else None
        _hadamard[(count, len(heights) if shared else 1)](
            x, y, codes, scale, second, x.new_empty(count * size, dtype=torch.float32) if lines else x,
            left, right, x if signs is None else signs, clip,
            x if counter is None else counter, num_rows, size**-0.5,
            height, columns, depths_of(height), heights[:1] if shared else heights, right.shape[0], parts,
            1 if at_once else parts, shared,
            lines, grid, packed,
            "none" if signs is None else "after" if signs_after else "before",
            x.dtype == torch.float32, stages, num_warps, stages * ahead, bits, counter is not None,
            num_warps=num_warps,
            enable_fp_fusion=False, **({} if registers == 255 else {"maxnreg": registers}),
        )  # fmt: skip
    return Codes(codes, scale, None if second is x else second) if packed else y


def stored_left(left_AA: Tensor, tiling: Tiling) -> Tensor:
    """H_aᵀ with zeros up to the tiles' rows and columns; in bits, with its first row again up to the tiles' rows: what
    comes of that is not stored, and no further from zero than what comes of the first one.
    """
    height, depths = len(left_AA), depths_of(len(left_AA))
    rows, columns, _ = padded(tiling, height * tiling.columns)
    below, beside = rows - height, columns - height
    if not tiling.bits:
        return F.pad(left_AA, (0, beside, 0, below)).contiguous()
    return packed_signs(F.pad(torch.cat([left_AA, left_AA[:1].expand(below, -1)]), (0, beside)), depths)


def stored_right(right_BB: Tensor) -> Tensor:
    """H_b with zeros up to a tile's columns."""
    beyond = max(16, triton.next_power_of_2(len(right_BB))) - len(right_BB)
    return F.pad(right_BB, (0, beyond, 0, beyond)).contiguous()
