"""The ops that stand on wires: online maps, and quantizers, if need be seen through a map.

Shapes: ... leading axes, N the wire's last axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spinfold.formats import Format, fake_quantize
from spinfold.formats.cache import tokens_of
from spinfold.maps import BlockDiagonal, Map, SiteMaps
from spinfold.networks import Layer, Network
from spinfold.recipe import Recipe
from spinfold.runtime.cache import QuantizeCache
from spinfold.runtime.transforms import add_change, fake_quantize_through

__all__ = [
    "Clips",
    "OnlineMap",
    "Quantize",
    "QuantizeChannels",
    "cache_quantizer",
    "maps_around",
    "quantize_wires",
    "quantized_wires",
    "round_weights_through",
]


Clips = Mapping[str, float | Tensor]
"""The share of a token's range that the grid covers, by layer and wire, as in `3.down`; a tensor takes gradients."""


class OnlineMap(nn.Module):
    """x -> x M: a map that can't be folded. Computed in fp32 at least, returned in x's dtype."""

    def __init__(self, map: Map) -> None:
        super().__init__()
        self.map = map

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        probe = fn(torch.empty(0))  # a map is no module: ask `fn` where it would put an fp32 tensor
        dtype = torch.float64 if probe.dtype == torch.float64 else torch.float32
        self.map = self.map.to(device=probe.device, dtype=dtype)
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        return self.map.apply(x)

    def with_next(self, op: nn.Module) -> Callable[[Tensor], Tensor] | None:
        """The map and a dynamic quantizer behind it at once; None for any other op."""
        if type(op) is not Quantize or op.map is not None or op.scale_gradient:
            return None
        return partial(fake_quantize_through, map=self.map, fmt=op.format, clip=op.clip)

    def added_to(self, branch: Tensor, x: Tensor, factor: float) -> Tensor:
        """branch + (x M - x) / factor."""
        return add_change(branch, x, self.map, factor)


class Quantize(nn.Module):
    """x -> Q(x M) M^-1: what quantization in the basis M does to x, told in the basis of x.

    With M folded, the next linear reads Q(x M) with the weight W M^-T, so its output is
    Q(x M) (W M^-T)^T = Q(x M) M^-1 W^T: the unfolded linear applied to this op's output. A fit therefore needs no
    folding: the network keeps its weights, and only this op knows the map. Without a map this is plain dynamic fake
    quantization: each token's nearest grid point, the grid taken from the token itself.
    """

    def __init__(
        self, format: Format, map: Map | None = None, *, clip: Tensor | None = None, scale_gradient: bool = False
    ) -> None:
        super().__init__()
        self.format, self.map, self.clip, self.scale_gradient = format, map, clip, scale_gradient

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.map is None else self.map.apply(x)
        y = fake_quantize(y, self.format, clip=self.clip, scale_gradient=self.scale_gradient)
        return y if self.map is None else self.map.inverse().apply(y)


class QuantizeChannels(Quantize):
    """The same with a grid per channel of `format.group_size` successive tokens, `(..., T, N)` with whole groups."""

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.map is None else self.map.apply(x)
        y = fake_quantize(y.mT.contiguous(), self.format, clip=self.clip, scale_gradient=self.scale_gradient).mT
        return y if self.map is None else self.map.inverse().apply(y)


def cache_quantizer(format: Format) -> type[Quantize]:
    """The op for keys or values of this format; a group size of integers counts tokens (`formats.cache`)."""
    return QuantizeChannels if tokens_of(format) else Quantize


def quantized_wires(layer: Layer, recipe: Recipe, maps: SiteMaps) -> dict[str, tuple[Format, Map | None]]:
    """The wires of a layer that the recipe quantizes: the grid, and the map through which the quantizer acts.

    A group size of keys or values in integers counts tokens, not neighbours (`formats.cache`).
    """
    cache = recipe.kv_format
    value, query_key, down = (maps.at(site, layer.index) for site in ("value", "query_key", "down"))
    wires: dict[str, tuple[Format | None, Map | None]] = {
        "qkv_input": (recipe.activation_format, maps.norm_output_at(2 * layer.index)),
        "mlp_input": (recipe.activation_format, maps.norm_output_at(2 * layer.index + 1)),
        "attention_out": (recipe.attention_out_format(layer.head_dim), value and BlockDiagonal(value, layer.num_heads)),
        "down": (recipe.activation_format, down),
        "key": (cache.key if cache else None, query_key),
        "value": (cache.value if cache else None, value),
    }
    return {wire: (format, map) for wire, (format, map) in wires.items() if format is not None}


