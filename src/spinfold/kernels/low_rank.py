"""A low-rank correction of the residual stream and the sum behind it.

    y = b + x + (x U) V        or, without x itself,        y = b + (x U) V

Many tokens: one program takes a tile of them. A first walk along their channels gathers x U, which then stays on the
chip; a second one, back from where the first ended, adds (x U) V to the branch b and, from the cache, to x.
Few tokens: programs share the channels. One kernel gives the parts of x U, a second one adds them up.

`maps.lowrank` defines the map, of which V is K Uᵀ. Products of 16-bit numbers run on the tensor cores as they are,
those of fp32 ones in three TF32 parts.

Shapes: T tokens, N channels, R rank, C parts of the channels.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinfold.kernels.grids import processors

__all__ = ["LARGEST_RANK", "Cut", "low_rank_sum"]

LARGEST_RANK = 256
_FEW = 64


class Cut(NamedTuple):
    """Tokens and channels of a tile, warps, tiles in flight, and programs per SM."""

    tokens: int
    channels: int
    num_warps: int
    num_stages: int
    programs: int


@triton.jit
def _project(
    x_ptr, u_ptr, inner_TR, row_T1, start, num_tokens, size, rank,
    PRECISION: tl.constexpr, TILE_N: tl.constexpr, TILE_R: tl.constexpr,
):  # fmt: skip
    """inner + x U for the channels from `start` on."""
    rank_1R = tl.arange(0, TILE_R)[None, :]
    channel_N = start + tl.arange(0, TILE_N)
    mask_TN = (row_T1 < num_tokens) & (channel_N < size)[None, :]
    x_TN = tl.load(x_ptr + row_T1 * size + channel_N[None, :], mask=mask_TN, other=0.0)
    mask_NR = (channel_N < size)[:, None] & (rank_1R < rank)
    u_NR = tl.load(u_ptr + channel_N[:, None] * rank + rank_1R, mask=mask_NR, other=0.0)
    return tl.dot(x_TN, u_NR, inner_TR, input_precision=PRECISION)


@triton.jit
def _add(
    x_ptr, b_ptr, v_ptr, y_ptr, inner_TR, row_T1, start, num_tokens, size, rank,
    WITH_X: tl.constexpr, PRECISION: tl.constexpr, TILE_N: tl.constexpr, TILE_R: tl.constexpr,
):  # fmt: skip
    """Store y for the channels from `start` on."""
    rank_R1 = tl.arange(0, TILE_R)[:, None]
    channel_N = start + tl.arange(0, TILE_N)
    mask_TN = (row_T1 < num_tokens) & (channel_N < size)[None, :]
    mask_RN = (rank_R1 < rank) & (channel_N < size)[None, :]
    v_RN = tl.load(v_ptr + rank_R1 * size + channel_N[None, :], mask=mask_RN, other=0.0)
    y_TN = tl.dot(inner_TR.to(v_RN.dtype), v_RN, input_precision=PRECISION)
    offset_TN = row_T1 * size + channel_N[None, :]
    if WITH_X:
        y_TN += tl.load(x_ptr + offset_TN, mask=mask_TN, other=0.0).to(tl.float32)
    y_TN += tl.load(b_ptr + offset_TN, mask=mask_TN, other=0.0).to(tl.float32)
    tl.store(y_ptr + offset_TN, y_TN.to(y_ptr.dtype.element_ty), mask=mask_TN)


@triton.jit(do_not_specialize=["num_tokens"])
def _many(
    x_ptr, b_ptr, u_ptr, v_ptr, y_ptr, num_tokens, size, rank,
    WITH_X: tl.constexpr, PRECISION: tl.constexpr, TILE_T: tl.constexpr, TILE_N: tl.constexpr, TILE_R: tl.constexpr,
):  # fmt: skip
    for tile in range(tl.program_id(0), tl.cdiv(num_tokens, TILE_T), tl.num_programs(0)):
        row_T1 = tl.full((), tile, tl.int64) * TILE_T + tl.arange(0, TILE_T)[:, None]
        inner_TR = tl.zeros((TILE_T, TILE_R), tl.float32)
        for start in range(0, size, TILE_N):
            inner_TR = _project(
                x_ptr, u_ptr, inner_TR, row_T1, start, num_tokens, size, rank, PRECISION, TILE_N, TILE_R
            )  # fmt: skip
        last = (tl.cdiv(size, TILE_N) - 1) * TILE_N
        for start in range(0, size, TILE_N):
            _add(x_ptr, b_ptr, v_ptr, y_ptr, inner_TR, row_T1, last - start, num_tokens, size, rank,
                 WITH_X, PRECISION, TILE_N, TILE_R)  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def _parts(
    x_ptr, u_ptr, part_ptr, num_tokens, size, rank,
    PRECISION: tl.constexpr, TILE_T: tl.constexpr, TILE_N: tl.constexpr, TILE_R: tl.constexpr,
):  # fmt: skip
    row_T1 = tl.program_id(1) * TILE_T + tl.arange(0, TILE_T)[:, None]
    rank_1R = tl.arange(0, TILE_R)[None, :]
    part_TR = _project(x_ptr, u_ptr, tl.zeros((TILE_T, TILE_R), tl.float32), row_T1, tl.program_id(0) * TILE_N,
                       num_tokens, size, rank, PRECISION, TILE_N, TILE_R)  # fmt: skip
    tl.store(part_ptr + (tl.program_id(0) * num_tokens + row_T1) * TILE_R + rank_1R, part_TR, mask=row_T1 < num_tokens)


@triton.jit(do_not_specialize=["num_tokens", "num_parts"])
def _few(
    x_ptr, b_ptr, part_ptr, v_ptr, y_ptr, num_tokens, num_parts, size, rank,
    WITH_X: tl.constexpr, PRECISION: tl.constexpr, TILE_T: tl.constexpr, TILE_N: tl.constexpr, TILE_R: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    row_T = tl.program_id(1) * TILE_T + tl.arange(0, TILE_T)
    offset_TR = row_T[:, None] * TILE_R + tl.arange(0, TILE_R)[None, :]
    inner_TR = tl.zeros((TILE_T, TILE_R), tl.float32)
    for start in range(0, num_parts, AT_ONCE):
        # Many parts in flight: their addition one by one would wait for the memory each time.
        part_C = start + tl.arange(0, AT_ONCE)
        mask_CTR = (part_C < num_parts)[:, None, None] & (row_T < num_tokens)[None, :, None]
        offset_CTR = (part_C * num_tokens * TILE_R)[:, None, None] + offset_TR[None, :, :]
        inner_TR += tl.sum(tl.load(part_ptr + offset_CTR, mask=mask_CTR, other=0.0), axis=0)
    _add(x_ptr, b_ptr, v_ptr, y_ptr, inner_TR, row_T[:, None], tl.program_id(0) * TILE_N, num_tokens, size, rank,
         WITH_X, PRECISION, TILE_N, TILE_R)  # fmt: skip


def low_rank_sum(
    x: Tensor, branch: Tensor, U_NR: Tensor, V_RN: Tensor, *, with_x: bool = True, cut: Cut | None = None
) -> Tensor:
    """branch + x + (x U) V, or branch + (x U) V, in the wider dtype of `x` and `branch` (..., N); U and V in x's.

    x U is rounded to x's dtype before it meets V. With a `cut` of no programs per SM, channels are shared out.
    """
    num_tokens, size, rank = x.numel() // x.shape[-1], x.shape[-1], U_NR.shape[1]
    assert rank <= LARGEST_RANK
    assert U_NR.dtype == V_RN.dtype == x.dtype
    x, branch, U_NR, V_RN = x.contiguous(), branch.contiguous(), U_NR.contiguous(), V_RN.contiguous()
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, branch.dtype))
    if not num_tokens:
        return y
    if cut is None and num_tokens <= _FEW:
        cut = Cut(16, 128 if x.dtype == torch.float32 else 256, 4, 2, 0)
    elif cut is None:
        cut = Cut(32, 64, 8, 2, 2) if x.dtype == torch.float32 else Cut(16, 256, 4, 3, 4)
    shape = {
        "PRECISION": "tf32x3" if x.dtype == torch.float32 else "ieee",
        "TILE_T": cut.tokens,
        "TILE_N": cut.channels,
        "TILE_R": max(16, triton.next_power_of_2(rank)),
    }
    launch = {"num_warps": cut.num_warps, "num_stages": cut.num_stages}
    tiles, parts = triton.cdiv(num_tokens, cut.tokens), triton.cdiv(size, cut.channels)
    if cut.programs:
        programs = (min(tiles, cut.programs * processors(x.device)),)
        _many[programs](x, branch, U_NR, V_RN, y, num_tokens, size, rank, WITH_X=with_x, **shape, **launch)
        return y
    part_CTR = x.new_empty((parts, num_tokens, shape["TILE_R"]), dtype=torch.float32)
    _parts[(parts, tiles)](x, U_NR, part_CTR, num_tokens, size, rank, **shape, **launch)
    _few[(parts, tiles)](
        x, branch, part_CTR, V_RN, y, num_tokens, parts, size, rank, WITH_X=with_x, **shape, **launch,
        AT_ONCE=min(16, triton.next_power_of_2(parts)),
    )  # fmt: skip
    return y
