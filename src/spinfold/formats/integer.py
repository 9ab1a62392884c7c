"""Integer grids for weights: where the representable numbers are, and the nearest one to each weight.

    symmetric    s = absmax / (2^(b-1) - 1)     q = clamp(RNE(w/s), -2^(b-1), 2^(b-1) - 1)     ŵ = s q
    asymmetric   s = (max - min) / (2^b - 1)    q = clamp(RNE(w/s) + z, 0, 2^b - 1)            ŵ = s (q - z)
                 z = RNE(-min / s)              with min ≤ 0 ≤ max, so that zero is exact

RNE is round-half-to-even; a clip ratio multiplies min and max first; an all-zero group has s = 1.

Shapes: O out features, I in features, G groups of g neighbours along I (G g = I), R = O G rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spinfold.errors import SpinfoldError

__all__ = ["ClipSearch", "Grid", "IntFormat", "QuantizedWeight", "extent", "fit_grid", "scale_and_zero"]


@dataclass(frozen=True)
class IntFormat:
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
        if not 0 < self.clip <= 1:
            raise SpinfoldError(f"A clip ratio of {self.clip} is not possible.", "It multiplies the range of a group.",
                                "Choose a ratio above 0 and at most 1.")  # fmt: skip
        if self.group_size is not None and self.group_size < 1:
            raise SpinfoldError(f"A group of {self.group_size} numbers is not possible.",
                                fix="Choose a positive group size, or none for the whole row.")  # fmt: skip

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


def extent(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest number along the last axis (kept as size 1), widened to contain zero."""
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    return low.clamp(max=0), high.clamp(min=0)


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


def _beyond(low_R1: Tensor, high_R1: Tensor, scale_R1: Tensor, zero_R1: Tensor | None, fmt: IntFormat) -> Tensor:
    """How far a row's two extremes lie beyond its grid's ends, or a little less, `(R, 2)`: no smaller grid does better.

    Smaller grids end no further out, but for the rounding of a zero point (one step) or of a scale (under 1 %).
    """
    if zero_R1 is None:
        ends = scale_R1 * (1.01 * fmt.low), scale_R1 * (1.01 * fmt.high)
    else:
        ends = scale_R1 * (fmt.low - zero_R1 - 1), scale_R1 * (fmt.high - zero_R1 + 1)
    return torch.cat([ends[0] - low_R1, high_R1 - ends[1]], -1).clamp_(min=0)


@dataclass(frozen=True)
class ClipSearch:
    """Shrink each group's range to minimise Σ |w - ŵ|^exponent.

    Candidates are 1, 1 - shrink/steps, …, 1 - shrink (steps-1)/steps: 1.00 … 0.21 by default, with
    exponent 2.4 as in GPTQ's reference quantizer (arXiv 2210.17323). The widest of equal ones wins.
    """

    exponent: float = 2.4
    steps: int = 80
    shrink: float = 0.8

    def factors(self) -> list[float]:
        return [1 - self.shrink * step / self.steps for step in range(self.steps)]

    def best(self, w_Rg: Tensor, low_R1: Tensor, high_R1: Tensor, fmt: IntFormat, scale_dtype: torch.dtype) -> Tensor:
        """The best shrink factor `(R, 1)` of each row of `w_Rg` whose `extent` is given."""
        found_R1 = torch.ones_like(low_R1)
        open_R = torch.arange(len(w_Rg), device=w_Rg.device)  # the rows that may still find better
        best_R1, least_R1 = torch.ones_like(low_R1), torch.full_like(low_R1, torch.inf)
        for step, factor in enumerate(self.factors()):
            scale_R1, zero_R1 = scale_and_zero(low_R1 * factor, high_R1 * factor, fmt, scale_dtype)
            error_Rg = from_integers(nearest_integers(w_Rg, scale_R1, zero_R1, fmt), scale_R1, zero_R1).sub_(w_Rg)
            loss_R1 = self._loss(error_Rg)
            better_R1 = loss_R1 < least_R1
            least_R1 = torch.where(better_R1, loss_R1, least_R1)
            best_R1 = best_R1.masked_fill(better_R1, factor)
            if step % 4 == 3 and w_Rg.device.type == "cpu":  # elsewhere, asking costs more than going on
                beyond_R1 = self._loss(_beyond(low_R1, high_R1, scale_R1, zero_R1, fmt))
                stays_R = (beyond_R1 <= least_R1).squeeze(1)
                found_R1[open_R] = best_R1
                kept = (t[stays_R] for t in (open_R, w_Rg, low_R1, high_R1, best_R1, least_R1))
                open_R, w_Rg, low_R1, high_R1, best_R1, least_R1 = kept
                if not len(open_R):
                    break
        found_R1[open_R] = best_R1
        return found_R1

    def _loss(self, error_Rg: Tensor) -> Tensor:
        """Σ |e|^p as exp(p log|e|), 0 included: three passes, and four times faster than pow on a CPU. Overwrites."""
        return error_Rg.abs_().log_().mul_(self.exponent).exp_().sum(-1, keepdim=True)


