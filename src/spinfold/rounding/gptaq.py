"""GPTAQ (arXiv 2504.02692): GPTQ towards the output of the unrounded network, on inputs from the rounded one.

With x the input in the rounded network, x° that of the same token in the unrounded one, H = E[xᵀx] and
D = E[(x° - x)ᵀ x], up to what does not depend on Ŵ

    E|x° Wᵀ - x Ŵᵀ|² = tr(Ŵ H Ŵᵀ) - 2 tr(W (H + D) Ŵᵀ) = tr((W* - Ŵ) H (W* - Ŵ)ᵀ),    W* = W + W D H⁻¹

so this is GPTQ with W* for W, and GPTQ itself if D = 0. With H⁻¹ = UᵀU the shift is (W D Uᵀ) U. The paper, whose
derivation goes column by column, keeps of D Uᵀ only what lies above the diagonal, since the columns behind column i
make up for what it misses; |W tril(D Uᵀ)|² of the objective is then left. Here all of it is taken.

`alpha` aims between the two networks' outputs, at x + alpha (x° - x), for D scales with it; the authors' code has 1/4.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spinfold.formats import ClipSearch, Format, QuantizedWeight
from spinfold.rounding.gptq import GPTQReport, gptq, live_problem
from spinfold.rounding.hessian import energy_O, inverse_factor
from spinfold.rounding.nearest import round_nearest

__all__ = ["asymmetric_target", "gptaq"]


@torch.no_grad()
def gptaq(
    w_OI: Tensor,
    hessian_II: Tensor,
    drift_II: Tensor,
    fmt: Format,
    *,
    alpha: float = 0.25,
    damp: float = 0.01,
    search: ClipSearch | None = None,
    scale_dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[QuantizedWeight, GPTQReport]:
    """Round `w_OI` against `hessian_II`, E[xᵀx], and `drift_II`, E[(x° - x)ᵀ x]; `options` are those of `gptq`.

    The report's errors are distances from W*, what is above the least that any weight could reach. Raises what `gptq`
    raises.
    """
    target_OI = asymmetric_target(w_OI, hessian_II, drift_II, alpha=alpha, damp=damp)
    rounded, report = gptq(target_OI, hessian_II, fmt, damp=damp, search=search, scale_dtype=scale_dtype, **options)
    nearest_OI = round_nearest(w_OI, fmt, search, scale_dtype=scale_dtype).dequantize(target_OI.dtype)
    error_O, _, total_O = report.energy_3O
    energy_3O = torch.stack([error_O, energy_O(target_OI - nearest_OI, hessian_II), total_O])
    _, nearest_error, total = energy_3O.sum(1).tolist()
    return rounded, replace(report, nearest_error=nearest_error / total if total else 0.0, energy_3O=energy_3O)


def asymmetric_target(
    w_OI: Tensor, hessian_II: Tensor, drift_II: Tensor, *, alpha: float = 0.25, damp: float = 0.01
) -> Tensor:
    """W* = W + alpha W D H⁻¹, H damped as for rounding: what GPTAQ aims at, `(O, I)` in at least fp32.

    W itself where H is so indefinite that it has no inverse to speak of. Raises SpinfoldError for statistics that are
    not finite or have another shape.
    """
    assert drift_II.shape == hessian_II.shape
    live_OI, h_II, _ = live_problem(w_OI, hessian_II)
    factor, wide_OI = inverse_factor(h_II, damp), w_OI.to(live_OI.dtype)
    if factor.diagonal:
        return wide_OI
    shift_OI = wide_OI.double() @ drift_II.to(h_II) @ factor.u_II.T @ factor.u_II
    return wide_OI + alpha * shift_OI.to(wide_OI.dtype)
