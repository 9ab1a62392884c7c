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

import copy
import gc
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from spinfold.compute import pick_precision
from spinfold.distributed import everyones, share, world
from spinfold.fitting.clipping import CLIP_WINDOWS, LearnedClips, search_clips
from spinfold.fitting.end_to_end import FitLog, Optimizer, Schedule, fit_end_to_end, graph_fits
from spinfold.fitting.objectives import distillation_loss, next_token_loss
from spinfold.formats import Format, IntFormat
from spinfold.maps import CayleySGD, Hadamard, Kronecker, Map, Orthogonal, SiteMaps, project
from spinfold.methods.base import QUANTIZERS, FitTask, Method
from spinfold.methods.quarot import hadamard_maps
from spinfold.networks import Network, hidden_in_batches
from spinfold.recipe import Recipe
from spinfold.runtime import quantize_wires, round_weights_through

__all__ = ["BATCH", "SPINQUANT", "STEPS", "fit_on_loss", "learnable", "settled", "shared_out"]

STEPS, BATCH = 100, 8
_DENSE_SIZE = 4096
_KEPT_BYTES = 2 << 30
_TOKENS_PER_BATCH = 16384


def learnable(
    maps: SiteMaps, device: torch.device, sites: Sequence[str] = ("residual", "value")
) -> tuple[SiteMaps, list[Tensor]]:
    """The maps on `device`, those at `sites` as dense matrices (Kronecker products of them) that take gradients; and
    these matrices. The others are `fixed`.
    """
    learned: list[Tensor] = []

    def leaf(one: Map) -> Map:
        if isinstance(one, Kronecker):
            return Kronecker(leaf(one.left), leaf(one.right))
        learned.append(one.matrix().float().to(device).requires_grad_())
        return Orthogonal(learned[-1])

    here = maps.to(device)
    others = [site for site in here.sites if site not in sites]
    return here.each_replaced(leaf, sites).each_replaced(partial(fixed, device=device), others), learned


def fixed(one: Map, device: torch.device) -> Map:
    """A map that is not learned, as it is fastest: on a GPU by one or two dense products in bf16, rather than by a fast
    transform's several passes over memory in fp32.
    """
    if device.type != "cuda" or not one.orthogonal:
        return one
    if one.size <= _DENSE_SIZE:
        return Orthogonal(one.matrix().float().to(device))
    return one.as_kronecker().to(device) if isinstance(one, Hadamard) else one


def settled(fitted: SiteMaps, start: SiteMaps, sites: Sequence[str] = ("residual", "value")) -> SiteMaps:
    """`start` with what was learned at `sites`, brought back to the orthogonal group in fp64."""

    def nearest(one: Map) -> Map:
        if isinstance(one, Kronecker):
            return Kronecker(nearest(one.left), nearest(one.right))
        return Orthogonal(project(one.R_NN.detach().double())) if isinstance(one, Orthogonal) else one

    clean = fitted.each_replaced(nearest, sites)
    return replace(start, **{site: getattr(clean, site) for site in sites})


def fit_on_loss(
    task: FitTask,
    maps: SiteMaps,
    learned: Sequence[Tensor],
    *,
    loss: Literal["next_token", "kl", "both"] = "next_token",
    learning_rate: float = 0.1,
) -> FitLog:
    """Move the matrices `learned`, which `maps` are made of, in place: an end-to-end fit by the recipe.

    The loss, unless the recipe names another: the cross-entropy of the next token, the KL divergence from the network
    as it is without quantizers, or the sum of both. Clip ratios that the
    recipe leaves to a search are those of the maps as they are given, and learned from there if it says so.
    """
    try:
        return _fit_on_loss(task, maps, learned, loss, learning_rate)
    finally:
        if world() > 1:
            gc.collect()  # layers that were shared out, and what FSDP2 knows of them, hold each other


