"""Frozen weights in equal parts on the devices of all processes, by FSDP2, brought together for a layer's turn.

    on each device:  16-bit weights / processes,  one layer whole, and the next one on its way

So an end-to-end fit can have a network that is larger than a GPU. Its weights take no gradient: nothing but the maps'
gradients is exchanged besides.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from spinfold.distributed import mesh
from spinfold.networks.placement import Away

__all__ = ["SharedOut", "Turns"]


class SharedOut(Away):
    """A layer's weights, of which this process holds its part of the `large` ones, and all of the others.

    A turn is taken by all processes together: they must give the same layers their turns, in the same order. Where
    gradients are taken, FSDP2 itself brings the weights and takes them away, forwards and backwards; else they stay
    for as many batches as this process has, and another may have one more.
    """

    def __init__(self, module: nn.Module, large: Collection[str]) -> None:
        self.users, self.changes = 0, []
        others = {parameter for name, parameter in module.named_parameters() if name not in large}
        share_out(module, others)

    def change(self, do: Callable[[Any], None]) -> None:
        raise NotImplementedError("a network that is shared out is there to be computed with, not to be changed")

    def fetch(self, module: nn.Module) -> None:
        if not torch.is_grad_enabled():
            cast(FSDPModule, module).set_reshard_after_forward(False)
            cast(FSDPModule, module).unshard()

    def forget(self, module: nn.Module) -> None:
        if not torch.is_grad_enabled():
            cast(FSDPModule, module).set_reshard_after_forward(True)
            cast(FSDPModule, module).reshard()


class Turns(nn.Module):
    """Layers that are shared out, as one module: it tells FSDP2 that they follow each other, so that the next one's
    weights travel while one computes.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        share_out(self, set(self.parameters()))
        self(lambda x: x, torch.zeros(0))  # FSDP2 takes what runs first as the one around all

    def forward(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return run(x)


def share_out(module: nn.Module, but: set[nn.Parameter]) -> None:
    """Cut the parameters along their first axis, in place, except `but`."""
    device = next(module.parameters()).device
    fully_shard(module, mesh=mesh(device.type), reshard_after_forward=True, ignored_params=but)
