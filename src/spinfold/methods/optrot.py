"""OptRot (Gadhikar, Grazzi & Hensman, arXiv 2512.24124): residual and value rotations from the weights alone.

    min over R, B_l   Σ_l  Σ_{q,k,gate,up} ‖W R‖₄⁴ + ‖B_lᵀ W_v R‖₄⁴ + ‖Rᵀ W_o B_l‖₄⁴ + ‖Rᵀ W_down H‖₄⁴

with B_l on every head of layer l. ‖·‖₄ is a smooth stand-in for the largest weight, which sets the rounding step. Two
objectives, of the rows w̃ of the rotated weights (which are what shares a scale, or groups of them):

    literal      Σ ‖w̃‖₄⁴                    the paper's
    normalised   Σ_g ‖w̃_g‖₄⁴ / ‖w̃_g‖₂²      each quantization unit g by its length², as its error counts

The residual rotation is fitted first, with the value maps at their Hadamard start; then all value rotations side by
side, with the residual rotation in place. A residual step sees `fit.batch` whole layers, in a random order and each
once per round; a value step sees all. Unknown in the paper, and chosen here: the optimiser (Cayley SGD, by an angle;
"capped" is the published step), the order, embedding and head left out (they stay in floating point), fixed Hadamards
at query_key and down.

Shapes: L layers, D residual width, O out features, I in features, K kv heads, N query heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from spinfold.fitting.end_to_end import FitLog
from spinfold.fitting.layerwise import LayerwiseSettings, RowObjective, Term, choose, dense, fit_layerwise
from spinfold.fitting.row_objectives import fourth_power, normalised_fourth_power
from spinfold.folding import fold
from spinfold.maps import Map, Orthogonal, SiteMaps
from spinfold.methods.base import FitTask, Method
from spinfold.methods.quarot import hadamard_maps
from spinfold.networks import Layer, Network
from spinfold.recipe import Fit

__all__ = ["OPTROT", "Cost", "fit_to_weights", "residual_term", "total_of", "value_term"]

Cost = Callable[[str, Sequence[int], Sequence[Tensor], Tensor], Tensor]
"""`cost(wire, layers, weights, R)`: the cost, a scalar, of rotated weights `(L, O, I)` that read `wire` in `layers`."""

_LAYERS = 3
_RESIDUAL = LayerwiseSettings(steps=350, learning_rate=0.4, optimiser="spectral")
_VALUE = LayerwiseSettings(steps=60, learning_rate=0.3, optimiser="spectral")


def total_of(objective: RowObjective) -> Cost:
    """The cost that is a row objective's sum over all rows of all matrices."""

    def cost(_: str, __: Sequence[int], weights: Sequence[Tensor], ___: Tensor) -> Tensor:
        return torch.stack([objective(w_LOI).sum() for w_LOI in weights]).sum()

    return cost


def residual_term(network: Network, cost: Cost, layers_per_step: int) -> Term:
    """The cost of `network` rotated by R, estimated without bias from a few layers a step, all of them in turn.

    Every other map is folded into `network`: what is left is W R for readers of the stream, Rᵀ W for its writers.
    """
    layers, waiting = network.layers, list[int]()
    drawn = min(layers_per_step, len(layers))

    def term(R_DD: Tensor, draws: torch.Generator) -> Tensor:
        some: dict[tuple[str, ...], list[Layer]] = {}
        for _ in range(drawn):
            if not waiting:
                waiting.extend(torch.randperm(len(layers), generator=draws).tolist())
            layer = layers[waiting.pop()]
            some.setdefault(tuple(layer.linears), []).append(layer)
        total = torch.zeros((), device=R_DD.device)
        for alike in some.values():
            for wire, linears in alike[0].groups.items():
                w_LOI = torch.stack([torch.cat([x.weight_OI for x in layer.groups[wire]]) for layer in alike])
                writes = wire in ("attention_out", "down")
                heights = [len(x.weight_OI) for x in linears]
                rotated = [R_DD.mT @ w for w in w_LOI.split(heights, 1)] if writes else (w_LOI @ R_DD).split(heights, 1)
                total = total + cost(wire, [layer.index for layer in alike], rotated, R_DD)
        return total * (len(layers) / drawn)

    return term


