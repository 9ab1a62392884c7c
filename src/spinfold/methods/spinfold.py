"""spinfold's own method: maps fitted to the rounding error that the chosen formats really cause, then to the original.

    1. layer by layer, from random Hadamards, no back-propagation through the network:
           min over orthogonal M of  mean ||x M - Q(x M)||^2      at each site, Q being the site's own quantizer
       residual: what all norms give, one basis for all; with `fit.rank` above 0 then one basis per block boundary,
       started there; value and query_key: per layer, what the KV cache stores. With floating-point activations the
       rows of the rotated weights stand in for x M.
    2. end to end, `fit.steps` steps (0: none): all of these together, by Cayley SGD on
           KL(original || quantized network)
    3. with bases per boundary, an exact chain of changes of basis of at most `fit.rank` (see methods/respinquant.py).

Gradients see that a grid's scale follows the range of its row; that is what tells a rotation to even out a row. The
down site keeps its Hadamard.

Shapes: L layers, S captured rows, D residual width, H head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from spinfold.fitting.capture import Captured, capture, pooled
from spinfold.fitting.end_to_end import FitLog
from spinfold.fitting.layerwise import LayerwiseSettings, dense, fit_layerwise, rows_term
from spinfold.fitting.row_objectives import rounding_error
from spinfold.formats import IntFormat
from spinfold.maps import Map, Orthogonal, SiteMaps
from spinfold.methods.base import FitTask, Method
from spinfold.methods.optrot import fit_to_weights, total_of
from spinfold.methods.quarot import hadamard_maps
from spinfold.methods.respinquant import joined
from spinfold.methods.spinquant import fit_on_loss, learnable, settled
from spinfold.recipe import Fit

__all__ = ["SPINFOLD"]

_WINDOWS, _TOKENS, _ROWS = 16, 4096, 16384
_GLOBAL = LayerwiseSettings(steps=300, learning_rate=0.02, compute="auto")
_LOCAL = LayerwiseSettings(steps=100, learning_rate=0.02, compute="auto")
_NORMS = ("qkv_input", "mlp_input")


def _fit(task: FitTask) -> tuple[SiteMaps, FitLog]:
    fit, recipe = task.recipe.fit, task.recipe
    start = hadamard_maps(task, random_value=True)
    learned_sites = [site for site in ("residual", "value", "query_key") if site in start.sites]
    if recipe.activation_format or recipe.kv_format:
        maps, log = _fit_to_wires(task, start)
    elif recipe.weight_format:
        cost = total_of(partial(rounding_error, format=recipe.weight_format))
        maps, log = fit_to_weights(task, lambda _: cost, lambda _: cost, fit=Fit())
        learned_sites = [site for site in learned_sites if site != "query_key"]
    else:
        return start, FitLog()
    if fit.steps != 0:
        free, learned = learnable(maps, task.network.device, learned_sites)
        log = fit_on_loss(task, free, learned, distil=True, learning_rate=0.05)
        maps = settled(free, maps, learned_sites)
    if isinstance(maps.residual, tuple):
        with task.progress.stage("join bases"):
            maps = joined(maps, fit.rank or 0)
    return maps, log


def _fit_to_wires(task: FitTask, start: SiteMaps) -> tuple[SiteMaps, FitLog]:
    """The layer-wise part where activations or the KV cache are quantized."""
    recipe, network = task.recipe, task.network
    ids_NT = task.windows(recipe.calibration.seq_len, _WINDOWS)
    wires = [*_NORMS, "value", "key"]
    captured = capture(network, ids_NT, wires, recipe.fit.tokens or _TOKENS, recipe.seed, task.progress)
    layers = range(len(network.layers))
    maps, log = start, FitLog()
    if isinstance(start.residual, Map) and recipe.activation_format:
        quantizer = recipe.activation_format
        first = dense(start.residual, network.device)
        R_DD, losses = _rotate(task, first, pooled(captured, *_NORMS), quantizer, _GLOBAL, "fit residual basis")
        log, maps = FitLog(losses, len(ids_NT)), replace(maps, residual=Orthogonal(R_DD))
        if recipe.fit.rank:
            x_BSD = torch.stack([captured[layer, wire] for layer in layers for wire in _NORMS])
            first_BDD = R_DD.float().expand(len(x_BSD), -1, -1)
            R_BDD, losses = _rotate(
                task, first_BDD, x_BSD, quantizer, _LOCAL, "fit bases per boundary", rows_per_step=2048
            )
            bases = tuple(Orthogonal(R_DD) for R_DD in R_BDD)
            log, maps = FitLog(losses, len(ids_NT)), replace(maps, residual=(*bases, bases[-1]))
    if head_quantizer := recipe.kv_format or recipe.activation_format:
        for site, wire in (("value", "value"), ("query_key", "key")):
            if (before := getattr(start, site)) is not None:
                fitted = _rotate_heads(task, before, captured, wire, head_quantizer)
                maps = replace(maps, **{site: fitted})
    return maps, log


def _rotate_heads(
    task: FitTask, before: Sequence[Map], captured: Captured, wire: str, quantizer: IntFormat
) -> tuple[Map, ...]:
    x_LSH = torch.stack([captured[layer, wire] for layer in range(len(before))])
    first_LHH = torch.stack([dense(one, x_LSH.device) for one in before])
    R_LHH, _ = _rotate(task, first_LHH, x_LSH, quantizer, _LOCAL, f"fit {wire} bases", rows_per_step=2048)
    return tuple(Orthogonal(R_HH) for R_HH in R_LHH)


def _rotate(
    task: FitTask,
    first: Tensor,
    rows: Tensor,
    quantizer: IntFormat,
    settings: LayerwiseSettings,
    label: str,
    *,
    rows_per_step: int = _ROWS,
) -> tuple[Tensor, tuple[float, ...]]:
    term = rows_term(rows, partial(rounding_error, format=quantizer), min(rows_per_step, rows.shape[-2]))
    return fit_layerwise(first, term, settings, seed=task.recipe.seed, progress=task.progress, label=label)


SPINFOLD = Method(
    name="spinfold",
    summary="maps fitted to the rounding error at each site, then to the original's output",
    paper="",
    sites=("residual", "value", "query_key", "down"),
    fit=_fit,
    needs_data=True,
    needs_backprop=True,
)
