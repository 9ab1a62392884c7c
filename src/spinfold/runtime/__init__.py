"""Torch modules of a quantized network: online ops and quantizers."""

from spinfold.runtime.online import OnlineMap, Quantize, quantize_wires

__all__ = ["OnlineMap", "Quantize", "quantize_wires"]
