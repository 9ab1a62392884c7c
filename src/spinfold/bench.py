"""The bench that a grid's cells are measured on: each stage that cells share is done once.

    job        the cells whose fits read the same of their recipes: one fit, fold and proof      fit_key
    rounding   the cells of a job whose weights are rounded alike: one pass over the layers      rounding_key
    cell       activations and cache quantized in turn, the figures on each text                 measured_cells

A stage may fail: then its cells' records say why, and the others are measured.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from spinfold.errors import CheckFailed, SpinfoldError
from spinfold.evaluation import Quality, Reference, TaskResult, average, evaluate_tasks, measure_quality
from spinfold.fitting.text import windows
from spinfold.grid import Cell
from spinfold.maps import BlockDiagonal, Cost
from spinfold.methods import METHODS
from spinfold.networks import WIRES, Network
from spinfold.networks.sources import Checkpoint
from spinfold.pipeline import clips_of
from spinfold.progress import Progress
from spinfold.recipe import Recipe
from spinfold.rotation import Rotated, rotate_network, sites_of
from spinfold.rounding import round_network
from spinfold.runtime import Clips, OnlineMap, quantize_wires
from spinfold.subject import Subject, prepare, read_tokens

__all__ = [
    "ROTATION_READS",
    "ROUNDING_READS",
    "Bench",
    "Failure",
    "Record",
    "describe_cell",
    "fit_key",
    "grouped",
    "measured_cells",
    "online_cost",
    "rounding_key",
]

ROTATION_READS = ("method", "seed", "compute", "online_dtype")
"""The attributes of a recipe that a rotated network depends on, besides its sites and what its method declares."""
ROUNDING_READS = (
    *("weight_format", "weights", "clip_search", "rounding", "overrides", "budget", "candidates"),
    *("format", "floats", "group_size"),
    *("calibration", "compute", "seed"),
)
"""Those that its rounded weights depend on."""
_ALL = 1 << 62
T = TypeVar("T")

Record = dict[str, Any]


# ---- what is shared --------------------------------------------------------------------------------------------------


def fit_key(recipe: Recipe) -> str:
    """Recipes with the same key have the same rotated network: all that is read of them on the way is the same."""
    return repr((sites_of(recipe), attrgetter(*ROTATION_READS, *METHODS[recipe.method].reads)(recipe)))


def rounding_key(recipe: Recipe) -> str:
    """Recipes of one job with the same key have the same rounded weights."""
    return repr(attrgetter(*ROUNDING_READS)(recipe))


def grouped(key: Callable[[Recipe], str], cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells with the same key, in the order of the first of each."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(key(cell.recipe), []).append(cell)
    return list(groups.values())


# ---- what a stage costs, and why it failed ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spent:
    """Wall time, and on a GPU the most memory in use at once, and how much of it was in use before."""

    seconds: float
    most_bytes: int | None = None
    before_bytes: int = 0

    @property
    def peak_bytes(self) -> int | None:
        """The most memory beyond what was in use before."""
        return None if self.most_bytes is None else self.most_bytes - self.before_bytes


def _timed(device: torch.device, stage: Callable[[], T]) -> tuple[T, _Spent]:
    before, on_gpu = 0, device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    result = stage()
    if on_gpu:
        torch.cuda.synchronize(device)
    most = torch.cuda.max_memory_allocated(device) if on_gpu else None
    return result, _Spent(time.perf_counter() - start, most, before)


@dataclass(frozen=True)
class Failure:
    """Why a stage has no result; the traceback only if nobody foresaw it."""

    reason: str
    traceback: str | None = None

    @classmethod
    def of(cls, error: Exception) -> Failure:
        first_line = str(error).partition("\n")[0]
        if isinstance(error, SpinfoldError):
            return cls(" ".join(part for part in (error.what, error.why) if part))
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return cls(f"Out of memory. {first_line}".strip())
        return cls(f"{type(error).__name__}: {first_line}", traceback.format_exc())

    def record(self) -> Record:
        """What a cell without figures says."""
        return {"failed": self.reason, "traceback": self.traceback}


def _attempt(stage: Callable[[], T]) -> T | Failure:
    """The stage's result, or why there is none; the memory of a failed stage is given back."""
    try:
        return stage()
    except Exception as error:
        failure = Failure.of(error)
    gc.collect()  # the traceback held the stage's tensors until here
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return failure


# ---- the stages ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    """A text to measure on, with what the original does there."""

    windows_NT: Tensor
    quality: Quality
    reference: Reference


