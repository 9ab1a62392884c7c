"""Fold maps into weights: the same function in another basis, for any family.

A map M on a wire x means that the wire carries x M. For a linear y = x W^T + b between a wire with the map A and a
wire with the map B,

    y B = (x A) A^-1 W^T B + b B     so     W <- B^T W A^-T,   b <- b B.

`A^-T` is `A` itself when A is orthogonal. What has no weight on one side becomes an online op. All merges are
computed in fp64 and rounded once.

The residual stream may have a basis R_i of its own at each of its 2L + 1 boundaries (see `SiteMaps`). Then readers fold
the basis of the boundary at which they read, a writer that of the boundary after it, and the skip connection takes
C_i = R_i^-1 R_{i+1} as an online op:  x_{i+1} R_{i+1} = (x_i R_i) C_i + branch R_{i+1}.

Behind a norm, a diagonal map S needs no linear before it: RMSNorm(x; g) S = RMSNorm(x; g S).

Shapes: D residual width, V vocabulary, H heads, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from spinfold.maps import Diagonal, Identity, Map, SiteMaps
from spinfold.networks import INPUT_WIRE, SKIP_WIRES, Layer, Network
from spinfold.runtime import OnlineMap, maps_around

__all__ = ["WORDS_AT_ONCE", "fold", "fold_layers", "fold_norms", "place_online"]

WORDS_AT_ONCE = 4096
"""Rows of embedding and head that are in fp64 at a time."""


def fold_norms(network: Network) -> None:
    """Move every gain on the residual stream into the linears that read it, in place; untie the head first.

    RMSNorm(x; g) = (x / rms(x)) diag(g), so RMSNorm(x; g) W^T = (x / rms(x)) (W diag(g))^T. Only without its gain
    does a norm commute with a rotation: rms(x R) = rms(x). Nothing is centred, since RMSNorm subtracts no mean.
    """
    network.untie()
    offset = network.family.gain_offset
    for layer in network.layers:
        layer.change(partial(_fold_norms_of, offset=offset))
    _move_gain(network.final_norm, [network.head.weight.data], offset)


def _fold_norms_of(layer: Layer, offset: int) -> None:
    for norm, wire in ((layer.attention_norm, "qkv_input"), (layer.mlp_norm, "mlp_input")):
        if isinstance(norm, nn.Module):
            _move_gain(norm, [x.weight_OI for x in layer.foldable if INPUT_WIRE[x.role] == wire], offset)


def _move_gain(norm: nn.Module, readers: Sequence[Tensor], offset: int) -> None:
    weight_D = cast(Tensor, norm.weight).data
    gain_D = weight_D.double() + offset
    for w_OD in readers:
        w_OD.copy_(w_OD.double() * gain_D)
    weight_D.fill_(1 - offset)


def fold(network: Network, maps: SiteMaps) -> None:
    """Fold `maps` into the network's weights in place and put the rest on its wires.

    A residual map needs `fold_norms` first. Raises `SpinfoldError` for a site that the family refuses, and ValueError
    for a residual fold after one that has left changes of basis on the skip connections, which it would invalidate.
    """
    for site in maps.sites:
        network.family.supports(site).require(f"{network.family.name} can't take a map at the site {site!r}.")
    maps = maps.to(network.device, torch.float64)
    if maps.residual is not None:
        last = 2 * len(network.layers)
        if isinstance(maps.residual, tuple) and len(maps.residual) != last + 1:
            raise ValueError(f"the stream has {last + 1} boundaries, not {len(maps.residual)}")
        if any(len(layer.wire(wire).ops) for layer in network.layers for wire in SKIP_WIRES):
            raise ValueError("the skip connections already change the basis")
        network.untie()
        for words_VD in network.embedding.weight.data.split(WORDS_AT_ONCE):
            _merge(words_VD.T, None, None, maps.residual_at(0))
        for words_VD in network.head.weight.data.split(WORDS_AT_ONCE):
            _merge(words_VD, None, maps.residual_at(last), None)
    fold_layers(network, maps)
    place_online(network, maps)


def fold_layers(network: Network, maps: SiteMaps, roles: Collection[str] | None = None) -> None:
    """What `fold` does to the layers' weights, and no more: for who looks at these alone, or at linears of `roles`."""
    maps = maps.to(network.device, torch.float64)
    for layer in network.layers:
        layer.change(partial(_fold_layer, maps=maps, offset=network.family.gain_offset, roles=roles))


def _fold_layer(layer: Layer, maps: SiteMaps, offset: int, roles: Collection[str] | None) -> None:
    for linear in layer.foldable:
        if roles is None or linear.role in roles:
            _merge(linear.weight_OI, linear.bias_O, *maps_around(layer, linear.role, maps))
    for norm, scales in (
        (layer.attention_norm, maps.at("qkv_input", layer.index)),
        (layer.mlp_norm, maps.at("mlp_input", layer.index)),
    ):
        if isinstance(norm, nn.Module) and scales is not None:
            _scale_gain(norm, scales, offset)


def _scale_gain(norm: nn.Module, scales: Map, offset: int) -> None:
    if not isinstance(scales, Diagonal):
        raise ValueError(f"the gain of a norm takes a diagonal map, not {type(scales).__name__}")
    weight_D = cast(Tensor, norm.weight).data
    weight_D.copy_(scales.apply(weight_D.double() + offset) - offset)


def place_online(network: Network, maps: SiteMaps) -> None:
    """Put the maps that have no weight on one side on their wires: q M (k M^-T)^T = q k^T, down's input, the skips."""
    for layer in network.layers:
        query_key = maps.at("query_key", layer.index)
        online = {
            "query": query_key,
            "key": query_key and query_key.inverse().transpose(),
            "down": maps.at("down", layer.index),
        } | {wire: maps.skip_at(2 * layer.index + i) for i, wire in enumerate(SKIP_WIRES)}
        for wire, one in online.items():
            if one is not None and not isinstance(one, Identity):
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
