"""A Hadamard map and dynamic quantization in one pass over the rows: each number is read once and written once.

    y = x diag(s) (H_a ⊗ H_b) / √n,  n = a b        each row as the matrix X (A, B):  Y = H_aᵀ (X ∘ S) H_b / √n
    then y on the grid of its row, or of each group of neighbours: as numbers again, or as codes and scales

Both products run on the tensor cores, and a row never leaves the chip between them. Entries of ±1 are exact in any
dtype, so only the numbers they meet are rounded: X not at all if it has 16 bits; X H_b, which is brought near fp16's
largest number by a power of two, to the 11 bits of fp16; sums are in fp32. For an fp32 x, both are cut in two fp16
numbers, 22 bits together. Between map and grid nothing is rounded. `maps.hadamard` and `formats` define the result.

A tile has a power of two of rows, so a is covered by two of them: 172 = 128 + 44, in 128 and 64.

Shapes: T rows of N = A B numbers, A1 and A2 rows of the two tiles (A2 = 0: there is one), G groups of W neighbours.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinfold.kernels.grids import (
    Codes,
    Grid,
    near_largest,
    one,
    outer_of,
    processors,
    put_on_grid,
    room_for,
    row_extent,
)

__all__ = ["MEASURED", "MEASURED_FEW", "Tiling", "best_tiling", "hadamard", "tilings"]


_MEMORY = 227 * 1024
"""Bytes of shared memory that a program can have on an H100."""


class Tiling(NamedTuple):
    """How the work is cut: b, the tiles' A1 and A2, warps of a program, rows in flight, programs per SM."""

    columns: int
    rows: int
    more_rows: int
    num_warps: int
    num_stages: int
    programs: int


@triton.jit
def _load(
    x_ptr, row, FIRST: tl.constexpr, A: tl.constexpr, B: tl.constexpr, TILE_A: tl.constexpr, TILE_B: tl.constexpr
):
    """Rows FIRST … of a matrix `(A, B)`, zero beyond it."""
    a_A1 = FIRST + tl.arange(0, TILE_A)[:, None]
    b_1B = tl.arange(0, TILE_B)[None, :]
    x_ptr += row * (A * B)
    if TILE_B != B:
        return tl.load(x_ptr + a_A1 * B + b_1B, mask=(a_A1 < A) & (b_1B < B), other=0.0)
    if FIRST + TILE_A > A:
        return tl.load(x_ptr + a_A1 * B + b_1B, mask=a_A1 < A, other=0.0)
    return tl.load(x_ptr + a_A1 * B + b_1B)


