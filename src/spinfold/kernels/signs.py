"""A matrix of ±1 as bits, which each thread makes the numbers of that it hands to the tensor cores.

In shared memory 192 × 176 numbers of 16 bits take 66 KiB, and an SM holds two programs; as words of bits they take 9,
in registers, and two instructions for two numbers. The tensor cores want of thread 4 j + t of a warp the columns
8 p + 2 t and the next one of rows j and j + 8. So a word has the signs of one row and one t, for all p of up to 128
columns: that of column 8 p + 2 t + e is bit 15 + 16 e - p.

Shapes: R rows, D columns of a block, of which there are several with 4 words for each row.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinfold.kernels.grids import in_hardware

__all__ = ["from_words", "load_words", "packed_signs"]


def packed_signs(x_RD: Tensor, depths: tuple[int, ...]) -> Tensor:
    """Words `(R, 4 C)`, int32, of a matrix of ±1 in C blocks of columns. 0 becomes 1."""
    assert max(depths) <= 128
    words = []
    for x_Rd in x_RD.split(list(depths), dim=1):
        negative_RPte = (x_Rd < 0).unflatten(1, (-1, 4, 2)).long()
        p = torch.arange(negative_RPte.shape[1], device=x_RD.device)[:, None, None]
        e = torch.arange(2, device=x_RD.device)
        words.append((negative_RPte << (15 + 16 * e - p)).sum((1, 3)))
    words_RW = torch.cat(words, 1)
    return (words_RW - ((words_RW >> 31) << 32)).int()  # as two's complement


@triton.jit
def load_words(
    ptr, ROW: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, WARPS: tl.constexpr
):
    """The words of a tile's rows 16 i + j and of its rows 16 i + j + 8, each `(4, 8, R / 16)`, of a block of
    columns; SIZE words are those of a row. Rows are `threads.swapped_rows(…, 2, WARPS)`.

    In this order of axes each thread loads what it needs itself.
    """
    t = tl.arange(0, 4)[:, None, None]
    j = tl.arange(0, 8)[None, :, None]
    i = tl.arange(0, ROWS // 16)[None, None, :]
    row = ROW + i // WARPS * (16 * WARPS) + i % WARPS * 8 + j
    place = ptr + row * SIZE + 4 * BLOCK + t
    return tl.load(place), tl.load(place + 8 * WARPS * SIZE)


@triton.jit
def from_words(words, turn, D: tl.constexpr, dtype: tl.constexpr):
    """A matrix `(R, D)` of ±1 in a dtype of 16 bits. `turn` is the number of a loop's turn, not negative: without it
    the compiler would make the matrix once, before the loop, and put it in shared memory.

    The two numbers of a register are neighbours, e = 0 and 1, of one word and one p. Their signs come to bits 15 and
    31; the rest is that of two ones.
    """
    STRIPS: tl.constexpr = words[0].shape[2]
    P: tl.constexpr = D // 8
    ONE: tl.constexpr = 0x3F80 if dtype == tl.bfloat16 else 0x3C00
    word = tl.join(words[0], words[1])[:, :, :, :, None]
    p = tl.arange(0, P)[None, None, None, None, :]
    if in_hardware(8, 0):
        # Two instructions that stay where they are, since they seem to read `turn`.
        ones = tl.full((1, 1, 1, 1, 1), ONE << 16 | ONE, tl.int32)
        two = tl.inline_asm_elementwise(
            "{ .reg .b32 %s; shl.b32 %s, $1, $2; lop3.b32 $0, %s, 0x80008000, $3, 0xEA; } // $4",
            "=r,r,r,r,r", [word, p, ones, turn], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        two = (word ^ (turn >> 31)) << p & -0x7FFF8000 | (ONE << 16 | ONE)
    x = tl.join(two.to(tl.int16), (two >> 16).to(tl.int16))
    x_RD = tl.reshape(tl.permute(x, (2, 3, 1, 4, 0, 5)), (16 * STRIPS, D))
    return x_RD.to(dtype, bitcast=True)
