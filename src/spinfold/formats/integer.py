"""Integer grids: where the representable numbers are, and the nearest one to each number.

    symmetric    s = absmax / (2^(b-1) - 1)     q = clamp(RNE(w/s), -2^(b-1), 2^(b-1) - 1)     ŵ = s q
    asymmetric   s = (max - min) / (2^b - 1)    q = clamp(RNE(w/s) + z, 0, 2^b - 1)            ŵ = s (q - z)
                 z = RNE(-min / s)              with min ≤ 0 ≤ max, so that zero is exact

RNE is round-half-to-even; a clip ratio multiplies min and max first; an all-zero group has s = 1.

Shapes: x (..., I) in groups (..., G, g).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spinfold.errors import SpinfoldError
from spinfold.formats.base import Format

__all__ = ["IntFormat", "from_integers", "nearest_integers", "scale_and_zero"]


@dataclass(frozen=True)
class IntFormat(Format):
    """`bits` per number, on a grid shared by each `group_size` neighbours (None: by the whole row).

    `clip` in (0, 1] shrinks the covered range. Unquantized tensors have no format: use None for them.
    """

    bits: int
    symmetric: bool
    group_size: int | None = None
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SpinfoldError(
                f"An integer format of {self.bits} bits does not exist.",
                "Integer grids have 2 to 8 bits.",
                "Choose 2 to 8 bits, or 16 to leave the tensor unquantized.",
            )
        super().__post_init__()

    @property
    def low(self) -> int:
        """The smallest stored integer."""
        return -(1 << self.bits - 1) if self.symmetric else 0

    @property
    def high(self) -> int:
        """The largest stored integer."""
        return (1 << self.bits - self.symmetric) - 1

    @property
    def dtype(self) -> torch.dtype:
        """The smallest dtype that stores the integers."""
        return torch.int8 if self.symmetric else torch.uint8

    @property
    def second(self) -> str:
        return "zero"

    def grid(
        self, low: Tensor, high: Tensor, *, whole: Tensor | None = None, scale_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return scale_and_zero(low, high, self, scale_dtype)

    def nearest(self, x: Tensor, scale: Tensor, second: Tensor | None) -> Tensor:
        return nearest_integers(x, scale, second, self)

    def values(self, q: Tensor, scale: Tensor, second: Tensor | None) -> Tensor:
        return from_integers(q, scale, second)

    def beyond(self, low: Tensor, high: Tensor, scale: Tensor, second: Tensor | None) -> Tensor:
        # Smaller grids end no further out, but for the rounding of a zero point (one step) or of a scale (under 1 %).
        if second is None:
            ends = scale * (1.01 * self.low), scale * (1.01 * self.high)
        else:
            ends = scale * (self.low - second - 1), scale * (self.high - second + 1)
        return torch.cat([ends[0] - low, high - ends[1]], -1).clamp_(min=0)

    def stored(self, scale: Tensor, second: Tensor | None, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        return scale.to(scale_dtype), None if second is None else second.to(self.dtype)

    def bits_per_number(self, width: int, scale_bits: int = 32) -> float:
        return self.bits + (scale_bits + (0 if self.symmetric else self.bits)) / self.group_of(width)


def scale_and_zero(
    low: Tensor,
    high: Tensor,
    fmt: IntFormat,
    scale_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The grid that covers [clip·low, clip·high] (with low ≤ 0 ≤ high): scale, and zero point if asymmetric.

    With `scale_dtype` the scale is rounded to that dtype first, and everything else follows from the
    rounded one. Both come back in the dtype of `low`. A scale of 0 (also by underflow) becomes 1.
    NaN and infinity stay NaN or infinite.
    """
    low, high = low * fmt.clip, high * fmt.clip
    width = torch.maximum(high, -low) if fmt.symmetric else high - low
    # Divide by a tensor: CUDA divides by a Python number through its reciprocal, one bit off the CPU's result.
    scale = width / width.new_full((), fmt.high)
    if scale_dtype is not None and scale_dtype != scale.dtype:
        scale = scale.clamp(max=torch.finfo(scale_dtype).max).to(scale_dtype).to(low.dtype)
    scale = torch.where(scale == 0, 1.0, scale)
    return scale, None if fmt.symmetric else torch.round(-low / scale).clamp(fmt.low, fmt.high)


def nearest_integers(x: Tensor, scale: Tensor, zero: Tensor | None, fmt: IntFormat) -> Tensor:
    """The integers nearest to `x`, still in x's floating dtype. A new tensor; `scale` and `zero` broadcast."""
    q = torch.div(x, scale).round_()
    if zero is not None:
        q.add_(zero)
    return q.clamp_(fmt.low, fmt.high)


def from_integers(q: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The numbers that floating-point integers `q` stand for. Overwrites `q`."""
    if zero is not None:
        q.sub_(zero)
    return q.mul_(scale)
