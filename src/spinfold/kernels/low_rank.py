"""A low-rank correction of the residual stream and the sum behind it.

    y = b + x + (x U) V        or, without x itself,        y = b + (x U) V

Two kernels: one for x U, in which a program takes a tile of tokens, and for few tokens a part of the channels; one for
the sum, in which a program takes a tile of tokens and channels and adds up the parts of x U first.

`maps.lowrank` defines the map, of which V is K Uᵀ. Products of 16-bit numbers run on the tensor cores as they are,
those of fp32 ones in three TF32 parts, or, where TF32 is off, as in a proof, in IEEE fp32: tensor cores cut off what
they add up, and sixty corrections in a row cut the same way.

Shapes: T tokens, N channels, R rank, C parts of the channels.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["LARGEST_RANK", "Cut", "low_rank_sum"]

LARGEST_RANK = 256
_FEW = 64
_AT_ONCE = tl.constexpr(8)


class Cut(NamedTuple):
    """Tokens of a tile, channels of one in x U and in the sum, parts of the channels, warps, tiles in flight."""

    tokens: int
    channels: int
    channels_of_sum: int
    parts: int
    num_warps: int
    num_stages: int


@triton.jit(do_not_specialize=["num_tokens"])
def _inner(
    x_ptr, u_ptr, part_ptr, num_tokens, size, rank, share,
    PRECISION: tl.constexpr, TILE_T: tl.constexpr, TILE_N: tl.constexpr, TILE_R: tl.constexpr,
):  # fmt: skip
    """x U of a tile of tokens and one `share` of the channels."""
    row_T1 = (tl.program_id(0).to(tl.int64) * TILE_T + tl.arange(0, TILE_T))[:, None]
    rank_1R = tl.arange(0, TILE_R)[None, :]
    part_TR = tl.zeros((TILE_T, TILE_R), tl.float32)
    begin = tl.program_id(1) * share
    for start in range(begin, begin + share, TILE_N):
        channel_N = start + tl.arange(0, TILE_N)
        mask_TN = (row_T1 < num_tokens) & (channel_N < size)[None, :]
        x_TN = tl.load(x_ptr + row_T1 * size + channel_N[None, :], mask=mask_TN, other=0.0)
        mask_NR = (channel_N < size)[:, None] & (rank_1R < rank)
        u_NR = tl.load(u_ptr + channel_N[:, None] * rank + rank_1R, mask=mask_NR, other=0.0)
        part_TR = tl.dot(x_TN, u_NR, part_TR, input_precision=PRECISION)
    tl.store(part_ptr + (tl.program_id(1) * num_tokens + row_T1) * TILE_R + rank_1R, part_TR, mask=row_T1 < num_tokens)


@triton.jit(do_not_specialize=["num_tokens"])
def _sum(
    x_ptr, b_ptr, part_ptr, v_ptr, y_ptr, num_tokens, size, rank,
    PARTS: tl.constexpr, WITH_X: tl.constexpr, PRECISION: tl.constexpr,
    TILE_T: tl.constexpr, TILE_N: tl.constexpr, TILE_R: tl.constexpr,
):  # fmt: skip
    """y of a tile of tokens and channels."""
    first = tl.program_id(1).to(tl.int64) * TILE_T
    row_T1 = (first + tl.arange(0, TILE_T))[:, None]
    rank_R1 = tl.arange(0, TILE_R)[:, None]
    channel_1N = (tl.program_id(0) * TILE_N + tl.arange(0, TILE_N))[None, :]
    offset_TN = row_T1 * size + channel_1N
    mask_TN = (row_T1 < num_tokens) & (channel_1N < size)
    v_RN = tl.load(v_ptr + rank_R1 * size + channel_1N, mask=(rank_R1 < rank) & (channel_1N < size), other=0.0)
    y_TN = tl.load(b_ptr + offset_TN, mask=mask_TN, other=0.0).to(tl.float32)
    if WITH_X:
        y_TN += tl.load(x_ptr + offset_TN, mask=mask_TN, other=0.0).to(tl.float32)
    # The parts of x U flat, so that each thread adds up numbers of its own, several in flight.
    place = first * TILE_R + tl.arange(0, TILE_T * TILE_R)[None, :]
    at_once: tl.constexpr = 1 if PARTS == 1 else _AT_ONCE
    inner = tl.zeros((TILE_T * TILE_R,), tl.float32)
    for start in tl.static_range(0, PARTS, at_once):
        part_C1 = start + tl.arange(0, at_once)[:, None]
        mask = (part_C1 < PARTS) & (place < num_tokens * TILE_R)
        inner += tl.sum(tl.load(part_ptr + part_C1 * (num_tokens * TILE_R) + place, mask=mask, other=0.0), axis=0)
    inner_TR = tl.reshape(inner, (TILE_T, TILE_R)).to(v_RN.dtype)
    y_TN += tl.dot(inner_TR, v_RN, input_precision=PRECISION)
    tl.store(y_ptr + offset_TN, y_TN.to(y_ptr.dtype.element_ty), mask=mask_TN)


def low_rank_sum(
    x: Tensor, branch: Tensor, U_NR: Tensor, V_RN: Tensor, *, with_x: bool = True, cut: Cut | None = None
) -> Tensor:
    """branch + x + (x U) V, or branch + (x U) V, in the wider dtype of `x` and `branch` (..., N); U and V in x's.

    x U is rounded to x's dtype before it meets V.
    """
    num_tokens, size, rank = x.numel() // x.shape[-1], x.shape[-1], U_NR.shape[1]
    assert rank <= LARGEST_RANK
    assert U_NR.dtype == V_RN.dtype == x.dtype
    x, branch, U_NR, V_RN = x.contiguous(), branch.contiguous(), U_NR.contiguous(), V_RN.contiguous()
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, branch.dtype))
    if not num_tokens:
        return y
    cut = cut or best_cut(num_tokens, rank, x.dtype)
    share = triton.cdiv(triton.cdiv(size, cut.parts), cut.channels) * cut.channels
    shape = {
        "PRECISION": "tf32x3" if x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "TILE_T": cut.tokens,
        "TILE_R": max(16, triton.next_power_of_2(rank)),
        "num_warps": cut.num_warps,
        "num_stages": cut.num_stages,
    }
    tiles, parts = triton.cdiv(num_tokens, cut.tokens), triton.cdiv(size, share)
    part_CTR = x.new_empty((parts, num_tokens, shape["TILE_R"]), dtype=torch.float32)
    _inner[(tiles, parts)](x, U_NR, part_CTR, num_tokens, size, rank, share, TILE_N=cut.channels, **shape)
    _sum[(triton.cdiv(size, cut.channels_of_sum), tiles)](
        x, branch, part_CTR, V_RN, y, num_tokens, size, rank,
        PARTS=parts, WITH_X=with_x, TILE_N=cut.channels_of_sum, **shape,
    )  # fmt: skip
    return y


def best_cut(num_tokens: int, rank: int, dtype: torch.dtype) -> Cut:
    """How the work is cut; measured on an H100 (`benchmarks/transforms.py`)."""
    if dtype == torch.float32:
        return Cut(16, 64, 64, 16, 4, 2) if num_tokens <= _FEW else Cut(32, 64, 64, 1, 8, 2)
    channels = 128 if rank <= 128 else 64  # of U, as many as shared memory holds three times
    return Cut(16, channels, 128, 16, 4, 3) if num_tokens <= _FEW else Cut(64, channels, 128, 1, 4, 3)
