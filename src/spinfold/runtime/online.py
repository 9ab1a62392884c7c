"""The ops that stand on wires: online maps, and quantizers, if need be seen through a map.

Shapes: ... leading axes, N the wire's last axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from spinfold.formats import IntFormat, fake_quantize
from spinfold.maps import BlockDiagonal, Map, SiteMaps
from spinfold.networks import Network
from spinfold.recipe import Recipe

__all__ = ["OnlineMap", "Quantize", "quantize_wires"]


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

    def __init__(self, format: IntFormat, map: Map | None = None) -> None:
        super().__init__()
        self.format, self.map, self.inverse = format, map, map and map.inverse()

    def forward(self, x: Tensor) -> Tensor:
        if self.map is None or self.inverse is None:
            return fake_quantize(x, self.format)
        return self.inverse.apply(fake_quantize(self.map.apply(x), self.format)).to(x.dtype)


def quantize_wires(network: Network, recipe: Recipe, maps: SiteMaps | None = None) -> Callable[[], None]:
    """Put the recipe's activation and KV quantizers on the wires; returns the function that takes them off again.

    With `maps`, which are not folded into the network, each acts through its site's map.
    """
    maps = maps or SiteMaps()
    placed: list[nn.ModuleList] = []
    for layer in network.layers:
        value, query_key, down = (maps.at(site, layer.index) for site in ("value", "query_key", "down"))
        heads = value and BlockDiagonal(value, layer.num_heads)
        for wire, format, map in (
            ("qkv_input", recipe.activation_format, maps.residual),
            ("mlp_input", recipe.activation_format, maps.residual),
            ("attention_out", recipe.attention_out_format(layer.head_dim), heads),
            ("down", recipe.activation_format, down),
            ("key", recipe.kv_format, query_key),
            ("value", recipe.kv_format, value),
        ):
            if format is not None:
                ops = layer.wire(wire).ops
                ops.append(Quantize(format, map))
                placed.append(ops)

    def take_off() -> None:
        for ops in placed:
            del ops[-1]

    return take_off
