"""Bits per weight, spent where they save most error: the grids of a network's linears under one budget.

Each linear l costs B_l(b) bits on grid b, scales and zero points included, and has the error

    e_l(b) = tr(E H Eᵀ) / tr(W H Wᵀ)        E = W - Ŵ as GPTQ rounds it to b, H from the unrounded network

b are integers of 2 to 8 bits, or the recipe's `candidates`. Wanted are the grids with the least Σ e_l(b_l) of all with
Σ B_l(b_l) ≤ budget. That is a knapsack with one choice per linear, solved by dynamic programming over what is spent:

    least[l, s] = min over b of e_l(b) + least[l - 1, s - B_l(b)]

The unit of s is the greatest common divisor of all costs, so the answer is exact, unless there would be more than 2^18
units; then costs are rounded up to larger ones, and the budget holds all the same.

Shapes: L linears, S what may be spent, in units.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from spinfold.distributed import dealt
from spinfold.errors import SpinfoldError
from spinfold.networks import Layer, Network
from spinfold.progress import Progress, Quiet
from spinfold.recipe import Override, Recipe
from spinfold.rounding.hessian import energy
from spinfold.rounding.matrix import round_matrix
from spinfold.rounding.stream import Moments, Stream, moments_of

__all__ = ["WIDTHS", "allocate", "choices_of", "meet_budget"]

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
_MOST_UNITS = 1 << 18
K = TypeVar("K", bound=Hashable)


def choices_of(linear: str, recipe: Recipe) -> list[Override]:
    """The grids that a linear may have under a budget: one, if an override names it."""
    if recipe.names_grid(linear):
        return [Override(match=linear)]
    usual = ("int",) if recipe.format == "int" else dict.fromkeys((recipe.format, "mxfp6", "mxfp8"))
    choices: list[Override] = []
    for name in recipe.candidates or usual:
        format = None if name == recipe.format == "int" else name
        choices += [Override(match=linear, format=format, bits=b) for b in (WIDTHS if name == "int" else (None,))]
    return choices


def allocate(costs: Sequence[Mapping[K, int]], errors: Sequence[Mapping[K, float]], budget: int) -> list[K]:
    """The grid of each linear with the least sum of `errors` whose `costs`, in bits, are at most `budget` together.

    Both map a grid to a number, for each linear those that it may have. Raises SpinfoldError if the least costs are
    too much. Of equal sums the one with the cheaper last linears wins.
    """
    least = sum(min(cost.values()) for cost in costs)
    if least > budget:
        raise SpinfoldError(
            f"A budget of {budget:,} bits can't be met.",
            f"The narrowest grids take {least:,} bits, with their scales.",
            "Raise the budget, use larger groups, or leave fewer linears to `overrides`.",
        )
    unit = math.gcd(*(bits for cost in costs for bits in cost.values()))
    unit *= math.ceil(budget / (unit * _MOST_UNITS))
    if sum(min(-(-bits // unit) for bits in cost.values()) for cost in costs) > budget // unit:
        return [min(cost, key=cost.__getitem__) for cost in costs]  # rounding up takes all that there is
    least_S = torch.zeros(budget // unit + 1, dtype=torch.float64)
    choices: list[Tensor] = []
    for cost, error in zip(costs, errors, strict=True):
        ways_WS = torch.full((len(cost), len(least_S)), torch.inf, dtype=torch.float64)
        for way_S, width in zip(ways_WS, sorted(cost, key=cost.__getitem__), strict=True):
            spent = -(-cost[width] // unit)
            way_S[spent:] = least_S[: max(0, len(least_S) - spent)] + error[width]
        least_S, choice_S = ways_WS.min(0)
        choices.append(choice_S.to(torch.int8))
    widths: list[K] = []
    left = len(least_S) - 1
    for cost, choice_S in zip(reversed(costs), reversed(choices), strict=True):
        widths.append(sorted(cost, key=cost.__getitem__)[int(choice_S[left])])
        left -= -(-cost[widths[-1]] // unit)
    return widths[::-1]


@dataclass
class _Sensitivity:
    """Of one linear, or of all experts' in a layer: bits and squared error by grid, and the squared output."""

    costs: dict[Override, int] = field(default_factory=dict)
    errors: dict[Override, float] = field(default_factory=dict)
    output: float = 0.0
    weights: int = 0


def meet_budget(network: Network, recipe: Recipe, ids_NT: Tensor, *, progress: Progress | None = None) -> Recipe:
    """The recipe with an override for each linear; itself, if it has no budget or every grid is named already.

    The network, whose weights are not rounded yet, stays as it is. A linear whose grid an override names keeps it.
    Raises SpinfoldError if the budget can't be met.
    """
    names = dict.fromkeys(f"layers.{x.layer}.{x.role}" for layer in network.layers for x in layer.linears.values())
    if recipe.budget is None or recipe.weight_format is None or all(map(recipe.names_grid, names)):
        return recipe
    found = _measure(network, recipe, ids_NT, progress or Quiet())
    weights = sum(one.weights for one in found.values())
    relative = [{b: error / (one.output or 1.0) for b, error in one.errors.items()} for one in found.values()]
    chosen = allocate([one.costs for one in found.values()], relative, math.floor(recipe.budget * weights))
    return recipe.with_(overrides=(*recipe.overrides, *(one for one in chosen if one != Override(match=one.match))))


@torch.no_grad()
def _measure(network: Network, recipe: Recipe, ids_NT: Tensor, progress: Progress) -> dict[str, _Sensitivity]:
    """What each linear costs, and how much it errs, on each grid that it may have."""
    plain = recipe.with_(rounding__method="rtn" if recipe.rounding.method == "rtn" else "gptq")
    found: dict[str, _Sensitivity] = {}
    stream = Stream(network, ids_NT, recipe.compute)
    with progress.stage("measure sensitivity", total=len(network.layers)) as bar:
        for layer in network.layers:
            with layer.present():
                _measure_layer(layer, plain, stream, found)
                stream.pass_through(layer)
            bar.advance()
    return found


def _measure_layer(layer: Layer, recipe: Recipe, stream: Stream, found: dict[str, _Sensitivity]) -> None:
    for wire, linears in layer.groups.items():
        experts = dict.fromkeys(x.expert for x in linears)
        for expert, moments in moments_of(stream, layer, wire, experts):
            for linear in (x for x in linears if x.expert == expert):
                name, w_OI = f"layers.{layer.index}.{linear.role}", linear.weight_OI
                one = found.setdefault(name, _Sensitivity())
                one.output += energy(w_OI, moments.hessian_II)
                one.weights += w_OI.numel()
                choices = choices_of(name, recipe)
                trial = partial(_try_grid, w_OI, moments, recipe)
                for choice, (error, bits) in zip(choices, dealt(choices, trial), strict=True):
                    one.errors[choice] = one.errors.get(choice, 0.0) + error
                    one.costs[choice] = one.costs.get(choice, 0) + bits


def _try_grid(w_OI: Tensor, moments: Moments, recipe: Recipe, choice: Override) -> tuple[float, int]:
    """The squared error of a linear on a grid, and what it takes, in bits."""
    fmt = recipe.weight_format_of(choice.match, choice)
    assert fmt is not None
    rounded, _ = round_matrix(w_OI, moments, fmt, recipe)
    error = energy(w_OI - rounded.dequantize(), moments.hessian_II)
    return error, round(rounded.bits_per_weight * w_OI.numel())
