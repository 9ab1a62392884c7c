"""One GPTQ block: quantize its columns one after the other, feeding each error into the later columns.

`rounding.gptq.round_block` defines it. Output rows are independent of each other, so one warp takes 32 of
them, keeps their part of the block in registers (a thread owns a row), and never has to synchronise.

Shapes: B columns of the block, O output rows; transposed, so that a column is contiguous.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinfold.kernels.rounding import round_even

__all__ = ["MAX_BLOCK", "gptq_block"]

# 128 columns are 128 fp32 registers of each thread.
MAX_BLOCK = 128


@triton.jit
def _gptq_block(
    w_ptr, e_ptr, u_ptr, scale_ptr, zero_ptr,
    num_columns, num_outputs, w_stride, u_stride, scale_stride, q_low, q_high,
    SYMMETRIC: tl.constexpr, TILE_B: tl.constexpr, TILE_O: tl.constexpr,
):  # fmt: skip
    column_B = tl.arange(0, TILE_B)
    output_O = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    valid_O = output_O < num_outputs
    valid_B = column_B < num_columns
    w_BO = tl.load(
        w_ptr + column_B[:, None] * w_stride + output_O[None, :],
        mask=valid_B[:, None] & valid_O[None, :], other=0.0,
    )  # fmt: skip

    for i in range(num_columns):
        w_O = tl.sum(tl.where((column_B == i)[:, None], w_BO, 0.0), axis=0)
        scale_O = tl.load(scale_ptr + i * scale_stride + output_O, mask=valid_O, other=1.0)
        q_O = round_even(tl.div_rn(w_O, scale_O))
        if SYMMETRIC:
            q_O = tl.minimum(tl.maximum(q_O, q_low), q_high)
            rounded_O = q_O * scale_O
        else:
            zero_O = tl.load(zero_ptr + i * scale_stride + output_O, mask=valid_O, other=0.0)
            q_O = tl.minimum(tl.maximum(q_O + zero_O, q_low), q_high)
            rounded_O = (q_O - zero_O) * scale_O

        u_B = tl.load(u_ptr + i * u_stride + column_B, mask=valid_B & (column_B > i), other=0.0)
        u_ii = tl.load(u_ptr + i * u_stride + i)
        e_O = tl.div_rn(w_O - rounded_O, tl.zeros_like(w_O) + u_ii)
        w_BO -= u_B[:, None] * e_O[None, :]

        tl.store(w_ptr + i * w_stride + output_O, q_O, mask=valid_O)
        tl.store(e_ptr + i * num_outputs + output_O, e_O, mask=valid_O)


def gptq_block(w_BO: Tensor, u_BB: Tensor, scale_BO: Tensor, zero_BO: Tensor | None, q_low: int, q_high: int) -> Tensor:
    """Overwrite the fp32 `w_BO` (B ≤ MAX_BLOCK) with its integers and return the scaled errors `e_BO`.

    The last axis of every argument has stride 1; `scale_BO` and `zero_BO` have the same strides.
    """
    num_columns, num_outputs = w_BO.shape
    assert num_columns <= MAX_BLOCK
    assert w_BO.dtype == torch.float32
    assert w_BO.stride(1) == u_BB.stride(1) == scale_BO.stride(1) == 1
    assert zero_BO is None or zero_BO.stride() == scale_BO.stride()
    e_BO = torch.empty((num_columns, num_outputs), dtype=w_BO.dtype, device=w_BO.device)
    tile_o = 32
    # Without fused multiply-add the arithmetic is the definition's, step by step.
    _gptq_block[(triton.cdiv(num_outputs, tile_o),)](
        w_BO, e_BO, u_BB, scale_BO, w_BO if zero_BO is None else zero_BO,
        num_columns, num_outputs, w_BO.stride(0), u_BB.stride(0), scale_BO.stride(0), float(q_low), float(q_high),
        SYMMETRIC=zero_BO is None, TILE_B=triton.next_power_of_2(num_columns), TILE_O=tile_o,
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return e_BO
