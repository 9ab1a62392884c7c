"""What stands on the wires of a network as data, and back: maps that could not be folded, quantizers and their grids.

    {"0.down": [{"map": {"kind": "hadamard", …}}, {"quantize": {"bits": 4, "symmetric": false, …}}],
     "1.down": [{"same": "0.down.0"}, …], …}
    spinfold.0.down.0.signs      a tensor of the first op on the wire `down` of layer 0

A map that several wires have is described and stored once, at the first of them, and once in the memory of a device.

Bases of the residual stream, of values, and whatever else was folded is in the weights and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spinfold.errors import SpinfoldError
from spinfold.export.cache import CacheOps
from spinfold.export.quantizer import digest
from spinfold.formats import CacheFormat, FloatFormat, Format, IntFormat
from spinfold.maps import Map
from spinfold.maps.serialise import from_parts, to_parts
from spinfold.runtime import OnlineMap, Quantize, QuantizeCache, cache_quantizer

__all__ = ["PREFIX", "describe_wires", "place_wires"]

PREFIX = "spinfold."
"""How the names of all tensors of maps begin."""

Wires = dict[str, list[dict[str, Any]]]


def describe_wires(model: PreTrainedModel) -> tuple[Wires, dict[str, Tensor]]:
    """The ops on each wire of a network's model by layer and wire, and the tensors of their maps."""
    wires: Wires = {}
    tensors: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    for index, layer in enumerate(model.base_model.layers):
        for name, wire in cast(nn.ModuleDict, layer.wires).items():
            for number, op in enumerate(_each(cast(nn.ModuleList, wire.ops))):
                place = f"{index}.{name}"
                entry: dict[str, Any]
                if isinstance(op, OnlineMap):
                    config, parts = to_parts(op.map)
                    here, content = f"{place}.{number}", repr((config, {k: digest(v) for k, v in parts.items()}))
                    if (first := places.setdefault(content, here)) != here:
                        entry = {"same": first}
                    else:
                        tensors |= {f"{PREFIX}{here}.{key}": value.clone() for key, value in parts.items()}
                        entry = {"map": config}
                elif isinstance(op, QuantizeCache):
                    entry = {"cache": asdict(op.exact_format)}
                else:
                    assert isinstance(op, Quantize) and op.map is None and op.clip is None, "an op of a fit"
                    entry = {"quantize": asdict(op.format)}
                wires.setdefault(place, []).append(entry)
    return wires, tensors


def place_wires(model: PreTrainedModel, wires: Wires, tensors: Mapping[str, Tensor]) -> None:
    """Put described ops on the wires of a network's model, each on its layer's device.

    Raises `SpinfoldError` for a description of something else.
    """
    layers, rest = model.base_model.layers, dict(tensors)
    described: dict[str, Map] = {}
    placed: dict[tuple[str, torch.device], OnlineMap] = {}
    try:
        for here, entry in ((f"{place}.{i}", entry) for place, ops in wires.items() for i, entry in enumerate(ops)):
            if "map" in entry:
                own = [key for key in rest if key.startswith(f"{PREFIX}{here}.")]
                parts = {key.removeprefix(f"{PREFIX}{here}."): rest.pop(key) for key in own}
                described[here] = from_parts(entry["map"], parts)
        for place, entries in wires.items():
            index, name = place.split(".")
            layer = layers[int(index)]
            device = next(layer.parameters()).device
            for number, entry in enumerate(entries):
                ((kind, config),) = entry.items()
                if kind in ("map", "same"):
                    origin = config if kind == "same" else f"{place}.{number}"
                    if (origin, device) not in placed:
                        placed[origin, device] = OnlineMap(described[origin]).to(device)
                    op: nn.Module = placed[origin, device]
                else:
                    op = {"quantize": _quantizer, "cache": _cache}[kind](config, layer).to(device)
                layer.wires[name].ops.append(op)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise _unreadable(f"{type(error).__name__}: {error}") from None
    if rest:
        raise _unreadable(f"No op has the tensor {min(rest)}.")


def _unreadable(why: str) -> SpinfoldError:
    return SpinfoldError("The checkpoint's description of its wires can't be read.", why, "Export the run again.")


def _quantizer(config: dict[str, Any], layer: Any) -> nn.Module:
    return Quantize(_format(config))


def _format(config: dict[str, Any]) -> Format:
    return FloatFormat(**config) if "element" in config else IntFormat(**config)


def _cache(config: dict[str, Any], layer: Any) -> nn.Module:
    formats = {name: None if config[name] is None else _format(config[name]) for name in ("key", "value")}
    key, value = (None if format is None else cache_quantizer(format)(format) for format in formats.values())
    return QuantizeCache(CacheFormat(**config | formats), key, value, layer.rope)


def _each(ops: nn.ModuleList) -> Iterator[nn.Module]:
    for op in ops:
        if isinstance(op, CacheOps):
            yield from op.ops
        else:
            yield op
