"""Which channels and which tokens hold the outliers.

    outlier channel   median over tokens of |x_c|  >  6 times the median of that over channels: large for most tokens
    massive token     max over channels of |x_t|  >  100 and 1000 times the median of |x|: large for itself alone

The medians keep the two apart: a single token can't make a channel an outlier. Channels are looked for on the wires
that quantizers stand on, since 6 is where LLM.int8 (arXiv 2208.07339) starts to count; tokens on the residual stream,
where massive activations live (Sun et al. 2024, arXiv 2402.17762, whose bounds these are).

Shapes: N windows, T tokens, C channels, D residual width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from spinfold.evaluation.outliers import MEASURED_WIRES
from spinfold.networks import Network

__all__ = ["Spikes", "find_spikes", "massive_tokens", "outlier_channels"]

CHANNEL_RATIO = 6.0
TOKEN_PEAK, TOKEN_RATIO = 100.0, 1000.0


@dataclass(frozen=True)
class Spikes:
    """`channels[wire][layer]`: the outlier channels there and how many times the median each is, the largest first;
    layers without any are left out. `tokens`: the massive ones as (window, position), each with the layers into which
    it goes massive, and its largest |x|.
    """

    channels: dict[str, dict[int, dict[int, float]]]
    tokens: dict[tuple[int, int], tuple[list[int], float]]


def outlier_channels(x_TC: Tensor, ratio: float = CHANNEL_RATIO) -> dict[int, float]:
    """The outlier channels of what one wire carries, and how many times the median channel each is."""
    typical_C = x_TC.abs().float().median(0).values
    times_C = typical_C / typical_C.median().clamp(min=torch.finfo(torch.float32).tiny)
    order_C = times_C.argsort(descending=True, stable=True).tolist()
    return {c: value for c in order_C if (value := float(times_C[c])) > ratio}


def massive_tokens(x_TD: Tensor) -> dict[int, float]:
    """The massive tokens of a residual stream by position, and the largest |x| of each."""
    x_TD = x_TD.abs().float()
    peaks_T, bound = x_TD.amax(-1), max(TOKEN_PEAK, TOKEN_RATIO * float(x_TD.median()))
    return {t: float(peaks_T[t]) for t in (peaks_T > bound).nonzero()[:, 0].tolist()}


@torch.no_grad()
def find_spikes(network: Network, ids_NT: Tensor) -> Spikes:
    """Outlier channels of every wire and layer, heads side by side, and massive tokens, of windows `(N, T)`.

    All windows pass at once. The network is left as it was.
    """
    channels: dict[str, dict[int, dict[int, float]]] = {wire: {} for wire in MEASURED_WIRES}
    tokens: dict[tuple[int, int], tuple[list[int], float]] = {}

    def on_wire(layer: int, wire: str, _: nn.Module, __: object, x: Tensor) -> None:
        side_by_side = x.transpose(1, 2).flatten(2) if x.ndim == 4 else x
        if found := outlier_channels(side_by_side.flatten(0, 1)):
            channels[wire][layer] = found

    def on_stream(layer: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        for place, peak in massive_tokens(args[0].flatten(0, 1)).items():
            where = divmod(place, ids_NT.shape[1])
            layers, largest = tokens.get(where, ([], 0.0))
            tokens[where] = [*layers, layer], max(largest, peak)

    handles = [layer.module.register_forward_pre_hook(partial(on_stream, layer.index)) for layer in network.layers]
    handles += [
        layer.wire(wire).register_forward_hook(partial(on_wire, layer.index, wire))
        for layer in network.layers
        for wire in MEASURED_WIRES
    ]
    try:
        network.hidden(ids_NT.to(network.device))
    finally:
        for handle in handles:
            handle.remove()
    return Spikes(channels, tokens)
