"""How a program meets its share of a tensor in which each run of `width` neighbours has a grid of its own.

Shapes: R groups of W numbers; a program holds a tile of whole groups, in fp32.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["MOST_NUMBERS", "clip_argument", "extremes", "largest", "tile", "warps"]

MOST_NUMBERS = 2**15
"""Numbers of a tile at most: beyond, a program's registers don't hold them."""
_SIZE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def tile(num_groups, width, TILE_R: tl.constexpr, TILE_W: tl.constexpr):
    """The program's groups, where their numbers are, and which of them exist."""
    group_R = tl.program_id(0).to(tl.int64) * TILE_R + tl.arange(0, TILE_R)
    col_W = tl.arange(0, TILE_W)
    offset_RW = group_R[:, None] * width + col_W[None, :]
    return group_R, offset_RW, (group_R < num_groups)[:, None] & (col_W < width)[None, :]


@triton.jit
def largest(x_RW):
    """The largest |x| of each group; NaN or infinity if a number is: among bits without a sign they come last."""
    return tl.max(x_RW.to(tl.int32, bitcast=True) & _SIZE, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def extremes(x_RW):
    """The least and the largest number of each group, and 0, or NaN for a group that isn't finite.

    tl.min and tl.max skip NaN, unlike torch's; 0·x is NaN if x is NaN or infinite.
    """
    return tl.min(x_RW, axis=1), tl.max(x_RW, axis=1), tl.abs(tl.sum(x_RW * 0.0, axis=1))


def warps(tile_numbers: int) -> int:
    """Warps of a program with a tile of so many numbers."""
    return min(16, max(4, tile_numbers // 1024))


def clip_argument(clip: Tensor | float, x: Tensor) -> dict[str, Tensor | float | bool]:
    """A clip ratio as the kernels take it: on the device, or as it is."""
    on_device = isinstance(clip, Tensor)
    return {"clip_ptr": clip if on_device else x, "clip": 1.0 if on_device else float(clip), "LOAD_CLIP": on_device}
