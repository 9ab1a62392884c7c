"""Fold maps into weights: the same function in another basis, for any family.

A map M on a wire x means that the wire carries x M. For a linear y = x W^T + b between a wire with the map A and a
wire with the map B,

    y B = (x A) A^-1 W^T B + b B     so     W <- B^T W A^-T,   b <- b B.

`A^-T` is `A` itself when A is orthogonal. What has no weight on one side becomes an online op. All merges are
computed in fp64 and rounded once.

Shapes: D residual width, V vocabulary, H heads, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from spinfold.maps import BlockDiagonal, Map, SiteMaps
from spinfold.networks import Layer, Network
from spinfold.runtime import OnlineMap

__all__ = ["fold", "fold_norms", "place_online"]


def fold_norms(network: Network) -> None:
    """Move every gain on the residual stream into the linears that read it, in place; untie the head first.

    RMSNorm(x; g) = (x / rms(x)) diag(g), so RMSNorm(x; g) W^T = (x / rms(x)) (W diag(g))^T. Only without its gain
    does a norm commute with a rotation: rms(x R) = rms(x). Nothing is centred, since RMSNorm subtracts no mean.
    """
    network.untie()
    for layer in network.layers:
        for norm, roles in ((layer.attention_norm, "q k v"), (layer.mlp_norm, "gate up")):
            if norm is not None:
                _move_gain(norm, [layer.linears[role].weight_OI for role in roles.split()], network)
    _move_gain(network.final_norm, [network.head.weight.data], network)


def _move_gain(norm: nn.Module, readers: Sequence[Tensor], network: Network) -> None:
    offset, weight_D = network.family.gain_offset, cast(Tensor, norm.weight).data
    gain_D = weight_D.double() + offset
    for w_OD in readers:
        w_OD.copy_(w_OD.double() * gain_D)
    weight_D.fill_(1 - offset)


def fold(network: Network, maps: SiteMaps) -> None:
    """Fold `maps` into the network's weights in place and put the rest on its wires.

    A residual map needs `fold_norms` first. Raises `SpinfoldError` for a site that the family refuses.
    """
    for site in maps.sites:
        network.family.supports(site).require(f"{network.family.name} can't take a map at the site {site!r}.")
    maps = maps.to(network.device, torch.float64)
    residual = maps.residual
    if residual is not None:
        network.untie()
        _merge(network.embedding.weight.data.T, None, None, residual)
        _merge(network.head.weight.data, None, residual, None)
    for layer in network.layers:
        _fold_layer(layer, maps)
    place_online(network, maps)


def _fold_layer(layer: Layer, maps: SiteMaps) -> None:
    residual = maps.residual
    value, down = maps.at("value", layer.index), maps.at("down", layer.index)
    reads = {"o": value and BlockDiagonal(value, layer.num_heads), "down": down}
    writes = {"v": value and BlockDiagonal(value, layer.num_kv_heads), "o": residual, "down": residual}
    for role, linear in layer.linears.items():
        _merge(linear.weight_OI, linear.bias_O, reads.get(role, residual), writes.get(role))


def place_online(network: Network, maps: SiteMaps) -> None:
    """Put the maps that have no weight on one side on their wires: q M (k M^-T)^T = q k^T, and down's input."""
    for layer in network.layers:
        query_key = maps.at("query_key", layer.index)
        online = {
            "query": query_key,
            "key": query_key and query_key.inverse().transpose(),
            "down": maps.at("down", layer.index),
        }
        for wire, one in online.items():
            if one is not None:
                layer.wire(wire).ops.append(OnlineMap(one).to(device=network.device, dtype=network.dtype))


def _merge(w_OI: Tensor, bias_O: Tensor | None, read: Map | None, write: Map | None) -> None:
    """W <- B^T W A^-T and b <- b B, in place, for the read map A and the write map B."""
    w = w_OI.double()
    if read is not None:
        w = read.inverse().transpose().apply(w)
    if write is not None:
        w = write.apply(w.T).T
        if bias_O is not None:
            bias_O.copy_(write.apply(bias_O.double()))
    if read is not None or write is not None:
        w_OI.copy_(w)
