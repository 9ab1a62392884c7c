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

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from spinfold.compute import pick_precision
from spinfold.distributed import share, spread, total
from spinfold.fitting.end_to_end import FitLog
from spinfold.fitting.layerwise import LayerwiseSettings, Term, at_once, choose, dense, fit_layerwise
from spinfold.fitting.row_objectives import RowObjective, fourth_power, in_blocks, normalised_fourth_power
from spinfold.folding import fold_layers
from spinfold.maps import Map, Orthogonal, SiteMaps
from spinfold.methods.base import FitTask, Method
from spinfold.methods.quarot import hadamard_maps
from spinfold.networks import Layer, Network
from spinfold.recipe import Fit

__all__ = [
    "LARGE",
    "LAYERS",
    "OPTROT",
    "PART",
    "RESIDUAL",
    "VALUE",
    "Cost",
    "fit_to_weights",
    "residual_term",
    "total_of",
    "value_term",
]


def _unweighed(wire: str, layers: Sequence[int], R: Tensor) -> None:
    """Errors in all channels count alike."""


@dataclass(frozen=True)
class Cost:
    """What rotated weights cost, a scalar."""

    of: Callable[[Tensor, Sequence[int], Tensor | None], Tensor]
    """`of(w, heights, weights)`: of w `(L, O, I)`, which are matrices of `heights`, one below the other."""
    weigh: Callable[[str, Sequence[int], Tensor], Tensor | None] = _unweighed
    """`weigh(wire, layers, R)`: the weights `(L, I)` of errors in the channels of `wire`, if they have any."""


LAYERS = 3
LARGE, PART = 1 << 28, 1 << 26
"""Weights of a step that are too many to be turned at once, and how many then are; a step holds six times as many."""
RESIDUAL = LayerwiseSettings(steps=350, learning_rate=0.4, optimiser="spectral")
VALUE = LayerwiseSettings(steps=60, learning_rate=0.3, optimiser="spectral")


def total_of(objective: RowObjective) -> Cost:
    """The cost that is a row objective's sum over all rows of all matrices."""
    objective = in_blocks(objective)

    return Cost(lambda w_LOI, *_: objective(w_LOI).sum())


