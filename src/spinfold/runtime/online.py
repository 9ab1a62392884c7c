"""The ops that stand on wires: online maps, and quantizers, if need be seen through a map.

Shapes: ... leading axes, N the wire's last axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spinfold.formats import IntFormat, fake_quantize
from spinfold.maps import BlockDiagonal, Map, SiteMaps
from spinfold.networks import Layer, Network
from spinfold.recipe import Recipe

__all__ = ["OnlineMap", "Quantize", "maps_around", "quantize_wires", "round_weights_through"]


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


class Quantize(nn.Module):
    """x -> Q(x M) M^-1: what quantization in the basis M does to x, told in the basis of x.

    With M folded, the next linear reads Q(x M) with the weight W M^-T, so its output is
    Q(x M) (W M^-T)^T = Q(x M) M^-1 W^T: the unfolded linear applied to this op's output. A fit therefore needs no
    folding: the network keeps its weights, and only this op knows the map. Without a map this is plain dynamic fake
    quantization: each token's nearest grid point, the grid taken from the token itself.
    """

    def __init__(self, format: IntFormat, map: Map | None = None, *, scale_gradient: bool = False) -> None:
        super().__init__()
        self.format, self.map, self.scale_gradient = format, map, scale_gradient

    def forward(self, x: Tensor) -> Tensor:
        if self.map is None:
            return fake_quantize(x, self.format, scale_gradient=self.scale_gradient)
        y = fake_quantize(self.map.apply(x), self.format, scale_gradient=self.scale_gradient)
        return self.map.inverse().apply(y)


def quantize_wires(
    network: Network, recipe: Recipe, maps: SiteMaps | None = None, *, scale_gradient: bool = False
) -> Callable[[], None]:
    """Put the recipe's activation and KV quantizers on the wires; returns the function that takes them off again.

    With `maps`, which are not folded into the network, each acts through its site's map. The stream itself then keeps
    its basis, so residual bases that differ need no change between them here. `scale_gradient` is for fits, see
    `formats.fake_quantize`.
    """
    maps = maps or SiteMaps()
    placed: list[nn.ModuleList] = []
    for layer in network.layers:
        value, query_key, down = (maps.at(site, layer.index) for site in ("value", "query_key", "down"))
        heads = value and BlockDiagonal(value, layer.num_heads)
        for wire, format, map in (
            ("qkv_input", recipe.activation_format, maps.norm_output_at(2 * layer.index)),
            ("mlp_input", recipe.activation_format, maps.norm_output_at(2 * layer.index + 1)),
            ("attention_out", recipe.attention_out_format(layer.head_dim), heads),
            ("down", recipe.activation_format, down),
            ("key", recipe.kv_format, query_key),
            ("value", recipe.kv_format, value),
        ):
            if format is not None:
                ops = layer.wire(wire).ops
                ops.append(Quantize(format, map, scale_gradient=scale_gradient))
                placed.append(ops)

    def take_off() -> None:
        for ops in placed:
            del ops[-1]

    return take_off


def maps_around(layer: Layer, role: str, maps: SiteMaps) -> tuple[Map | None, Map | None]:
    """The map on what a linear reads and the map on what it writes; None where there is none."""
    here, value = 2 * layer.index, maps.at("value", layer.index)
    reads = dict.fromkeys(("q", "k", "v"), maps.norm_output_at(here))
    reads |= dict.fromkeys(("gate", "up"), maps.norm_output_at(here + 1))
    reads |= {"o": value and BlockDiagonal(value, layer.num_heads), "down": maps.at("down", layer.index)}
    writes = {"o": maps.residual_at(here + 1), "down": maps.residual_at(here + 2)}
    writes |= {"v": value and BlockDiagonal(value, layer.num_kv_heads)}
    return reads[role], writes.get(role)


class _RoundRows(nn.Module):
    """A parametrization W -> B Q(B^T W A^-T) A^T of a module's weight, part by part: rounding seen through maps."""

    def __init__(self, parts: list[tuple[slice, Map | None, Map | None]], format: IntFormat) -> None:
        super().__init__()
        self.parts, self.format = parts, format

    def forward(self, w_OI: Tensor) -> Tensor:
        return torch.cat([self._round(w_OI[rows], read, write) for rows, read, write in self.parts])

    def _round(self, w_OI: Tensor, read: Map | None, write: Map | None) -> Tensor:
        if read is not None:
            w_OI = read.inverse().transpose().apply(w_OI)
        if write is not None:
            w_OI = write.apply(w_OI.T).T
        w_OI = fake_quantize(w_OI, self.format, scale_gradient=True)
        if write is not None:
            w_OI = write.inverse().apply(w_OI.T).T
        return w_OI if read is None else read.transpose().apply(w_OI)


def round_weights_through(network: Network, format: IntFormat, maps: SiteMaps) -> Callable[[], None]:
    """Let every linear compute with its weight rounded to nearest in the basis that `maps` would fold it into.

    Returns the function that takes the rounding off again. Row grids are dynamic: they follow the maps.
    """
    modules: dict[nn.Module, list[tuple[slice, Map | None, Map | None]]] = {}
    for layer in network.layers:
        for role, linear in layer.linears.items():
            modules.setdefault(linear.module, []).append((linear.rows, *maps_around(layer, role, maps)))
    for module, parts in modules.items():
        parametrize.register_parametrization(module, "weight", _RoundRows(parts, format), unsafe=True)

    def take_off() -> None:
        for module in modules:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)

    return take_off
