"""Rotary embedding, a rotation of each head, and dynamic quantization in one pass over queries or keys.

    r = x ∘ [cos, cos] + [-x₂, x₁] ∘ [sin, sin],  x = [x₁, x₂]        y = r M        then y on its row's grid

M is any matrix of a head's size. The product runs on the tensor cores: r is brought near fp16's largest number, row by
row, by a power of two, and rounded to fp16, as M is; an fp32 x and its M are cut in two fp16 numbers, 22 bits
together. Nothing else is rounded in between, but tensor cores don't round sums: they cut them off.

Shapes: R rows, one for each head of each token, the heads of a token together; N head size.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinfold.kernels.grids import Codes, Grid, extremes, near_largest, one, processors, put_on_grid, room_for, store
from spinfold.kernels.threads import in_order, interleaved, neighbours, stores, swapped, swapped_rows

__all__ = ["LARGEST_HEAD", "rotate_heads"]

LARGEST_HEAD = {2: 256, 4: 128}
"""By the bytes of a number: shared memory holds M, for fp32 both its pieces."""
_LIFT = 2.0**12
"""Without it, second halves of the entries of an orthogonal matrix were subnormal in fp16, with fewer than 11 bits."""


@triton.jit
def _half(ptr, line_R1, FIRST: tl.constexpr, HALF: tl.constexpr, stride, mask_R1):
    return tl.load(ptr + line_R1 * stride + FIRST + tl.arange(0, HALF)[None, :], mask=mask_R1, other=0.0)


@triton.jit
def _rows(m_ptr, FIRST: tl.constexpr, HALF: tl.constexpr, N: tl.constexpr, RUN: tl.constexpr):
    """Rows of a matrix with N columns, which are in the order of `in_order`."""
    m = tl.load(m_ptr + (FIRST + tl.arange(0, HALF)[:, None]) * N + tl.arange(0, N)[None, :])
    return swapped(m, 4, RUN // 2, 2)


@triton.jit
def _swapped_number(row, WARPS: tl.constexpr):
    """The row of a tile that stands at place `row` in the order of `swapped_rows(…, 2, WARPS)`."""
    return row // (16 * WARPS) * (16 * WARPS) + row // 8 % 2 * (8 * WARPS) + row // 16 % WARPS * 8 + row % 8


@triton.jit
def _add_rest(y, r, high_m, low_m):
    """y + what the first halves of r and of some rows of M leave out of r M, but for the product of second halves."""
    high = r.to(tl.float16)
    y = tl.dot((r - high.to(tl.float32)).to(tl.float16), high_m, y)
    return tl.dot(high, low_m, y)


@triton.jit(do_not_specialize=["num_rows", "num_angles"])
def _rotate_heads(
    x_ptr, cos_ptr, sin_ptr, m_ptr, clip_ptr, y_ptr, codes_ptr, scale_ptr, second_ptr,
    num_rows, num_heads, num_angles, cos_stride, factor,
    N: tl.constexpr, ROPE: tl.constexpr, SPLIT: tl.constexpr, grid: tl.constexpr, PACKED: tl.constexpr,
    TILE_R: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = N // 2
    BITS: tl.constexpr = grid.bits if PACKED else y_ptr.dtype.element_ty.primitive_bitwidth
    # A tile of fewer rows has its columns in several warps, and a thread no more than pairs of neighbours.
    FULL: tl.constexpr = TILE_R % (16 * WARPS) == 0
    RUN: tl.constexpr = neighbours(N, BITS) if FULL else 2
    BY_TURNS: tl.constexpr = interleaved(TILE_R, WARPS, RUN, BITS)
    STORES: tl.constexpr = stores(N, RUN, BITS)
    top = _rows(m_ptr, 0, HALF, N, RUN)
    bottom = _rows(m_ptr, HALF, HALF, N, RUN)
    low_top = top
    low_bottom = bottom
    if SPLIT:
        low_top = _rows(m_ptr + N * N, 0, HALF, N, RUN)
        low_bottom = _rows(m_ptr + N * N, HALF, HALF, N, RUN)
    clip = tl.load(clip_ptr)
    first_tile = tl.program_id(0).to(tl.int64)
    for tile in tl.range(first_tile, tl.cdiv(num_rows, TILE_R), tl.num_programs(0), num_stages=STAGES):
        start = tile * TILE_R
        row_R1 = start + _swapped_number(tl.arange(0, TILE_R), BY_TURNS)[:, None]
        mask_R1 = row_R1 < num_rows
        first = _half(x_ptr, row_R1, 0, HALF, N, mask_R1).to(tl.float32)
        second = _half(x_ptr, row_R1, HALF, HALF, N, mask_R1).to(tl.float32)
        if ROPE:
            line_R1 = row_R1.to(tl.int32) // num_heads % num_angles
            cos = _half(cos_ptr, line_R1, 0, HALF, cos_stride, mask_R1).to(tl.float32)
            sin = _half(sin_ptr, line_R1, 0, HALF, cos_stride, mask_R1).to(tl.float32)
            turned = second * cos + first * sin
            first = first * cos - second * sin
            second = turned
        most_R = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1))
        # max drops NaN, but the product carries it on.
        up_R, down_R = near_largest(most_R)
        first, second = first * up_R[:, None], second * up_R[:, None]
        y = tl.zeros((TILE_R, N), tl.float32)
        if SPLIT:  # before the large terms: tensor cores cut off what lies below a sum's last bit, step by step
            y = _add_rest(y, first, top, low_top)
            y = _add_rest(y, second, bottom, low_bottom)
        y = tl.dot(first.to(tl.float16), top, y)
        y = tl.dot(second.to(tl.float16), bottom, y)
        unscale_R = down_R * factor
        if grid is None:
            y = in_order(y * unscale_R[:, None], RUN, BY_TURNS)
            store(y_ptr, y, start, num_rows - start, 0, N, STORES)
        else:
            y = in_order(y, RUN, BY_TURNS)
            unscale_R = tl.reshape(swapped_rows(unscale_R[:, None], BY_TURNS, 2), (TILE_R,))
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
    cut: tuple[int, int, int, int] | None = None,
) -> Tensor | Codes:
    """`x (B, T, H, N)`, N a power of two from 32 to LARGEST_HEAD of its dtype, times `factor` · `matrix`, which is
    `split_matrix`'s.

    `cos` and `sin`, `(1 or B, T, N / 2)`, are those of the angles of each token; with neither, x is not turned, and
    has any leading axes. A `grid`, whose `width` is N for one to a row, puts each row on it; `packed` gives codes.
    `cut` has the rows of a tile, warps, tiles in flight, and programs per SM.
    """
    x = x.contiguous()
    size = matrix.shape[-1]
    assert size <= LARGEST_HEAD[x.element_size()]
    num_rows = x.numel() // size
    y, codes, scale, second = room_for(x, grid, packed)
    num_angles, stride = 1, 0
    if cos is not None and sin is not None:
        assert cos.stride() == sin.stride() and cos.stride(-1) == 1
        assert cos.shape[0] == 1 or cos.stride(0) == cos.stride(1) * cos.shape[1]
        num_angles, stride = cos.shape[0] * cos.shape[1], cos.stride(1)
    factor /= _LIFT
    tile, num_warps, num_stages, programs = cut or best_cut(num_rows, size, on_grid=grid is not None)
    if num_rows:
        count = min(triton.cdiv(num_rows, tile), programs * processors(x.device))
        _rotate_heads[(count,)](
            x, x if cos is None else cos, x if sin is None else sin, matrix, one(x.device) if clip is None else clip,
            y, codes, scale, second, num_rows, x.shape[-2] if cos is not None else 1, num_angles, stride, factor,
            size, cos is not None, x.dtype == torch.float32, grid, packed, tile, num_stages, num_warps,
            num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return Codes(codes, scale, None if second is x else second) if packed else y


def split_matrix(matrix: Tensor) -> Tensor:
    """_LIFT times a matrix `(N, N)`, whose entries are less than 16, as the sum of two in fp16, `(2, N, N)`."""
    lifted = matrix.double() * _LIFT
    high = lifted.half()
    return torch.stack([high, (lifted - high.double()).half()])


def best_cut(num_rows: int, size: int, *, on_grid: bool) -> tuple[int, int, int, int]:
    """How the rows are cut, see `rotate_heads`; measured on an H100 (`benchmarks/transforms.py`)."""
    if num_rows <= 1024:
        return 16, 8, 1, 8
    if size < 128:
        return (64, 4, 1, 8) if on_grid else (64, 4, 2, 64)
    return (64, 4, 1 if on_grid else 2, 3)  # each program reads all of the matrix, so few of them
