"""DartQuant (Shao et al., NeurIPS 2025, arXiv 2511.04063): rotations by the Whip loss, parameterised by QR.

    min over Z   mean over tokens of Σ_i exp(-|(x R)_i|),    R = Q of Z = Q U, diag(U) > 0

by SGD with momentum 0.9 from random Hadamards. Whip pushes small entries away from zero; as a rotation keeps a token's
length, its large entries must shrink. At the residual site x are the inputs of attention and MLP of all layers, which
have unit RMS after a norm without gain. Values have not: each is divided by its RMS, since Whip is not scale-free.

Fixed Hadamards at query_key and down. Other than the authors, there is one value rotation per layer, not per KV head,
and the tokens of all layers are pooled in equal parts and drawn once.
"""

from __future__ import annotations

from dataclasses import replace

from spinfold.fitting.end_to_end import FitLog
from spinfold.fitting.layerwise import LayerwiseSettings, choose, fit_to_activations
from spinfold.fitting.row_objectives import unit_rms, whip
from spinfold.maps import SiteMaps
from spinfold.methods.base import FitTask, Method
from spinfold.methods.kurtail import ROWS, STEPS, TOKENS, VALUE_STEPS, captured_for
from spinfold.methods.quarot import hadamard_maps

__all__ = ["DARTQUANT"]

_RESIDUAL = LayerwiseSettings(steps=STEPS, learning_rate=1e-2, optimiser="qr")
_VALUE = LayerwiseSettings(steps=VALUE_STEPS, learning_rate=1e-3, optimiser="qr")


def _fit(task: FitTask) -> tuple[SiteMaps, FitLog]:
    recipe = task.recipe
    objective = choose(recipe.fit.objective, {"whip": whip}, "dartquant")
    residual = LayerwiseSettings.of(recipe.fit, _RESIDUAL, recipe.compute)
    captured = captured_for(task, TOKENS)
    for (_, wire), x in captured.items():
        if wire == "value":
            x.copy_(unit_rms(x.float()))
    return fit_to_activations(
        hadamard_maps(task, random_value=True),
        captured,
        {"residual": objective, "value": objective},
        {
            "residual": residual,
            "value": replace(residual, steps=min(residual.steps, _VALUE.steps), learning_rate=_VALUE.learning_rate),
        },
        recipe.fit.batch or ROWS,
        seed=recipe.seed,
        progress=task.progress,
        journal=task.journal,
    )


DARTQUANT = Method(
    name="dartquant",
    summary="residual and value rotations that even out activations (Whip loss)",
    paper="arXiv 2511.04063",
    sites=("residual", "value", "query_key", "down"),
    fit=_fit,
    reads=("fit", "calibration"),
    needs_data=True,
)
