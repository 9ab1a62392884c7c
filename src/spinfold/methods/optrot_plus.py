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

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import repeat

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spinfold.compute import precision
from spinfold.fitting.capture import second_moments
from spinfold.fitting.end_to_end import FitLog
from spinfold.fitting.layerwise import choose
from spinfold.fitting.row_objectives import feedback
from spinfold.maps import BlockDiagonal, Map, SiteMaps
from spinfold.methods.base import FitTask, Method
from spinfold.methods.optrot import Cost, fit_to_weights
from spinfold.methods.quarot import hadamard_maps
from spinfold.recipe import Fit

__all__ = ["NUMBERS", "OPTROT_PLUS", "Bound", "error_bound", "fit_to_feedback"]

_TURNED = ("qkv_input", "attention_out", "mlp_input")
"""The wires that a fitted rotation turns."""
NUMBERS = 1 << 26
"""Of the moments that are turned and factored together; the way back needs them about ten times."""
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


def _cost(bound: Bound, moments: Mapping[str, Tensor], known: Mapping[str, Tensor], damp: float) -> Cost:
    """Feedback from `known` `(L, I)` by wire, or else from the wire's second moment `(L, I, I)`, turned by R."""

    def cost(wire: str, layers: Sequence[int], w_LOI: Tensor, heights: Sequence[int], R: Tensor) -> Tensor:
        index = torch.tensor(list(layers), dtype=torch.int64, device=R.device)
        variance_LI = known[wire][index] if wire in known else _turned_feedback(moments[wire][index], R, damp)
        return torch.stack([bound(one_LOI, variance_LI) for one_LOI in w_LOI.split(list(heights), 1)]).sum()

    return cost


def _turned_feedback(moment_LII: Tensor, R: Tensor, damp: float) -> Tensor:
    """Feedback `(L, I)` in the basis of R; of many large layers in parts, each made again on the way back."""

    def one(moment_LII: Tensor, R: Tensor) -> Tensor:
        with precision("fp32", R.device):  # coarser products lose the small eigenvalues that the factor is about
            return feedback(_turned(moment_LII, R), damp)

    parts = moment_LII.split(max(1, NUMBERS // moment_LII.shape[-1] ** 2))
    if len(parts) == 1:  # or none, of a process without a layer
        return one(moment_LII, R)
    turns = repeat(R) if R.ndim == 2 else R.split(len(parts[0]))
    again = partial(checkpoint, one, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(part_LII, turn) for part_LII, turn in zip(parts, turns, strict=False)])


def _turned(moment_LII: Tensor, R: Tensor) -> Tensor:
    """Mᵀ H M, with M = R `(I, I)`, or I ⊗ R_l for a stack of head rotations `(L, H, H)`."""
    if R.ndim == 2:
        return R.mT @ moment_LII @ R
    head_dim = R.shape[-1]
    moment_LNHNH = moment_LII.unflatten(2, (-1, head_dim)).unflatten(1, (-1, head_dim))
    return torch.einsum("lahbk,lhx,lky->laxby", moment_LNHNH, R, R).flatten(3, 4).flatten(1, 2)


def _in_basis(moment_II: Tensor, map: Map | None) -> Tensor:
    """Mᵀ H M in fp32, the product in fp64."""
    moment_II = moment_II.double()
    return (moment_II if map is None else map.apply(map.apply(moment_II).mT)).float()


def fit_to_feedback(task: FitTask, bound: Bound, fit: Fit | None = None) -> tuple[SiteMaps, FitLog]:
    """Residual, then value rotations that lower `bound`, summed over all weights; `fit` as in `fit_to_weights`.

    The down wire's basis is fixed, so that of its moments, the largest, no more is kept than their feedback.
    """
    recipe, layers, damp = task.recipe, task.network.layers, task.recipe.rounding.damp
    ids_WT = task.windows(recipe.fit.seq_len or recipe.calibration.seq_len, recipe.calibration.samples)
    fixed = hadamard_maps(task).to(task.network.device)  # at the down site what the fit to weights has, too
    moments, down = dict[str, Tensor](), list[Tensor]()
    wires = (*_TURNED, "down")
    seen = second_moments(task.network, ids_WT, wires, compute=recipe.compute, progress=task.progress)
    with closing(seen):
        for layer, of_layer in seen:
            for wire in _TURNED:
                moment_II = of_layer.pop(wire)
                if wire not in moments:
                    moments[wire] = torch.empty(len(layers), *moment_II.shape, device=moment_II.device)
                moments[wire][layer] = moment_II
            down.append(feedback(_in_basis(of_layer.pop("down"), fixed.at("down", layer)), damp))
            del moment_II  # before the next layer has its own
    down_LF = torch.stack(down)

    def known(wire: str, maps: Sequence[Map | None]) -> dict[str, Tensor]:
        pairs = zip(moments[wire], maps, strict=True)
        return {wire: torch.stack([feedback(_in_basis(moment_II, map), damp) for moment_II, map in pairs])}

    def residual_cost(maps: SiteMaps) -> Cost:
        values = [(one := maps.at("value", x.index)) and BlockDiagonal(one, x.num_heads) for x in layers]
        return _cost(bound, moments, {"down": down_LF, **known("attention_out", values)}, damp)

    def value_cost(maps: SiteMaps) -> Cost:
        return _cost(bound, moments, known("qkv_input", [maps.residual_at(2 * x.index) for x in layers]), damp)

    device = task.network.device
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
