"""One block of columns rounded one after the other, each error fed into the later columns.

`rounding.columns.round_block` defines it. Output rows are independent of each other, so one warp takes 32 of
them, keeps their part of the block in registers (a thread owns a row), and never has to synchronise.

Shapes: B columns of the block, O output rows; transposed, so that a column is contiguous.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinfold.kernels import Elements
from spinfold.kernels.rounding import nearest_element, round_even

__all__ = ["MAX_BLOCK", "gptq_block"]

# 128 columns are 128 fp32 registers of each thread.
MAX_BLOCK = 128


@triton.jit
def _integer(x, scale, zero, HAS_ZERO: tl.constexpr, q_low, q_high):
    """The nearest integer of a grid, and what it stands for."""
    q = round_even(tl.div_rn(x, scale))
    if HAS_ZERO:
        q = tl.minimum(tl.maximum(q + zero, q_low), q_high)
        return q, (q - zero) * scale
    q = tl.minimum(tl.maximum(q, q_low), q_high)
    return q, q * scale


@triton.jit
def _element(x, step, below, BY_SIGN: tl.constexpr, STEPS: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr):
    """The nearest floating-point element, and what it stands for; `below` is the step of negative numbers."""
    if BY_SIGN:
        step = tl.where(x.to(tl.int32, bitcast=True) < 0, below, step)
    q = nearest_element(tl.div_rn(x, tl.where(step == 0.0, float("inf"), step)), STEPS, SMALLEST, LARGEST)
    return q, q * step


@triton.jit
def _gptq_block(
    w_ptr, base_ptr, e_ptr, u_ptr, scale_ptr, second_ptr,
    num_columns, num_outputs, w_stride, base_stride, u_stride, scale_stride, q_low, q_high,
    HAS_BASE: tl.constexpr, HAS_SECOND: tl.constexpr, STEPS: tl.constexpr, SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr, TILE_B: tl.constexpr, TILE_O: tl.constexpr,
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
        second_O = scale_O
        if HAS_SECOND:
            second_O = tl.load(second_ptr + i * scale_stride + output_O, mask=valid_O, other=0.0)
        if STEPS > 0.0:
            q_O, rounded_O = _element(w_O, scale_O, second_O, HAS_SECOND, STEPS, SMALLEST, LARGEST)
        else:
            q_O, rounded_O = _integer(w_O, scale_O, second_O, HAS_SECOND, q_low, q_high)

        if HAS_BASE:
            e_O = rounded_O - tl.load(base_ptr + i * base_stride + output_O, mask=valid_O, other=0.0)
        else:
            u_ii = tl.load(u_ptr + i * u_stride + i)
            e_O = tl.div_rn(w_O - rounded_O, tl.zeros_like(w_O) + u_ii)
        u_B = tl.load(u_ptr + i * u_stride + column_B, mask=valid_B & (column_B > i), other=0.0)
        w_BO -= u_B[:, None] * e_O[None, :]

        tl.store(w_ptr + i * w_stride + output_O, q_O, mask=valid_O)
        tl.store(e_ptr + i * num_outputs + output_O, e_O, mask=valid_O)


def gptq_block(
    w_BO: Tensor,
    u_BB: Tensor,
    scale_BO: Tensor,
    second_BO: Tensor | None,
    ends: tuple[int, int] | Elements,
    base_BO: Tensor | None = None,
) -> Tensor:
    """Overwrite the fp32 `w_BO` (B ≤ MAX_BLOCK) with its elements and return the errors `e_BO`.

    `ends` are those of an integer grid, whose `second_BO` are zero points, or the elements of a floating-point one,
    whose `second_BO` are the scales of negative numbers. The last axis of every argument has stride 1; `scale_BO` and
    `second_BO` have the same strides.
    """
    num_columns, num_outputs = w_BO.shape
    assert num_columns <= MAX_BLOCK
    assert w_BO.dtype == torch.float32
    assert w_BO.stride(1) == u_BB.stride(1) == scale_BO.stride(1) == 1
    assert second_BO is None or second_BO.stride() == scale_BO.stride()
    assert base_BO is None or base_BO.stride(1) == 1
    e_BO = torch.empty((num_columns, num_outputs), dtype=w_BO.dtype, device=w_BO.device)
    tile_o = 32
    elements = ends if isinstance(ends, Elements) else None
    low, high = (0, 0) if isinstance(ends, Elements) else ends
    # Without fused multiply-add the arithmetic is the definition's, step by step.
    _gptq_block[(triton.cdiv(num_outputs, tile_o),)](
        w_BO, w_BO if base_BO is None else base_BO, e_BO, u_BB, scale_BO, w_BO if second_BO is None else second_BO,
        num_columns, num_outputs, w_BO.stride(0), 0 if base_BO is None else base_BO.stride(0), u_BB.stride(0),
        scale_BO.stride(0), float(low), float(high), HAS_BASE=base_BO is not None, HAS_SECOND=second_BO is not None,
        STEPS=2.0**elements.mantissa_bits if elements else 0.0,
        SMALLEST=elements.smallest_normal if elements else 0.0, LARGEST=elements.largest if elements else 0.0,
        TILE_B=triton.next_power_of_2(num_columns), TILE_O=tile_o, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return e_BO