@triton.jit
def _block(ptr, ROW: tl.constexpr, COLUMN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr):
    """A block of a stored square matrix, from its first row and column."""
    return tl.load(ptr + (ROW + tl.arange(0, ROWS)[:, None]) * SIZE + COLUMN + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _largest(x):
    return tl.max(tl.max(tl.abs(x), axis=1), axis=0)


@triton.jit
def _by_right(x, right, power, SPLIT: tl.constexpr):
    """x H_b in fp32; an fp32 x in two pieces."""
    if SPLIT:
        x = x * power
        high = x.to(tl.float16)
        low = (x - high.to(tl.float32)).to(tl.float16)
        y = tl.dot(low, right, tl.dot(high, right))
    else:
        y = tl.dot(x, right)
    return y


@triton.jit
def _by_left(left, y, z, SPLIT: tl.constexpr):
    """z + H_aᵀ y in fp32; y, near fp16's largest number, as one or two pieces."""
    high = y.to(tl.float16)
    z = tl.dot(left, high, z)
    if SPLIT:
        z = tl.dot(left, (y - high.to(tl.float32)).to(tl.float16), z)
    return z


@triton.jit
def _write(
    z, factor, y_ptr, signs_ptr, row, FIRST: tl.constexpr, A: tl.constexpr, B: tl.constexpr, SIGNS: tl.constexpr
):
    """Store a tile without a grid."""
    TILE_A: tl.constexpr = z.shape[0]
    TILE_B: tl.constexpr = z.shape[1]
    z = z * factor
    if SIGNS == "after":
        z = z * _load(signs_ptr, 0, FIRST, A, B, TILE_A, TILE_B).to(tl.float32)
    a_A1 = FIRST + tl.arange(0, TILE_A)[:, None]
    b_1B = tl.arange(0, TILE_B)[None, :]
    tl.store(y_ptr + row * (A * B) + a_A1 * B + b_1B, z.to(y_ptr.dtype.element_ty), mask=(a_A1 < A) & (b_1B < B))


@triton.jit(do_not_specialize=["num_rows"])
def _hadamard(
    x_ptr, y_ptr, codes_ptr, scale_ptr, second_ptr, left_ptr, right_ptr, signs_ptr, clip_ptr, num_rows, factor,
    A: tl.constexpr, B: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, TILE_B: tl.constexpr,
    grid: tl.constexpr, PACKED: tl.constexpr, SIGNS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    right_BB = _block(right_ptr, 0, 0, TILE_B, TILE_B, TILE_B)
    left_11 = _block(left_ptr, 0, 0, A1, A1, A1 + A2)
    if A2:
        left_12 = _block(left_ptr, 0, A1, A1, A2, A1 + A2)
        left_21 = _block(left_ptr, A1, 0, A2, A1, A1 + A2)
        left_22 = _block(left_ptr, A1, A1, A2, A2, A1 + A2)
    clip = tl.load(clip_ptr)
    for row in tl.range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0), num_stages=STAGES):
        x_AB = _load(x_ptr, row, 0, A, B, A1, TILE_B)
        if SIGNS == "before":
            x_AB = x_AB * _load(signs_ptr, 0, 0, A, B, A1, TILE_B).to(x_AB.dtype)
        if A2:
            more_AB = _load(x_ptr, row, A1, A, B, A2, TILE_B)
            if SIGNS == "before":
                more_AB = more_AB * _load(signs_ptr, 0, A1, A, B, A2, TILE_B).to(more_AB.dtype)
        up = 1.0
        down = factor
        if SPLIT:
            most = _largest(x_AB)
            if A2:
                most = tl.maximum(most, _largest(more_AB))
            up, back = near_largest(most)
            down = down * back
        y_AB = _by_right(x_AB, right_BB, up, SPLIT)
        most = _largest(y_AB)
        if A2:
            yy_AB = _by_right(more_AB, right_BB, up, SPLIT)
            most = tl.maximum(most, _largest(yy_AB))
        up, back = near_largest(most)
        down = down * back
        z_AB = _by_left(left_11, y_AB * up, tl.zeros((A1, TILE_B), tl.float32), SPLIT)
        if A2:
            z_AB = _by_left(left_12, yy_AB * up, z_AB, SPLIT)
            zz_AB = _by_left(left_21, y_AB * up, tl.zeros((A2, TILE_B), tl.float32), SPLIT)
            zz_AB = _by_left(left_22, yy_AB * up, zz_AB, SPLIT)
        if grid is None:
            _write(z_AB, down, y_ptr, signs_ptr, row, 0, A, B, SIGNS)
            if A2:
                _write(zz_AB, down, y_ptr, signs_ptr, row, A1, A, B, SIGNS)
        else:
            low = 0.0
            high = 0.0
            outer = 1.0
            if grid.width == 0 or grid.by_row:
                low, high = row_extent(z_AB, grid)
                if A2:
                    more_low, more_high = row_extent(zz_AB, grid)
                    low = tl.minimum(low, more_low)
                    high = tl.maximum(high, more_high)
                low = low * down
                high = high * down
            if grid.by_row:
                outer = outer_of(low, high, grid)
            put_on_grid(z_AB, down, low, high, outer, clip, y_ptr, codes_ptr, scale_ptr, second_ptr,
                        row * A, A, row, True, B, grid, PACKED)  # fmt: skip
            if A2:
                put_on_grid(zz_AB, down, low, high, outer, clip, y_ptr, codes_ptr, scale_ptr, second_ptr,
                            row * A + A1, A - A1, row, False, B, grid, PACKED)  # fmt: skip


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

    `left` is H_aᵀ in fp16, `right` H_b in the dtype of an x of 16 bits, else in fp16, both with zeros up to the tiles
    of `tiling`. `signs`, int8, come before the product or after it. Without a `grid`, the rotated x; with one, the
    numbers on it in x's dtype or, `packed`, their codes. `clip` is one fp32 number on the device; None stands for 1.
    """
    x = x.contiguous()
    columns, rows, more_rows, num_warps, num_stages, programs = tiling
    num_rows = x.numel() // size
    assert grid is None or (x.shape[-1] == size and columns % max(grid.width, 1) == 0)
    y, codes, scale, second = room_for(x, grid, packed)
    clip = one(x.device) if clip is None else clip
    if num_rows:
        count = min(num_rows, programs * processors(x.device))
        _hadamard[(count,)](
            x, y, codes, scale, second, left, right, x if signs is None else signs, clip, num_rows, size**-0.5,
            size // columns, columns, rows, more_rows, right.shape[0], grid, packed,
            "none" if signs is None else "after" if signs_after else "before",
            x.dtype == torch.float32, num_stages if count < num_rows else 1, num_warps=num_warps,
            enable_fp_fusion=False,
        )  # fmt: skip
    return Codes(codes, scale, None if second is x else second) if packed else y


def best_tiling(
    orders: tuple[int, ...], width: int = 0, num_rows: int = 1024, num_bytes: int = 2, memory: int = _MEMORY
) -> Tiling | None:
    """How rows of a Hadamard map with factors of these `orders` are cut, for groups of `width` neighbours.

    `num_bytes` is the size of a number, `memory` that of an SM's shared memory. None if there is no way: then there is
    no kernel for these rows.
    """
    measured = (MEASURED_FEW if num_rows <= FEW else MEASURED).get(math.prod(orders))
    found = [measured] if measured is not None and _fits(measured, width) else []
    found += sorted((_usual(cut) for cut in _cuts(orders) if _fits(cut, width)), key=_work)
    return next(filter(None, (_within(memory, tiling, num_bytes) for tiling in found)), None)


def _within(memory: int, tiling: Tiling, num_bytes: int) -> Tiling | None:
    """The tiling with as many rows in flight as shared memory holds beside both matrices, X H_b, and room to reorder
    the result.
    """
    columns, rows = max(16, triton.next_power_of_2(tiling.columns)), tiling.rows + tiling.more_rows
    beside = 2 * (columns**2 + rows**2 + 2 * columns * rows)
    num_stages = min(tiling.num_stages, (memory - beside) // (num_bytes * columns * rows))
    return tiling._replace(num_stages=num_stages) if num_stages > 0 else None


def _fits(cut: tuple[int, ...], width: int) -> bool:
    """Does no group of `width` neighbours cross a row of the matrix? A tile divides into powers of two only."""
    return width == 0 or (width & (width - 1) == 0 and cut[0] % width == 0)


def tilings(orders: tuple[int, ...], width: int = 0) -> list[Tiling]:
    """All that are worth a measurement: the two or three cuts with least work, each in several ways."""
    usual = sorted((_usual(cut) for cut in _cuts(orders) if _fits(cut, width)), key=_work)
    found = [
        _within(_MEMORY, tiling._replace(num_warps=num_warps, num_stages=num_stages, programs=programs), 2)
        for tiling in usual[: 3 if math.prod(orders) < 4096 else 2]
        for num_warps in (tiling.num_warps, min(16, tiling.num_warps * 2))
        for num_stages in (1, 3)
        for programs in (1, 2, 3, 4, 6, 8, 12, 16)
    ]
    return sorted({tiling for tiling in found if tiling is not None})


def _cuts(orders: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """b, A1 and A2 for every way to see H_{k_1} ⊗ … as H_a ⊗ H_b: b is a product of the last factors.

    Powers of two come apart into twos, which is what Sylvester's matrices are made of.
    """
    factors = [f for order in orders for f in ([2] * (order.bit_length() - 1) if order & (order - 1) == 0 else [order])]
    cuts = []
    for index in range(len(factors) + 1):
        columns, rows = math.prod(factors[index:]), math.prod(factors[:index])
        whole = max(16, triton.next_power_of_2(rows))
        if not 16 <= columns <= 128 or whole > 256:
            continue
        cuts.append((columns, whole, 0))
        more = max(16, triton.next_power_of_2(rows - whole // 2)) if whole > 16 else whole
        if whole // 2 + more < whole:
            cuts.append((columns, whole // 2, more))
    return cuts


def _usual(cut: tuple[int, int, int]) -> Tiling:
    """A tiling with 64 numbers for each thread, and as many programs as registers allow."""
    columns, rows, more_rows = cut
    numbers = (rows + more_rows) * max(16, triton.next_power_of_2(columns))
    num_warps = min(8, max(1, triton.next_power_of_2(numbers // 2048)))
    return Tiling(*cut, num_warps, 3, max(1, 16 // num_warps))


def _work(tiling: Tiling) -> float:
    """A measure of what a row costs: multiplications, and numbers that are moved."""
    rows, columns = tiling.rows + tiling.more_rows, triton.next_power_of_2(tiling.columns)
    return rows * columns * (rows + columns + 300)


FEW = 64
"""Up to so many rows, the time of one counts rather than how many run at once."""

MEASURED: dict[int, Tiling] = {
    576: Tiling(48, 16, 0, 1, 3, 12),
    1536: Tiling(32, 32, 16, 1, 3, 16),
    3072: Tiling(64, 32, 16, 1, 3, 16),
    4096: Tiling(64, 64, 0, 4, 3, 8),
    5120: Tiling(64, 64, 16, 2, 3, 4),
    8192: Tiling(128, 64, 0, 4, 3, 2),
    9728: Tiling(64, 128, 32, 8, 1, 2),
    11008: Tiling(64, 128, 64, 8, 3, 2),
    14336: Tiling(128, 128, 0, 8, 1, 4),
    18944: Tiling(128, 128, 32, 8, 1, 16),
}
MEASURED_FEW: dict[int, Tiling] = {
    576: Tiling(48, 16, 0, 2, 1, 1),
    1536: Tiling(32, 64, 0, 2, 1, 1),
    3072: Tiling(32, 64, 32, 2, 1, 1),
    4096: Tiling(64, 64, 0, 4, 1, 1),
    5120: Tiling(64, 64, 16, 4, 1, 1),
    8192: Tiling(64, 128, 0, 4, 1, 1),
    9728: Tiling(64, 128, 32, 8, 1, 1),
    11008: Tiling(64, 128, 64, 8, 1, 1),
    14336: Tiling(128, 128, 0, 8, 1, 1),
    18944: Tiling(128, 128, 32, 8, 1, 1),
}
"""The best of `tilings` on an H100, by size (`benchmarks/transforms.py`)."""
