"""Rotary embedding, a rotation of each head, and dynamic quantization in one pass over queries or keys.

    r = x ∘ [cos, cos] + [-x₂, x₁] ∘ [sin, sin],  x = [x₁, x₂]        y = r M        then y on its row's grid

M is any matrix of a head's size. The product runs on the tensor cores: r is brought near fp16's largest number, row by
row, by a power of two, and rounded to fp16, as M is; an fp32 x and its M are cut in two fp16 numbers, 22 bits
together. Nothing else is rounded in between, but tensor cores don't round sums: they cut them off.

Of 16-bit numbers, 64 or more in a row, a thread loads 16 bytes. With columns in another order, and the rows of M in the
same, these are what the tensor cores want of that thread as a left factor; and what they leave with it, it stores
(`kernels.threads`). So where a tile fills all warps, on Hopper, no number goes through shared memory, where only M is,
and no warp waits for another one, but to store scales, and codes of rows of 64.

Shapes: R rows, one for each head of each token, the heads of a token together; N head size; C columns of a piece.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# ruff: noqa: RUF005 (Triton's tuples grow by addition only)
from __future__ import annotations

from typing import NamedTuple

import torch
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
    processors,
    put_on_grid,
    room_for,
    store,
    to_cache,
)
from spinfold.kernels.threads import in_order, interleaved, neighbours, stores, swapped, swapped_rows

__all__ = ["LARGEST_HEAD", "Cut", "rotate_heads", "split_matrix"]

LARGEST_HEAD = {2: 256, 4: 128}
"""By the bytes of a number: shared memory holds M, for fp32 both its pieces."""
_LIFT = 2.0**12
"""Without it, second halves of the entries of an orthogonal matrix were subnormal in fp16, with fewer than 11 bits."""


class Cut(NamedTuple):
    """Rows of a tile, warps, tiles in flight, programs per SM; how many turns ahead a tile is brought to the cache."""

    rows: int
    num_warps: int
    num_stages: int
    programs: int
    ahead: int = 0


@triton.jit
def _piece(ptr, line_R1, FIRST: tl.constexpr, C: tl.constexpr, stride, mask_R1):
    column_1C = (FIRST + tl.arange(0, C))[None, :]
    return tl.load(ptr + (line_R1 * stride + column_1C), mask=mask_R1, other=0.0)


@triton.jit
def _rows(m_ptr, FIRST: tl.constexpr, C: tl.constexpr, N: tl.constexpr, RUN: tl.constexpr):
    """Rows of a matrix with N columns, those in the order of `_as_factor`, these in that of `in_order`."""
    place_C1 = tl.arange(0, C)[:, None]
    row_C1 = FIRST + place_C1 // 2 % 4 * (C // 4) + place_C1 // 8 * 2 + place_C1 % 2
    return swapped(tl.load(m_ptr + row_C1 * N + tl.arange(0, N)[None, :]), 4, RUN // 2, 2)


@triton.jit
def _as_factor(r_RC, TURNS: tl.constexpr):
    """What threads have loaded, neighbours each, as the left factor that the tensor cores want of them: the inverse of
    `in_order`. As there, no number moves, if the numbers have 16 bits.
    """
    r_RC = swapped(r_RC, 4, r_RC.shape[1] // 8, 2)
    return swapped_rows(r_RC, 2, TURNS) if TURNS else r_RC


@triton.jit
def _dealt(place_R, TURNS: tl.constexpr):
    """The rows to load for `swapped_rows(…, 2, TURNS)` to leave them in order."""
    first_R = place_R // (16 * TURNS) * (16 * TURNS) + place_R // (8 * TURNS) % 2 * 8
    return first_R + place_R // 8 % TURNS * 16 + place_R % 8


@triton.jit
def _add_rest(y, r, high_m, low_m, TURNS: tl.constexpr):
    """y + what the first halves of r and of some rows of M leave out of r M, but for the product of second halves."""
    high = r.to(tl.float16)
    y = tl.dot(_as_factor((r - high.to(tl.float32)).to(tl.float16), TURNS), high_m, y)
    return tl.dot(_as_factor(high, TURNS), low_m, y)


@triton.jit(do_not_specialize=["num_rows", "num_angles"])
def _rotate_heads(
    x_ptr, cos_ptr, sin_ptr, m_ptr, clip_ptr, y_ptr, codes_ptr, scale_ptr, second_ptr,
    num_rows, num_angles, factor,
    N: tl.constexpr, STRIDE: tl.constexpr, HEADS: tl.constexpr, ROPE: tl.constexpr, WRAPS: tl.constexpr,
    SPLIT: tl.constexpr, grid: tl.constexpr, PACKED: tl.constexpr,
    TILE_R: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = N // 2
    C: tl.constexpr = min(HALF, 32)
    COUNT: tl.constexpr = N // C
    BITS: tl.constexpr = grid.bits if PACKED else y_ptr.dtype.element_ty.primitive_bitwidth
    WHOLE: tl.constexpr = ROPE and not WRAPS and TILE_R % HEADS == 0
    # A tile of fewer rows has its columns in several warps, and a thread no more than pairs of neighbours.
    TURNS: tl.constexpr = WARPS if TILE_R % (16 * WARPS) == 0 else 0
    RUN: tl.constexpr = neighbours(N, BITS) if TURNS else 2
    BY_TURNS: tl.constexpr = interleaved(TILE_R, WARPS, RUN, BITS)
    STORES: tl.constexpr = stores(N, RUN, BITS)
    first_tile = tl.program_id(0).to(tl.int64)
    if AHEAD:
        to_cache(x_ptr, first_tile, num_rows // TILE_R, N * TILE_R, N * TILE_R)
    ms = ()
    lows = ()
    for p in tl.static_range(COUNT):
        ms = ms + (_rows(m_ptr, p * C, C, N, RUN),)
        if SPLIT:
            lows = lows + (_rows(m_ptr + N * N, p * C, C, N, RUN),)
    clip = tl.load(clip_ptr)
    for tile in tl.range(first_tile, tl.cdiv(num_rows, TILE_R), tl.num_programs(0), num_stages=STAGES):
        start = tile * TILE_R
        place_R = tl.arange(0, TILE_R)
        if TURNS and BY_TURNS == 1:
            place_R = _dealt(place_R, TURNS)
        row_R1 = place_R[:, None]
        mask_R1 = row_R1 < num_rows - start
        # The angles of a row: those of its token. A tile of whole tokens needs no division by a number of heads.
        if WHOLE:
            angle = start // HEADS * STRIDE
            line_R1 = row_R1 // HEADS
        else:
            angle = start * 0
            line_R1 = (start.to(tl.int32) + row_R1) // HEADS % num_angles
        loaded = ()
        for p in tl.static_range(HALF // C):
            first = _piece(x_ptr + start * N, row_R1, p * C, C, N, mask_R1)
            second = _piece(x_ptr + start * N, row_R1, HALF + p * C, C, N, mask_R1)
            if ROPE:
                cos = _piece(cos_ptr + angle, line_R1, p * C, C, STRIDE, mask_R1)
                sin = _piece(sin_ptr + angle, line_R1, p * C, C, STRIDE, mask_R1)
                loaded = loaded + ((first, second, cos, sin),)
            else:
                loaded = loaded + ((first, second),)
        if AHEAD:  # behind the loads of this tile, which come first
            next_tile = tile + AHEAD * tl.num_programs(0)
            to_cache(x_ptr, next_tile, num_rows // TILE_R, N * TILE_R, N * TILE_R)
            if WHOLE:
                span: tl.constexpr = TILE_R // HEADS * STRIDE
                to_cache(cos_ptr, next_tile, num_rows // TILE_R, span, span - STRIDE + HALF)
                to_cache(sin_ptr, next_tile, num_rows // TILE_R, span, span - STRIDE + HALF)
        firsts = ()
        seconds = ()
        most_R = tl.zeros((TILE_R,), tl.float32)
        for p in tl.static_range(HALF // C):
            first = loaded[p][0].to(tl.float32)
            second = loaded[p][1].to(tl.float32)
            if ROPE:
                cos = loaded[p][2].to(tl.float32)
                sin = loaded[p][3].to(tl.float32)
                turned = tl.fma(second, cos, first * sin)
                first = tl.fma(first, cos, -(second * sin))
                second = turned
            most_R = tl.maximum(most_R, tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=1))
            firsts = firsts + (first,)
            seconds = seconds + (second,)
        rs = firsts + seconds
        # max drops NaN, but the product carries it on.
        up_R, down_R = near_largest(most_R)
        y = tl.zeros((TILE_R, N), tl.float32)
        if SPLIT:  # before the large terms: tensor cores cut off what lies below a sum's last bit, step by step
            for p in tl.static_range(COUNT):
                y = _add_rest(y, rs[p] * up_R[:, None], ms[p], lows[p], TURNS)
        for p in tl.static_range(COUNT):
            y = tl.dot(_as_factor((rs[p] * up_R[:, None]).to(tl.float16), TURNS), ms[p], y)
        y = in_order(y, RUN, BY_TURNS)
        unscale_R = down_R * factor
        if TURNS and BY_TURNS == 1:
            unscale_R = tl.reshape(swapped_rows(unscale_R[:, None], 2, TURNS), (TILE_R,))
        if grid is None:
            store(y_ptr, y * unscale_R[:, None], start, num_rows - start, 0, N, STORES)
        else:
            low, high = extremes(y, unscale_R, grid, N)
            put_on_grid(y, unscale_R, low, high, 1.0, clip, y_ptr, codes_ptr, scale_ptr, second_ptr,
                        start, num_rows - start, 0, False, 0, N, grid, PACKED, STORES)  # fmt: skip


def rotate_heads(
    x: Tensor,
    matrix: Tensor,
    factor: float = 1.0,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    grid: Grid | None = None,
    clip: Tensor | None = None,
    packed: bool = False,
    cut: Cut | None = None,
) -> Tensor | Codes:
    """`x (B, T, H, N)`, N a power of two from 32 to LARGEST_HEAD of its dtype, times `factor` · `matrix`, which is
    `split_matrix`'s.

    `cos` and `sin`, `(1 or B, T, N / 2)`, are those of the angles of each token; with neither, x is not turned, and
    has any leading axes. A `grid`, whose `width` is N for one to a row, puts each row on it; `packed` gives codes.
    """
    x = x.contiguous()
    size = matrix.shape[-1]
    assert size <= LARGEST_HEAD[x.element_size()]
    assert x.shape[-1] == size or (cos is None and x.shape[-1] % size == 0)
    assert (cos is None) == (sin is None)
    num_rows = x.numel() // size
    y, codes, scale, second = room_for(x, grid, packed)
    num_angles, stride, num_heads = 1, size // 2, 1
    if cos is not None and sin is not None:
        cos, sin = _evenly_apart(cos), _evenly_apart(sin)
        if cos.stride() != sin.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
        assert cos.shape == sin.shape
        assert cos.shape[1:] == (x.shape[1], size // 2)
        assert cos.shape[0] in (1, x.shape[0])
        num_angles, num_heads = cos.shape[0] * cos.shape[1], x.shape[-2]
        stride = cos.stride(1) if num_angles > 1 else stride
    factor /= _LIFT
    cut = cut or best_cut(num_rows, size, on_grid=grid is not None)
    if num_rows:
        tiles = triton.cdiv(num_rows, cut.rows)
        count = min(tiles, cut.programs * processors(x.device))
        tables = [] if cos is None or sin is None else [cos, sin]
        ahead = cut.ahead if count < tiles and aligned(x, *tables) else 0
        _rotate_heads[(count,)](
            x, x if cos is None else cos, x if sin is None else sin, matrix, one(x.device) if clip is None else clip,
            y, codes, scale, second, num_rows, num_angles, factor,
            size, stride, num_heads, cos is not None, num_angles * num_heads < num_rows,
            x.dtype == torch.float32, grid, packed,
            cut.rows, cut.num_stages, cut.num_warps, ahead,
            num_warps=cut.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return Codes(codes, scale, None if second is x else second) if packed else y


def _evenly_apart(angles: Tensor) -> Tensor:
    """Angles `(B, T, N / 2)` whose lines, of all of the batch, are as far apart as the first two."""
    batch, length, _ = angles.shape
    even = batch == 1 or (length > 1 and angles.stride(0) == angles.stride(1) * length)
    return angles if even and angles.stride(-1) == 1 else angles.clone(memory_format=torch.contiguous_format)


def split_matrix(matrix: Tensor) -> Tensor:
    """_LIFT times a matrix `(N, N)`, whose entries are less than 16, as the sum of two in fp16, `(2, N, N)`."""
    lifted = matrix.double() * _LIFT
    high = lifted.half()
    return torch.stack([high, (lifted - high.double()).half()])


def best_cut(num_rows: int, size: int, *, on_grid: bool) -> Cut:
    """How the rows are cut; measured on an H100 (`benchmarks/transforms.py`)."""
    if num_rows <= 1024:
        return Cut(16, 8 if size >= 128 else 4, 1, 8)
    if size < 128:
        return Cut(64, 4, 1, 8 if on_grid else 64, 1)
    return Cut(64, 4, 1, 2 if on_grid and num_rows < 2**16 else 3, 1)
