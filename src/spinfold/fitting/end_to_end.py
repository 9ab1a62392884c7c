"""Fit orthogonal maps by gradient on the loss of the quantized network.

The network keeps its weights: every quantizer acts through its site's map (`runtime.QuantizeThrough`), so that only
the maps are learned and nothing is folded until they are.

Shapes: N windows, B windows per step, T tokens, D residual width, H head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi
from typing import Literal

import torch
from torch import Tensor

from spinfold.compute import pick_precision, precision
from spinfold.fitting.objectives import next_token_loss
from spinfold.maps import CayleySGD, SiteMaps
from spinfold.networks import Network
from spinfold.progress import Progress, Quiet
from spinfold.recipe import Recipe
from spinfold.runtime import quantize_wires

__all__ = ["FitLog", "FitSettings", "fit_end_to_end"]


@dataclass(frozen=True)
class FitSettings:
    """Steps of `batch` windows; `tokens_per_pass` bounds memory: a step is the sum of smaller passes if it must."""

    steps: int
    batch: int
    learning_rate: float
    step_rule: Literal["capped", "spectral"]
    schedule: Literal["linear", "cosine", "constant"]
    clip_grad_norm: float | None = None
    checkpointing: bool = False
    tokens_per_pass: int = 16384

    def rate_at(self, step: int) -> float:
        """The learning rate's factor at a step: 1 at the first, towards 0 after the last."""
        done = step / max(1, self.steps)
        return {"linear": 1 - done, "cosine": 0.5 * (1 + cos(pi * done)), "constant": 1.0}[self.schedule]


@dataclass(frozen=True)
class FitLog:
    """The objective at every step."""

    losses: tuple[float, ...] = ()
    samples: int = 0


def fit_end_to_end(
    network: Network,
    maps: SiteMaps,
    learned: list[Tensor],
    ids_NT: Tensor,
    recipe: Recipe,
    settings: FitSettings,
    progress: Progress | None = None,
) -> FitLog:
    """Move `learned`, the matrices inside `maps`, in place towards a lower next-token loss.

    Step s sees windows s*batch ... s*batch + batch - 1, counted around the N windows, whatever the device can hold.
    The network comes back as it was.
    """
    device = network.device
    mode = pick_precision(recipe.compute, device)
    mode = "bf16" if device.type == "cuda" and recipe.compute == "auto" else mode
    optimizer = CayleySGD(learned, settings.learning_rate, rule=settings.step_rule, clip_grad_norm=settings.clip_grad_norm)
    per_pass = max(1, settings.tokens_per_pass // ids_NT.shape[1])
    losses: list[float] = []
    take_off = quantize_wires(network, recipe, maps)
    if settings.checkpointing:
        network.model.gradient_checkpointing_enable({"use_reentrant": False})
        network.model.train()
    try:
        with (progress or Quiet()).stage("fit rotations", total=settings.steps) as bar:
            for step in range(settings.steps):
                index = torch.arange(step * settings.batch, (step + 1) * settings.batch) % len(ids_NT)
                total = torch.zeros((), device=device)
                for ids_BT in ids_NT[index].split(per_pass):
                    with precision(mode, device):
                        loss = next_token_loss(network, ids_BT.to(device)) * (len(ids_BT) / settings.batch)
                    loss.backward()  # type: ignore[no-untyped-call]
                    total += loss.detach()
                optimizer.step(settings.rate_at(step))
                optimizer.zero_grad()
                losses.append(float(total))
                bar.advance(note=f"loss {losses[-1]:.3f}")
    finally:
        take_off()
        if settings.checkpointing:
            network.model.gradient_checkpointing_disable()
            network.model.eval()
    return FitLog(tuple(losses), settings.steps * settings.batch)
