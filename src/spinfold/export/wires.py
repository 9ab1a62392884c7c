"""What stands on the wires of a network as data, and back: maps that could not be folded, quantizers and their grids.

    {"0.down": [{"map": {"kind": "hadamard", …}}, {"quantize": {"bits": 4, "symmetric": false, …}}], …}
    spinfold.0.down.0.signs      a tensor of the first op on the wire `down` of layer 0

Bases of the residual stream, of values, and whatever else was folded is in the weights and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from spinfold.errors import SpinfoldError
from spinfold.export.cache import CacheOps
from spinfold.formats import CacheFormat, IntFormat
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
    for index, layer in enumerate(model.base_model.layers):
        for name, wire in cast(nn.ModuleDict, layer.wires).items():
            for number, op in enumerate(_each(cast(nn.ModuleList, wire.ops))):
                place = f"{index}.{name}"
                if isinstance(op, OnlineMap):
                    config, parts = to_parts(op.map)
                    tensors |= {f"{PREFIX}{place}.{number}.{key}": value.clone() for key, value in parts.items()}
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
    try:
        for place, entries in wires.items():
            index, name = place.split(".")
            layer = layers[int(index)]
            device = next(layer.parameters()).device
            for number, entry in enumerate(entries):
                (kind, config), prefix = *entry.items(), f"{PREFIX}{place}.{number}."
                own = [key for key in rest if key.startswith(prefix)]
                parts = {key.removeprefix(prefix): rest.pop(key) for key in own}
                op = {"map": _online_map, "quantize": _quantizer, "cache": _cache}[kind](config, parts, layer)
                layer.wires[name].ops.append(op.to(device))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise _unreadable(f"{type(error).__name__}: {error}") from None
    if rest:
        raise _unreadable(f"No op has the tensor {min(rest)}.")


def _unreadable(why: str) -> SpinfoldError:
    return SpinfoldError("The checkpoint's description of its wires can't be read.", why, "Export the run again.")


def _online_map(config: dict[str, Any], parts: dict[str, Tensor], layer: Any) -> nn.Module:
    return OnlineMap(from_parts(config, parts))


def _quantizer(config: dict[str, Any], parts: dict[str, Tensor], layer: Any) -> nn.Module:
    return Quantize(IntFormat(**config))


def _cache(config: dict[str, Any], parts: dict[str, Tensor], layer: Any) -> nn.Module:
    formats = {name: None if config[name] is None else IntFormat(**config[name]) for name in ("key", "value")}
    key, value = (None if format is None else cache_quantizer(format)(format) for format in formats.values())
    return QuantizeCache(CacheFormat(**config | formats), key, value, layer.rope)


def _each(ops: nn.ModuleList) -> Iterator[nn.Module]:
    for op in ops:
        if isinstance(op, CacheOps):
            yield from op.ops
        else:
            yield op
