"""The arrows of a run, in order; each a function of what it is given.

    source -> Subject          the model, its texts, what the original does    prepare
           -> rotated network  maps fitted and folded, same function proved    rotate_network
           -> rounded network  weights and wires on their grids                round_network, quantize_wires
           -> figures          perplexity, KL, agreement                       measure_quality
           -> run folder       checkpoint, proofs, page                        quantize

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import hashlib
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from spinfold import __version__, plan
from spinfold.allocator import keep_freed_memory
from spinfold.checkpoint import save_clips, save_maps, save_model
from spinfold.compute import pick_device, pick_precision
from spinfold.distributed import held_by_first, is_first, joined, on_first, world
from spinfold.errors import SpinfoldError
from spinfold.evaluation import Quality, measure_quality
from spinfold.evaluation.outliers import OUTLIER_WINDOWS, measure_outliers
from spinfold.files import write_json, write_whole
from spinfold.fitting.clipping import CLIP_WINDOWS, search_clips
from spinfold.fitting.text import Text, texts_of
from spinfold.forecast import (
    CHARACTERS,
    UNREAD,
    Forecast,
    Machine,
    Reading,
    forecast,
    measure_machine,
    measure_reading,
    unmeasured_machine,
)
from spinfold.kept import kept_allocation, kept_rotation, kept_rounding
from spinfold.methods import METHODS
from spinfold.networks import Network
from spinfold.networks.sources import Checkpoint, resolve
from spinfold.progress import Logged, Progress, Quiet
from spinfold.recipe import Recipe
from spinfold.report import write_report
from spinfold.rotation import Rotated, prove_orthogonal, rotate_network
from spinfold.rounding import RoundedLinear, round_network
from spinfold.run import RunFolder
from spinfold.runtime import Clips, quantize_wires
from spinfold.subject import EVAL_TOKENS, Subject, prepare

__all__ = ["MethodInfo", "Run", "clips_of", "methods", "predict", "quantize", "report"]

_SPARE_TOKENS = 1 << 18
"""So many tokens more than are needed are read of the calibration text, so that each seed draws windows of its own."""
_SLACK = 1.25
"""A run is refused if it needs this many times the free memory: predictions are within a fifth (docs/planning.md)."""


@dataclass(frozen=True)
class Run:
    """A finished run folder and the contents of its run.json."""

    path: Path
    data: dict[str, Any]


@dataclass(frozen=True)
class MethodInfo:
    """What `spinfold methods` tells of a method."""

    name: str
    summary: str
    paper: str
    sites: tuple[str, ...]
    online: tuple[str, ...]
    needs_data: bool
    needs_backprop: bool


@joined()
def quantize(
    model: str,
    output: str | Path,
    recipe: Recipe | None = None,
    *,
    device: str = "auto",
    resume: bool = False,
    evaluate_on: str | None = None,
    baselines: Sequence[str] = (),
    progress: Progress | None = None,
) -> Run:
    """Rotate, prove, round and measure a model, and leave a run folder.

    `model` is a Hugging Face folder or hub id, a GGUF file, or `smollm2`; `evaluate_on` names the text of the
    figures (else the last fifth of the calibration text is held out for them); `baselines` names methods that are
    measured beside the recipe's, with its other settings, and leave no more than their row in the table of figures.
    Under torchrun the processes work together (`spinfold.distributed`), and the first one writes the folder. Raises
    `SpinfoldError` for what can't be done, before weights are loaded where that can be known, and `CheckFailed` if a
    proof does not hold.
    """
    recipe, progress, output = recipe or Recipe.load("spinfold"), progress or Quiet(), Path(output)
    place, folder = pick_device(device), RunFolder(output)
    on_first(partial(_check_folder, folder, resume))
    checkpoint = resolve(model)
    plan.plan_run(checkpoint.config, recipe)
    for name in baselines:
        plan.plan_run(checkpoint.config, recipe.with_(method=name))
    if place.type == "cpu" and (recipe.fit.steps == 0 or not METHODS[recipe.method].needs_backprop):
        keep_freed_memory()  # back-propagation through the network would take a fifth more of it for 3 % less time
    texts = texts_of(recipe.calibration.source, evaluate_on)
    room = _forecast(checkpoint, recipe, texts, unmeasured_machine(place)).fits(_SLACK)
    room.require("This run does not fit on this machine.")
    key = {
        "model": checkpoint.fingerprint(),
        "recipe": recipe.model_dump(mode="json"),
        "text": [hashlib.sha256(one.text.encode()).hexdigest() for one in texts],
        "version of spinfold": __version__,
        "baselines": list(baselines),
    }
    with held_by_first(folder.writing(key, resume=resume)):
        progress = Logged(progress, folder.log) if is_first() else progress
        subject = prepare(checkpoint, recipe, place, progress, held_out=evaluate_on, max_tokens=_tokens_needed(recipe))
        rows = [row("original", subject.quality)]
        rows += [_baseline(subject, recipe.with_(method=name), progress) for name in baselines]
        start = time.perf_counter()
        seen_NT = subject.held_out_NT[:OUTLIER_WINDOWS]
        with progress.stage("find outliers"):
            before = measure_outliers(subject.network, seen_NT, compute=recipe.compute)
        rotated = kept_rotation(folder, subject, recipe, progress)
        with progress.stage("find outliers"):
            after = measure_outliers(rotated.network, seen_NT, at=before.places, compute=recipe.compute)
        clips = clips_of(subject, rotated, recipe, progress)
        asked, recipe = recipe, kept_allocation(folder, subject, rotated.network, recipe, progress)
        rounded = kept_rounding(folder, subject, rotated.network, recipe, progress)
        seconds = time.perf_counter() - start
        rows.append(_measure(subject, rotated.network, recipe, clips, progress, seconds, "quantized"))

        def write() -> dict[str, Any]:
            with progress.stage("write checkpoint"):
                write_whole(output / "recipe.yaml", lambda path: path.write_text(asked.to_yaml(), "utf-8"))
                save_maps(output, rotated.maps)
                save_clips(output, clips)
                save_model(output / "model", rotated.network, rounded)
                before.save(output / "outliers-before.npz")
                after.save(output / "outliers-after.npz")
            data = describe(subject, recipe, rotated, rounded, rows, place, progress)
            log = folder.log.read_bytes()
            write_whole(output / "log.txt", lambda path: path.write_bytes(log))
            write_json(output / "run.json", data)
            write_report(output)
            return data

        data = on_first(write)
    return Run(output, data)


def _check_folder(folder: RunFolder, resume: bool) -> None:
    """May a run be written there? `SpinfoldError` if not."""
    plan.check_output(folder.path, resume)
    if folder.finished:
        what = f"{folder.path} holds a finished run."
        raise SpinfoldError(what, "There is nothing to resume.", "Choose another folder.")


def predict(
    model: str,
    output: str | Path,
    recipe: Recipe | None = None,
    *,
    device: str = "auto",
    evaluate_on: str | None = None,
) -> Forecast:
    """What `quantize` with these arguments would take, stage by stage; a few weights are read and nothing is written.

    What it would refuse is refused here too, but for a run that does not fit: `Forecast.fits` says so.
    """
    recipe, place = recipe or Recipe.load("spinfold"), pick_device(device)
    plan.check_output(output)
    checkpoint = resolve(model)
    plan.plan_run(checkpoint.config, recipe)
    texts = texts_of(recipe.calibration.source, evaluate_on)
    before = measure_reading(checkpoint, texts[0])
    machine = measure_machine(place, recipe.compute)
    after = measure_reading(checkpoint, texts[0], again=True)
    return _forecast(checkpoint, recipe, texts, machine, Reading.mean(before, after))


def _forecast(
    checkpoint: Checkpoint, recipe: Recipe, texts: tuple[Text, Text], machine: Machine, reading: Reading = UNREAD
) -> Forecast:
    """With the calibration text and the one held out, of which a little more than is needed is tokenized
    (`fitting.text.tokenize`).
    """
    (available, held), needed = (len(one.text) // CHARACTERS for one in texts), _tokens_needed(recipe)
    limit = EVAL_TOKENS.get(machine.device, EVAL_TOKENS["cpu"])
    read = min(available, needed * 5 // 4) + min(held, limit * 5 // 4)
    return forecast(checkpoint, recipe, machine, reading=reading, text_tokens=read, held_out_tokens=min(held, limit))


def row(name: str, quality: Quality, seconds: float | None = None) -> dict[str, Any]:
    """One line of a table of figures; `seconds` are those of fitting and rounding."""
    return {"name": name} | asdict(quality) | {"seconds": seconds}


def _baseline(subject: Subject, recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """Another method's row."""
    start = time.perf_counter()
    rotated = rotate_network(subject, recipe, progress)
    network, clips = rotated.network, clips_of(subject, rotated, recipe, progress)
    if recipe.weight_format is not None:
        ids_NT = subject.windows(recipe.calibration.seq_len, recipe.calibration.samples, recipe.seed)
        for _ in round_network(network, recipe, ids_NT, progress=progress):
            pass
    return _measure(subject, network, recipe, clips, progress, time.perf_counter() - start, recipe.method)