def _fit_on_loss(
    task: FitTask,
    maps: SiteMaps,
    learned: Sequence[Tensor],
    loss: Literal["next_token", "kl", "both"],
    learning_rate: float,
) -> FitLog:
    fit, network = task.recipe.fit, task.network
    mode, weights = _precision(task), _weight_format(task.recipe)
    seq_len, batch = fit.seq_len or task.recipe.calibration.seq_len, fit.batch or BATCH
    steps = STEPS if fit.steps is None else fit.steps
    ids_NT = task.windows(seq_len, steps * batch)
    clips = search_clips(network, task.recipe, ids_NT[:CLIP_WINDOWS], maps, task.progress)
    if mode == "bf16" and weights is None:
        network = network.held(torch.bfloat16, shared_out=_too_large(network) and len(ids_NT) >= world())
    elif weights is not None and not network.resident:  # rounded anew at every step, they can't come and go
        network = network.held(torch.float32)
    schedule = Schedule(
        steps,
        batch,
        decay=fit.schedule or "linear",
        checkpointing=fit.checkpointing or not network.resident or not graph_fits(network, batch * seq_len),
    )
    rate, rule = fit.learning_rate or learning_rate, fit.step_rule or "spectral"
    optimizers: list[Optimizer] = [CayleySGD(learned, rate, rule, fit.clip_grad_norm)]
    data, objective = [ids_NT], partial(next_token_loss, network)
    if (name := fit.loss or loss) != "next_token":
        data.append(_hidden(network, ids_NT, mode))
        head, next_token = copy.deepcopy(network.head), float(name == "both")
        objective = partial(distillation_loss, network, head, next_token=next_token)
    open_clips = {name: c for name, c in clips.items() if task.recipe.clip_of(name.partition(".")[2]) == "learned"}
    learned_clips = LearnedClips(open_clips, network.device) if open_clips else None
    if learned_clips:
        optimizers.append(learned_clips)
        clips = {**clips, **learned_clips.leaves}
    scale_gradient = fit.scale_gradient is not False
    take_off = [quantize_wires(network, task.recipe, maps, clips=clips, scale_gradient=scale_gradient)]
    if weights is not None:
        take_off.append(round_weights_through(network, weights, maps))
    try:
        log = fit_end_to_end(network, objective, data, optimizers, schedule, mode, task.progress, task.journal)
        return replace(log, clips=learned_clips.settled()) if learned_clips else log
    finally:
        for undo in take_off:
            undo()


@torch.no_grad()
def _hidden(network: Network, ids_NT: Tensor, mode: str) -> Tensor:
    """What the head reads, `(N, T, D)` in bf16: half the memory, and far more exact than what is compared with it.

    On the host if it is large.
    """
    much = 2 * ids_NT.numel() * network.hidden_size > _KEPT_BYTES
    place = torch.device("cpu") if much else network.device
    hidden = hidden_in_batches(network, ids_NT[share(len(ids_NT))], mode, _TOKENS_PER_BATCH)
    own = [hidden_BTD.bfloat16().to(place) for hidden_BTD in hidden]
    return torch.cat([hidden_BTD for part in everyones(own) for hidden_BTD in part])


def shared_out(parameters: int, free_bytes: float, processes: int) -> bool:
    """Would 16-bit weights take more than half of what is free on a GPU? Then several processes share them."""
    return processes > 1 and 2 * parameters > free_bytes / 2


def _too_large(network: Network) -> bool:
    """For the GPU of some process."""
    large = False
    if not network.resident and network.device.type == "cuda":
        parameters = sum(parameter.numel() for parameter in network.model.parameters())
        large = shared_out(parameters, torch.cuda.mem_get_info(network.device)[0], world())
    return any(everyones(large))


def _weight_format(recipe: Recipe) -> Format | None:
    """How weights are rounded during a fit: as `fit.weight_bits` says, else only where nothing else is quantized."""
    bits = recipe.fit.weight_bits
    if bits is None:
        return None if recipe.activation_format or recipe.kv_format else recipe.weight_format
    return None if bits == 16 else IntFormat(bits, recipe.weights.symmetric, recipe.group_size)


def _precision(task: FitTask) -> str:
    """bf16 products unless the recipe names a precision: a fit's gradients are far noisier than 2^-9."""
    mode = pick_precision(task.recipe.compute, task.network.device)
    return "bf16" if mode == "tf32" and task.recipe.compute == "auto" else mode


def _fit(task: FitTask) -> tuple[SiteMaps, FitLog]:
    start = hadamard_maps(task, random_value=True)
    maps, learned = learnable(start, task.network.device)
    log = fit_on_loss(task, maps, learned)
    return settled(maps, start), log


SPINQUANT = Method(
    name="spinquant",
    summary="residual and value rotations learned on the language-model loss",
    paper="arXiv 2405.16406",
    sites=("residual", "value", "query_key", "down"),
    fit=_fit,
    reads=("fit", "calibration", *QUANTIZERS),
    needs_data=True,
    needs_backprop=True,
)
