"""Many methods in one harness: every cell of a grid measured, job by job, and kept in a folder.

    job    the cells that share a fit (see `bench.py`): one process's at a time
    cell   the figures on each text, one file in DIR/cells, written whole

So a comparison that was stopped goes on where it was, and several processes may share a folder: each takes the next
job that nobody holds. The table and the page are made from the cells that are there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from spinfold import __version__, plan
from spinfold.bench import Bench, Failure, Record, describe_cell, fit_key, grouped, measured_cells
from spinfold.cluster import Lost, connected, on_cluster
from spinfold.compute import pick_device
from spinfold.errors import SpinfoldError, reading
from spinfold.evaluation import read_tasks
from spinfold.files import read_json, write_json, write_whole
from spinfold.fitting.text import Text, load_text, texts_of
from spinfold.grid import Cell, Grid
from spinfold.networks.sources import Checkpoint, resolve
from spinfold.progress import Progress, Quiet
from spinfold.recipe import Recipe
from spinfold.report import build_comparison, comparison_csv, comparison_markdown, comparison_rows

__all__ = ["Comparison", "compare", "hold_jobs"]

_KEY, _CELLS, _ORIGINAL = "comparison.json", "cells", "original.json"


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
    `recipe`. Perplexity, KL and agreement are measured on `text` (else the calibration text's last fifth, held out) and
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
    texts = [*texts_of(base.calibration.source, text), *([load_text(second_text)] if second_text is not None else [])]
    _found(output, checkpoint, base, texts, max_tokens, tasks)
    _take_over(output, merge)

    setting = (checkpoint, base, text, second_text, max_tokens, tasks, task_data)

    @cache
    def bench() -> Bench:
        return Bench.prepare(place, progress, *setting)

    def late() -> bool:
        return time.monotonic() - start > seconds

    jobs = grouped(fit_key, cells)[shard[0] :: shard[1]]
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
    texts: Sequence[Text],
    max_tokens: int | None,
    tasks: Sequence[str],
) -> None:
    """Make the folder this comparison's, or check that it is. `texts` are that of calibration and those of figures."""
    recipe = json.loads(base.identity())
    common = {key: value for key, value in recipe.items() if key not in ("method", "bits", "seed")}
    common["rounding"] = {key: value for key, value in recipe["rounding"].items() if key != "method"}
    common["calibration"] = {key: value for key, value in recipe["calibration"].items() if key != "source"}
    key = {
        "model": checkpoint.fingerprint(),
        "recipe": common,
        "texts": [hashlib.sha256(one.text.encode()).hexdigest() for one in texts],
        "max_tokens": max_tokens,
        "tasks": sorted(tasks),
        "version of spinfold": __version__,
    }
    measured = [one.name for one in texts[1:]]
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
    bench: Callable[[], Bench],
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
                for cell, record in measured_cells(bench(), missing, late):
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
                failed = Failure(result.reason).record()
                found = [(cell.name, describe_cell(cell) | failed) for cell in _missing(folder, todo[index])]
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
def _bench_there(setting: bytes, device: str) -> Bench:
    """The bench of a process on a cluster, for all of its jobs; `setting` is pickled since it has no hash."""
    return Bench.prepare(torch.device(device), Quiet(), *pickle.loads(setting))


def _cells_there(setting: bytes, device: str, end: float, job: Sequence[Cell]) -> Iterator[tuple[str, Record]]:
    """On a machine of a cluster: the records of the original and of a job's cells, each with the name of its file."""
    if time.time() > end:
        return
    bench = _bench_there(setting, device)
    yield Path(_ORIGINAL).stem, bench.original()
    for cell, record in measured_cells(bench, job, lambda: time.time() > end):
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