def clips_of(subject: Subject, rotated: Rotated, recipe: Recipe, progress: Progress) -> Clips:
    """The clip ratios that the fit has learned, and by a search, before any weight is rounded, the others that the
    recipe leaves open.
    """
    ids_NT = subject.windows(recipe.calibration.seq_len, CLIP_WINDOWS, recipe.seed)
    return {**search_clips(rotated.network, recipe, ids_NT, progress=progress), **rotated.log.clips}


def _measure(
    subject: Subject, network: Network, recipe: Recipe, clips: Clips, progress: Progress, seconds: float, what: str
) -> dict[str, Any]:
    """The row of a rounded network, whose activations and cache are quantized from now on."""
    quantize_wires(network, recipe, clips=clips)
    quality, _ = measure_quality(
        network,
        subject.held_out_NT,
        reference=subject.reference,
        compute=recipe.compute,
        progress=progress,
        label=f"evaluate {what}",
    )
    return row(recipe.method, quality, seconds)


def _tokens_needed(recipe: Recipe) -> int:
    """How much of the calibration text is worth tokenizing."""
    fit = recipe.fit
    fitted = (100 if fit.steps is None else fit.steps) * (fit.batch or 8) * (fit.seq_len or recipe.calibration.seq_len)
    calibrated = recipe.calibration.samples * recipe.calibration.seq_len
    return max(fitted, calibrated) + _SPARE_TOKENS


