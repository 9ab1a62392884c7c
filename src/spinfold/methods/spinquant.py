"""SpinQuant (Liu et al., ICLR 2025, arXiv 2405.16406): residual and value rotations learned on the loss.

    min over orthogonal R1, R2 of the next-token cross-entropy of the network with quantized activations and KV cache

by Cayley SGD from random Hadamards, with fixed Hadamards at query_key and down (leave these sites out for the
variant without online ops). Weights stay in 16 bits during the fit unless the recipe's `fit.weight_bits` says
otherwise, as the authors advise when GPTQ follows.

Two differences from the published code, on purpose: the step is a rotation by about `learning_rate` radians
("spectral", fit.step_rule) rather than a capped one under a hidden joint gradient clip, and the result is brought
back to the orthogonal group in fp64. The recipe `spinquant` has the published settings.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from spinfold.fitting.end_to_end import FitLog, FitSettings, fit_end_to_end
from spinfold.maps import Map, Orthogonal, SiteMaps, project
from spinfold.methods.base import FitTask, Method
from spinfold.methods.quarot import hadamard_maps

__all__ = ["SPINQUANT", "learnable"]


def learnable(maps: SiteMaps, device: torch.device) -> tuple[SiteMaps, list[Tensor]]:
    """The maps on `device`, those at residual and value as dense matrices that take gradients; and these."""
    learned: list[Tensor] = []

    def dense(map: Map) -> Orthogonal:
        learned.append(map.matrix().float().to(device).requires_grad_())
        return Orthogonal(learned[-1])

    here = maps.to(device)
    return replace(
        here,
        residual=here.residual and dense(here.residual),
        value=here.value and tuple(dense(one) for one in here.value),
    ), learned


def settings_of(task: FitTask) -> FitSettings:
    """The recipe's fit, with this method's defaults where it says nothing."""
    fit = task.recipe.fit
    return FitSettings(
        steps=100 if fit.steps is None else fit.steps,
        batch=fit.batch or 8,
        learning_rate=fit.learning_rate or 0.1,
        step_rule=fit.step_rule or "spectral",
        schedule=fit.schedule or "linear",
        clip_grad_norm=fit.clip_grad_norm,
        checkpointing=fit.checkpointing,
    )


def _fit(task: FitTask) -> tuple[SiteMaps, FitLog]:
    settings = settings_of(task)
    maps, learned = learnable(hadamard_maps(task, random_value=True), task.network.device)
    ids_NT = task.windows(task.recipe.fit.seq_len or task.recipe.calibration.seq_len, settings.steps * settings.batch)
    log = fit_end_to_end(task.network, maps, learned, ids_NT, task.recipe, settings, task.progress)
    return orthonormal(maps), log


def orthonormal(maps: SiteMaps) -> SiteMaps:
    """Every learned matrix replaced by the nearest orthogonal one, in fp64."""
    return maps.each_replaced(lambda x: Orthogonal(project(x.R_NN.detach().double())) if isinstance(x, Orthogonal) else x)


SPINQUANT = Method(
    name="spinquant",
    summary="residual and value rotations learned on the language-model loss",
    paper="arXiv 2405.16406",
    sites=("residual", "value", "query_key", "down"),
    fit=_fit,
    needs_data=True,
    needs_backprop=True,
)
