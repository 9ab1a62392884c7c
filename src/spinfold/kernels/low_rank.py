"""A low-rank correction of the residual stream and the sum behind it.

    y = b + x + (x U) V        or, without x itself,        y = b + (x U) V

Two kernels: one for x U, one for the sum. All of a row of x is needed before any of it can be summed, so x is read
twice, unless the sum that made x has made x U as well: a stream goes through one correction after another, and the sum
has every number of the next one's x in registers. Then one kernel reads x and b once and writes y.

Either kernel takes a tile of tokens and a part of the channels, so x U comes in parts, which the sum adds up first.

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

from spinfold.kernels.grids import shared_memory

__all__ = ["LARGEST_RANK", "Cut", "inner_product", "low_rank_sum"]

LARGEST_RANK = 256
_FEW, _MANY = 64, 8192
_AT_ONCE = tl.constexpr(8)
"""Parts of a product that a thread asks for before it adds them up."""
_BESIDE = 16384
"""Bytes of shared memory for what does not grow with a tile's channels."""


class Cut(NamedTuple):
    """Tokens and channels of a tile, parts of the channels, warps, tiles in flight. The sum may have fewer than the 16
    tokens that the tensor cores want, and pads them.
    """

    tokens: int
    channels: int
    parts: int
    num_warps: int
    num_stages: int


@triton.jit
def _factor(ptr, row, column, num_rows, num_columns):
    """A tile of U or V, zero beyond it."""
    row_A1, column_1B = row[:, None], column[None, :]
    mask_AB = (row_A1 < num_rows) & (column_1B < num_columns)
    return tl.load(ptr + row_A1 * num_columns + column_1B, mask=mask_AB, other=0.0)


@triton.jit(do_not_specialize=["num_tokens"])
def _inner(
    x_ptr, u_ptr, part_ptr, num_tokens, size, rank, share,
    PRECISION: tl.constexpr, TILE_T: tl.constexpr, TILE_N: tl.constexpr, TILE_R: tl.constexpr,
):  # fmt: skip
    """x U of a tile of tokens and one `share` of the channels."""
    row_T1 = (tl.program_id(0).to(tl.int64) * TILE_T + tl.arange(0, TILE_T))[:, None]
    rank_R = tl.arange(0, TILE_R)
    part_TR = tl.zeros((TILE_T, TILE_R), tl.float32)
    begin = tl.program_id(1) * share
    for start in range(begin, begin + share, TILE_N):
        channel_N = start + tl.arange(0, TILE_N)
        mask_TN = (row_T1 < num_tokens) & (channel_N < size)[None, :]
        x_TN = tl.load(x_ptr + row_T1 * size + channel_N[None, :], mask=mask_TN, other=0.0)
        part_TR = tl.dot(x_TN, _factor(u_ptr, channel_N, rank_R, size, rank), part_TR, input_precision=PRECISION)
    place_TR = (tl.program_id(1) * num_tokens + row_T1) * TILE_R + rank_R[None, :]
    tl.store(part_ptr + place_TR, part_TR, mask=row_T1 < num_tokens)


@triton.jit
def _added_up(part_ptr, first, end, stride, PARTS: tl.constexpr, TILE_T: tl.constexpr, TILE_R: tl.constexpr):
    """x U of the tokens from `first` to `end`, from its parts: flat, so that each thread adds up numbers of its own."""
    at_once: tl.constexpr = min(triton.next_power_of_2(PARTS), _AT_ONCE)
    place_1P = first * TILE_R + tl.arange(0, TILE_T * TILE_R)[None, :]
    inner_P = tl.zeros((TILE_T * TILE_R,), tl.float32)
    for start in tl.static_range(0, PARTS, at_once):
        part_C1 = start + tl.arange(0, at_once)[:, None]
        mask_CP = (part_C1 < PARTS) & (place_1P < end * TILE_R)
        inner_P += tl.sum(tl.load(part_ptr + part_C1 * stride + place_1P, mask=mask_CP, other=0.0), axis=0)
    return tl.reshape(inner_P, (TILE_T, TILE_R))