def describe(
    subject: Subject,
    recipe: Recipe,
    rotated: Rotated,
    rounded: Sequence[RoundedLinear],
    rows: Iterable[dict[str, Any]],
    device: torch.device,
    progress: Progress,
) -> dict[str, Any]:
    """The contents of run.json."""
    network, checkpoint, calibration = rotated.network, subject.checkpoint, recipe.calibration
    weights = sum(x.weight.q_OI.numel() for x in rounded)
    bits = sum(x.weight.bits_per_weight * x.weight.q_OI.numel() for x in rounded) / weights if weights else 16.0
    linear_weights = sum(linear.weight_OI.numel() for linear in network.linears)
    orthogonal, gaps = prove_orthogonal(rotated.maps)
    return {
        "schema_version": 1,
        "spinfold": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["spinfold", *sys.argv[1:]]),
        "model": {
            "name": network.name,
            "family": network.family.name,
            "parameters": checkpoint.num_parameters,
            "fingerprint": checkpoint.fingerprint(),
        },
        "recipe": recipe.model_dump(mode="json"),
        "sites": list(rotated.maps.sites),
        "device": {
            "name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "type": device.type,
            "processes": world(),
            "threads": torch.get_num_threads(),
            "compute": pick_precision(recipe.compute, device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "text": {
            "calibration": calibration.source,
            "evaluation": subject.held_out,
            "evaluation_tokens": subject.quality.tokens,
            "seq_len": calibration.seq_len,
        },
        "stages": [asdict(record) for record in progress.records],
        "proofs": [rotated.proof.to_dict(), orthogonal.to_dict()],
        "fit": {
            "losses": list(rotated.log.losses),
            "samples": rotated.log.samples,
            "seconds": rotated.seconds,
            "orthogonality": gaps,
        },
        "rounding": [
            {
                "layer": x.layer,
                "role": x.role,
                "expert": x.expert,
                "error": x.error,
                "nearest_error": x.nearest_error,
                "damping": x.damping,
                "bits_per_weight": x.weight.bits_per_weight,
            }
            for x in rounded
        ],
        "sizes": {
            "linear_weights": linear_weights,
            "original_bytes": linear_weights * 2,
            "quantized_bytes": int(linear_weights * bits / 8),
            "bits_per_weight": bits,
        },
        "metrics": {"rows": list(rows)},
    }


def methods() -> list[MethodInfo]:
    """All methods, in the order of the registry."""
    return [
        MethodInfo(
            m.name,
            m.summary,
            m.paper,
            m.sites,
            tuple(site for site in m.sites if site in plan.ONLINE_SITES),
            m.needs_data,
            m.needs_backprop,
        )
        for m in METHODS.values()
    ]


def report(run: str | Path) -> Path:
    """Draw a finished run's page anew; returns its path."""
    if not RunFolder(Path(run)).finished:
        raise SpinfoldError(
            f"{run} is no finished run.", "It has no run.json.", "Give the folder of `spinfold quantize`."
        )
    return write_report(Path(run))
