"""SmoothQuant (Xiao et al., ICML 2023, arXiv 2211.10438): activation outliers moved into the weights by scales.

    s_j = max|x_j|^α / max|W_j|^(1-α)        the norm gives x / s, the linears that read it have W diag(s)

per channel j of the inputs of attention and MLP; the maxima are over all calibration tokens, and over all rows of the
linears that read the wire. So the map at the sites qkv_input and mlp_input is diag(1/s): folded, nothing online.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spinfold.fitting.capture import channel_maxima
from spinfold.fitting.end_to_end import FitLog
from spinfold.maps import Diagonal, SiteMaps
from spinfold.methods.base import FitTask, Method

__all__ = ["SMOOTHQUANT", "smoothing_scales"]

_ALPHA, _LEAST = 0.5, 1e-5


def smoothing_scales(activation_max_N: Tensor, weight_max_N: Tensor, alpha: float) -> Tensor:
    """s `(N,)`; maxima below 1e-5 count as that, so that a dead channel gets a finite scale."""
    return activation_max_N.clamp(min=_LEAST) ** alpha / weight_max_N.clamp(min=_LEAST) ** (1 - alpha)


def _fit(task: FitTask) -> tuple[SiteMaps, FitLog]:
    recipe = task.recipe
    alpha = _ALPHA if recipe.fit.alpha is None else recipe.fit.alpha
    ids_WT = task.windows(recipe.fit.seq_len or recipe.calibration.seq_len, recipe.calibration.samples)
    maxima = channel_maxima(task.network, ids_WT, task.sites, compute=recipe.compute, progress=task.progress)
    maps: dict[str, tuple[Diagonal, ...]] = {}
    for site in task.sites:
        scales = []
        for layer in task.network.layers:
            with layer.present():
                weight_max_N = torch.stack([linear.weight_OI.abs().amax(0) for linear in layer.groups[site]]).amax(0)
            scales.append(smoothing_scales(maxima[layer.index, site], weight_max_N.float(), alpha))
        maps[site] = tuple(Diagonal(1 / s_N) for s_N in scales)
    return SiteMaps(**maps), FitLog()


SMOOTHQUANT = Method(
    name="smoothquant",
    summary="activation outliers moved into the weights by scales on the norms",
    paper="arXiv 2211.10438",
    sites=("qkv_input", "mlp_input"),
    allowed=("qkv_input", "mlp_input"),
    fit=_fit,
    reads=("fit", "calibration"),
    needs_data=True,
)
