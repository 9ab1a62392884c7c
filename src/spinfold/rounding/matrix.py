"""One weight, or the stacked weights that read one wire, by the back-end that a recipe names.

    rtn    to the nearest point                      gptq   column by column, towards W
    ldlq   likewise in natural order, then passes    gptaq  likewise towards the unrounded network's output

With `rounding.absorb` each starts from a weight that OSAQ has flattened.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from spinfold.formats import Format, QuantizedWeight
from spinfold.recipe import Recipe
from spinfold.rounding.gptaq import gptaq
from spinfold.rounding.gptq import gptq
from spinfold.rounding.hessian import energy_O
from spinfold.rounding.ldlq import ldlq
from spinfold.rounding.nearest import round_nearest
from spinfold.rounding.osaq import absorb_outliers
from spinfold.rounding.stream import Moments

__all__ = ["Errors", "measure", "round_matrix"]


@dataclass(frozen=True)
class Errors:
    """The outputs' mean squares, row by row: of what a rounding leaves, of what rounding to nearest would leave, and of
    the weight itself; None without statistics. And the damping of the Hessian, if there was one."""

    energy_3O: Tensor | None = None
    damping: float | None = None

    def split(self, sizes: Sequence[int]) -> list[tuple[float | None, float | None, float | None]]:
        """Relative squared errors of the rounding and of the nearest one, and the damping, for parts of so many rows.

        None where there is no output to compare with, or one that is not finite.
        """
        if self.energy_3O is None:
            return [(None, None, self.damping)] * len(sizes)
        sums = torch.stack([part.sum(1) for part in self.energy_3O.split(list(sizes), 1)]).tolist()
        errors = [[e / total if total and isfinite(e / total) else None for e in es] for *es, total in sums]
        return [(error, nearest_error, self.damping) for error, nearest_error in errors]


def round_matrix(w_OI: Tensor, moments: Moments | None, fmt: Format, recipe: Recipe) -> tuple[QuantizedWeight, Errors]:
    """`w_OI` on the grid `fmt`. Rounding to nearest needs no moments; without a drift GPTAQ is GPTQ."""
    settings, method = recipe.rounding, recipe.rounding.method
    grid: dict[str, Any] = {"search": recipe.clip_search, "scale_dtype": recipe.scale_dtype}
    if moments is None:
        assert method == "rtn"
        return round_nearest(w_OI, fmt, **grid), Errors()
    hessian_II, drift_II = moments.hessian_II, moments.drift_II
    start_OI = w_OI
    if settings.absorb is not None:
        start_OI = absorb_outliers(w_OI, hessian_II, fmt, share=settings.absorb, **grid)
    columns = grid | settings.model_dump(include={"damp", "act_order", "static_groups", "block_size"})
    if method == "rtn":
        rounded, damping = round_nearest(start_OI, fmt, **grid), None
    else:
        if method == "ldlq":
            rounded, report = ldlq(start_OI, hessian_II, fmt, passes=settings.passes, damp=settings.damp, **grid)
        elif method == "gptaq" and drift_II is not None:
            rounded, report = gptaq(start_OI, hessian_II, drift_II, fmt, alpha=settings.alpha, **columns)
        else:
            rounded, report = gptq(start_OI, hessian_II, fmt, **columns)
        damping = report.damping
        if start_OI is w_OI:
            return rounded, Errors(report.energy_3O, damping)
    nearest = rounded if start_OI is w_OI else round_nearest(w_OI, fmt, **grid)
    return rounded, measure(w_OI, hessian_II, rounded, nearest, damping)


def measure(
    w_OI: Tensor, hessian_II: Tensor, rounded: QuantizedWeight, nearest: QuantizedWeight, damping: float | None = None
) -> Errors:
    """The errors of two ways to round `w_OI`."""
    weights = (w_OI - rounded.dequantize(w_OI.dtype), w_OI - nearest.dequantize(w_OI.dtype), w_OI)
    return Errors(torch.stack([energy_O(x_OI, hessian_II) for x_OI in weights]), damping)
