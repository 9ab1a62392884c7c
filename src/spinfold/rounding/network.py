"""Round all linears of a network, layer by layer, each on inputs from the already rounded prefix.

For each layer, and in it for each wire in the order in which tokens meet them (q k v, o, gate up, down), the layer
runs on the calibration tokens up to that wire, with the online maps active and activations unquantized; the wire's
second moment is the Hessian of every linear that reads it.

Shapes: N windows, T tokens, B windows per batch, D residual width, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spinfold.compute import pick_precision, precision
from spinfold.formats import QuantizedWeight
from spinfold.networks import Layer, Linear, Network
from spinfold.progress import Progress, Quiet
from spinfold.recipe import Recipe
from spinfold.rounding.gptq import gptq
from spinfold.rounding.hessian import HessianAccumulator
from spinfold.rounding.nearest import round_nearest

__all__ = ["RoundedLinear", "round_network"]

_TOKENS_PER_BATCH = {"cuda": 32768, "cpu": 4096}


@dataclass(frozen=True)
class RoundedLinear:
    """One linear on its grid. `error` and `nearest_error` are relative squared output errors,
    tr(E H E^T) / tr(W H W^T), of this rounding and of rounding to nearest; None without a Hessian."""

    layer: int
    role: str
    weight: QuantizedWeight
    error: float | None = None
    nearest_error: float | None = None
    damping: float | None = None

    @property
    def name(self) -> str:
        """Such as `layers.3.down`."""
        return f"layers.{self.layer}.{self.role}"


def round_network(
    network: Network,
    recipe: Recipe,
    ids_NT: Tensor | None = None,
    *,
    done: Sequence[list[RoundedLinear]] = (),
    progress: Progress | None = None,
) -> Iterator[list[RoundedLinear]]:
    """Round in place, and yield each layer's linears when they are; weights become the dequantized values.

    `ids_NT` are the calibration windows; `rtn` needs none. `done` holds the first layers of an earlier run with the
    same arguments: they are put in place, not rounded again, and the rest comes out as it would have.
    """
    method = recipe.rounding.method
    with (progress or Quiet()).stage(f"round weights ({method})", total=len(network.layers)) as bar:
        for layer, rounded in zip(network.layers, done, strict=False):
            _place(layer, rounded)
            bar.advance()
        for rounded in (
            _nearest(network, recipe, len(done)) if method == "rtn" else _gptq(network, recipe, ids_NT, len(done))
        ):
            yield rounded
            bar.advance()


def _place(layer: Layer, rounded: Sequence[RoundedLinear]) -> None:
    for one in rounded:
        w_OI = layer.linears[one.role].weight_OI
        w_OI.copy_(one.weight.dequantize())


def _nearest(network: Network, recipe: Recipe, start: int) -> Iterator[list[RoundedLinear]]:
    assert recipe.weight_format is not None
    for layer in network.layers[start:]:
        rounded = [
            RoundedLinear(x.layer, x.role, round_nearest(x.weight_OI, recipe.weight_format, recipe.clip_search))
            for x in layer.linears.values()
        ]
        _place(layer, rounded)
        yield rounded


@torch.no_grad()
def _gptq(network: Network, recipe: Recipe, ids_NT: Tensor | None, start: int) -> Iterator[list[RoundedLinear]]:
    assert ids_NT is not None and recipe.weight_format is not None
    device = network.device
    mode = pick_precision(recipe.compute, device)
    size = max(1, _TOKENS_PER_BATCH.get(device.type, 4096) // ids_NT.shape[1])
    batches: list[Tensor] = []
    for ids_BT in ids_NT.to(device).split(size):
        x_BTD, kwargs_of = network.layer_arguments(ids_BT)
        batches.append(x_BTD)
    for layer, kwargs in zip(network.layers, kwargs_of, strict=True):
        if layer.index >= start:
            rounded: list[RoundedLinear] = []
            for wire, linears in layer.groups.items():
                hessian_II = _second_moment(layer, wire, batches, kwargs, mode)
                group = _round_group(linears, hessian_II, recipe)
                _place(layer, group)
                rounded += group
            yield rounded
        if layer.index + 1 < len(network.layers):
            with precision(mode, device):
                for i, x_BTD in enumerate(batches):
                    batches[i] = layer(x_BTD, **kwargs)


def _round_group(linears: Sequence[Linear], hessian_II: Tensor, recipe: Recipe) -> list[RoundedLinear]:
    """Linears that read one wire share its Hessian, so they are rounded as one matrix and taken apart again."""
    assert recipe.weight_format is not None
    settings = recipe.rounding
    w_OI = torch.cat([linear.weight_OI for linear in linears])
    whole, report = gptq(
        w_OI,
        hessian_II,
        recipe.weight_format,
        search=recipe.clip_search,
        damp=settings.damp,
        act_order=settings.act_order,
        block_size=settings.block_size,
    )
    parts = whole.split([len(linear.weight_OI) for linear in linears])
    return [
        RoundedLinear(x.layer, x.role, part, report.error, report.nearest_error, report.damping)
        for x, part in zip(linears, parts, strict=True)
    ]


class _Enough(Exception):
    """The wire has been seen; the rest of the layer need not run."""


def _second_moment(layer: Layer, wire: str, batches: Sequence[Tensor], kwargs: dict[str, Any], mode: str) -> Tensor:
    """H = sum over tokens of x^T x on a wire, `(I, I)`."""
    accumulator: HessianAccumulator | None = None

    def note(_: nn.Module, __: Any, x_BTI: Tensor) -> None:
        nonlocal accumulator
        x_TI = x_BTI.flatten(0, -2).float()
        accumulator = accumulator or HessianAccumulator(x_TI.shape[1], x_TI.device)
        with precision("fp32", x_TI.device):
            accumulator.add(x_TI)
        raise _Enough

    handle = layer.wire(wire).register_forward_hook(note)
    try:
        for x_BTD in batches:
            with precision(mode, x_BTD.device), suppress(_Enough):
                layer(x_BTD, **kwargs)
    finally:
        handle.remove()
    assert accumulator is not None
    return accumulator.value()
