"""spinfold's own method: maps fitted to the rounding error that the chosen formats really cause, then to the original.

    1. layer by layer, from random Hadamards, no back-propagation through the network. Where activations (for value and
       query_key: the cache) have no more bits than weights, a rotation is fitted to what flows along its own wires:
           min over orthogonal M of  mean ‖x M - Q(x M)‖²,  Q the site's own quantizer
       (where Q's grids are of blocks, from the best of that Hadamard, one of the block's size, and none at all)
       residual: what all norms give, one basis for all; with `fit.rank` above 0 then one per block boundary, started
       there; value and query_key: per layer, what the KV cache stores. Elsewhere residual and value are fitted to the
       error that GPTQ leaves in the weights:
           min over R of  Σ_W Σ_rows ε(w̃) Σ_i D_i,  ε the mean squared rounding error of a row, D as in OptRot+
    2. end to end, `fit.steps` steps (0: none, as by default where weights are the coarsest), by Cayley SGD on
           KL(original || quantized network) + cross-entropy of the next token
       all of these maps together, the Kronecker factors of the down map, and the clip ratios if the recipe says so.
    3. with bases per boundary, an exact chain of changes of basis of at most `fit.rank` (see methods/respinquant.py).

Gradients see that a grid's scale follows the range of its row; that is what tells a rotation to even out a row. At the
down site stands a Kronecker product of two small Hadamards, which costs a few products more than one Hadamard and can
be learned (FlatQuant's form, arXiv 2410.09426, kept orthogonal); the whole Hadamard if nothing is learned end to end.

Shapes: L layers, S captured rows, D residual width, H head_dim, F MLP width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from math import gcd

import torch

from spinfold.fitting.capture import Captured, capture, pooled, stacked
from spinfold.fitting.end_to_end import FitLog
from spinfold.fitting.layerwise import LayerwiseSettings, dense, fit_to_rows
from spinfold.fitting.row_objectives import in_blocks, rounding_error
from spinfold.formats import ClipSearch, Format, fit_grid
from spinfold.formats.cache import tokens_of
from spinfold.maps import Map, Orthogonal, SiteMaps, kronecker_hadamard, project
from spinfold.methods.base import QUANTIZERS, FitTask, Method
from spinfold.methods.block_hadamard import hadamard_blocks
from spinfold.methods.optrot_plus import fit_to_feedback
from spinfold.methods.quarot import hadamard_maps
from spinfold.methods.respinquant import joined
from spinfold.methods.spinquant import fit_on_loss, learnable, settled
from spinfold.recipe import Bits, Fit, Recipe

__all__ = ["GLOBAL", "HEAD_ROWS", "LOCAL", "ROWS", "SPINFOLD", "TOKENS", "WINDOWS", "weights_are_coarsest"]

WINDOWS = 16
TOKENS = 4096
"""Captured at each wire and layer, if the recipe does not say."""
ROWS, HEAD_ROWS = 16384, 2048
"""Of a step: of the residual basis, and of each head's or boundary's."""
GLOBAL = LayerwiseSettings(steps=300, learning_rate=0.02, compute="auto")
LOCAL = LayerwiseSettings(steps=100, learning_rate=0.02, compute="auto")
_NORMS = ("qkv_input", "mlp_input")


def weights_are_coarsest(recipe: Recipe) -> bool:
    """Are they coarser than activations? Then the fit is to them, and takes no end-to-end steps by itself."""
    bits = Bits.parse(recipe.bits)
    return bits.weights < bits.activations


def _fit(task: FitTask) -> tuple[SiteMaps, FitLog]:
    recipe = task.recipe
    bits = Bits.parse(recipe.bits)
    if min(bits) == 16:
        return hadamard_maps(task, random_value=True), FitLog()
    maps, log = hadamard_maps(task, random_value=True), FitLog()
    by_weights = weights_are_coarsest(recipe)
    if by_weights:
        maps, log = _fit_to_weights(task)
    if not by_weights or bits.kv <= bits.weights:
        maps, log = _fit_to_wires(task, maps, log, residual=not by_weights)
    if recipe.fit.steps or (recipe.fit.steps is None and not by_weights):
        if maps.down is not None:
            maps = replace(maps, down=tuple(kronecker_hadamard(one.size) for one in maps.down))
        free, learned = learnable(maps, task.network.device, maps.sites)
        log = fit_on_loss(task, free, learned, loss="both", learning_rate=0.05)
        maps = settled(free, maps, maps.sites)
    if isinstance(maps.residual, tuple):
        with task.progress.stage("join bases"):
            maps = joined(maps, recipe.fit.rank or 0)
    return maps, log


def _fit_to_weights(task: FitTask) -> tuple[SiteMaps, FitLog]:
    """The layer-wise part where weights are the coarsest."""
    format = task.recipe.weight_format
    assert format is not None

    def left_by_gptq(w_LOI: torch.Tensor, variance_LI: torch.Tensor) -> torch.Tensor:
        clip = _usual_clip(format, format.group_of(w_LOI.shape[-1]), task.recipe.clip_search)
        error = in_blocks(partial(rounding_error, format=replace(format, group_size=None, clip=clip)), on_gpu=1 << 24)
        error_LOG = error(format.split(w_LOI))
        return (error_LOG * format.split(variance_LI).sum(-1)[:, None]).sum()

    return fit_to_feedback(task, left_by_gptq, fit=Fit())


@cache
def _usual_clip(format: Format, size: int, search: ClipSearch | None) -> float:
    """The share of its range that a search leaves to a group of `size` normal numbers, which is what a rotated weight
    looks like: at 3 bits little more than half."""
    if search is None:
        return 1.0
    w_OI = torch.randn(256, size, generator=torch.Generator().manual_seed(0))
    whole, found = (fit_grid(w_OI, replace(format, group_size=None), search=one) for one in (None, search))
    return float((found.scale_OG.float() / whole.scale_OG.float()).mean())


def _fit_to_wires(task: FitTask, start: SiteMaps, log: FitLog, *, residual: bool) -> tuple[SiteMaps, FitLog]:
    """The layer-wise part where activations, if `residual`, or the KV cache are no finer than weights."""
    recipe, network, maps = task.recipe, task.network, start
    ids_NT = task.windows(recipe.calibration.seq_len, WINDOWS)
    wires: list[str | tuple[str, ...]] = ["value", "key", *([_NORMS] if residual else ())]
    captured = capture(network, ids_NT, wires, recipe.fit.tokens or TOKENS, recipe.seed, task.progress)
    quantizer = recipe.activation_format
    if residual and isinstance(start.residual, Map) and quantizer is not None:
        x_SD = pooled(captured, *_NORMS)
        first = _least(_starts(start.residual, quantizer, x_SD.device), x_SD, quantizer)
        R_DD, losses = _rotate(task, first, x_SD, quantizer, GLOBAL, "fit residual basis")
        if quantizer.group_size:  # blocks leave little to learn, which mini-batches may miss
            R_DD = _least([project(first.double()), R_DD], x_SD, quantizer)
        log, maps = FitLog(losses), replace(maps, residual=Orthogonal(R_DD))
        if recipe.fit.rank:
            x_BSD = x_SD.unflatten(0, (2 * len(network.layers), -1))
            first_BDD = R_DD.float().expand(len(x_BSD), -1, -1)
            R_BDD, losses = _rotate(
                task, first_BDD, x_BSD, quantizer, LOCAL, "fit bases per boundary", rows_per_step=HEAD_ROWS
            )
            bases = tuple(Orthogonal(R_DD) for R_DD in R_BDD)
            log, maps = FitLog(losses), replace(maps, residual=(*bases, bases[-1]))
    for site, wire in (("value", "value"), ("query_key", "key")):
        head_quantizer, before = _head_format(recipe, wire, network.layers[0].head_dim), getattr(start, site)
        if head_quantizer is not None and before is not None:
            maps = replace(maps, **{site: _rotate_heads(task, before, captured, wire, head_quantizer)})
    return maps, log


def _starts(hadamard: Map, quantizer: Format, device: torch.device) -> list[torch.Tensor]:
    """Where to start: at the Hadamard; for a grid of blocks perhaps at the block's own, or without mixing them."""
    bases = [dense(hadamard, device)]
    if quantizer.group_size:
        bases.append(dense(hadamard_blocks(quantizer.group_size, hadamard.size), device))
        bases.append(torch.eye(hadamard.size, device=device))
    return bases