@dataclass(frozen=True)
class _Rounded:
    """A network with rounded weights, their bits with scales, and what each layer took."""

    network: Network
    bits_per_weight: float
    layers: tuple[_Spent, ...] = ()

    def record(self) -> Record:
        """Without layers, weights stay as they are."""
        peaks = [one.peak_bytes for one in self.layers if one.peak_bytes is not None]
        cost: Record = {"bits_per_weight": self.bits_per_weight}
        if self.layers:
            cost["rounding_layer_seconds"] = sum(one.seconds for one in self.layers) / len(self.layers)
            cost["rounding_layer_bytes"] = max(peaks, default=None)
        return cost


class Bench:
    """The original, loaded and measured once; every stage of a cell is a method."""

    def __init__(
        self,
        subject: Subject,
        second: _Text | None,
        tasks: Sequence[str],
        task_data: str | Path | None,
        compute: str,
        progress: Progress,
    ) -> None:
        self.subject, self.progress, self.device = subject, progress, subject.network.device
        texts = [_Text(subject.held_out_NT, subject.quality, subject.reference), second]
        self.texts = [one for one in texts if one is not None]
        self.tasks, self.task_data, self.compute = tasks, task_data, compute
        self.calibration: dict[str, Tensor] = {}

    @classmethod
    def prepare(
        cls,
        device: torch.device,
        progress: Progress,
        checkpoint: Checkpoint,
        base: Recipe,
        text: str | None,
        second_text: str | None,
        max_tokens: int | None,
        tasks: Sequence[str],
        task_data: str | Path | None,
    ) -> Bench:
        """Load the model, and measure it on the texts."""
        subject = prepare(checkpoint, base, device, progress, held_out=text, held_out_tokens=max_tokens or _ALL)
        second = None
        if second_text is not None:
            network = subject.network
            ids_NT = windows(read_tokens(second_text, network, max_tokens), base.calibration.seq_len)
            quality, reference = measure_quality(
                network, ids_NT, keep=True, compute=base.compute, progress=progress, label="evaluate original"
            )
            assert reference is not None
            second = _Text(ids_NT, quality, reference)
        bench = cls(subject, second, tasks, task_data, base.compute, progress)
        bench.calibration[base.calibration.source] = subject.calibration_T
        return bench

    def original(self) -> Record:
        """The record of the network as it is."""
        figures = _figures([one.quality for one in self.texts], self._on_tasks(self.subject.network, self.compute))
        return {"label": "original", "bits": "W16A16KV16", "rounding": "none", "seed": 0} | figures

    def subject_for(self, recipe: Recipe) -> Subject:
        """The subject with the recipe's calibration text, read once; `SpinfoldError` if it is too short."""
        source, samples, seq_len = recipe.calibration.source, recipe.calibration.samples, recipe.calibration.seq_len
        if source not in self.calibration:
            self.calibration[source] = read_tokens(source, self.subject.network)
        subject = replace(self.subject, calibration_T=self.calibration[source])
        windows(subject.calibration_T, seq_len, samples)
        return subject

    def rotate(self, recipe: Recipe) -> tuple[Rotated, _Spent]:
        """Fit, fold and prove."""
        subject = self.subject_for(recipe)
        return _timed(self.device, partial(rotate_network, subject, recipe, self.progress))

    def round(self, rotated: Rotated, recipe: Recipe) -> tuple[_Rounded, _Spent]:
        """The rotated network with rounded weights; itself, if they stay in 16 bits."""
        if recipe.weight_format is None:
            return _Rounded(rotated.network, 16.0), _Spent(0.0)
        subject, network = self.subject_for(recipe), rotated.network.copy()
        ids_NT = subject.windows(recipe.calibration.seq_len, recipe.calibration.samples, recipe.seed)

        def stage() -> _Rounded:
            layers: list[_Spent] = []
            bits, weights = 0.0, 0
            rounding = iter(round_network(network, recipe, ids_NT, progress=self.progress))
            while True:
                rounded, spent = _timed(self.device, partial(next, rounding, None))
                if rounded is None:
                    return _Rounded(network, bits / weights, tuple(layers))
                layers.append(spent)
                bits += sum(one.weight.bits_per_weight * one.weight.q_OI.numel() for one in rounded)
                weights += sum(one.weight.q_OI.numel() for one in rounded)

        result, spent = _timed(self.device, stage)
        peaks = [one.most_bytes for one in (spent, *result.layers) if one.most_bytes is not None]
        return result, replace(spent, most_bytes=max(peaks, default=None))

    def clip(self, rotated: Rotated, recipe: Recipe) -> tuple[Clips, _Spent]:
        """The clip ratios that the recipe leaves to a search."""
        subject = self.subject_for(recipe)
        return _timed(self.device, partial(clips_of, subject, rotated, recipe, self.progress))

    def measure(self, network: Network, recipe: Recipe, clips: Clips) -> Record:
        """The figures with activations and cache quantized. `CheckFailed` if they are no numbers."""
        take_off = quantize_wires(network, recipe, clips=clips)
        try:
            qualities = [
                measure_quality(
                    network, one.windows_NT, reference=one.reference, compute=recipe.compute, progress=self.progress
                )[0]
                for one in self.texts
            ]
            if not all(math.isfinite(one.perplexity) for one in qualities):
                raise CheckFailed("The quantized network's loss is not a finite number.")
            return _figures(qualities, self._on_tasks(network, recipe.compute))
        finally:
            take_off()

    def _on_tasks(self, network: Network, compute: str) -> dict[str, TaskResult]:
        if not self.tasks:
            return {}
        return evaluate_tasks(network, self.tasks, self.task_data, compute=compute, progress=self.progress)


