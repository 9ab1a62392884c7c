"""Many methods in one harness: every cell of a grid measured, each stage that cells share done once.

    job        the cells whose fits read the same of their recipes: one fit, fold and proof
    rounding   the cells of a job whose weights are rounded alike: one pass, activations and cache quantized in turn
    cell       the figures on each text, one file in DIR/cells, written whole

So a comparison that was stopped goes on where it was, and several processes may share a folder: each takes the next
job that nobody holds. The table and the page are made from the cells that are there.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import json
import math
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache, partial
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from spinfold import __version__, plan
from spinfold.cluster import Lost, connected, on_cluster
from spinfold.compute import pick_device
from spinfold.errors import CheckFailed, SpinfoldError, reading
from spinfold.evaluation import Quality, Reference, TaskResult, average, evaluate_tasks, measure_quality, read_tasks
from spinfold.fitting.text import load_text, windows
from spinfold.grid import Cell, Grid
from spinfold.maps import BlockDiagonal, Cost
from spinfold.methods import METHODS
from spinfold.networks import WIRES, Network
from spinfold.networks.sources import Checkpoint, resolve
from spinfold.pipeline import Rotated, Subject, clips_of, prepare, read_tokens, rotate_network, sites_of
from spinfold.progress import Progress, Quiet
from spinfold.recipe import Recipe
from spinfold.report import build_comparison, comparison_csv, comparison_markdown, comparison_rows
from spinfold.rounding import round_network
from spinfold.run import read_json, write_json, write_whole
from spinfold.runtime import Clips, OnlineMap, quantize_wires

__all__ = [
    "ROTATION_READS",
    "ROUNDING_READS",
    "Comparison",
    "compare",
    "fit_key",
    "hold_jobs",
    "online_cost",
    "rounding_key",
]

ROTATION_READS = ("method", "seed", "compute", "online_dtype")
"""The attributes of a recipe that a rotated network depends on, besides its sites and what its method declares."""
ROUNDING_READS = (
    *("weight_format", "weights", "clip_search", "rounding", "overrides", "budget"),
    *("calibration", "compute", "seed"),
)
"""Those that its rounded weights depend on."""
_ALL = 1 << 62
_KEY, _CELLS, _ORIGINAL = "comparison.json", "cells", "original.json"
T = TypeVar("T")

Record = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A comparison's folder and the contents of its table.json."""

    path: Path
    data: dict[str, Any]

    @property
    def failed(self) -> list[str]:
        """The rows of which a cell failed, with the reason."""
        rows = self.data["rows"]
        what = ("name", "format", "bits", "rounding")
        return [f"{' '.join(x[key] for key in what if x.get(key))}: {x['failed']}" for x in rows if x.get("failed")]


