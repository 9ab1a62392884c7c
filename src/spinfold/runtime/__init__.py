"""Torch modules of a quantized network: online ops and quantizers."""

from spinfold.runtime.cache import QuantizeCache
from spinfold.runtime.online import (
    Clips,
    OnlineMap,
    Quantize,
    QuantizeChannels,
    cache_quantizer,
    maps_around,
    quantize_wires,
    quantized_wires,
    round_weights_through,
)

__all__ = [
    "Clips",
    "OnlineMap",
    "Quantize",
    "QuantizeCache",
    "QuantizeChannels",
    "cache_quantizer",
    "maps_around",
    "quantize_wires",
    "quantized_wires",
    "round_weights_through",
]
