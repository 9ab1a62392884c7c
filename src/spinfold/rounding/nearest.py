"""Rounding to nearest (RTN): every weight to the closest point of its grid, whatever the inputs.

Shapes: O out features, I in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spinfold.formats import ClipSearch, Format, QuantizedWeight, fit_grid

__all__ = ["round_nearest"]


@torch.no_grad()
def round_nearest(
    w_OI: Tensor,
    fmt: Format,
    search: ClipSearch | None = None,
    *,
    scale_dtype: torch.dtype = torch.float32,
) -> QuantizedWeight:
    """Round `w_OI` to the grid that `fit_grid` finds for it. Raises what `fit_grid` raises."""
    grid = fit_grid(w_OI, fmt, search=search, scale_dtype=scale_dtype)
    return QuantizedWeight(grid.quantize(w_OI), grid.scale_OG, grid.second_OG, fmt)
