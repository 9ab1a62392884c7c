"""Pack weights into the blocks of 32 neighbours that llama.cpp computes with: our integers as they are, byte for byte.

    F16    32 fp16                                                                       64 bytes
    Q4_0   d fp16 | 16 bytes, byte j = u_j + 16 u_(j+16)             w = d (u - 8)       18
    Q4_1   d fp16 | m fp16 | 16 bytes, likewise                      w = d u + m         20
    Q8_0   d fp16 | 32 int8                                          w = d q             34

A symmetric grid is w = s q, so d = s and u = q + 8. An asymmetric one is w = s (q - z) = s q - s z, so d = s and
m = -d z. Both are the nearest fp16: with `scale_dtype: float16` in the recipe d is s itself, and m is within 2^-11 of
-d z, a hundredth of a step at most. Groups of any multiple of 32 fit, a scale written once for each of their blocks;
grids of fewer bits fit into the next wider block.

Shapes: O out features, I in features, G groups, N blocks of a row, P bytes of a row.
"""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from spinfold.errors import SpinfoldError, Verdict
from spinfold.formats import IntFormat, QuantizedWeight, fit_grid

__all__ = ["BLOCK", "block_kind", "fits_blocks", "pack", "round_to_q8_0", "unpack"]

BLOCK = 32

Kind = GGMLQuantizationType


def block_kind(fmt: IntFormat | None) -> GGMLQuantizationType:
    """The type that holds the integers of `fmt`, F16 for weights that are not rounded; see `fits_blocks`."""
    if fmt is None:
        return Kind.F16
    if fmt.bits <= 4:
        return Kind.Q4_0 if fmt.symmetric else Kind.Q4_1
    assert fmt.symmetric, "no type holds them"
    return Kind.Q8_0


def fits_blocks(fmt: IntFormat | None, in_features: int) -> Verdict:
    """Can a weight on the grid `fmt` with rows of `in_features` be written as it is?"""
    if fmt is None:
        return Verdict(True)
    if not fmt.symmetric and fmt.bits > 4:
        return Verdict(
            False,
            f"llama.cpp has no type for asymmetric integers of {fmt.bits} bits.",
            "Choose weights of up to 4 bits, or symmetric ones (weights: symmetric: true).",
        )
    if fmt.group_of(in_features) % BLOCK:
        return Verdict(
            False,
            f"llama.cpp keeps one scale per block of {BLOCK} weights, and groups of {fmt.group_of(in_features)} "
            f"in rows of {in_features} are not made of whole blocks.",
            f"Choose group_size {BLOCK}, or a multiple of it that divides {in_features}.",
        )
    return Verdict(True)


def pack(weight: QuantizedWeight | Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """The bytes of a weight `(O, I)`, uint8 `(O, P)`, or a floating-point tensor of any shape in F32 or F16.

    For Q8_0 a weight that no rounding has seen is rounded to nearest. Raises `SpinfoldError` if a number is too large
    for fp16.
    """
    if isinstance(weight, Tensor) and kind == Kind.Q8_0:
        weight = round_to_q8_0(weight)
    if isinstance(weight, Tensor):
        values = weight.float() if kind == Kind.F32 else _half(weight)
        return values.contiguous().numpy()
    assert isinstance(weight.format, IntFormat) and kind == block_kind(weight.format)
    q_ON = weight.q_OI.to(torch.int16).unflatten(-1, (-1, BLOCK))  # (O, N, 32)
    repeats = q_ON.shape[1] // weight.scale_OG.shape[1]
    d_ON1 = _half(weight.scale_OG).repeat_interleave(repeats, dim=1).unsqueeze(-1)
    if kind == Kind.Q8_0:
        parts = [d_ON1, q_ON.to(torch.int8)]
    elif weight.second_OG is None:
        parts = [d_ON1, _nibbles(q_ON + 8)]
    else:
        z_ON1 = weight.second_OG.repeat_interleave(repeats, dim=1).unsqueeze(-1)
        parts = [d_ON1, _half(-d_ON1.float() * z_ON1), _nibbles(q_ON)]
    blocks = torch.cat([part.view(torch.uint8) for part in parts], dim=-1)
    assert blocks.shape[-1] == GGML_QUANT_SIZES[kind][1]
    return blocks.flatten(1).numpy()


def unpack(blocks_OP: Tensor, kind: GGMLQuantizationType) -> Tensor:
    """The integers `(O, I)` that `pack` wrote, as the run's grid has them: int8 if it is symmetric, else uint8."""
    header = GGML_QUANT_SIZES[kind][1] - (BLOCK if kind == Kind.Q8_0 else BLOCK // 2)
    data_ON = blocks_OP.unflatten(1, (-1, GGML_QUANT_SIZES[kind][1]))[..., header:]
    if kind == Kind.Q8_0:
        return data_ON.contiguous().view(torch.int8).flatten(1)
    u_OI = torch.cat([data_ON & 15, data_ON >> 4], dim=-1).flatten(1)
    return u_OI if kind == Kind.Q4_1 else u_OI.view(torch.int8) - 8


def round_to_q8_0(w_OI: Tensor) -> QuantizedWeight:
    """An embedding or head on the grid of Q8_0: each block's range, rounded to nearest. I must be a multiple of 32."""
    grid = fit_grid(w_OI, IntFormat(8, symmetric=True, group_size=BLOCK), scale_dtype=torch.float16)
    return QuantizedWeight(grid.quantize(w_OI), grid.scale_OG, grid.second_OG, grid.format)


def _nibbles(u_ON: Tensor) -> Tensor:
    """`(O, N, 32)` values of 4 bits as `(O, N, 16)` bytes: the first half of a block in the low halves of its bytes."""
    low, high = u_ON.to(torch.uint8).chunk(2, dim=-1)
    return low | high << 4


def _half(x: Tensor) -> Tensor:
    """The nearest fp16."""
    half = x.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise SpinfoldError(
            "The model can't be written as GGUF.",
            f"A weight or scale of {float(x.abs().max()):.3g} does not fit into fp16, whose largest number is 65504.",
            "Check the model: weights of this size are unusual.",
        )
    return half