@triton.jit(do_not_specialize=["num_tokens"])
def _sum(
    x_ptr, b_ptr, part_ptr, v_ptr, y_ptr, next_u_ptr, next_part_ptr, num_tokens, size, rank, next_rank, share,
    PARTS: tl.constexpr, WITH_X: tl.constexpr, WITH_NEXT: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, TILE_N: tl.constexpr, TILE_R: tl.constexpr, TILE_Q: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y of a tile of tokens and one `share` of the channels; and what these add to y U of the next correction."""
    TILE_T: tl.constexpr = max(TOKENS, 16)
    first = tl.program_id(1).to(tl.int64) * TOKENS
    end = tl.minimum(first + TOKENS, num_tokens)
    row_T1 = (first + tl.arange(0, TILE_T))[:, None]
    rank_R, rank_Q = tl.arange(0, TILE_R), tl.arange(0, TILE_Q)
    stride = num_tokens.to(tl.int64) * TILE_R
    inner_TR = _added_up(part_ptr, first, end, stride, PARTS, TILE_T, TILE_R).to(v_ptr.dtype.element_ty)
    next_TQ = tl.zeros((TILE_T, TILE_Q), tl.float32)
    begin = tl.program_id(0) * share
    for start in tl.range(begin, begin + share, TILE_N, num_stages=STAGES):
        channel_N = start + tl.arange(0, TILE_N)
        offset_TN = row_T1 * size + channel_N[None, :]
        mask_TN = (row_T1 < end) & (channel_N < size)[None, :]
        y_TN = tl.load(b_ptr + offset_TN, mask=mask_TN, other=0.0).to(tl.float32)
        if WITH_X:
            y_TN += tl.load(x_ptr + offset_TN, mask=mask_TN, other=0.0).to(tl.float32)
        v_RN = _factor(v_ptr, rank_R, channel_N, rank, size)
        y_TN = tl.dot(inner_TR, v_RN, y_TN, input_precision=PRECISION).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offset_TN, y_TN, mask=mask_TN)
        if WITH_NEXT:
            u_NQ = _factor(next_u_ptr, channel_N, rank_Q, size, next_rank)
            next_TQ = tl.dot(y_TN, u_NQ, next_TQ, input_precision=PRECISION)
    if WITH_NEXT:
        place_TQ = (tl.program_id(0) * num_tokens + row_T1) * TILE_Q + rank_Q[None, :]
        tl.store(next_part_ptr + place_TQ, next_TQ, mask=row_T1 < end)


def inner_product(x: Tensor, U_NR: Tensor, cut: Cut | None = None) -> Tensor:
    """x U of `x (..., N)`, with which `low_rank_sum` begins: in fp32, in parts that it adds up, and padded."""
    x, U_NR, (size, rank) = x.contiguous(), U_NR.contiguous(), U_NR.shape
    assert rank <= LARGEST_RANK
    assert x.shape[-1] == size
    assert U_NR.dtype == x.dtype
    num_tokens = x.numel() // size
    cut = cut or best_cut_of_inner(num_tokens, rank, x.dtype, x.device)
    parts, share = _shares(size, cut)
    part_CTR = x.new_empty((parts, num_tokens, _tile(rank)), dtype=torch.float32)
    if num_tokens:
        _inner[(triton.cdiv(num_tokens, cut.tokens), parts)](
            x, U_NR, part_CTR, num_tokens, size, rank, share,
            PRECISION=_precision(x.dtype), TILE_T=cut.tokens, TILE_N=cut.channels, TILE_R=_tile(rank),
            num_warps=cut.num_warps, num_stages=cut.num_stages,
        )  # fmt: skip
    return part_CTR


def low_rank_sum(
    x: Tensor,
    branch: Tensor,
    inner_CTR: Tensor,
    V_RN: Tensor,
    *,
    with_x: bool = True,
    next_U_NR: Tensor | None = None,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y = branch + x + (x U) V, or branch + (x U) V, in the wider dtype of `x` and `branch` (..., N); `inner_CTR` is x
    U as `inner_product` or the sum before has it, and V in x's dtype. Beside it, with the U of the next correction, in
    y's dtype, y U in the same form.

    x U is rounded to x's dtype before it meets V, y to its own before it meets the next U.
    """
    (rank, size), num_tokens = V_RN.shape, x.numel() // x.shape[-1]
    x, branch, V_RN = x.contiguous(), branch.contiguous(), V_RN.contiguous()
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, branch.dtype))
    assert V_RN.dtype == x.dtype
    assert x.shape == branch.shape == (*x.shape[:-1], size)
    assert inner_CTR.dtype == torch.float32
    assert inner_CTR.shape[1:] == (num_tokens, _tile(rank))
    next_rank = 0 if next_U_NR is None else next_U_NR.shape[1]
    assert max(rank, next_rank) <= LARGEST_RANK
    cut = cut or best_cut(num_tokens, size, (rank, next_rank), (x.dtype, y.dtype), x.device)
    parts, share = _shares(size, cut)
    next_CTR = None
    if next_U_NR is not None:
        assert next_U_NR.dtype == y.dtype
        assert next_U_NR.shape[0] == size
        next_U_NR = next_U_NR.contiguous()
        next_CTR = x.new_empty((parts, num_tokens, _tile(next_rank)), dtype=torch.float32)
    if num_tokens:
        _sum[(parts, triton.cdiv(num_tokens, cut.tokens))](
            x, branch, inner_CTR, V_RN, y, V_RN if next_U_NR is None else next_U_NR,
            inner_CTR if next_CTR is None else next_CTR, num_tokens, size, rank, next_rank, share,
            PARTS=len(inner_CTR), WITH_X=with_x, WITH_NEXT=next_U_NR is not None, PRECISION=_precision(y.dtype),
            TOKENS=cut.tokens, TILE_N=cut.channels, TILE_R=_tile(rank), TILE_Q=_tile(next_rank), STAGES=cut.num_stages,
            num_warps=cut.num_warps,
        )  # fmt: skip
    return y, next_CTR


