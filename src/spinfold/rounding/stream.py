"""Calibration tokens on their way through a network, layer by layer, and the statistics of what they bring to a wire.

A wire's second moment is the Hessian of every linear that reads it. An expert has a Hessian of its own, H_e, from the
n_e tokens that are routed to it. With fewer tokens than inputs H_e is singular, so the mean H over the layer's experts
stands in for the tokens that are missing:

    H_e <- s H_e + (1 - s) H,    s = min(1, n_e / I)

Shapes: N windows, T tokens, B windows per batch, D residual width, I in features, K experts of a token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from spinfold import networks
from spinfold.compute import precision
from spinfold.distributed import share, world
from spinfold.networks import Layer, Network
from spinfold.rounding.hessian import HessianAccumulator

__all__ = ["Moments", "Stream", "copy_layer", "moments_of"]

_TOKENS_PER_BATCH = {"cuda": 32768, "cpu": 4096}
_MOST_NUMBERS = 1 << 29  # on the widest wire


@dataclass(frozen=True)
class Moments:
    """H = E[xᵀx] of a linear's inputs, and D = E[(x° - x)ᵀx], x° the input in the unrounded network, if it is known."""

    hessian_II: Tensor
    drift_II: Tensor | None = None


class Stream(networks.Stream):
    """The calibration tokens at the input of a layer, those of this process's share."""

    def __init__(self, network: Network, ids_NT: Tensor, compute: str) -> None:
        tokens = _TOKENS_PER_BATCH.get(network.device.type, 4096)
        tokens = min(tokens, _MOST_NUMBERS // max(layer.mlp_width for layer in network.layers))
        super().__init__(network, ids_NT, compute, tokens, share(len(ids_NT)))
        self._at: tuple[str, tuple[Tensor, Tensor | None]] | None = None

    @property
    def is_one_batch(self) -> bool:
        """Are all tokens together, so that they can wait at a wire?"""
        return len(self.batches) == 1 and world() == 1

    def stop_at(self, layer: Layer, wires: Iterable[str], act: Callable[[str], None]) -> None:
        """`pass_through` for one batch, with `act(wire)` when it has come there: `on_wire` has what the wire carries at
        hand, and linears behind it may be changed.
        """
        assert self.is_one_batch
        left = set(wires)

        def stop(wire: str, _: nn.Module, args: tuple[Tensor, ...], x: Tensor) -> None:
            if wire in left:
                left.remove(wire)
                self._at = wire, (x, args[1] if len(args) > 1 else None)
                with precision("fp32", self.device):
                    act(wire)
                self._at = None

        handles = [layer.wire(wire).register_forward_hook(partial(stop, wire)) for wire in left]
        try:
            self.pass_through(layer)
        finally:
            for handle in handles:
                handle.remove()

    def on_wire(self, layer: Layer, wire: str) -> Iterator[tuple[Tensor, Tensor | None]]:
        """What a wire of the next layer carries, and on the wires of experts which of them a token meets,
        `(T, K)`; the rest of the layer does not run."""
        if self._at is not None and self._at[0] == wire:
            yield self._at[1]
            return
        seen: list[tuple[Tensor, Tensor | None]] = []

        def note(_: nn.Module, args: tuple[Tensor, ...], x: Tensor) -> None:
            seen.append((x, args[1] if len(args) > 1 else None))
            raise _Enough

        for x_BTD in self.batches:
            handle = layer.wire(wire).register_forward_hook(note)
            try:
                with precision(self.mode, self.device), suppress(_Enough):
                    layer(x_BTD, **self.kwargs_of[layer.index])
            finally:
                handle.remove()
            yield seen.pop()


class _Enough(Exception):
    """The wire has been seen."""


def copy_layer(layer: Layer) -> Layer:
    """A layer that computes what this one, which is present, does now, whatever happens to its weights."""
    twin = copy.copy(layer)
    twin.module, twin.away = copy.deepcopy(layer.module), None
    twin.wires = cast(nn.ModuleDict, twin.module.wires)
    return twin


def moments_of(
    stream: Stream,
    layer: Layer,
    wire: str,
    experts: Iterable[int | None],
    original: tuple[Stream, Layer] | None = None,
) -> Iterator[tuple[int | None, Moments]]:
    """The statistics of what reads a wire; on the wires of experts those of each.

    `original` is the stream in the unrounded network with its layer, for the drift. Experts have none: there a token
    may have met others.
    """
    hessians: dict[int | None, HessianAccumulator] = {}
    drift: HessianAccumulator | None = None
    unrounded = original[0].on_wire(original[1], wire) if original else None
    for x, experts_TK in stream.on_wire(layer, wire):
        for expert, x_TI in _rows(x, experts_TK):
            if expert not in hessians:
                hessians[expert] = HessianAccumulator(x_TI.shape[1], x.device)
            hessians[expert].add(x_TI)
        if unrounded is not None and experts_TK is None:
            drift = drift or HessianAccumulator(x.shape[-1], x.device)
            drift.add(x.float(), next(unrounded)[0].float() - x.float())
    hessians = HessianAccumulator.joined(hessians)
    drift = HessianAccumulator.joined({None: drift} if drift else {}).get(None)
    if None in hessians:
        yield None, Moments(hessians.pop(None).value(), drift.value() if drift else None)
        return
    total = sum(one.count for one in hessians.values())
    mean_II = sum((one.value() * (one.count / total) for one in hessians.values()), start=torch.zeros(()))
    for expert in experts:
        own = hessians.pop(expert, None)
        share = min(1.0, own.count / len(mean_II)) if own else 0.0
        yield expert, Moments(own.value() * share + mean_II * (1 - share) if own else mean_II)


def _rows(x: Tensor, experts_TK: Tensor | None) -> Iterator[tuple[int | None, Tensor]]:
    """What a wire carries, `(T, I)`; on the wires of experts what each of them reads."""
    if experts_TK is None:
        yield None, x.flatten(0, -2)
        return
    num_tokens, per_token = experts_TK.shape
    x_KTI = x.reshape(-1, num_tokens, x.shape[-1]).expand(per_token, -1, -1)
    experts_KT = experts_TK.T
    for expert in experts_KT.unique().tolist():
        yield expert, x_KTI[experts_KT == expert]