def compare(
    model: str | None,
    output: str | Path,
    grid: Grid | Sequence[str] = (),
    *,
    recipe: Recipe | None = None,
    text: str | None = None,
    second_text: str | None = None,
    max_tokens: int | None = None,
    tasks: Sequence[str] = (),
    task_data: str | Path | None = None,
    device: str = "auto",
    shard: tuple[int, int] = (0, 1),
    seconds: float = math.inf,
    merge: Sequence[str | Path] = (),
    ray: str | None = None,
    resume: bool = False,
    on_cell: Callable[[Record], None] | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure every cell of a grid that the folder has not yet, and write table.md, .csv, .json and index.html.

    `grid` says what is compared, or names the entries of one (see `spinfold.grid`); all are partial recipes over
    `recipe`. Perplexity, KL and agreement are measured on `text` (else the held-out fifth of the calibration text) and
    `second_text`, `max_tokens` of each at most, accuracy on the zero-shot `tasks` whose files are in `task_data`.
    `shard` (i, n) leaves all but the i-th of n parts of the work to others; no cell is started after `seconds`. `merge`
    names folders of the same comparison whose cells are taken over; without a model nothing else is done. `ray` is the
    address of a cluster whose machines do the jobs (see `cluster.py`), one per GPU, or per core if there is none or
    `device` is cpu. `on_cell` is called with the record of every cell that is finished.

    A cell that fails is recorded with its reason, and the rest goes on. Raises `SpinfoldError`, before any weight is
    read, for a recipe that the model can't have and for a folder that holds something else.
    """
    start = time.monotonic()
    output, progress = Path(output), progress or Quiet()
    grid = grid if isinstance(grid, Grid) else Grid.parse({"entries": list(grid)})
    base = grid.base(recipe or Recipe())
    place = pick_device(device if ray is None else "cpu")
    _check_folder(output, resume)
    if model is None:
        _take_over(output, merge)
        return Comparison(output, _write_tables(output, page=True))
    checkpoint, cells = resolve(model), grid.cells(base)
    if tasks:
        read_tasks(tasks, task_data)  # what can't be used is refused before a weight is read
    for cell in cells:
        try:
            plan.plan_run(checkpoint.config, cell.recipe)
        except SpinfoldError as error:
            error.add_note(f"The entry {cell.label!r} asks for it, at {cell.recipe.bits}.")
            raise
    sources = [base.calibration.source, *(source for source in (text, second_text) if source is not None)]
    _found(output, checkpoint, base, sources, max_tokens, tasks)
    _take_over(output, merge)

    setting = (checkpoint, base, text, second_text, max_tokens, tasks, task_data)

    @cache
    def bench() -> _Bench:
        return _Bench.prepare(place, progress, *setting)

    def late() -> bool:
        return time.monotonic() - start > seconds

    jobs = _grouped(fit_key, cells)[shard[0] :: shard[1]]
    try:
        if ray is None:
            _work(output, jobs, bench, late, on_cell or (lambda _: None), progress)
        else:
            end = time.time() + seconds - (time.monotonic() - start)
            with connected(ray) as gpus:
                there = "cuda" if gpus and device != "cpu" else "cpu"
                work = partial(_cells_there, pickle.dumps(setting), there, end)
                _work_on_cluster(output, jobs, work, there, on_cell or (lambda _: None), progress)
    finally:
        data = _write_tables(output, page=True)
    return Comparison(output, data)


# ---- what is shared ------------------------------------------------------------------------------------------------


def fit_key(recipe: Recipe) -> str:
    """Recipes with the same key have the same rotated network: all that is read of them on the way is the same."""
    return repr((sites_of(recipe), attrgetter(*ROTATION_READS, *METHODS[recipe.method].reads)(recipe)))


def rounding_key(recipe: Recipe) -> str:
    """Recipes of one job with the same key have the same rounded weights."""
    return repr(attrgetter(*ROUNDING_READS)(recipe))


def _grouped(key: Callable[[Recipe], str], cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells with the same key, in the order of the first of each."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(key(cell.recipe), []).append(cell)
    return list(groups.values())


@dataclass(frozen=True)
class _Failure:
    """Why a stage has no result; the traceback only if nobody foresaw it."""

    reason: str
    traceback: str | None = None

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        first_line = str(error).partition("\n")[0]
        if isinstance(error, SpinfoldError):
            return cls(" ".join(part for part in (error.what, error.why) if part))
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return cls(f"Out of memory. {first_line}".strip())
        return cls(f"{type(error).__name__}: {first_line}", traceback.format_exc())


def _attempt(stage: Callable[[], T]) -> T | _Failure:
    """The stage's result, or why there is none; the memory of a failed stage is given back."""
    try:
        return stage()
    except Exception as error:
        failure = _Failure.of(error)
    gc.collect()  # the traceback held the stage's tensors until here
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return failure


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


@dataclass(frozen=True)
class _Text:
    """A text to measure on, with what the original does there."""

    windows_NT: Tensor
    quality: Quality
    reference: Reference


class _Bench:
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
    ) -> _Bench:
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


def _cells(bench: _Bench, job: Sequence[Cell], late: Callable[[], bool]) -> Iterator[tuple[Cell, Record]]:
    """The records of a job's cells, each as soon as it is there, until it is late."""
    fitted = _attempt(partial(bench.rotate, job[0].recipe))
    if isinstance(fitted, _Failure):
        yield from ((cell, _describe(cell) | _failed(fitted)) for cell in job)
        return
    rotated, fit = fitted
    for alike in _grouped(rounding_key, job):
        if late():
            return
        rounded = _attempt(partial(bench.round, rotated, alike[0].recipe))
        for cell in alike:
            if late():
                return
            record = _describe(cell) | _cost_of_fit(rotated, fit)
            measured = (
                rounded
                if isinstance(rounded, _Failure)
                else _attempt(partial(_measured, bench, rotated, rounded, cell.recipe))
            )
            yield cell, record | (_failed(measured) if isinstance(measured, _Failure) else measured)


