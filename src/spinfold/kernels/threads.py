"""Which numbers of a product a thread is left with, and an order of rows and columns in which it can store them.

The tensor cores leave a thread pairs of neighbours. With rows and columns of the factors in another order it has runs
of them, as many as the 16 bytes that one instruction stores; and the product in its own order again is what Triton
deals out to the threads for a store, so no number has to move between them.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["in_order", "interleaved", "neighbours", "of_a_thread", "stores", "swapped", "swapped_rows"]


@triton.constexpr_function
def neighbours(columns, bits):
    """Columns of every line that a thread is to hold in a row: 16 bytes, if that leaves work for four threads."""
    return min(128 // bits, columns // 4)


@triton.constexpr_function
def interleaved(rows, warps, run, bits):
    """Warps whose rows alternate in the tile's order, eight at a time: as stores of 16 bytes deal out rows that four
    threads fill. Rows that fewer fill stay within a warp.
    """
    return warps if rows % (16 * warps) == 0 and run * bits == 128 else 1


@triton.constexpr_function
def of_a_thread(rows, columns, warps):
    """Neighbours of a line that one thread has, eight if the tile fills all warps; else all columns."""
    return 8 if rows % (16 * warps) == 0 and columns >= 32 else columns


@triton.constexpr_function
def stores(columns, run, bits):
    """Parts of the columns, each of which four threads fill with 16 bytes."""
    return columns // (4 * run) if run * bits == 128 else 1


@triton.jit
def swapped(x, FIRST: tl.constexpr, SECOND: tl.constexpr, REST: tl.constexpr):
    """Columns, whose numbers are (…, i, j, k), in the order (…, j, i, k), for i < FIRST, j < SECOND, k < REST."""
    y = tl.reshape(x, (x.shape[0], x.shape[1] // (FIRST * SECOND * REST), FIRST, SECOND, REST))
    return tl.reshape(tl.permute(y, (0, 1, 3, 2, 4)), x.shape)


@triton.jit
def swapped_rows(x, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """The same for rows, in eights."""
    y = tl.reshape(x, (x.shape[0] // (FIRST * SECOND * 8), FIRST, SECOND, 8, x.shape[1]))
    return tl.reshape(tl.permute(y, (0, 2, 1, 3, 4)), x.shape)


@triton.jit
def in_order(z_RC, RUN: tl.constexpr, WARPS: tl.constexpr):
    """A product whose factors have their columns `swapped(…, 4, RUN / 2, 2)` and rows `swapped_rows(…, 2, WARPS)`, in
    order again. No number moves: of a line, the tensor cores leave columns 8 k + 2 t and the next one with thread t of
    four, which in order has RUN neighbours; and rows 16 w to 16 w + 15 with warp w, which in order has eight
    neighbours, and eight more 8 WARPS further on.
    """
    return swapped_rows(swapped(z_RC, RUN // 2, 4, 2), WARPS, 2)
