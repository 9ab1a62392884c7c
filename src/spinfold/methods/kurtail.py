"""KurTail (arXiv 2503.01483): residual and value rotations that take the tails off activations, without backprop.

    min over R   mean over tokens of kurtosis(x R),    x the inputs of attention and MLP of all layers, after the norm

per token across channels, which is what a per-token quantizer sees; at the value site x is each head's value, with a
rotation per layer. `fit.objective: uniform` is |kurtosis - 1.8| of each token. Riemannian Adam from random Hadamards,
and fixed Hadamards at query_key and down. The paper's steps, learning rate and samples are unknown: ours are defaults.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from spinfold.fitting.capture import Captured, capture
from spinfold.fitting.end_to_end import FitLog
from spinfold.fitting.layerwise import WIRES_OF, LayerwiseSettings, choose, fit_to_activations
from spinfold.fitting.row_objectives import gap_to_uniform, kurtosis
from spinfold.maps import SiteMaps
from spinfold.methods.base import FitTask, Method
from spinfold.methods.quarot import hadamard_maps

__all__ = ["KURTAIL", "ROWS", "STEPS", "TOKENS", "VALUE_STEPS", "captured_for"]

STEPS, VALUE_STEPS = 300, 100
_DEFAULT = LayerwiseSettings(steps=STEPS, learning_rate=0.03)
TOKENS, ROWS = 2048, 4096


def captured_for(task: FitTask, tokens: int) -> Captured:
    """What flows through the task's residual and value sites, `tokens` per wire unless the recipe says otherwise.

    In fp16: its 11 bits are those of a TF32 product, and a norm without gain gives no number above √D.
    """
    recipe = task.recipe
    return capture(
        task.network,
        task.windows(recipe.fit.seq_len or recipe.calibration.seq_len, recipe.calibration.samples),
        [wires for site, wires in WIRES_OF.items() if site in task.sites],
        recipe.fit.tokens or tokens,
        recipe.seed,
        task.progress,
        compute=recipe.compute,
        dtype=torch.float16,
    )


def _fit(task: FitTask) -> tuple[SiteMaps, FitLog]:
    recipe = task.recipe
    objective = choose(recipe.fit.objective, {"kurtosis": kurtosis, "uniform": gap_to_uniform}, "kurtail")
    settings = LayerwiseSettings.of(recipe.fit, _DEFAULT, recipe.compute)
    return fit_to_activations(
        hadamard_maps(task, random_value=True),
        captured_for(task, TOKENS),
        {"residual": objective, "value": objective},
        {"residual": settings, "value": replace(settings, steps=min(settings.steps, VALUE_STEPS))},
        recipe.fit.batch or ROWS,
        seed=recipe.seed,
        progress=task.progress,
        journal=task.journal,
    )


KURTAIL = Method(
    name="kurtail",
    summary="residual and value rotations that lower the kurtosis of activations",
    paper="arXiv 2503.01483",
    sites=("residual", "value", "query_key", "down"),
    fit=_fit,
    reads=("fit", "calibration"),
    needs_data=True,
)