def value_term(network: Network, cost: Cost) -> Term:
    """The cost of all W_v and W_o with a rotation `(L, H, H)` of each layer's heads; other maps are folded in."""
    layers: list[Layer] = network.layers
    head_dim = layers[0].head_dim
    v_LKHD = torch.stack([x.linears["v"].weight_OI.float().unflatten(0, (-1, head_dim)) for x in layers])
    o_LDNH = torch.stack([x.linears["o"].weight_OI.float().unflatten(1, (-1, head_dim)) for x in layers])
    everyone = range(len(layers))

    def term(B_LHH: Tensor, _: torch.Generator) -> Tensor:
        v_LOD = (B_LHH.mT[:, None] @ v_LKHD).flatten(1, 2)
        o_LDI = (o_LDNH.flatten(1, 2) @ B_LHH).reshape(*o_LDNH.shape[:2], -1)
        return cost("qkv_input", everyone, [v_LOD], B_LHH) + cost("attention_out", everyone, [o_LDI], B_LHH)

    return term


def fit_to_weights(
    task: FitTask,
    residual_cost: Callable[[SiteMaps], Cost],
    value_cost: Callable[[SiteMaps], Cost],
    fit: Fit | None = None,
) -> tuple[SiteMaps, FitLog]:
    """Residual, then value rotations that lower the cost of the rotated weights, from random Hadamards.

    A cost is asked for once the maps of the other sites are known. `fit` stands in for the recipe's, where that means
    another fit. The log is the residual fit's, if there is one.
    """
    recipe, device, fit = task.recipe, task.network.device, fit or task.recipe.fit
    maps, log = hadamard_maps(task, random_value=True), FitLog()
    settings = partial(LayerwiseSettings.of, fit, compute=recipe.compute)
    if isinstance(maps.residual, Map):
        others = _folded(task.network, replace(maps, residual=None, query_key=None))
        R_DD, losses = fit_layerwise(
            dense(maps.residual, device),
            residual_term(others, residual_cost(maps), fit.batch or _LAYERS),
            settings(_RESIDUAL),
            seed=recipe.seed,
            progress=task.progress,
            label="fit residual rotation",
        )
        maps, log = replace(maps, residual=Orthogonal(R_DD)), FitLog(losses)
        del others
    if maps.value is not None:
        others = _folded(task.network, replace(maps, value=None, query_key=None))
        B_LHH, losses = fit_layerwise(
            torch.stack([dense(one, device) for one in maps.value]),
            value_term(others, value_cost(maps)),
            settings(_VALUE),
            seed=recipe.seed,
            progress=task.progress,
            label="fit value rotations",
        )
        maps = replace(maps, value=tuple(Orthogonal(B_HH) for B_HH in B_LHH))
        log = log if log.losses else FitLog(losses)
    return maps, log


def _folded(network: Network, maps: SiteMaps) -> Network:
    twin = network.copy()
    fold(twin, maps)
    return twin


def _fit(task: FitTask) -> tuple[SiteMaps, FitLog]:
    normalised = partial(normalised_fourth_power, group_size=task.recipe.group_size)
    choices: dict[str, RowObjective] = {"normalised": normalised, "literal": fourth_power}
    cost = total_of(choose(task.recipe.fit.objective, choices, "optrot"))
    return fit_to_weights(task, lambda _: cost, lambda _: cost)


OPTROT = Method(
    name="optrot",
    summary="residual and value rotations that flatten the weights; needs no data",
    paper="arXiv 2512.24124",
    sites=("residual", "value", "query_key", "down"),
    fit=_fit,
    reads=("fit", "group_size"),
)