def _measured(bench: _Bench, rotated: Rotated, rounded: tuple[_Rounded, _Spent], recipe: Recipe) -> Record:
    """What a rounded network cost, and how good it is."""
    result, rounding = rounded
    clips, search = bench.clip(rotated, recipe)
    figures = bench.measure(result.network, recipe, clips)
    seconds = rounding.seconds + search.seconds
    cost = {"rounding_seconds": seconds, "rounding_peak_bytes": rounding.peak_bytes}
    return result.record() | cost | figures


# ---- records -------------------------------------------------------------------------------------------------------


def _describe(cell: Cell) -> Record:
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


def _failed(failure: _Failure) -> Record:
    return {"failed": failure.reason, "traceback": failure.traceback}


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


# ---- the folder ----------------------------------------------------------------------------------------------------


def _check_folder(output: Path, resume: bool) -> None:
    """A new or empty folder, or, with `resume`, one that holds a comparison."""
    if (output / _KEY).is_file():
        if not resume:
            raise SpinfoldError(
                f"{output} holds a comparison already.",
                "Its cells are kept, and only those that are missing would be measured.",
                "Add --resume to go on with it, also beside another process; or choose another folder.",
            )
    elif not (output.is_dir() and {entry.name[0] for entry in output.iterdir()} == {"."}):  # just being founded
        plan.check_output(output)


def _found(
    output: Path,
    checkpoint: Checkpoint,
    base: Recipe,
    sources: Sequence[str],
    max_tokens: int | None,
    tasks: Sequence[str],
) -> None:
    """Make the folder this comparison's, or check that it is."""
    recipe = json.loads(base.identity())
    common = {key: value for key, value in recipe.items() if key not in ("method", "bits", "seed")}
    common["rounding"] = {key: value for key, value in recipe["rounding"].items() if key != "method"}
    common["calibration"] = {key: value for key, value in recipe["calibration"].items() if key != "source"}
    texts = [load_text(source) for source in sources]
    key = {
        "model": checkpoint.fingerprint(),
        "recipe": common,
        "texts": [hashlib.sha256(one.text.encode()).hexdigest() for one in texts],
        "max_tokens": max_tokens,
        "tasks": sorted(tasks),
        "version of spinfold": __version__,
    }
    measured = [one.name for one in texts[1:]] or [f"last fifth of {texts[0].name}"]
    about = {"model": checkpoint.name, "texts": measured, "calibration": texts[0].name, "recipe": recipe}
    _agree(output, {"schema_version": 1, "key": key} | about)


def _agree(output: Path, ours: Record) -> None:
    """Found the comparison, or refuse if the folder holds another one."""
    if not (output / _KEY).is_file():
        write_json(output / _KEY, ours)
    with reading(output / _KEY, "Use another folder."):
        before = dict(read_json(output / _KEY)["key"])
        changed = sorted(name for name, value in ours["key"].items() if (before.get(name) or None) != (value or None))
    if changed:
        raise SpinfoldError(
            f"{output} holds another comparison.",
            f"It was made with another {', '.join(changed)}.",
            "Use the same command as before, or another folder.",
        )


def _take_over(output: Path, folders: Iterable[str | Path]) -> None:
    """Copy the cells of other folders of the same comparison."""
    for folder in map(Path, folders):
        _agree(output, read_json(folder / _KEY))
        for path in sorted((folder / _CELLS).glob("*.json")):
            if not (output / _CELLS / path.name).exists():
                write_json(output / _CELLS / path.name, read_json(path))


@contextmanager
def hold_jobs(folder: Path, jobs: Iterable[str]) -> Iterator[list[bool]]:
    """Which jobs are this process's while the block runs? The system takes them back however the process ends.

    A job is one byte of a file, by its hash, that is locked for one process, until it closes the file: so there is one
    such block at a time. A file system that knows no locks gives every job to everybody, which costs time and harms
    nothing.
    """
    with (folder / ".jobs").open("ab") as file:

        def lock(job: str) -> bool:
            place = int(hashlib.sha256(job.encode()).hexdigest()[:15], 16)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            except (BlockingIOError, PermissionError):
                return False
            except OSError:
                pass
            return True

        yield [lock(job) for job in jobs]


