"""Artificial outliers on a network's wires while maps are being fitted, gone afterwards.

    literal      x -> ops(x d)        the next linear meets outliers that its weights do not expect
    compensated  x -> ops(x d) / d    without ops the same function: only what the ops round tells the difference

d is γ at some channels of some tokens, and 1 elsewhere. A fit leaves the network in its own basis and lets a quantizer
act through its map, Q(x R) Rᵀ, so x d here is, in the rotated basis, x R -> x R D' with D' = Rᵀ diag(d) R: the outlier
passes through R, and R's gradient tells how well it was spread. Dividing by d after Q is dividing the weight's columns
by it, which works for a d that differs between tokens too.

Channels and positions are drawn once per wire. Real outliers keep their channels; and since windows are cut anywhere in
a text, fixed positions are random tokens. So nothing is drawn during a pass: a CUDA graph, and the recomputation of a
checkpoint, see the same outliers.

Shapes: B windows, T tokens of a window, N width of a wire.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spinfold.networks import Network

__all__ = ["OUTLIER_WIRES", "Injection", "inject"]

OUTLIER_WIRES = ("qkv_input", "attention_out", "mlp_input")
"""Wires whose quantizer acts through a map that is learned. At `down` stands a fixed Hadamard: no fit could answer."""


@dataclass(frozen=True)
class Injection:
    """What is injected: factor γ at a share of the tokens, the first one always, and of the channels, one at least."""

    gamma: float = 8.0
    compensated: bool = True
    token_share: float = 0.05
    channel_share: float = 0.001
    seed: int = 0


class _Outliers:
    """The hooks around one wire's ops. An object rather than closures, for deep copies."""

    def __init__(self, gamma: float, token_T1: Tensor, channel_N: Tensor) -> None:
        self.gamma, self.token_T1, self.channel_N = gamma, token_T1, channel_N

    def add(self, wire: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x_BTN, *rest = args
        return torch.where(self._where(x_BTN), x_BTN * self.gamma, x_BTN), *rest

    def remove(self, wire: nn.Module, args: tuple[Tensor, ...], y_BTN: Tensor) -> Tensor:
        return torch.where(self._where(y_BTN), y_BTN / self.gamma, y_BTN)

    def _where(self, x_BTN: Tensor) -> Tensor:
        windows = x_BTN.shape[1] // len(self.token_T1)  # 1, but experts get all windows as one, (1, B T, N)
        return self.token_T1.repeat(windows, 1) & self.channel_N


def inject(network: Network, layers: Collection[int], injection: Injection, seq_len: int) -> Callable[[], None]:
    """Put outliers on `OUTLIER_WIRES` of these layers, around whatever ops stand there or come later.

    For windows of `seq_len` tokens. A layer's outliers do not depend on which other layers have some. Returns the
    function that takes them off again.
    """
    draws = torch.Generator().manual_seed(injection.seed)
    handles = []
    for layer in network.layers:
        groups = layer.groups
        for name in OUTLIER_WIRES:
            wire, width = layer.wire(name), groups[name][0].weight_OI.shape[1]
            token_T1 = torch.rand(seq_len, 1, generator=draws) < injection.token_share
            token_T1[0] = True
            channel_N = torch.zeros(width, dtype=torch.bool)
            channel_N[torch.randperm(width, generator=draws)[: max(1, round(injection.channel_share * width))]] = True
            if layer.index in layers:
                outliers = _Outliers(injection.gamma, token_T1.to(network.device), channel_N.to(network.device))
                handles.append(wire.register_forward_pre_hook(outliers.add))
                if injection.compensated:
                    handles.append(wire.register_forward_hook(outliers.remove))

    def take_off() -> None:
        for handle in handles:
            handle.remove()

    return take_off
