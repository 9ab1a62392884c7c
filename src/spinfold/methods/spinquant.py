"""SpinQuant (Liu et al., ICLR 2025, arXiv 2405.16406): residual and value rotations learned on the loss.

    min over orthogonal R1, R2 of the next-token cross-entropy of the network with quantized activations and KV cache

by Cayley SGD from random Hadamards, with fixed Hadamards at query_key and down (leave these sites out for the
variant without online ops). Weights stay in 16 bits during the fit unless the recipe's `fit.weight_bits` says
otherwise, as the authors advise when GPTQ follows.

Three differences from the published code, on purpose; the recipe `spinquant` has the published settings.

- Gradients flow through the quantizers' scales (fit.scale_gradient). The published code holds scales constant; then
  the gradient is skew(h^T e) with the error e and the loss gradient h there. With h near H e and errors of equal size
  in all directions its mean over tokens is skew(H sigma^2) = 0: what is left is noise, and in our harness no descent.
- A step is a rotation by about `learning_rate` radians (fit.step_rule "spectral") rather than a capped one under a
  hidden joint gradient clip.
- The result is brought back to the orthogonal group in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from spinfold.compute import pick_precision
from spinfold.fitting.end_to_end import FitLog, Schedule, fit_end_to_end
from spinfold.fitting.objectives import next_token_loss
from spinfold.formats import IntFormat
from spinfold.maps import CayleySGD, Map, Orthogonal, SiteMaps, project
from spinfold.methods.base import FitTask, Method
from spinfold.methods.quarot import hadamard_maps
from spinfold.recipe import Recipe
from spinfold.runtime import quantize_wires, round_weights_through

__all__ = ["SPINQUANT", "fit_on_loss", "fit_precision", "learnable", "orthonormal"]


def learnable(maps: SiteMaps, device: torch.device) -> tuple[SiteMaps, list[Tensor]]:
    """The maps on `device`, those at residual and value as dense matrices that take gradients; and these."""
    learned: list[Tensor] = []

    def dense(map: Map) -> Orthogonal:
        learned.append(map.matrix().float().to(device).requires_grad_())
        return Orthogonal(learned[-1])

    here = maps.to(device)
    residual = dense(here.residual) if isinstance(here.residual, Map) else here.residual
    return replace(here, residual=residual, value=here.value and tuple(dense(one) for one in here.value)), learned


def fit_on_loss(task: FitTask, maps: SiteMaps, learned: Sequence[Tensor]) -> FitLog:
    """Move the matrices `learned`, which `maps` are made of, in place by the recipe's fit."""
    fit, network = task.recipe.fit, task.network
    schedule = Schedule(
        steps=100 if fit.steps is None else fit.steps,
        batch=fit.batch or 8,
        decay=fit.schedule or "linear",
        checkpointing=fit.checkpointing,
    )
    optimizer = CayleySGD(learned, fit.learning_rate or 0.1, fit.step_rule or "spectral", fit.clip_grad_norm)
    ids_NT = task.windows(fit.seq_len or task.recipe.calibration.seq_len, schedule.steps * schedule.batch)
    take_off = [quantize_wires(network, task.recipe, maps, scale_gradient=fit.scale_gradient is not False)]
    weights = weight_format_of(task.recipe)
    if weights is not None:
        take_off.append(round_weights_through(network, weights, maps))
    try:
        loss = partial(next_token_loss, network)
        return fit_end_to_end(network, loss, [ids_NT], [optimizer], schedule, fit_precision(task), task.progress)
    finally:
        for undo in take_off:
            undo()


def weight_format_of(recipe: Recipe) -> IntFormat | None:
    """How weights are rounded during a fit: as `fit.weight_bits` says, else only where nothing else is quantized."""
    bits = recipe.fit.weight_bits
    if bits is None:
        return None if recipe.activation_format or recipe.kv_format else recipe.weight_format
    return None if bits == 16 else IntFormat(bits, recipe.weights.symmetric, recipe.group_size)


def fit_precision(task: FitTask) -> str:
    """bf16 products unless the recipe names a precision: in a fit, rounding noise of 2^-9 is far below the gradient's."""
    mode = pick_precision(task.recipe.compute, task.network.device)
    return "bf16" if mode == "tf32" and task.recipe.compute == "auto" else mode


def orthonormal(maps: SiteMaps) -> SiteMaps:
    """Every learned matrix replaced by the nearest orthogonal one, in fp64."""
    return maps.each_replaced(lambda x: Orthogonal(project(x.R_NN.detach().double())) if isinstance(x, Orthogonal) else x)


def _fit(task: FitTask) -> tuple[SiteMaps, FitLog]:
    maps, learned = learnable(hadamard_maps(task, random_value=True), task.network.device)
    log = fit_on_loss(task, maps, learned)
    return orthonormal(maps), log


SPINQUANT = Method(
    name="spinquant",
    summary="residual and value rotations learned on the language-model loss",
    paper="arXiv 2405.16406",
    sites=("residual", "value", "query_key", "down"),
    fit=_fit,
    needs_data=True,
    needs_backprop=True,
)
