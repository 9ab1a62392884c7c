"""Fit the tensors inside maps by gradient through the whole quantized network.

The network keeps its weights: every quantizer acts through its site's map (`runtime.quantize_wires`), so that only
the maps are learned and nothing is folded until they are.

Shapes: N windows, B windows per step, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import cos, pi
from typing import Literal, Protocol

import torch
from torch import Tensor

from spinfold.compute import precision
from spinfold.networks import Network
from spinfold.progress import Progress, Quiet

__all__ = ["FitLog", "Optimizer", "Schedule", "fit_end_to_end"]

Loss = Callable[..., Tensor]


class Optimizer(Protocol):
    """What the loop needs of an optimiser; gradients stay allocated between steps."""

    def step(self, lr_scale: float) -> None:
        """Move the parameters in place by a share of the learning rate."""

    def zero_grad(self) -> None:
        """Set gradients to zero."""


@dataclass(frozen=True)
class Schedule:
    """Steps of `batch` windows each. `tokens_per_pass` bounds memory: a step is split into passes if it must."""

    steps: int
    batch: int
    decay: Literal["linear", "cosine", "constant"] = "linear"
    checkpointing: bool = False
    tokens_per_pass: int = 16384

    def rate_at(self, step: int) -> float:
        """The learning rate's factor at a step: 1 at the first, towards 0 after the last."""
        done = step / max(1, self.steps)
        return {"linear": 1 - done, "cosine": 0.5 * (1 + cos(pi * done)), "constant": 1.0}[self.decay]


@dataclass(frozen=True)
class FitLog:
    """What a fit leaves beside its maps: the objective at every step, how many windows were looked at (0: those that it
    asked for, once), and the clip ratios that it learned, by layer and wire (`runtime.Clips`).
    """

    losses: tuple[float, ...] = ()
    samples: int = 0
    clips: Mapping[str, float] = field(default_factory=dict)


def fit_end_to_end(
    network: Network,
    loss: Loss,
    data: Sequence[Tensor],
    optimizers: Sequence[Optimizer],
    schedule: Schedule,
    mode: str,
    progress: Progress | None = None,
) -> FitLog:
    """Let `optimizers` lower `loss(*batch)`, a mean over windows, computed in the precision `mode`.

    `data` are tensors with one entry per window, (N, ...) each, `ids_NT` first. Step s sees windows s*batch ...
    s*batch + batch - 1, counted around the N windows, however many fit on the device at a time.
    """
    ids_NT = data[0]
    per_pass = max(1, min(schedule.batch, schedule.tokens_per_pass // ids_NT.shape[1]))
    if schedule.checkpointing:
        network.model.gradient_checkpointing_enable({"use_reentrant": False})
        network.model.train()
    one_pass = _Pass(network.device, loss, mode, graph=not schedule.checkpointing)
    losses: list[float] = []
    try:
        with (progress or Quiet()).stage("fit rotations", total=schedule.steps) as bar:
            for step in range(schedule.steps):
                index_B = torch.arange(step * schedule.batch, (step + 1) * schedule.batch) % len(ids_NT)
                total = 0.0
                for part in index_B.split(per_pass):
                    batch = [tensor[part.to(tensor.device)] for tensor in data]
                    total += one_pass(batch, len(part) / schedule.batch)
                for optimizer in optimizers:
                    optimizer.step(schedule.rate_at(step))
                    optimizer.zero_grad()
                losses.append(total)
                bar.advance(note=f"loss {total:.3f}")
    finally:
        if schedule.checkpointing:
            network.model.gradient_checkpointing_disable()
            network.model.eval()
    return FitLog(tuple(losses), schedule.steps * schedule.batch)


class _Pass:
    """One forward and backward pass, adding to the gradients.

    On a GPU the second pass of a batch shape is captured as a CUDA graph and replayed from then on: a small model's
    step is a quarter arithmetic and three quarters launching kernels.
    """

    def __init__(self, device: torch.device, loss: Loss, mode: str, *, graph: bool) -> None:
        self.device, self.loss, self.mode = device, loss, mode
        self.graph = graph and device.type == "cuda"
        self.seen: dict[tuple[torch.Size, ...], int] = {}
        self.captured: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, batch: Sequence[Tensor], weight: float) -> float:
        shapes = tuple(tensor.shape for tensor in batch)
        self.seen[shapes] = self.seen.get(shapes, 0) + 1
        if not self.graph or self.seen[shapes] == 1:
            return float(self._run([tensor.to(self.device) for tensor in batch], weight))
        if shapes not in self.captured:
            self.captured[shapes] = self._capture(batch, weight)
        graph, inputs, total = self.captured[shapes]
        for own, tensor in zip(inputs, batch, strict=True):
            own.copy_(tensor)
        graph.replay()
        return float(total)

    def _run(self, batch: Sequence[Tensor], weight: float) -> Tensor:
        with precision(self.mode, self.device):
            loss = self.loss(*batch) * weight
        loss.backward()
        return loss.detach()

    def _capture(self, batch: Sequence[Tensor], weight: float) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        inputs = [tensor.to(self.device, copy=True) for tensor in batch]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            total = self._run(inputs, weight)
        return graph, inputs, total
