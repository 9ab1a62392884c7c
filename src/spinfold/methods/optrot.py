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
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spinfold.compute import pick_precision
from spinfold.distributed import share, spread, total
from spinfold.fitting.end_to_end import FitLog
from spinfold.fitting.layerwise import LayerwiseSettings, Term, choose, dense, fit_layerwise
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
    "RESIDUAL",
    "VALUE",
    "Cost",
    "fit_to_weights",
    "residual_term",
    "total_of",
    "value_term",
]

Cost = Callable[[str, Sequence[int], Tensor, Sequence[int], Tensor], Tensor]
"""`cost(wire, layers, w, heights, R)`: the cost, a scalar, of the rotated weights w `(L, O, I)` that read `wire` in
`layers`; these are matrices of `heights`, one below the other.
"""

LAYERS = 3
LARGE = 1 << 28  # weights
RESIDUAL = LayerwiseSettings(steps=350, learning_rate=0.4, optimiser="spectral")
VALUE = LayerwiseSettings(steps=60, learning_rate=0.3, optimiser="spectral")


def total_of(objective: RowObjective) -> Cost:
    """The cost that is a row objective's sum over all rows of all matrices."""
    objective = in_blocks(objective)

    def cost(_: str, __: Sequence[int], w_LOI: Tensor, ___: Sequence[int], ____: Tensor) -> Tensor:
        return objective(w_LOI).sum()

    return cost


def residual_term(
    network: Network, cost: Cost, layers_per_step: int, waiting_L: Tensor, dtype: torch.dtype = torch.float32
) -> Term:
    """The cost of `network` rotated by R, estimated without bias from a few layers a step, all of them in turn.

    `waiting_L`, int64, are the layers that wait for their turn, from the last one on, and -1 for all others.

    Every other map is folded into `network`: what is left is W R for readers of the stream, Rᵀ W for its writers. The
    products have their weights in `dtype`: held so, and the network let go, unless a step's are large.
    """
    num_layers = len(network.layers)
    drawn = min(layers_per_step, num_layers)
    large = drawn * max(sum(x.weight_OI.numel() for x in layer.foldable) for layer in network.layers) > LARGE
    weights_of = _weights_of(network, dtype, hold=not large)
    heights_of = [
        {wire: [len(x.weight_OI) for x in linears] for wire, linears in layer.groups.items()}
        for layer in network.layers
    ]
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
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
        found = 0 * R_DD.sum()  # a process without a layer has a gradient too
        for alike in own.values():
            for wire in heights_of[alike[0]]:
                args = alike, wire, R_DD
                # What is made of large layers is made again in the backward pass: to hold it takes gigabytes.
                found = found + (again(of_wire, *args) if large else of_wire(*args))
        return total(found) * (num_layers / drawn)

    def of_wire(alike: list[int], wire: str, R_DD: Tensor) -> Tensor:
        weights = [weights_of(layer, wire) for layer in alike]
        w_LOI = torch.stack(weights) if len(weights) > 1 else weights[0][None]
        if wire in ("attention_out", "down"):
            w_LOI = (R_DD.mT.to(dtype) @ w_LOI.unflatten(1, (-1, len(R_DD)))).flatten(1, 2)
        else:
            w_LOI = w_LOI @ R_DD.to(dtype)
        return cost(wire, alike, w_LOI, heights_of[alike[0]][wire], R_DD)

    return term


def _weights_of(network: Network, dtype: torch.dtype, hold: bool) -> Callable[[int, str], Tensor]:
    """The function of a layer and a wire that gives all weights that read it, `(O, I)`; with `hold` made once."""

    def made(layer: int, wire: str) -> Tensor:
        return torch.cat([x.weight_OI for x in network.layers[layer].groups[wire]]).to(dtype)

    if not hold:
        return made
    held = {(layer.index, wire): made(layer.index, wire) for layer in network.layers for wire in layer.groups}
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

    def term(B_LHH: Tensor, _: torch.Generator) -> Tensor:
        B_LHH = spread(B_LHH)[own]
        v_LOD = (B_LHH.mT[:, None].to(dtype) @ v_LKHD).flatten(1, 2)
        o_LDI = (o_LDNH.flatten(1, 2) @ B_LHH.to(dtype)).reshape(*o_LDNH.shape[:2], -1)
        of_v = cost("qkv_input", some, v_LOD, [v_LOD.shape[1]], B_LHH)
        return total(of_v + cost("attention_out", some, o_LDI, [o_LDI.shape[1]], B_LHH))

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
        if not others.resident:  # every step needs some of it: all stays, in 16 bits, which is more than a fit needs
            others = others.held(torch.bfloat16)
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
