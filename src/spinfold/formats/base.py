"""The contract of a number format: a finite set of elements, and how a group of numbers shares a grid.

    grid(low, high)        the grid for a group whose numbers lie in [low, high]: a scale, and a second number or none
    nearest(x, *grid)      the nearest element to each number, as a number of its own, before the scale
    values(q, *grid)       what elements stand for
    encode / decode        elements as stored codes, and back

What the second number is, is the format's matter: the zero point of asymmetric integers, AMXFP4's scale of the
negative numbers, NVFP4's scale of the scales. Everything else (weights, activations, GPTQ, the search of a range) is
written once, over these few functions.

Shapes: x (..., I) in groups (..., G, g); a grid's tensors broadcast against the groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from spinfold.errors import SpinfoldError

__all__ = ["Format", "compute_dtype", "extent"]


class Format(ABC):
    """A grid shared by each `group_size` neighbours (None: by the whole row), of `bits` per number beside the scales.

    `clip` in (0, 1] shrinks the covered range. Unquantized tensors have no format: use None for them. Subclasses are
    frozen dataclasses with at least these three fields.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    bits: int
    group_size: int | None
    clip: float

    def __post_init__(self) -> None:
        if not 0 < self.clip <= 1:
            raise SpinfoldError(f"A clip ratio of {self.clip} is not possible.", "It multiplies the range of a group.",
                                "Choose a ratio above 0 and at most 1.")  # fmt: skip
        if self.group_size is not None and self.group_size < 1:
            raise SpinfoldError(f"A group of {self.group_size} numbers is not possible.",
                                fix="Choose a positive group size, or none for the whole row.")  # fmt: skip

    @property
    @abstractmethod
    def second(self) -> str:
        """What the second number of a grid is called, if there is one."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The smallest dtype that stores the codes."""

    @abstractmethod
    def grid(
        self, low: Tensor, high: Tensor, *, whole: Tensor | None = None, scale_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The grid for [clip·low, clip·high] (low ≤ 0 ≤ high): scale and second number, in the dtype of `low`.

        `whole` is what `whole_of` has found. With `scale_dtype` a format whose scales are real numbers rounds them
        to that dtype first. NaN or infinity in the range makes every number of the group NaN.
        """

    @abstractmethod
    def nearest(self, x: Tensor, scale: Tensor, second: Tensor | None) -> Tensor:
        """The nearest elements, ties to even, in x's dtype. A new tensor."""

    @abstractmethod
    def values(self, q: Tensor, scale: Tensor, second: Tensor | None) -> Tensor:
        """The numbers that elements `q` stand for. May overwrite `q`."""

    @abstractmethod
    def beyond(self, low: Tensor, high: Tensor, scale: Tensor, second: Tensor | None) -> Tensor:
        """How far both extremes lie beyond the grid's ends, or a bit less, `(..., 2)`: no smaller grid does better."""

    @abstractmethod
    def stored(self, scale: Tensor, second: Tensor | None, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """A grid in the dtypes in which it is stored, which hold it exactly."""

    @abstractmethod
    def bits_per_number(self, width: int, scale_bits: int = 32) -> float:
        """Bits per number of rows of `width` numbers, scales and all; `scale_bits` of a scale that is a real number."""

    def stored_dtypes(self, scale_dtype: torch.dtype = torch.float32) -> tuple[torch.dtype, ...]:
        """Those of scales and, if there are any, second numbers."""
        return _stored_dtypes(self, scale_dtype)

    def seconds_of(self, groups: int) -> int:
        """How many second numbers are stored for that many groups of a row, if there are any."""
        return groups

    def nearest_scale(self, scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
        """The nearest numbers that scales can be, in the dtype of `scale`."""
        return scale.to(scale_dtype).to(scale.dtype)

    def encode(self, q: Tensor) -> Tensor:
        """Elements as codes of `dtype`."""
        return q.to(self.dtype)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Codes as elements in a floating dtype. A new tensor."""
        return codes.to(dtype, copy=True)

    def whole_of(self, low: Tensor, high: Tensor) -> Tensor | None:
        """What a group's grid needs to know of the others, from the extremes `(..., G, 1)` of all; None if nothing."""
        return None

    def group_of(self, size: int) -> int:
        """How many neighbours share a scale in rows of `size` numbers. Raises if groups do not fit."""
        group_size = self.group_size or size
        if size % group_size:
            divisors = [d for d in range(1, size + 1) if size % d == 0]
            below = max(d for d in divisors if d < group_size or d == 1)
            above = min(d for d in divisors if d > group_size or d == size)
            raise SpinfoldError(
                f"Groups of {group_size} do not fit into rows of {size} numbers.",
                f"{size} is not a multiple of {group_size}.",
                f"Choose group size {below} or {above}, or no groups.",
            )
        return group_size

    def split(self, x: Tensor) -> Tensor:
        """`x (..., I)` as `(..., G, g)`, a view where possible."""
        group_size = self.group_of(x.shape[-1])
        return x.reshape(*x.shape[:-1], x.shape[-1] // group_size, group_size)


@lru_cache(maxsize=64)
def _stored_dtypes(format: Format, scale_dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    zero_11 = torch.zeros(1, 1, dtype=torch.promote_types(scale_dtype, torch.float32))
    numbers = format.stored(*format.grid(zero_11, zero_11, whole=format.whole_of(zero_11, zero_11)), scale_dtype)
    return tuple(one.dtype for one in numbers if one is not None)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: fp32, or fp64 if `x` is fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def extent(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest number along the last axis (kept as size 1), widened to contain zero."""
    # In PyTorch 2.11 aminmax has no derivative, and on a CPU it takes three times as long as both.
    if x.device.type == "cpu" or (x.requires_grad and torch.is_grad_enabled()):
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    else:
        low, high = torch.aminmax(x, dim=-1, keepdim=True)
    return low.clamp(max=0), high.clamp(min=0)
