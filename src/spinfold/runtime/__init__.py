"""Torch modules of a quantized network: online ops and quantizers."""

from spinfold.runtime.online import OnlineMap, Quantize, maps_around, quantize_wires, round_weights_through

__all__ = ["OnlineMap", "Quantize", "maps_around", "quantize_wires", "round_weights_through"]