def quantize_wires(
    network: Network,
    recipe: Recipe,
    maps: SiteMaps | None = None,
    *,
    clips: Clips | None = None,
    scale_gradient: bool = False,
) -> Callable[[], None]:
    """Put the recipe's activation and KV quantizers on the wires; returns the function that takes them off again.

    With `maps`, which are not folded into the network, each acts through its site's map. The stream itself then keeps
    its basis, so residual bases that differ need no change between them here. `clips` has the clip ratios that the
    recipe leaves to a search or a fit (`fitting.clipping`). `scale_gradient` is for fits, see
    `formats.fake_quantize`.
    """
    placed: list[nn.ModuleList] = []
    cache = recipe.kv_format
    for layer in network.layers:
        ops: dict[str, nn.Module] = {}
        for wire, (format, map) in quantized_wires(layer, recipe, maps or SiteMaps()).items():
            ratio = (clips or {}).get(f"{layer.index}.{wire}", format.clip)
            clip = ratio if isinstance(ratio, Tensor) else None
            format = format if isinstance(ratio, Tensor) else replace(format, clip=ratio)
            kind = cache_quantizer(format) if wire in ("key", "value") else Quantize
            ops[wire] = kind(format, map, clip=clip, scale_gradient=scale_gradient)
        if cache and not cache.by_token:
            ops["cache"] = QuantizeCache(cache, ops.pop("key", None), ops.pop("value", None), layer.rope)
        for wire, op in ops.items():
            layer.wire(wire).ops.append(op)
            placed.append(layer.wire(wire).ops)

    def take_off() -> None:
        for ops in placed:
            del ops[-1]

    return take_off


def maps_around(layer: Layer, role: str, maps: SiteMaps) -> tuple[Map | None, Map | None]:
    """The map on what a linear reads and the map on what it writes; None where there is none."""
    here, value = 2 * layer.index, maps.at("value", layer.index)
    reads = dict.fromkeys(("q", "k", "v"), maps.norm_output_at(here))
    reads |= dict.fromkeys(("router", "gate", "up"), maps.norm_output_at(here + 1))
    reads |= {"o": value and BlockDiagonal(value, layer.num_heads), "down": maps.at("down", layer.index)}
    writes = {"o": maps.residual_at(here + 1), "down": maps.residual_at(here + 2)}
    writes |= {"v": value and BlockDiagonal(value, layer.num_kv_heads)}
    return reads[role], writes.get(role)


class _RoundRows(nn.Module):
    """A parametrization W -> B Q(B^T W A^-T) A^T of a parameter, rows by rows: rounding seen through maps."""

    def __init__(self, parts: list[tuple[slice, Map | None, Map | None]], format: Format) -> None:
        super().__init__()
        self.parts, self.format = sorted(parts, key=lambda part: part[0].start), format

    def forward(self, weight: Tensor) -> Tensor:
        w_OI = weight.flatten(0, -2)
        return torch.cat([self._round(w_OI[rows], read, write) for rows, read, write in self.parts]).view_as(weight)

    def _round(self, w_OI: Tensor, read: Map | None, write: Map | None) -> Tensor:
        if read is not None:
            w_OI = read.inverse().transpose().apply(w_OI)
        if write is not None:
            w_OI = write.apply(w_OI.T).T
        w_OI = fake_quantize(w_OI, self.format, scale_gradient=True)
        if write is not None:
            w_OI = write.inverse().apply(w_OI.T).T
        return w_OI if read is None else read.transpose().apply(w_OI)


def round_weights_through(network: Network, format: Format, maps: SiteMaps) -> Callable[[], None]:
    """Let every linear compute with its weight rounded to nearest in the basis that `maps` would fold it into.

    Returns the function that takes the rounding off again. Row grids are dynamic: they follow the maps.
    """
    parts_of: dict[tuple[nn.Module, str], list[tuple[slice, Map | None, Map | None]]] = {}
    for layer in network.layers:
        for linear in layer.linears.values():
            part = linear.rows, *maps_around(layer, linear.role, maps)
            parts_of.setdefault((linear.module, linear.attribute), []).append(part)
    for (module, attribute), parts in parts_of.items():
        parametrize.register_parametrization(module, attribute, _RoundRows(parts, format), unsafe=True)

    def take_off() -> None:
        for module, attribute in parts_of:
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)

    return take_off
