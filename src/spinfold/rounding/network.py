"""Round all linears of a network, layer by layer, each on inputs from the already rounded prefix.

For each layer, and in it for each wire in the order in which tokens meet them (q k v, o, gate up, down), the layer
runs on the calibration tokens up to that wire, with the online maps active and activations unquantized; the wire's
second moment is the Hessian of every linear that reads it.

An expert has a Hessian of its own, H_e, from the n_e tokens that are routed to it. With fewer tokens than inputs H_e is
singular, so the mean H over the layer's experts stands in for the tokens that are missing:

    H_e <- s H_e + (1 - s) H,    s = min(1, n_e / I)

Shapes: N windows, T tokens, B windows per batch, D residual width, O out features, I in features, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
    """One linear, by its key in the layer, on its grid. `error` and `nearest_error` are relative squared output
    errors, tr(E H E^T) / tr(W H W^T), of this rounding and of rounding to nearest; None without a Hessian."""

    layer: int
    key: str
    weight: QuantizedWeight
    error: float | None = None
    nearest_error: float | None = None
    damping: float | None = None

    @property
    def name(self) -> str:
        """Such as `layers.3.down`, or `layers.3.down@5` of an expert."""
        return f"layers.{self.layer}.{self.key}"

    @property
    def role(self) -> str:
        """Such as `down`, whichever expert it is."""
        return self.key.partition("@")[0]


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
    linears = layer.linears
    for one in rounded:
        w_OI = linears[one.key].weight_OI
        w_OI.copy_(one.weight.dequantize())


def _nearest(network: Network, recipe: Recipe, start: int) -> Iterator[list[RoundedLinear]]:
    assert recipe.weight_format is not None
    for layer in network.layers[start:]:
        rounded = [
            RoundedLinear(
                x.layer,
                x.key,
                round_nearest(x.weight_OI, recipe.weight_format, recipe.clip_search, scale_dtype=recipe.scale_dtype),
            )
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
                experts = dict.fromkeys(x.expert for x in linears)
                group: list[RoundedLinear] = []
                for expert, hessian_II in _second_moments(layer, wire, experts, batches, kwargs, mode):
                    group += _round_group([x for x in linears if x.expert == expert], hessian_II, recipe)
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
        scale_dtype=recipe.scale_dtype,
    )
    parts = whole.split([len(linear.weight_OI) for linear in linears])
    return [
        RoundedLinear(x.layer, x.key, part, report.error, report.nearest_error, report.damping)
        for x, part in zip(linears, parts, strict=True)
    ]


class _Enough(Exception):
    """The wire has been seen; the rest of the layer need not run."""


def _second_moments(
    layer: Layer,
    wire: str,
    experts: Iterable[int | None],
    batches: Sequence[Tensor],
    kwargs: dict[str, Any],
    mode: str,
) -> Iterator[tuple[int | None, Tensor]]:
    """The Hessian `(I, I)` of what reads a wire; on the wires of experts that of each."""
    seen: dict[int | None, HessianAccumulator] = {}

    def note(_: nn.Module, args: tuple[Tensor, ...], x: Tensor) -> None:
        for expert, x_TI in _rows(x.float(), *args[1:]):
            seen.setdefault(expert, HessianAccumulator(x_TI.shape[1], x_TI.device)).add(x_TI)
        raise _Enough

    handle = layer.wire(wire).register_forward_hook(note)
    try:
        for x_BTD in batches:
            with precision(mode, x_BTD.device), suppress(_Enough):
                layer(x_BTD, **kwargs)
    finally:
        handle.remove()
    if None in seen:
        yield None, seen[None].value()
        return
    total = sum(one.count for one in seen.values())
    mean_II = sum((one.value() * (one.count / total) for one in seen.values()), start=torch.zeros(()))
    for expert in experts:
        own = seen.pop(expert, None)
        share = min(1.0, own.count / len(mean_II)) if own else 0.0
        yield expert, own.value() * share + mean_II * (1 - share) if own else mean_II


def _rows(x: Tensor, experts_TK: Tensor | None = None) -> Iterator[tuple[int | None, Tensor]]:
    """What a wire carries, `(T, I)`; on the wires of experts what each of them reads."""
    if experts_TK is None:
        yield None, x.flatten(0, -2)
        return
    num_tokens, per_token = experts_TK.shape
    x_KTI = x.reshape(-1, num_tokens, x.shape[-1]).expand(per_token, -1, -1)
    experts_KT = experts_TK.T
    for expert in experts_KT.unique().tolist():
        yield expert, x_KTI[experts_KT == expert]