def _least(bases: Sequence[torch.Tensor], x_SD: torch.Tensor, quantizer: Format) -> torch.Tensor:
    """The basis with the least rounding error, on rows of all layers."""
    if len(bases) == 1:
        return bases[0]
    some_SD = x_SD[:: max(1, len(x_SD) // ROWS)].float()
    return min(bases, key=lambda R_DD: float(rounding_error(some_SD @ R_DD.float(), quantizer).mean()))


def _head_format(recipe: Recipe, wire: str, head_dim: int) -> Format | None:
    """The grid of a head of one token: the cache's, also where that has one per channel, or else the activations'."""
    if (cache := recipe.kv_format) and (format := getattr(cache, wire)):
        return replace(format, group_size=None) if tokens_of(format) else format
    if (whole := recipe.activation_format) and whole.group_size:  # blocks of a row may lie across heads
        return replace(whole, group_size=gcd(whole.group_size, head_dim))
    return whole


def _rotate_heads(
    task: FitTask, before: Sequence[Map], captured: Captured, wire: str, quantizer: Format
) -> tuple[Map, ...]:
    x_LSH = stacked(captured, wire)
    first_LHH = torch.stack([dense(one, x_LSH.device) for one in before])
    R_LHH, _ = _rotate(task, first_LHH, x_LSH, quantizer, LOCAL, f"fit {wire} bases", rows_per_step=HEAD_ROWS)
    return tuple(Orthogonal(R_HH) for R_HH in R_LHH)


def _rotate(
    task: FitTask,
    first: torch.Tensor,
    rows: torch.Tensor,
    quantizer: Format,
    settings: LayerwiseSettings,
    label: str,
    *,
    rows_per_step: int = ROWS,
) -> tuple[torch.Tensor, tuple[float, ...]]:
    objective, count = partial(rounding_error, format=quantizer), min(rows_per_step, rows.shape[-2])
    seed = task.recipe.seed
    return fit_to_rows(
        first,
        rows,
        objective,
        count,
        settings,
        seed=seed,
        progress=task.progress,
        journal=task.journal,
        label=label,
    )


SPINFOLD = Method(
    name="spinfold",
    summary="maps fitted to the rounding error at each site, then to the original's output",
    paper="",
    sites=("residual", "value", "query_key", "down"),
    fit=_fit,
    reads=("fit", "calibration", "bits", "clip_search", "rounding.damp", *QUANTIZERS),
    needs_data=True,
    needs_backprop=True,
)