@dataclass(frozen=True)
class Grid:
    """Scales `(O, G)` and, if asymmetric, integer zero points `(O, G)` of a weight."""

    scale_OG: Tensor
    zero_OG: Tensor | None
    format: IntFormat

    def _expanded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Scale and zero as `(O, G, 1)` in `dtype`."""
        zero_OG1 = None if self.zero_OG is None else self.zero_OG.to(dtype).unsqueeze(-1)
        return self.scale_OG.to(dtype).unsqueeze(-1), zero_OG1

    def quantize(self, w_OI: Tensor) -> Tensor:
        """The nearest integers `(O, I)`, as int8 (symmetric) or uint8 (asymmetric)."""
        w_OGg = self.format.split(w_OI.to(compute_dtype(w_OI)))
        return nearest_integers(w_OGg, *self._expanded(w_OGg.dtype), self.format).flatten(-2).to(self.format.dtype)

    def dequantize(self, q_OI: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights `(O, I)` that integers stand for: one product in at least fp32, then rounded to `dtype`."""
        wide = torch.promote_types(dtype, torch.float32)
        q_OGg = self.format.split(q_OI).to(wide, copy=True)
        return from_integers(q_OGg, *self._expanded(wide)).flatten(-2).to(dtype)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight `(O, I)` on its grid: integers, scales, zero points."""

    q_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None
    format: IntFormat

    @property
    def grid(self) -> Grid:
        return Grid(self.scale_OG, self.zero_OG, self.format)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The rounded weight `(O, I)`."""
        return self.grid.dequantize(self.q_OI, dtype)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight when packed, with each group's scale and zero point (of the format's bits) counted."""
        per_group = self.scale_OG.element_size() * 8 + (0 if self.zero_OG is None else self.format.bits)
        return self.format.bits + per_group * self.scale_OG.numel() / self.q_OI.numel()

    def split(self, sizes: Sequence[int]) -> list[QuantizedWeight]:
        """The weights that were stacked along O, of `sizes` rows each."""
        parts = zip(*(torch.split(t, list(sizes)) for t in self.tensors().values()), strict=True)
        return [self.from_tensors(dict(zip(self.tensors(), part, strict=True)), self.format) for part in parts]

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint stores: `q`, `scale` and, if asymmetric, `zero`."""
        zero = {} if self.zero_OG is None else {"zero": self.zero_OG}
        return {"q": self.q_OI, "scale": self.scale_OG, **zero}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], fmt: IntFormat) -> QuantizedWeight:
        """The inverse of `tensors`."""
        return cls(tensors["q"], tensors["scale"], tensors.get("zero"), fmt)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: fp32, or fp64 if `x` is fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def fit_grid(
    w_OI: Tensor, fmt: IntFormat, *, search: ClipSearch | None = None, scale_dtype: torch.dtype = torch.float32
) -> Grid:
    """The grid of a weight: its range, or the part of it that `search` finds best, per row or group.

    Scales are rounded to `scale_dtype` before anything depends on them, so a checkpoint that stores
    them in that dtype reproduces the weights bit for bit. Raises SpinfoldError if a weight is not finite
    or groups do not fit.
    """
    w_OGg = fmt.split(w_OI.to(compute_dtype(w_OI)))
    low_OG1, high_OG1 = extent(w_OGg)
    if not (torch.isfinite(low_OG1).all() and torch.isfinite(high_OG1).all()):
        raise SpinfoldError(
            f"A weight of shape {tuple(w_OI.shape)} cannot be quantized.",
            "It contains NaN or infinity.",
            "Check the checkpoint, and the maps that were folded into it.",
        )
    if search is not None:
        group_size = w_OGg.shape[-1]
        # Blocks that stay in the CPU's cache make the passes several times faster; a GPU wants large ones.
        rows = max(1, (2**26 if w_OI.is_cuda else 2**17) // group_size)
        pieces = (torch.split(t.reshape(-1, t.shape[-1]), rows) for t in (w_OGg, low_OG1, high_OG1))
        factors = [search.best(w, low, high, fmt, scale_dtype) for w, low, high in zip(*pieces, strict=True)]
        factor_OG1 = torch.cat(factors).view_as(low_OG1)
        low_OG1, high_OG1 = low_OG1 * factor_OG1, high_OG1 * factor_OG1
    scale_OG1, zero_OG1 = scale_and_zero(low_OG1, high_OG1, fmt, scale_dtype)
    zero_OG = None if zero_OG1 is None else zero_OG1.squeeze(-1).to(fmt.dtype)
    return Grid(scale_OG1.squeeze(-1).to(scale_dtype), zero_OG, fmt)