def _work(
    output: Path,
    jobs: Sequence[Sequence[Cell]],
    bench: Callable[[], _Bench],
    late: Callable[[], bool],
    on_cell: Callable[[Record], None],
    progress: Progress,
) -> None:
    """Measure the cells that are missing, job by job, until it is late; `bench` is asked for at the first one."""
    folder = output / _CELLS
    folder.mkdir(parents=True, exist_ok=True)
    with progress.stage("compare", total=sum(map(len, jobs))) as bar:
        for job in jobs:
            with hold_jobs(folder, [fit_key(job[0].recipe)]) as (ours,):
                missing = _missing(folder, job)
                bar.advance(len(job) - len(missing))
                if not missing or not ours or late():
                    continue
                if not (folder / _ORIGINAL).exists():
                    write_json(folder / _ORIGINAL, bench().original())
                for cell, record in _cells(bench(), missing, late):
                    write_json(folder / f"{cell.name}.json", record)
                    on_cell(record)
                    bar.advance(note=f"{cell.label} {cell.recipe.bits}")
            _write_tables(output)


def _missing(folder: Path, job: Sequence[Cell]) -> list[Cell]:
    """The cells of a job that nobody has measured yet."""
    return [cell for cell in job if not (folder / f"{cell.name}.json").exists()]


def _work_on_cluster(
    output: Path,
    jobs: Sequence[Sequence[Cell]],
    work: Callable[[Sequence[Cell]], Iterator[tuple[str, Record]]],
    device: str,
    on_cell: Callable[[Record], None],
    progress: Progress,
) -> None:
    """The same by the machines of a cluster: this process holds the jobs, and writes down what comes."""
    folder = output / _CELLS
    folder.mkdir(parents=True, exist_ok=True)
    keys = [fit_key(job[0].recipe) for job in jobs]
    with progress.stage("compare", total=sum(map(len, jobs))) as bar, hold_jobs(folder, keys) as ours:
        todo = [missing for job, mine in zip(jobs, ours, strict=True) if mine and (missing := _missing(folder, job))]
        bar.advance(sum(map(len, jobs)) - sum(map(len, todo)))
        for index, result in on_cluster(work, todo, gpus=float(device == "cuda")):
            if isinstance(result, Lost):
                failed = _failed(_Failure(result.reason))
                found = [(cell.name, _describe(cell) | failed) for cell in _missing(folder, todo[index])]
            else:
                found = [result]
            for name, record in found:
                if not (path := folder / f"{name}.json").exists():
                    write_json(path, record)
                    if path.name != _ORIGINAL:
                        on_cell(record)
                        bar.advance(note=f"{record['label']} {record['bits']}")
            _write_tables(output)


@lru_cache(maxsize=1)
def _bench_there(setting: bytes, device: str) -> _Bench:
    """The bench of a process on a cluster, for all of its jobs; `setting` is pickled since it has no hash."""
    return _Bench.prepare(torch.device(device), Quiet(), *pickle.loads(setting))


def _cells_there(setting: bytes, device: str, end: float, job: Sequence[Cell]) -> Iterator[tuple[str, Record]]:
    """On a machine of a cluster: the records of the original and of a job's cells, each with the name of its file."""
    if time.time() > end:
        return
    bench = _bench_there(setting, device)
    yield Path(_ORIGINAL).stem, bench.original()
    for cell, record in _cells(bench, job, lambda: time.time() > end):
        yield cell.name, record


def _write_tables(output: Path, *, page: bool = False) -> Record:
    """Make the tables, and the page, of the cells that are there; one process at a time, so that the last wins."""
    descriptor = os.open(output, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with reading(output, "Remove the file in cells that was changed, and go on with --resume."):
            cells = [read_json(path) for path in sorted((output / _CELLS).glob("*.json"))]
            about = {key: value for key, value in read_json(output / _KEY).items() if key != "key"}
            data = about | {"rows": comparison_rows(cells)}
            texts = {"table.md": comparison_markdown(data), "table.csv": comparison_csv(data)}
            texts |= {"index.html": build_comparison(data, cells)} if page else {}
        write_json(output / "table.json", data)
        for name, text in texts.items():
            write_whole(output / name, partial(_write_text, text))
    finally:
        os.close(descriptor)
    return data


def _write_text(text: str, path: Path) -> None:
    """Line ends as they are; half a character, which a name may hold, as a question mark."""
    path.write_text(text, "utf-8", "replace", newline="")
