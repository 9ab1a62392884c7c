"""Many tokens on their way through a network, together, one layer after the other: a layer is needed for its turn only.

Shapes: N windows, T tokens, B windows per batch, D residual width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor

from spinfold.compute import pick_precision, precision
from spinfold.networks.layer import Layer
from spinfold.networks.network import Network

__all__ = ["Stream", "hidden_in_batches"]


class Stream:
    """Tokens at the input of a layer, batch by batch: `(B, T, D)` each; all windows, or some of them."""

    @torch.no_grad()
    def __init__(
        self, network: Network, ids_NT: Tensor, compute: str, tokens_per_batch: int, some: slice = slice(None)
    ) -> None:
        self.device = network.device
        self.mode = pick_precision(compute, self.device)
        self.kwargs_of: list[dict[str, Any]] = network.arguments(ids_NT[:1].to(self.device))[1]
        some_NT = ids_NT[some].to(self.device)
        batches = some_NT.split(max(1, tokens_per_batch // ids_NT.shape[1])) if len(some_NT) else ()
        self.batches = [network.arguments(ids_BT)[0] for ids_BT in batches]

    def copy(self) -> Self:
        """The same tokens on a way of their own."""
        twin = copy.copy(self)
        twin.batches = list(self.batches)
        return twin

    def pass_through(self, layer: Layer) -> None:
        """On to the input of the next layer."""
        with layer.present(), precision(self.mode, self.device):
            for i, x_BTD in enumerate(self.batches):
                self.batches[i] = layer(x_BTD, **self.kwargs_of[layer.index])


@torch.no_grad()
def hidden_in_batches(network: Network, ids_NT: Tensor, compute: str, tokens_per_batch: int) -> Iterator[Tensor]:
    """What the head reads, `(B, T, D)` batch by batch; if layers come and go, all batches pass one before the next."""
    mode = pick_precision(compute, network.device)
    if not len(ids_NT):
        return
    if network.resident:
        for ids_BT in ids_NT.split(max(1, tokens_per_batch // ids_NT.shape[1])):
            with precision(mode, network.device):
                hidden_BTD = network.hidden(ids_BT.to(network.device))
            yield hidden_BTD
        return
    stream = Stream(network, ids_NT, compute, tokens_per_batch)
    for layer in network.layers:
        stream.pass_through(layer)
    while stream.batches:
        with precision(mode, network.device):
            hidden_BTD = network.final_norm(stream.batches.pop(0))
        yield hidden_BTD