def residual_term(
    network: Network, cost: Cost, layers_per_step: int, waiting_L: Tensor, dtype: torch.dtype = torch.float32
) -> Term:
    """The cost of `network` rotated by R, estimated without bias from a few layers a step, all of them in turn.

    `waiting_L`, int64, are the layers that wait for their turn, from the last one on, and -1 for all others.

    Every other map is folded into `network`: what is left is W R for readers of the stream, Rᵀ W for its writers. The
    products have their weights in `dtype`: held so, and the network let go, unless a step's are large; those of layers
    that come and go are held in 16 bits, which is more than a fit needs.
    """
    num_layers = len(network.layers)
    drawn = min(layers_per_step, num_layers)
    large = drawn * max(sum(x.weight_OI.numel() for x in layer.foldable) for layer in network.layers) > LARGE
    weights_of = _weights_of(network, dtype, hold=not large)
    heights_of = [
        {wire: [len(x.weight_OI) for x in linears] for wire, linears in layer.groups.items()}
        for layer in network.layers
    ]
    one_by_one = large or network.device.type == "cpu"  # a GPU likes few large products, a CPU what its cache holds

    def term(R_DD: Tensor, draws: torch.Generator) -> Tensor:
        picked: list[int] = []
        for _ in range(drawn):
            if bool((waiting_L < 0).all()):
                waiting_L.copy_(torch.randperm(num_layers, generator=draws))
            last = waiting_L.ge(0).nonzero()[-1]
            picked.append(int(waiting_L[last]))
            waiting_L[last] = -1
        R_DD = spread(R_DD)
        own: dict[str, list[int]] = {}
        for layer in picked[share(drawn)]:
            own.setdefault(str(layer if one_by_one else heights_of[layer]), []).append(layer)
        parts = [partial(of_wire, alike, wire) for alike in own.values() for wire in heights_of[alike[0]]]
        found = 0 * R_DD.sum()  # a process without a layer has a gradient too
        if large and parts:  # what is made of large layers takes gigabytes
            found = found + at_once(parts, R_DD)
        elif parts:
            found = torch.stack([part(R_DD) for part in parts]).sum()
        return total(found) * (num_layers / drawn)

    def of_wire(alike: list[int], wire: str, R_DD: Tensor) -> Tensor:
        weights, heights = [weights_of(layer, wire) for layer in alike], heights_of[alike[0]][wire]
        w_LOI = torch.stack(weights) if len(weights) > 1 else weights[0][None]
        weigh_LI = cost.weigh(wire, alike, R_DD)
        if not large:
            return of_weights(w_LOI, heights, wire, R_DD, weigh_LI)
        blocks = _blocks(heights, max(1, PART // w_LOI.shape[-1]))
        parts = zip(w_LOI.split([sum(block) for block in blocks], 1), blocks, strict=True)
        return at_once([partial(of_weights, *part, wire) for part in parts], R_DD, weigh_LI)

    def of_weights(w_LOI: Tensor, heights: Sequence[int], wire: str, R_DD: Tensor, weigh_LI: Tensor | None) -> Tensor:
        w_LOI = w_LOI.to(dtype)
        if wire in ("attention_out", "down"):
            w_LOI = (R_DD.mT.to(dtype) @ w_LOI.unflatten(1, (-1, len(R_DD)))).flatten(1, 2)
        else:
            w_LOI = w_LOI @ R_DD.to(dtype)
        return cost.of(w_LOI, heights, weigh_LI)

    return term


def _blocks(heights: Sequence[int], most: int) -> list[list[int]]:
    """Neighbours together, as long as they are not higher than `most`."""
    blocks: list[list[int]] = [[]]
    for height in heights:
        if blocks[-1] and sum(blocks[-1]) + height > most:
            blocks.append([])
        blocks[-1].append(height)
    return blocks


def _weights_of(network: Network, dtype: torch.dtype, hold: bool) -> Callable[[int, str], Tensor]:
    """The function of a layer and a wire that gives all weights that read it, `(O, I)`; with `hold` made once."""

    def made(layer: Layer, wire: str, dtype: torch.dtype) -> Tensor:
        return torch.cat([x.weight_OI for x in layer.groups[wire]]).to(dtype)

    if network.resident and not hold:
        return lambda layer, wire: made(network.layers[layer], wire, dtype)
    held = dict[tuple[int, str], Tensor]()
    for layer in network.layers:
        with layer.present():
            for wire in layer.groups:
                held[layer.index, wire] = made(layer, wire, dtype if network.resident else torch.bfloat16)
    return lambda layer, wire: held[layer, wire]


def value_term(network: Network, cost: Cost, dtype: torch.dtype = torch.float32) -> Term:
    """The cost of all W_v and W_o, held in `dtype`, with a rotation `(L, H, H)` of each layer's heads; other maps are
    folded in."""
    layers: list[Layer] = network.layers
    own, head_dim = share(len(layers)), layers[0].head_dim
    v, o = list[Tensor](), list[Tensor]()
    for layer in layers[own] or layers[:1]:  # a process without a layer has tensors of none
        with layer.present():
            v.append(layer.linears["v"].weight_OI.to(dtype).unflatten(0, (-1, head_dim)))
            o.append(layer.linears["o"].weight_OI.to(dtype).unflatten(1, (-1, head_dim)))
    some = range(len(layers))[own]
    v_LKHD, o_LDNH = torch.stack(v)[: len(some)], torch.stack(o)[: len(some)]
    most = max(1, PART // (v[0].numel() + o[0].numel()))
    parts = [slice(low, low + most) for low in range(0, len(some), most)]

    def term(B_LHH: Tensor, _: torch.Generator) -> Tensor:
        B_LHH = spread(B_LHH)[own]
        if len(parts) == 1:
            return total(of_layers(parts[0], B_LHH))
        found = 0 * B_LHH.sum()  # a process without a layer has a gradient too
        for part in parts:
            found = found + at_once([partial(of_layers, part)], B_LHH[part])
        return total(found)

    def of_layers(part: slice, B_LHH: Tensor) -> Tensor:
        v_LOD = (B_LHH.mT[:, None].to(dtype) @ v_LKHD[part]).flatten(1, 2)
        o_LDI = (o_LDNH[part].flatten(1, 2) @ B_LHH.to(dtype)).reshape(*o_LDNH[part].shape[:2], -1)
        by_wire = {"qkv_input": v_LOD, "attention_out": o_LDI}
        return torch.stack(
            [cost.of(w, [w.shape[1]], cost.weigh(wire, some[part], B_LHH)) for wire, w in by_wire.items()]
        ).sum()

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
    dtype = torch.bfloat16 if pick_precision(recipe.compute, device) == "bf16" else torch.float32
    if isinstance(maps.residual, Map):
        others = _folded(task.network, replace(maps, residual=None, query_key=None))
        waiting_L = torch.full((len(others.layers),), -1)
        term = residual_term(others, residual_cost(maps), fit.batch or LAYERS, waiting_L, dtype)
        del others
        R_DD, losses = fit_layerwise(
            dense(maps.residual, device),
            term,
            settings(RESIDUAL),
            seed=recipe.seed,
            progress=task.progress,
            journal=task.journal,
            moved={"waiting": waiting_L},
            label="fit residual rotation",
        )
        maps, log = replace(maps, residual=Orthogonal(R_DD)), FitLog(losses)
        del term
    if maps.value is not None:
        others = _folded(task.network, replace(maps, value=None, query_key=None, down=None), roles=("v", "o"))
        B_LHH, losses = fit_layerwise(
            torch.stack([dense(one, device) for one in maps.value]),
            value_term(others, value_cost(maps), dtype),
            settings(VALUE),
            seed=recipe.seed,
            progress=task.progress,
            journal=task.journal,
            label="fit value rotations",
        )
        maps = replace(maps, value=tuple(Orthogonal(B_HH) for B_HH in B_LHH))
        log = log if log.losses else FitLog(losses)
    return maps, log


def _folded(network: Network, maps: SiteMaps, roles: Collection[str] | None = None) -> Network:
    """A network whose layers, and no more, have these maps; with `roles` only the linears of these."""
    twin = network.copy(share_ends=True)
    fold_layers(twin, maps, roles)
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
