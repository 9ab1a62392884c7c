"""DFRot (Xiang & Zhang, COLM 2025, arXiv 2412.00648): one residual rotation by weighted alternating Procrustes.

    min over R   Σ_x w(x) ‖x R - Q(x R)‖²,    Q symmetric per token;   w = γ² for massive tokens, 1 for the others

x are the inputs of attention and MLP of all layers, of one window of text. By turns B = Q(x R), and the R that brings x
nearest to B, both in closed form, from a random Hadamard; massive rows are multiplied by γ = 100, which is the weight
because the grid follows the row. Fixed Hadamards at value, query_key and down.

Where this differs from the published code: a token is massive if one channel has 80 % of its squared length (theirs is
a constant that fits 4 bits and width 4096; it means nearly all of it), and the best R is kept (theirs is the last,
although the error may rise).
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from spinfold.fitting.capture import capture, pooled
from spinfold.fitting.end_to_end import FitLog
from spinfold.fitting.layerwise import WIRES_OF, alternate_procrustes, choose, dense
from spinfold.formats import IntFormat, fake_quantize
from spinfold.maps import Map, Orthogonal, SiteMaps
from spinfold.methods.base import FitTask, Method
from spinfold.methods.quarot import hadamard_maps

__all__ = ["DFROT", "TURNS", "massive"]

TURNS, _GAMMA, _SHARE, _FALLBACK_BITS = 100, 100.0, 0.8, 4


def massive(x_SN: Tensor, share: float = _SHARE) -> Tensor:
    """Is one channel's square more than `share` of the row's? `(S, N) -> (S,)`, boolean."""
    square_SN = x_SN.square()
    return square_SN.amax(-1) > share * square_SN.sum(-1)


def _fit(task: FitTask) -> tuple[SiteMaps, FitLog]:
    recipe, maps = task.recipe, hadamard_maps(task)
    choose(recipe.fit.objective, {"rounding": None}, "dfrot")
    if not isinstance(maps.residual, Map):
        return maps, FitLog()
    ids_WT = task.windows(recipe.fit.seq_len or recipe.calibration.seq_len, recipe.fit.batch or 1)
    wires = WIRES_OF["residual"]
    x_SD = pooled(
        capture(task.network, ids_WT, [wires], recipe.fit.tokens, recipe.seed, task.progress, compute=recipe.compute),
        *wires,
    )
    x_SD[massive(x_SD)] *= _GAMMA
    activations = recipe.activation_format or IntFormat(_FALLBACK_BITS, symmetric=True)
    format = IntFormat(activations.bits, symmetric=True, clip=activations.clip)
    R_DD, errors = alternate_procrustes(
        x_SD,
        dense(maps.residual, x_SD.device),
        lambda y: fake_quantize(y, format),
        TURNS if recipe.fit.steps is None else recipe.fit.steps,
        progress=task.progress,
        journal=task.journal,
    )
    return replace(maps, residual=Orthogonal(R_DD)), FitLog(errors)


DFROT = Method(
    name="dfrot",
    summary="a residual rotation by closed-form steps, massive tokens first",
    paper="arXiv 2412.00648",
    sites=("residual", "value", "query_key", "down"),
    fit=_fit,
    reads=("fit", "calibration", "activation_format"),
    needs_data=True,
)
