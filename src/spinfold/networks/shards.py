"""Frozen weights in equal parts on the devices of all processes, brought together for a layer's turn.

    on each device:  16-bit weights / processes,  and one layer whole

So an end-to-end fit can have a network that is larger than a GPU: its weights need no gradient, and a layer's turn
comes once in the forward pass and once when it is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spinfold.distributed import gathered, rank, world
from spinfold.networks.placement import Away, put

__all__ = ["SharedOut"]


class SharedOut(Away):
    """A layer's weights, of which this process holds its part of the `large` ones, and all of the others.

    A turn is taken by all processes together: they must give the same layers their turns, in the same order.
    """

    def __init__(self, module: nn.Module, large: Collection[str]) -> None:
        self.users, self.changes = 0, []
        parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
        self.large = {name: parameters[name].shape for name in parameters if name in large}
        self.others = {name: tensor for name, tensor in parameters.items() if name not in large}
        flat = torch.cat([parameters[name].flatten() for name in self.large])
        self.device, size = flat.device, -(-len(flat) // world())
        self.part = F.pad(flat, (0, size * world() - len(flat)))[rank() * size : (rank() + 1) * size].clone()
        self.forget(module)

    def copy(self) -> Away:
        raise NotImplementedError("a network that is shared out is there to be computed with, not to be changed")

    def fetch(self, module: nn.Module) -> None:
        """Bring the parts together."""
        sizes = [shape.numel() for shape in self.large.values()]
        pieces: dict[str, Tensor] = dict(zip(self.large, gathered(self.part)[: sum(sizes)].split(sizes), strict=True))
        for name, shape in self.large.items():
            put(module, name, pieces[name].view(shape))
        for name, tensor in self.others.items():
            put(module, name, tensor)