def _shares(size: int, cut: Cut) -> tuple[int, int]:
    """Parts of the channels, and channels of a part, a whole number of tiles."""
    share = triton.cdiv(triton.cdiv(size, cut.parts), cut.channels) * cut.channels
    return triton.cdiv(size, share), share


def _tile(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def best_cut_of_inner(num_tokens: int, rank: int, dtype: torch.dtype, device: torch.device) -> Cut:
    """How x U is cut; measured on an H100 for 16 bits and ranks up to 64 (`benchmarks/transforms.py`)."""
    few = num_tokens <= _FEW
    if dtype == torch.float32:
        cut = Cut(16, 64, 16, 4, 2) if few else Cut(32, 64, 1, 8, 2)
    elif few:
        cut = Cut(16, 128, 32, 4, 2)
    else:
        cut = Cut(64, 128, 2, 4, 4) if num_tokens < _MANY else Cut(64, 128, 1, 4, 3)
    return _that_fits(cut, (cut.tokens + _tile(rank)) * dtype.itemsize, 0, device)


def best_cut(
    num_tokens: int, size: int, ranks: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], device: torch.device
) -> Cut:
    """How the sum is cut, measured in the same way. `ranks` are those of V and of the next U, 0 if there is none;
    `dtypes` are those of x and y.
    """
    few, onward = num_tokens <= _FEW, ranks[1] > 0
    tokens = 16 if few else 32 if dtypes[1] == torch.float32 else 64
    if dtypes[1] == torch.float32:
        cut = Cut(tokens, 64, 16 if onward else triton.cdiv(size, 64), 4 if few else 8, 1)
    elif few and onward:
        cut = Cut(tokens, 128, 32, 4, 2) if max(ranks) <= 32 else Cut(tokens // 2, 128, 64, 8, 2)
    elif few:
        cut = Cut(tokens, 128, triton.cdiv(size, 128), 4, 1)
    elif onward:
        cut = Cut(tokens, 128, 2, 4, 3 if num_tokens < _MANY else 2)
    else:
        cut = Cut(tokens, 64, 4, 4, 4) if num_tokens < _MANY else Cut(tokens, 128, 4, 4, 2)
    x_bytes, y_bytes = (dtype.itemsize for dtype in dtypes)
    loaded = tokens * (x_bytes + y_bytes) + _tile(ranks[0]) * x_bytes + (_tile(ranks[1]) * y_bytes if onward else 0)
    return _that_fits(cut, loaded, tokens * y_bytes, device)


def _that_fits(cut: Cut, loaded: int, once: int, device: torch.device) -> Cut:
    """The cut with fewer tiles in flight, then fewer channels, until shared memory holds it: for each channel so many
    bytes are `loaded` for every tile in flight, and others needed `once`.
    """
    while (loaded * cut.num_stages + once) * cut.channels + _BESIDE > shared_memory(device) and cut.channels > 16:
        if cut.num_stages > 1:
            cut = cut._replace(num_stages=cut.num_stages - 1)
        else:
            cut = cut._replace(channels=cut.channels // 2)
    return cut
