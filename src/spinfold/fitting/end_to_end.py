"""Fit the tensors inside maps by gradient through the whole quantized network.

The network keeps its weights: every quantizer acts through its site's map (`runtime.quantize_wires`), so that only
the maps are learned and nothing is folded until they are.

Shapes: N windows, B windows per step, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, cos, pi
from typing import Literal, Protocol

import torch
from torch import Tensor

from spinfold.allocator import free_bytes
from spinfold.compute import precision, products
from spinfold.distributed import add_up, local_world, share, world
from spinfold.fitting.journal import Journal
from spinfold.networks import Network
from spinfold.progress import Progress, Quiet

__all__ = ["GRAPH_SHARE", "FitLog", "Optimizer", "Schedule", "fit_end_to_end", "graph_fits", "numbers_of_token"]

Loss = Callable[..., Tensor]
GRAPH_SHARE = 0.6
"""Of the memory that is free: a graph may take so much, or activations are computed again."""


class Optimizer(Protocol):
    """What the loop needs of an optimiser; gradients stay allocated between steps."""

    @property
    def params(self) -> Sequence[Tensor]:
        """What is moved."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """All that a step reads and moves in place, `params` included."""

    def step(self, lr_scale: float) -> None:
        """Move the parameters in place by a share of the learning rate."""

    def zero_grad(self) -> None:
        """Set gradients to zero."""


@dataclass(frozen=True)
class Schedule:
    """Steps of `batch` windows each. `tokens_per_pass` bounds memory: a step is split into passes if it must. With
    `checkpointing` a layer's activations are computed again rather than held.
    """

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


def numbers_of_token(width: int, mlp_width: int) -> float:
    """What back-propagation through a layer keeps of a token, in fp32."""
    return 5.5 * width + 3.5 * mlp_width


def graph_fits(network: Network, tokens: int, share: float = GRAPH_SHARE) -> bool:
    """Do the activations that a pass over so many tokens holds fit into a share of what is free on its device?"""
    if network.device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(network.device)[0]
    else:
        free = free_bytes() // local_world()
    numbers = sum(numbers_of_token(network.hidden_size, layer.mlp_width) for layer in network.layers)
    return 4 * min(tokens, Schedule.tokens_per_pass) * numbers < share * free


def fit_end_to_end(
    network: Network,
    loss: Loss,
    data: Sequence[Tensor],
    optimizers: Sequence[Optimizer],
    schedule: Schedule,
    mode: str,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> FitLog:
    """Let `optimizers` lower `loss(*batch)`, a mean over windows, computed in the precision `mode`.

    `data` are tensors with one entry per window, (N, ...) each, `ids_NT` first. Step s sees windows s*batch ...
    s*batch + batch - 1, counted around the N windows, however many fit on the device at a time, and however many
    processes share them out.
    """
    ids_NT = data[0]
    per_pass = max(1, min(schedule.batch, schedule.tokens_per_pass // ids_NT.shape[1]))
    before, network.checkpointing = network.checkpointing, schedule.checkpointing or not network.resident
    one_pass = _Pass(network.device, loss, mode, graph=not network.checkpointing)
    loss_S = torch.zeros(schedule.steps, dtype=torch.float64)
    moved = {f"{i}.{name}": tensor for i, one in enumerate(optimizers) for name, tensor in one.state.items()}
    moved["loss"], journal = loss_S, journal or Journal()
    try:
        with (progress or Quiet()).stage("fit rotations", total=schedule.steps) as bar:
            for step in journal.steps(schedule.steps, moved, bar=bar):
                index_B = torch.arange(step * schedule.batch, (step + 1) * schedule.batch) % len(ids_NT)
                own_B, total = index_B[share(schedule.batch)], 0.0
                parts = [(part, len(part) / schedule.batch) for part in own_B.split(per_pass) if len(part)]
                if not network.resident:  # its layers may be shared out: then all processes make the same passes
                    passes = ceil(ceil(schedule.batch / world()) / per_pass)
                    parts += [(index_B[:1], 0.0)] * (passes - len(parts))
                for part, weight in parts:
                    batch = [tensor[part.to(tensor.device)] for tensor in data]
                    total += one_pass(batch, weight)
                total = _over_processes(optimizers, total)
                for optimizer in optimizers:
                    optimizer.step(schedule.rate_at(step))
                    optimizer.zero_grad()
                loss_S[step] = total
                bar.advance(note=f"loss {total:.3f}")
    finally:
        network.checkpointing = before
    return FitLog(tuple(loss_S.tolist()), schedule.steps * schedule.batch)


def _over_processes(optimizers: Sequence[Optimizer], total: float) -> float:
    """Add up what the processes have found: the gradients, in place, and a step's objective."""
    if world() == 1:
        return total
    params = [param for optimizer in optimizers for param in optimizer.params]
    for param in params:
        if param.grad is None:  # this process had no window yet
            param.grad = torch.zeros_like(param)
    sum_of_totals = torch.tensor(total, dtype=torch.float64, device=params[0].device)
    add_up([sum_of_totals, *(param.grad for param in params if param.grad is not None)])
    return float(sum_of_totals)


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
        with products(self.mode):
            loss.backward()
        return loss.detach()

    def _capture(self, batch: Sequence[Tensor], weight: float) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        inputs = [tensor.to(self.device, copy=True) for tensor in batch]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # Other threads may talk to the GPU meanwhile: that of NCCL does.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            total = self._run(inputs, weight)
        return graph, inputs, total
