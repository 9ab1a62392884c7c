"""One weight, or the stacked weights that read one wire, by the back-end that a recipe names.

    rtn    to the nearest point                      gptq   column by column, towards W
    ldlq   likewise in natural order, then passes    gptaq  likewise towards the unrounded network's output

With `rounding.absorb` each starts from a weight that OSAQ has flattened.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from spinfold.formats import Format, QuantizedWeight
from spinfold.recipe import Recipe
from spinfold.rounding.gptaq import gptaq
from spinfold.rounding.gptq import gptq
from spinfold.rounding.hessian import energy
from spinfold.rounding.ldlq import ldlq
from spinfold.rounding.nearest import round_nearest
from spinfold.rounding.osaq import absorb_outliers
from spinfold.rounding.stream import Moments

__all__ = ["Errors", "round_matrix"]


@dataclass(frozen=True)
class Errors:
    """Relative squared output errors of a rounding and of rounding to nearest, None without statistics; and the damping
    of the Hessian, if there was one."""

    error: float | None = None
    nearest_error: float | None = None
    damping: float | None = None


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
            return rounded, Errors(report.error, report.nearest_error, damping)
    nearest = rounded if start_OI is w_OI else round_nearest(w_OI, fmt, **grid)
    total = energy(w_OI, hessian_II) or 1.0
    error, nearest_error = (energy(w_OI - one.dequantize(w_OI.dtype), hessian_II) / total for one in (rounded, nearest))
    return rounded, Errors(error, nearest_error, damping)
