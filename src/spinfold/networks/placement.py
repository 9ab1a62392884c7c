"""Weights that are on the device only while their layer has its turn.

A network held for good takes 4 bytes a weight on the device, and as many again once a rotated copy stands beside it.
A larger one stays in a `Store`, such as the files of its checkpoint, in the dtype in which it is stored:

    with layer.present():      its weights are on the device, in fp32; of a layer that is always there, nothing is done
    layer.change(do)           `do(layer)` now, or whenever the weights have come

What is stored never changes: folds and rounded weights are remembered, and put in place anew in each turn. So nothing
is lost to a 16-bit copy, a copy of the network costs nothing, and the memory is that of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spinfold.allocator import return_freed_memory
from spinfold.errors import SpinfoldError

__all__ = ["Away", "Store", "built_without_weights", "put"]


class Store(Protocol):
    """Where weights are while nobody needs them."""

    def read(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """The tensors of these names as they are stored, on any device."""


class Away:
    """What a layer needs to get its weights, and how they are changed on the way."""

    def __init__(self, store: Store, prefix: str, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.store, self.prefix, self.device, self.dtype = store, prefix, device, dtype
        self.changes: list[Callable[[Any], None]] = []
        self.users = 0

    def copy(self) -> Away:
        """The same weights, changed on a way of their own."""
        twin = Away(self.store, self.prefix, self.device, self.dtype)
        twin.changes = list(self.changes)
        return twin

    def change(self, do: Callable[[Any], None]) -> None:
        """Let `do(layer)` change the weights each time that they have come."""
        self.changes.append(do)

    def fetch(self, module: nn.Module) -> None:
        """Put the stored weights into a module."""
        names = [name for name, _ in module.named_parameters()]
        tensors = self.store.read([f"{self.prefix}.{name}" for name in names])
        for name in names:
            # In two steps: in one, the host would do the cast, and more would travel.
            weight = tensors[f"{self.prefix}.{name}"].to(self.device).to(self.dtype)
            if not bool(weight.isfinite().all()):
                raise SpinfoldError(
                    "The weights are not all finite.",
                    f"{self.prefix}.{name} holds NaN or infinity.",
                    "Download the model again.",
                )
            put(module, name, weight)

    def forget(self, module: nn.Module) -> None:
        """Leave nothing but shapes."""
        for name, parameter in list(module.named_parameters()):
            put(module, name, torch.empty_like(parameter, device="meta"))
        if self.device.type == "cpu":  # else free pieces between what stays pile up from layer to layer
            return_freed_memory()


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Make a tensor a module's frozen parameter, such as `mlp.down_proj.weight`; RuntimeError for another shape."""
    owner, _, leaf = name.rpartition(".")
    parameters = module.get_submodule(owner)._parameters
    before = parameters[leaf]
    if before is not None and before.shape != tensor.shape:
        raise RuntimeError(f"{name} should be {list(before.shape)}, it is {list(tensor.shape)}")
    parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


@contextmanager
def built_without_weights() -> Iterator[None]:
    """Modules made here have parameters with a shape and no memory; their buffers, which are computed, are real."""
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that has a second name stays one
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = without_memory  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