def measured_cells(bench: Bench, job: Sequence[Cell], late: Callable[[], bool]) -> Iterator[tuple[Cell, Record]]:
    """The records of a job's cells, each as soon as it is there, until it is late."""
    fitted = _attempt(partial(bench.rotate, job[0].recipe))
    if isinstance(fitted, Failure):
        yield from ((cell, describe_cell(cell) | fitted.record()) for cell in job)
        return
    rotated, fit = fitted
    for alike in grouped(rounding_key, job):
        if late():
            return
        rounded = _attempt(partial(bench.round, rotated, alike[0].recipe))
        for cell in alike:
            if late():
                return
            record = describe_cell(cell) | _cost_of_fit(rotated, fit)
            measured = (
                rounded
                if isinstance(rounded, Failure)
                else _attempt(partial(_measured, bench, rotated, rounded, cell.recipe))
            )
            yield cell, record | (measured.record() if isinstance(measured, Failure) else measured)


def _measured(bench: Bench, rotated: Rotated, rounded: tuple[_Rounded, _Spent], recipe: Recipe) -> Record:
    """What a rounded network cost, and how good it is."""
    result, rounding = rounded
    clips, search = bench.clip(rotated, recipe)
    figures = bench.measure(result.network, recipe, clips)
    seconds = rounding.seconds + search.seconds
    cost = {"rounding_seconds": seconds, "rounding_peak_bytes": rounding.peak_bytes}
    return result.record() | cost | figures


# ---- records ---------------------------------------------------------------------------------------------------------


def describe_cell(cell: Cell) -> Record:
    """What was asked for."""
    recipe, method = cell.recipe, METHODS[cell.recipe.method]
    return {
        "label": cell.label,
        **({"format": cell.format} if cell.format else {}),
        "method": method.name,
        "summary": method.summary,
        "paper": method.paper,
        "bits": recipe.bits,
        "rounding": cell.rounding,
        "seed": recipe.seed,
        "order": list(cell.order),
        "sites": list(sites_of(recipe)),
        "changes": dict(cell.changes),
        "needs_data": method.needs_data,
        "needs_backprop": method.needs_backprop,
    }


def _cost_of_fit(rotated: Rotated, fit: _Spent) -> Record:
    """What the maps took, and what they take at inference."""
    online = online_cost(rotated.network)
    return {
        "fit_seconds": fit.seconds,
        "fit_peak_bytes": fit.peak_bytes,
        "samples": rotated.log.samples,
        "losses": [float(f"{loss:.5g}") for loss in rotated.log.losses],
        "invariance": rotated.proof.measured,
        "online_flops": online.flops,
        "online_bytes": online.bytes,
    }


def _figures(qualities: Sequence[Quality], results: Mapping[str, TaskResult]) -> Record:
    """Perplexity, KL and agreement; those of a second text under names of their own; accuracy on tasks."""
    figures: Record = {"evaluation_seconds": sum(one.seconds for one in qualities)}
    for prefix, one in zip(("", "second_"), qualities, strict=False):
        figures |= {f"{prefix}{key}": getattr(one, key) for key in ("perplexity", "kl", "top1")}
    if results:
        figures["tasks"] = {name: asdict(one) for name, one in results.items()}
        figures["task_accuracy"] = average(results).acc_norm
    return figures


def online_cost(network: Network) -> Cost:
    """What the maps on a network's wires cost per token. Heads share a map, whose bytes are read once."""
    total = Cost(0, 0)
    for layer in network.layers:
        heads = {"query": layer.num_heads, "key": layer.num_kv_heads, "value": layer.num_kv_heads}
        for wire in WIRES:
            for op in layer.wire(wire).ops:
                if isinstance(op, OnlineMap):
                    total += BlockDiagonal(op.map, heads.get(wire, 1)).cost()
    return total
