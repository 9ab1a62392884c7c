"""SpinOut (Park & Chung, IEEE Access 14, 2026): SpinQuant on a quarter of the data, with outliers in sensitive layers.

    score    s = z(log κ) + z(Δ) of each layer: z standardises over layers; from random Hadamards,
             κ  kurtosis E[(y - μ)⁴] / σ⁴ of the rotated tokens that its linears read, mean over tokens and wires
             Δ  rise of the quantized network's loss when outliers are injected into this layer alone
    search   the m layers of highest score, m = 1, 2, 4, 8, L/4, L/2, by the validation loss, without injection, after
             a fit of 15 steps with it; then one greedy pass over the layers beside the cut, in or out
    fit      SpinQuant's, 50 steps of 4 windows, with outliers injected into the layers that were found

A reconstruction: only the paper's abstract was at hand. From it: outliers are injected into sensitive layers, found by
a score of kurtosis and performance and a search for the best subset, with 75 % fewer samples and half the iterations
of SpinQuant. Ours: both formulas, the weights of the score, the search and its budget, and all of the injection
(`fitting/injection.py`). `fit.injection` says if they are taken out again behind the quantizer: "safe", the default,
or left to the network: "literal".

`fit.layers` has the controls: rank by "kurtosis" or "performance" alone, a "random" subset as large as the one found,
"all" layers; `fit.injection: none` is SpinQuant at this budget. The reported samples are all windows that passes looked
at, those of the search, which costs several fits, among them.

Shapes: W windows (B of them at a time), T tokens, L layers, N a row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from spinfold.compute import pick_precision, precision
from spinfold.distributed import add_up, share
from spinfold.errors import Verdict
from spinfold.fitting.capture import watch
from spinfold.fitting.clipping import CLIP_WINDOWS, search_clips
from spinfold.fitting.end_to_end import FitLog
from spinfold.fitting.injection import OUTLIER_WIRES, Injection, inject
from spinfold.fitting.journal import Journal
from spinfold.fitting.objectives import next_token_loss
from spinfold.fitting.row_objectives import kurtosis
from spinfold.maps import SiteMaps
from spinfold.methods.base import QUANTIZERS, FitTask, Method
from spinfold.methods.quarot import hadamard_maps
from spinfold.methods.spinquant import fit_on_loss, learnable, settled
from spinfold.progress import Bar, Quiet
from spinfold.recipe import Recipe
from spinfold.runtime import quantize_wires, quantized_wires

__all__ = [
    "BATCH",
    "SCORE_WINDOWS",
    "SPINOUT",
    "STEPS",
    "TOKENS_PER_BATCH",
    "TRIAL_STEPS",
    "VALIDATION_WINDOWS",
    "Trials",
    "choose_layers",
    "fit_with_outliers",
    "search_subset",
    "standard_score",
    "token_kurtosis",
]

STEPS, BATCH, _GAMMA = 50, 4, 8.0
TRIAL_STEPS, SCORE_WINDOWS, VALIDATION_WINDOWS = 15, 32, 10
_SIZES, _BESIDE_CUT = (1, 2, 4, 8), 4
_SCORED_WIRES = (*OUTLIER_WIRES, "down")
TOKENS_PER_BATCH = 16384

Layers = frozenset[int]


def token_kurtosis(y: Tensor) -> Tensor:
    """E[(y - μ)⁴] / σ⁴ of each row, `(..., N) -> (...)`: 3 for a Gaussian, 1.8 for a uniform distribution."""
    return kurtosis(y - y.mean(-1, keepdim=True))


def standard_score(x_L: Tensor) -> Tensor:
    """z = (x - mean) / standard deviation; zeros if all are equal."""
    centred_L = x_L - x_L.mean()
    return centred_L / centred_L.square().mean().sqrt().clamp(min=torch.finfo(x_L.dtype).tiny)


def search_subset(score_L: Tensor, loss_of: Callable[[Layers], float]) -> Layers:
    """The subset of layers with the least loss among nested ones, best scores first, and their near neighbours.

    First the m best layers for a few m; then, around the best m, each layer within four places of the cut changes
    sides, and stays there if that lowers the loss. No subset is tried twice; none is empty.
    """
    loss_of = cache(loss_of)
    order = score_L.argsort(descending=True, stable=True).tolist()
    count = len(order)
    sizes = sorted({m for m in (*_SIZES, count // 4, count // 2) if 1 <= m <= count})
    size = min(sizes, key=lambda m: loss_of(frozenset(order[:m])))
    chosen: Layers = frozenset(order[:size])
    for layer in order[max(0, size - _BESIDE_CUT) : size + _BESIDE_CUT]:
        other = chosen ^ {layer}
        if other and loss_of(other) < loss_of(chosen):
            chosen = other
    return chosen


class Trials:
    """What the search measures, on the last windows of the calibration text, and how many windows that took."""

    def __init__(self, task: FitTask, start: SiteMaps, injection: Injection, bar: Bar) -> None:
        fit, recipe = task.recipe.fit, task.recipe
        steps, batch = fit.steps or 0, fit.batch or BATCH
        short = recipe.with_(fit__steps=min(steps, TRIAL_STEPS))
        self.task = replace(task, recipe=short, progress=Quiet(), journal=Journal())  # a trial is kept as a whole
        self.start, self.injection, self.bar, self.journal = start, injection, bar, task.journal
        # beyond those of the fit, unless the text is too short for both
        self.held_WT = task.windows(_seq_len(task), steps * batch + SCORE_WINDOWS)[-SCORE_WINDOWS:]
        self.unfitted, _ = learnable(start, task.network.device)
        self.clips = search_clips(task.network, recipe, self.held_WT[:CLIP_WINDOWS], self.unfitted)
        self.samples = 0

    def kurtosis(self) -> Tensor:
        """κ of each layer, `(L,)` in fp64."""
        network, recipe = self.task.network, self.task.recipe
        map_at = [quantized_wires(layer, recipe, self.unfitted) for layer in network.layers]
        total_L = torch.zeros(len(network.layers), dtype=torch.float64)

        def see(layer: int, wire: str, start: int, x: Tensor) -> None:
            map = map_at[layer][wire][1]
            y = x.float() if map is None else map.apply(x.float())
            total_L[layer] += token_kurtosis(y).mean().item() * len(y)

        watch(network, self.held_WT[share(len(self.held_WT))], _SCORED_WIRES, see, compute=recipe.compute)
        add_up([total_L])
        self.samples += len(self.held_WT)
        return total_L / (self.held_WT.numel() * len(_SCORED_WIRES))

    def damage(self) -> Tensor:
        """Δ of each layer, `(L,)` in fp64: what outliers in it alone add to the loss, in nats."""
        unharmed = self._loss(self.unfitted, self.held_WT)
        harmed = [self._loss(self.unfitted, self.held_WT, {layer.index}) for layer in self.task.network.layers]
        return torch.tensor(harmed, dtype=torch.float64) - unharmed

    def loss_after_fit(self, layers: Layers) -> float:
        """The validation loss, without injection, after a short fit with injection into `layers`."""
        found = {"loss": torch.zeros((), dtype=torch.float64), "samples": torch.zeros((), dtype=torch.int64)}
        for _ in self.journal.steps(1, found, key=f"layers {sorted(layers)}"):
            maps, log = fit_with_outliers(self.task, self.start, self.injection, layers)
            found["loss"].fill_(self._loss(maps, self.held_WT[:VALIDATION_WINDOWS], clips=log.clips))
            found["samples"].fill_(self.samples + log.samples)
        loss, self.samples = float(found["loss"]), int(found["samples"])
        self.bar.advance(note=f"{len(layers)} layers: loss {loss:.3f}")
        return loss

    @torch.no_grad()
    def _loss(
        self, maps: SiteMaps, ids_WT: Tensor, layers: Collection[int] = (), clips: Mapping[str, float] | None = None
    ) -> float:
        """The quantized network's mean next-token cross-entropy, with outliers in `layers`; `clips` were learned."""
        network, recipe = self.task.network, self.task.recipe
        undo = [
            quantize_wires(network, recipe, maps, clips={**self.clips, **(clips or {})}),
            inject(network, layers, self.injection, ids_WT.shape[1]),
        ]
        total, own_WT = torch.zeros((), dtype=torch.float64), ids_WT[share(len(ids_WT))]
        try:
            with precision(pick_precision(recipe.compute, network.device), network.device):
                for ids_BT in own_WT.split(max(1, TOKENS_PER_BATCH // ids_WT.shape[1])) if len(own_WT) else ():
                    total += len(ids_BT) * float(next_token_loss(network, ids_BT.to(network.device)))
        finally:
            for take_off in undo:
                take_off()
        add_up([total])
        self.samples += len(ids_WT)
        return float(total) / len(ids_WT)


def fit_with_outliers(
    task: FitTask, start: SiteMaps, injection: Injection, layers: Collection[int]
) -> tuple[SiteMaps, FitLog]:
    """SpinQuant's fit from `start` with outliers in `layers`; the maps are not yet brought back to the group."""
    maps, learned = learnable(start, task.network.device)
    take_off = inject(task.network, layers, injection, _seq_len(task))
    try:
        return maps, fit_on_loss(task, maps, learned)
    finally:
        take_off()


def choose_layers(task: FitTask, start: SiteMaps, injection: Injection) -> tuple[Layers, int]:
    """The layers that `fit.layers` asks for, and how many windows it took to find them."""
    by, count = task.recipe.fit.layers or "searched", len(task.network.layers)
    if by == "all":
        return frozenset(range(count)), 0
    with task.progress.stage("search layers") as bar:
        trials = Trials(task, start, injection, bar)
        score_L = torch.zeros(count, dtype=torch.float64)
        if by != "performance":
            score_L += standard_score(trials.kurtosis().log())
        if by != "kurtosis":
            score_L += standard_score(trials.damage())
        found = search_subset(score_L, trials.loss_after_fit)
    if by == "random":
        order = torch.randperm(count, generator=torch.Generator().manual_seed(task.recipe.seed))
        found = frozenset(order[: len(found)].tolist())
    return found, trials.samples


def _seq_len(task: FitTask) -> int:
    return task.recipe.fit.seq_len or task.recipe.calibration.seq_len


def _suits(recipe: Recipe) -> Verdict:
    return Verdict(
        recipe.activation_format is not None or recipe.fit.injection == "none",
        f"It injects outliers before the activations' quantizers, and at {recipe.bits} there are none.",
        "Choose 8 bits or fewer for activations, another method, or fit.injection: none.",
    )


def _fit(task: FitTask) -> tuple[SiteMaps, FitLog]:
    recipe = task.recipe
    mode = recipe.fit.injection or "safe"
    steps = STEPS if recipe.fit.steps is None else recipe.fit.steps
    task = replace(task, recipe=recipe.with_(fit__steps=steps, fit__batch=recipe.fit.batch or BATCH))
    injection = Injection(recipe.fit.gamma or _GAMMA, compensated=mode == "safe", seed=recipe.seed)
    start = hadamard_maps(task, random_value=True)
    layers, searched = (frozenset[int](), 0) if mode == "none" else choose_layers(task, start, injection)
    maps, log = fit_with_outliers(task, start, injection, layers)
    return settled(maps, start), replace(log, samples=log.samples + searched)


SPINOUT = Method(
    name="spinout",
    summary="SpinQuant on a quarter of its samples, with outliers injected into sensitive layers",
    paper="DOI 10.1109/ACCESS.2026.3664084",
    sites=("residual", "value", "query_key", "down"),
    fit=_fit,
    reads=("fit", "calibration", *QUANTIZERS),
    suits=_suits,
    needs_data=True,
    needs_backprop=True,
)
