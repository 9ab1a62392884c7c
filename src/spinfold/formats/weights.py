"""Weights on a grid of any format: its scales found, codes and scales stored, and read back.

Shapes: O out features, I in features, G groups of g neighbours along I (G g = I), R = O G rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spinfold.errors import SpinfoldError
from spinfold.formats.base import Format, compute_dtype, extent
from spinfold.formats.clip_search import ClipSearch

__all__ = ["Grid", "QuantizedWeight", "fit_grid", "layout"]


@dataclass(frozen=True)
class Grid:
    """Scales `(O, G)` of a weight and, where the format has them, its second numbers `(O, G)`."""

    scale_OG: Tensor
    second_OG: Tensor | None
    format: Format

    def _expanded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Both as `(O, G, 1)` in `dtype`."""
        second_OG1 = None if self.second_OG is None else self.second_OG.to(dtype).unsqueeze(-1)
        return self.scale_OG.to(dtype).unsqueeze(-1), second_OG1

    def quantize(self, w_OI: Tensor) -> Tensor:
        """The nearest codes `(O, I)`, such as int8 (symmetric) or uint8 (asymmetric) integers."""
        w_OGg = self.format.split(w_OI.to(compute_dtype(w_OI)))
        return self.format.encode(self.format.nearest(w_OGg, *self._expanded(w_OGg.dtype)).flatten(-2))

    def dequantize(self, q_OI: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights `(O, I)` that codes stand for: one product in at least fp32, then rounded to `dtype`."""
        wide = torch.promote_types(dtype, torch.float32)
        q_OGg = self.format.decode(self.format.split(q_OI), wide)
        return self.format.values(q_OGg, *self._expanded(wide)).flatten(-2).to(dtype)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight `(O, I)` on its grid: codes, scales, second numbers."""

    q_OI: Tensor
    scale_OG: Tensor
    second_OG: Tensor | None
    format: Format

    @property
    def grid(self) -> Grid:
        return Grid(self.scale_OG, self.second_OG, self.format)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The rounded weight `(O, I)`."""
        return self.grid.dequantize(self.q_OI, dtype)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight when packed, with all that a group stores counted."""
        return self.format.bits_per_number(self.q_OI.shape[1], self.scale_OG.element_size() * 8)

    def split(self, sizes: Sequence[int]) -> list[QuantizedWeight]:
        """The weights that were stacked along O, of `sizes` rows each."""
        parts = zip(*(torch.split(t, list(sizes)) for t in self.tensors().values()), strict=True)
        return [self.from_tensors(dict(zip(self.tensors(), part, strict=True)), self.format) for part in parts]

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same on `device`."""
        return self.from_tensors({name: t.to(device) for name, t in self.tensors().items()}, self.format)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint stores: `q`, `scale` and, where the format has one, the second number, such as `zero`.

        A second number that all groups of a row share is stored once for each row.
        """
        tensors = {"q": self.q_OI, "scale": self.scale_OG}
        if self.second_OG is not None:
            tensors[self.format.second] = self.second_OG[
                :, : self.format.seconds_of(self.second_OG.shape[1])
            ].contiguous()
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], fmt: Format) -> QuantizedWeight:
        """The inverse of `tensors`."""
        scale_OG, second = tensors["scale"], tensors.get(fmt.second)
        return cls(tensors["q"], scale_OG, None if second is None else second.expand_as(scale_OG), fmt)


def layout(
    shape: Sequence[int], fmt: Format, scale_dtype: torch.dtype = torch.float32
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of `QuantizedWeight.tensors` for a weight of `shape (..., O, I)`."""
    *rows, in_features = shape
    groups = in_features // fmt.group_of(in_features)
    names, counts = ("scale", fmt.second), (groups, fmt.seconds_of(groups))
    grid = zip(names, counts, fmt.stored_dtypes(scale_dtype), strict=False)
    return {"q": (tuple(shape), fmt.dtype)} | {name: ((*rows, count), dtype) for name, count, dtype in grid}


def fit_grid(
    w_OI: Tensor,
    fmt: Format,
    *,
    search: ClipSearch | None = None,
    scale_dtype: torch.dtype = torch.float32,
    whole_OG1: Tensor | None = None,
) -> Grid:
    """The grid of a weight: its range, or the part of it that `search` finds best, per row or group.

    Scales are rounded to `scale_dtype`, or to the dtype that the format has for them, before anything depends on
    them, so a checkpoint reproduces the weights bit for bit. `whole_OG1` stands for what `whole_of` finds, if the
    weight is only a part of those that share it. Raises SpinfoldError if a weight is not finite or groups
    do not fit.
    """
    w_OGg = fmt.split(w_OI.to(compute_dtype(w_OI)))
    low_OG1, high_OG1 = extent(w_OGg)
    if not (torch.isfinite(low_OG1).all() and torch.isfinite(high_OG1).all()):
        raise SpinfoldError(
            f"A weight of shape {tuple(w_OI.shape)} cannot be quantized.",
            "It contains NaN or infinity.",
            "Check the checkpoint, and the maps that were folded into it.",
        )
    whole_OG1 = fmt.whole_of(low_OG1, high_OG1) if whole_OG1 is None else whole_OG1
    if search is not None:
        group_size = w_OGg.shape[-1]
        # Blocks that stay in the CPU's cache make the passes several times faster; a GPU wants large ones.
        numbers = 2**26 if w_OI.is_cuda else 2**17
        rows = max(1, numbers // group_size)
        at_once = max(1, numbers // w_OI.numel()) if w_OI.is_cuda else 1
        pieces = [torch.split(t.reshape(-1, t.shape[-1]), rows) for t in (w_OGg, low_OG1, high_OG1)]
        wholes = [None] * len(pieces[0]) if whole_OG1 is None else torch.split(whole_OG1.reshape(-1, 1), rows)
        factors = [
            search.best(w_Rg, low_R1, high_R1, whole_R1, fmt, scale_dtype, at_once)
            for w_Rg, low_R1, high_R1, whole_R1 in zip(*pieces, wholes, strict=True)
        ]
        factor_OG1 = torch.cat(factors).view_as(low_OG1)
        low_OG1, high_OG1 = low_OG1 * factor_OG1, high_OG1 * factor_OG1
    scale_OG1, second_OG1 = fmt.grid(low_OG1, high_OG1, whole=whole_OG1, scale_dtype=scale_dtype)
    second_OG = None if second_OG1 is None else second_OG1.squeeze(-1)
    return Grid(*fmt.stored(scale_OG1.squeeze(-1), second_OG, scale_dtype), fmt)
