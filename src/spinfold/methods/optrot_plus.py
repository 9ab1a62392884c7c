"""OptRot+ (Gadhikar, Grazzi & Hensman, arXiv 2512.24124): OptRot weighted by what GPTQ can't repair.

GPTQ's error is at most Σ_i D_i s_i² / 4 per row, with s_i the grid step at channel i and D from
H = E[xᵀx] = (I + U) D (I + U)ᵀ (`feedback`). A rotation R of the input acts on both factors, the steps through the
largest weights and D through Rᵀ H R. With ‖·‖₄ for the largest weight:

    literal      Σ_W  rows(W) ‖W̃‖₄² tr(D)                     one step for the matrix, as in the error bound
    normalised   Σ_W  Σ_rows Σ_g ‖w̃_g‖₄² Σ_{i in g} D_i        one step for each quantization unit g, as in fact

The paper's own formula was not available: both are our reading of its bound. q, k, v, gate and up feel the residual
rotation through D, o feels the value rotation, down neither, since its input has the fixed basis of the down site.

Shapes: L layers, O out features, I in features, G groups of g neighbours, H head_dim, N query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial

import torch
from torch import Tensor

from spinfold.fitting.capture import second_moments
from spinfold.fitting.end_to_end import FitLog
from spinfold.fitting.feedback import feedback, lower_one, pair, turned_feedback, upper_one
from spinfold.fitting.layerwise import choose
from spinfold.maps import BlockDiagonal, Map, SiteMaps
from spinfold.methods.base import FitTask, Method
from spinfold.methods.optrot import Cost, fit_to_weights
from spinfold.methods.quarot import hadamard_maps
from spinfold.recipe import Fit

__all__ = ["OPTROT_PLUS", "Bound", "error_bound", "fit_to_feedback"]

Bound = Callable[[Tensor, Tensor], Tensor]
"""`bound(weights, feedback)`: the error, a scalar, of rotated weights `(L, O, I)` with feedback `(L, I)`."""


def error_bound(w_LOI: Tensor, variance_LI: Tensor, group_size: int | None, *, per_unit: bool) -> Tensor:
    """The smooth error bound of rotated weights `(L, O, I)` with feedback `(L, I)`, a scalar (see the module)."""
    square_LOI = w_LOI.float().square()
    if not per_unit:
        norm_L = square_LOI.square().sum((-2, -1)).sqrt()
        return (w_LOI.shape[-2] * norm_L * variance_LI.sum(-1)).sum()
    square_LOGg = square_LOI.unflatten(-1, (-1, group_size or w_LOI.shape[-1]))
    norm_LOG = square_LOGg.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    variance_LG = variance_LI.unflatten(-1, (-1, square_LOGg.shape[-1])).sum(-1)
    return (norm_LOG * variance_LG[:, None]).sum()


def _cost(bound: Bound, weigh: Callable[[str, Sequence[int], Tensor], Tensor]) -> Cost:
    """The bound, summed over matrices, weighed by feedback."""

    def of(w_LOI: Tensor, heights: Sequence[int], feedback_LI: Tensor | None) -> Tensor:
        assert feedback_LI is not None
        return torch.stack([bound(one_LOI, feedback_LI) for one_LOI in w_LOI.split(list(heights), 1)]).sum()

    return Cost(of, weigh)


def _in_basis(moment_II: Tensor, map: Map | None) -> Tensor:
    """Mᵀ H M in fp32, the product in fp64."""
    moment_II = moment_II.double()
    return (moment_II if map is None else map.apply(map.apply(moment_II).mT)).float()


def fit_to_feedback(task: FitTask, bound: Bound, fit: Fit | None = None) -> tuple[SiteMaps, FitLog]:
    """Residual, then value rotations that lower `bound`, summed over all weights; `fit` as in `fit_to_weights`.

    The down wire's basis is fixed, so that of its moments, the largest, no more is kept than their feedback. Those that
    the residual rotation turns lie in pairs in the memory of one, and those of heads wait on the host for their turn.
    """
    recipe, network, damp = task.recipe, task.network, task.recipe.rounding.damp
    layers, device = network.layers, network.device
    ids_WT = task.windows(recipe.fit.seq_len or recipe.calibration.seq_len, recipe.calibration.samples)
    fixed = hadamard_maps(task).to(device)  # at the down site what the fit to weights has, too
    width, of_heads = network.hidden_size, layers[0].num_heads * layers[0].head_dim
    moments = {"pairs": torch.empty(len(layers), width, width + 1, device=device)}
    heads_LII, down = torch.empty(len(layers), of_heads, of_heads, device="cpu"), list[Tensor]()
    wires = ("qkv_input", "mlp_input", "attention_out", "down")
    seen = second_moments(network, ids_WT, wires, compute=recipe.compute, progress=task.progress)
    with closing(seen):
        for layer, of_layer in seen:
            moments["pairs"][layer] = pair(*(of_layer.pop(wire).float() for wire in wires[:2]))
            heads_LII[layer] = of_layer.pop("attention_out").float()
            down.append(feedback(_in_basis(of_layer.pop("down"), fixed.at("down", layer)), damp))
    down_LF = torch.stack(down)

    def known(moments: Iterable[Tensor], maps: Sequence[Map | None]) -> Tensor:
        both = zip(moments, maps, strict=True)
        return torch.stack([feedback(_in_basis(moment_II.to(device), one), damp) for moment_II, one in both])

    def residual_cost(maps: SiteMaps) -> Cost:
        values = [(one := maps.at("value", x.index)) and BlockDiagonal(one, x.num_heads) for x in layers]
        fixed_LI = {"down": down_LF, "attention_out": known(heads_LII, values)}

        def weigh(wire: str, some: Sequence[int], R_DD: Tensor) -> Tensor:
            if wire in fixed_LI:
                return fixed_LI[wire][list(some)]
            one_of = lower_one if wire == "qkv_input" else upper_one
            return turned_feedback(one_of(moments["pairs"][list(some)]), R_DD, damp)

        return _cost(bound, weigh)

    def value_cost(maps: SiteMaps) -> Cost:
        pairs_LDM = moments.pop("pairs")
        qkv_LD = known(map(lower_one, pairs_LDM), [maps.residual_at(2 * x.index) for x in layers])
        turned_LII = heads_LII.to(device)

        def weigh(wire: str, some: Sequence[int], B_LHH: Tensor) -> Tensor:
            if wire == "qkv_input":
                return qkv_LD[list(some)]
            return turned_feedback(turned_LII[list(some)], B_LHH, damp)

        return _cost(bound, weigh)

    return fit_to_weights(task, lambda m: residual_cost(m.to(device)), lambda m: value_cost(m.to(device)), fit)


def _fit(task: FitTask) -> tuple[SiteMaps, FitLog]:
    fit, group_size = task.recipe.fit, task.recipe.group_size
    per_unit = choose(fit.objective, {"normalised": True, "literal": False}, "optrot-plus")
    return fit_to_feedback(task, partial(error_bound, group_size=group_size, per_unit=per_unit))


OPTROT_PLUS = Method(
    name="optrot-plus",
    summary="OptRot weighted by the error that GPTQ can't repair",
    paper="arXiv 2512.24124",
    sites=("residual", "value", "query_key", "down"),
    fit=_fit,
    reads=("fit", "calibration", "group_size", "rounding.damp"),
    needs_data=True,
)
