"""The report of a run as one HTML file that needs nothing else: no network, no server, no second file.

    run.json, outliers  →  figures.py  →  template.html, drawn by document.py  →  report.html

Every part of a run may be missing; what depends on it is left out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from spinfold.errors import SpinfoldError, reading
from spinfold.evaluation.outliers import Outliers
from spinfold.recipe import Bits
from spinfold.report import figures
from spinfold.report.document import Chart, Section, render
from spinfold.report.tables import cells, columns_of, human_bytes, human_seconds, perplexity_text

__all__ = ["WIRE_TITLES", "build_report", "outlier_panels", "surfaces", "write_report"]

Data = Mapping[str, Any]
ORTHOGONALITY_TOLERANCE = 1e-6

WIRE_TITLES = {
    "qkv_input": "input of q, k, v",
    "key": "keys, per head",
    "value": "values, per head",
    "attention_out": "input of o",
    "mlp_input": "input of gate, up",
    "down": "input of down",
}


_RUN_IN = {
    "gguf": ("Exported, in llama.cpp", "llama-cli -m CHECKPOINT/FILE"),
    "compressed-tensors": ("Exported, in vLLM", "vllm serve CHECKPOINT"),
    "transformers": (
        "Exported, in Transformers",
        "import spinfold\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('CHECKPOINT')",
    ),
}
"""How an exported checkpoint is run, by target: where, and the lines."""

_ERROR_OF = {
    "gptaq": "Squared distance of the output from what GPTAQ aims at, which leans towards the unrounded network's, "
    "relative to it",
    "autoround": "Squared error of a whole layer's output due to rounding its weights, relative to the output",
}
"""What the errors in run.json are errors of, by rounding method; those of the others are as GPTQ's."""


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run folder, whole or not at all, from what the folder holds.

    Raises `SpinfoldError` if there is no readable run.json.
    """
    run_dir = Path(run_dir)
    try:
        run = json.loads((run_dir / "run.json").read_text("utf-8"))
        if not isinstance(run, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise SpinfoldError(
            f"{run_dir} is not the folder of a run.",
            f"Its run.json can't be read: {error}.",
            "Give the folder that `spinfold quantize` wrote.",
        ) from None
    before, after = (run_dir / f"outliers-{when}.npz" for when in ("before", "after"))
    outliers = [Outliers.load(path) if path.is_file() else None for path in (before, after)]
    with reading(run_dir / "run.json"):
        page = build_report(run, *outliers, folder=run_dir.resolve().name)
    path = run_dir / "report.html"
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def build_report(
    run_json: Data,
    outliers_before: Outliers | None = None,
    outliers_after: Outliers | None = None,
    *,
    folder: str = "RUN",
) -> str:
    """The page's HTML. `folder` is what the run is called where the page says how to use it."""
    sections = [
        *surfaces(outliers_before, outliers_after),
        *outlier_panels(outliers_before, outliers_after),
        *_rounding(run_json),
        *_fit(run_json),
        *_stages(run_json),
    ]
    recipe = _part(run_json, "recipe")
    rows = [row for row in _list(_part(run_json, "metrics").get("rows")) if isinstance(row, Mapping)]
    return render(
        "template.html",
        sections,
        name=_part(run_json, "model").get("name") or folder,
        lede=_lede(run_json),
        tiles=_tiles(run_json, rows),
        sizes=_sizes(run_json),
        columns=columns_of(rows),
        rows=cells(rows),
        proofs=[_proof(proof) for proof in _list(run_json.get("proofs")) if isinstance(proof, Mapping)],
        loads=_loads(run_json, folder),
        uses=_uses(run_json, folder),
        recipe=yaml.safe_dump(json.loads(_plain_json(recipe)), sort_keys=False, allow_unicode=True) if recipe else "",
        environment=_environment(run_json),
    )


# ---- the first screen ------------------------------------------------------------------------------------------


def _lede(run: Data) -> str:
    """What was quantized, to what, and how, in a sentence or two."""
    recipe, model = _part(run, "recipe"), _part(run, "model")
    said = []
    if bits := _bits(recipe):
        widths = {"weights": bits.weights, "activations": bits.activations}
        same = bits.keys == bits.values
        widths |= {"KV cache": bits.kv} if same else {"keys": bits.keys, "values": bits.values}
        words = [f"{what} {'in floating point' if n == 16 else f'{n} bit'}" for what, n in widths.items()]
        said.append(f"{bits}: {', '.join(words)}.")
    grid = "" if (name := recipe.get("format", "int")) == "int" else str(name).upper()
    if recipe.get("method"):
        sites = f" at {', '.join(map(str, sites))}" if (sites := _list(recipe.get("sites"))) else ""
        said.append(f"Maps: {recipe['method']}{sites}.")
    if rounding := _part(recipe, "rounding").get("method"):
        group = recipe.get("group_size")
        shared = f"one scale per {f'{group} inputs' if group else 'output row'}"
        said.append(f"Rounding: {str(rounding).upper()}{f' to {grid}' if grid else f', {shared}'}.")
    if (parameters := _number(model.get("parameters"))) is not None:
        family = f", family {model['family']}" if model.get("family") else ""
        millions = parameters / 1e6
        said.append(
            f"{millions:,.0f} million parameters{family}."
            if millions >= 1
            else f"{parameters:,.0f} parameters{family}."
        )
    return " ".join(said)


def _tiles(run: Data, rows: Sequence[Data]) -> list[tuple[str, str, str]]:
    """The result in a few numbers: (label, value, remark)."""
    method = _part(run, "recipe").get("method")
    original = next((row for row in rows if row.get("name") == "original"), {})
    others = [row for row in rows if row.get("name") != "original"]
    result: Data = next((row for row in others if row.get("name") == method), others[-1] if others else {})
    tiles = []
    if (now := _number(result.get("perplexity"))) is not None:
        was = _number(original.get("perplexity"))
        remark = f"original {perplexity_text(was)}" if was else "lower is better"
        tiles.append(("perplexity", perplexity_text(now), remark))
    if (kl := _number(result.get("kl"))) is not None:
        tiles.append(("KL to the original", f"{kl:.4f}", "nats per token"))
    if (top1 := _number(result.get("top1"))) is not None:
        tiles.append(("first choice kept", f"{top1:.1%}", "of all tokens"))
    if sizes := _sizes(run):
        tiles.append(("linear weights, packed", sizes[-1][1], f"{sizes[0][2] / sizes[-1][2]:.1f}× smaller"))
    seconds = [_number(stage.get("seconds")) for stage in _list(run.get("stages")) if isinstance(stage, Mapping)]
    if any(seconds):
        device = _part(run, "device").get("name")
        tiles.append(("time", human_seconds(sum(s or 0 for s in seconds)), f"on {device}" if device else "all stages"))
    return tiles


def _sizes(run: Data) -> list[tuple[str, str, float, float]]:
    """Label, size in words, in bytes, and as percentage of the original; empty unless both are known."""
    sizes = _part(run, "sizes")
    before, after = (_number(sizes.get(key)) for key in ("original_bytes", "quantized_bytes"))
    if not before or not after:
        return []
    bits = _number(sizes.get("bits_per_weight"))
    label = "quantized" + (f", {bits:.2f} bits per weight" if bits else "")
    widest = max(before, after)
    return [
        ("original", human_bytes(before), before, 100 * before / widest),
        (label, human_bytes(after), after, 100 * after / widest),
    ]


def _proof(proof: Data) -> dict[str, Any]:
    """A proof ready to be shown. It holds only if its numbers are there and in order, whatever it says of itself."""
    measured, tolerance = _number(proof.get("measured")), _number(proof.get("tolerance"))
    held = measured is not None and tolerance is not None and measured <= tolerance and proof.get("ok", True) is True
    shown = [f"{value:.2g}" if value is not None else "not a number" for value in (measured, tolerance)]
    text = f"{shown[0]} {'≤' if held else 'is not ≤'} {shown[1]}"
    return {"ok": held, "statement": proof.get("statement", ""), "text": text, "detail": proof.get("detail", "")}


def _loads(run: Data, folder: str) -> str:
    """Where no export has been proved: what would prove it."""
    said = [str(_words(proof.get("statement"))) for proof in _list(run.get("proofs")) if isinstance(proof, Mapping)]
    if not said or any(statement.startswith(f"{target}: ") for statement in said for target in _RUN_IN):
        return ""
    return f"spinfold export {_shell_word(folder)} --to TARGET -o CHECKPOINT"


def _uses(run: Data, folder: str) -> list[tuple[str, str]]:
    """Where, and the lines that run it there."""
    uses = [
        (
            "In Python",
            f"from spinfold import evaluate\nquality = evaluate({folder!r}, text='my-text.txt')\nprint(quality)",
        ),
        ("In a shell", f"spinfold evaluate {_shell_word(folder)} --text my-text.txt"),
    ]
    for target, made in _part(run, "exports").items():
        if isinstance(made, Mapping) and target in _RUN_IN:
            file = next((str(name) for name in _part(made, "files") if str(name).endswith(".gguf")), "model.gguf")
            title, lines = _RUN_IN[target]
            uses.append((title, lines.replace("FILE", _shell_word(file))))
    return uses


def _environment(run: Data) -> list[tuple[str, str]]:
    """Where the numbers come from, as pairs."""
    pairs: list[tuple[str, Any]] = [(key, run.get(key)) for key in ("spinfold", "created", "command", "schema_version")]
    for section in ("model", "device", "text"):
        pairs += [(f"{section}: {key}", value) for key, value in _part(run, section).items()]
    pairs += [(key, value) for key, value in _part(run, "metrics").items() if key != "rows"]
    return [(key.replace("_", " "), _words(value)) for key, value in pairs if value not in (None, "", {}, [])]


# ---- the figures -----------------------------------------------------------------------------------------------


def surfaces(before: Outliers | None, after: Outliers | None) -> list[Section]:
    shown = [(when, outliers) for when, outliers in (("before", before), ("after", after)) if outliers]
    places = list(dict.fromkeys(place for _, outliers in shown for place in outliers.places))
    charts = []
    for place in places:
        pair = [(when, surface) for when, outliers in shown if (surface := outliers.surface(place))]
        ceiling = max(surface.largest for _, surface in pair) or 1.0
        title = f"layer {place[0]}, {WIRE_TITLES.get(place[1], place[1])}"
        for when, surface in pair:
            peak = f"{when}, largest |x| = {surface.largest:.4g}"
            charts.append(Chart(f"{title}: {peak}", figures.surface(surface, ceiling), pair=f"{place[0]}-{place[1]}"))
    if not charts:
        return []
    caption = (
        "Height is the largest |activation| of a few neighbouring tokens and channels: a spike makes the steps of the "
        "grid coarse for everything that shares its scale, so flat is good. The pictures of one place share their "
        "scale; drag one and the other turns with it."
    )
    return [Section("Where the outliers are", caption, charts, layout="pairs")]


def outlier_panels(before: Outliers | None, after: Outliers | None) -> list[Section]:
    shown = {when: outliers for when, outliers in (("before", before), ("after", after)) if outliers}
    if not shown:
        return []
    legend = {when: when for when in shown}
    wires = next(iter(shown.values())).wires

    def panels(table: Callable[[Outliers], Any], unit: str, reference: float | None) -> list[Chart]:
        series = {
            wire: {when: _column(table(outliers), outliers.wires, wire) for when, outliers in shown.items()}
            for wire in wires
        }
        span = figures.value_range([values for of in series.values() for values in of.values()], log=True)
        if span is None:
            return []
        return [
            Chart(WIRE_TITLES.get(wire, wire), figures.lines(of, unit, span, log=True, reference=reference))
            for wire, of in series.items()
        ]

    return [
        Section(
            "Kurtosis",
            "How much of a token sits in few channels, as a mean over tokens: 1 is all channels alike, 3 (dotted) a "
            "Gaussian, the number of channels a single spike; lower is easier to round.",
            panels(lambda outliers: outliers.kurtosis_LW, "kurtosis", 3.0),
            "panels",
            legend,
        ),
        Section(
            "Peak to RMS",
            "A token's largest magnitude over its root mean square, as a mean over tokens: the grid must reach the "
            "peak, so at half the ratio its steps are half as wide.",
            panels(lambda outliers: outliers.peak_to_rms_LW, "peak / RMS", None),
            "panels",
            legend,
        ),
    ]


def _rounding(run: Data) -> list[Section]:
    """A panel for each linear, or for those with the same errors, since they were rounded as one."""
    settings = _part(_part(run, "recipe"), "rounding")
    how = str(settings.get("method") or "rounded")
    ours = ("OSAQ, " if settings.get("absorb") else "") + ("nearest" if how == "rtn" else how.upper())
    series = _errors_by_role(run, {"nearest": "nearest_error", ours: "error"})
    span = figures.value_range(values for of in series.values() for values in of.values())
    if span is None:
        return []
    gains = [
        nearest - mine
        for of in series.values()
        for nearest, mine in zip(of.get("nearest", []), of.get(ours, []), strict=False)
        if ours != "nearest" and mine is not None and nearest is not None
    ]
    gain = f" {ours} is {sum(gains) / len(gains):.1f} dB better than nearest on average." if gains else ""
    panels: list[tuple[str, dict[str, list[figures.Number]]]] = []
    for role, of in series.items():
        if panels and panels[-1][1] == of:
            panels[-1] = f"{panels[-1][0]}, {role}", of
        else:
            panels.append((role, of))
    charts = [Chart(roles, figures.lines(of, "error, dB", span)) for roles, of in panels]
    legend = {name: "before" if name in figures.BASELINES else "after" for of in series.values() for name in of}
    error_of = _ERROR_OF.get(how, "Squared error of the output due to rounding the weights, relative to the output")
    caption = (
        f"{error_of}, in decibels: 10 dB lower is a tenth of the error. What shares a panel was rounded together.{gain}"
    )
    return [Section("Rounding error", caption, charts, "panels", legend)]


def _errors_by_role(run: Data, keys: Mapping[str, str]) -> dict[str, dict[str, list[figures.Number]]]:
    """The error of each layer in decibels, by role and name of a series; of experts, which share a role, the mean."""
    entries = [entry for entry in _list(run.get("rounding")) if isinstance(entry, Mapping)]
    depth = 1 + max((int(entry["layer"]) for entry in entries), default=-1)
    found: dict[str, dict[str, list[list[float]]]] = {}
    for entry in entries:
        for name, key in keys.items():
            if (error := _number(entry.get(key))) is not None:
                layers = found.setdefault(str(entry["role"]), {}).setdefault(name, [[] for _ in range(depth)])
                layers[int(entry["layer"])].append(error)
    return {
        role: {name: [figures.decibels(_mean(errors)) for errors in layers] for name, layers in of.items()}
        for role, of in found.items()
    }


def _fit(run: Data) -> list[Section]:
    fit = _part(run, "fit")
    sections = []
    if losses := [_number(loss) for loss in _list(fit.get("losses"))]:
        caption = "The objective on each step's batch, and its running mean: it should fall, and be flat at the end."
        sections.append(Section("The fit", caption, [Chart("loss over steps", figures.curve(losses))]))
    gaps = fit.get("orthogonality")
    if not isinstance(gaps, Mapping):
        listed = _list(gaps) or [gaps]
        gaps = {f"map {i}" if len(listed) > 1 else "all maps": gap for i, gap in enumerate(listed)}
    if named := {str(name): gap for name, value in gaps.items() if (gap := _number(value)) is not None}:
        caption = (
            "How far each map is from orthogonal after the fit; up to the dotted line is allowed, and rounding noise "
            "is near 1e-15 in fp64, 1e-7 in fp32."
        )
        figure = figures.dots(named, "largest entry of |RRᵀ − I|", reference=ORTHOGONALITY_TOLERANCE)
        sections.append(Section("Orthogonality", caption, [Chart("distance from orthogonal", figure)]))
    return sections


def _stages(run: Data) -> list[Section]:
    stages = [stage for stage in _list(run.get("stages")) if isinstance(stage, Mapping)]
    seconds: dict[str, figures.Number] = {}
    gigabytes: dict[str, figures.Number] = {}
    for stage in stages:
        name = str(stage.get("name", ""))
        if (value := _number(stage.get("seconds"))) is not None:
            seconds[name] = (seconds.get(name) or 0) + value
        if (value := _number(stage.get("peak_bytes"))) is not None:
            gigabytes[name] = max(gigabytes.get(name) or 0, value / 1e9)
    charts = []
    if seconds:
        charts.append(Chart("time", figures.bars(seconds, "seconds")))
    if gigabytes:
        charts.append(Chart("memory", figures.bars(gigabytes, "peak, GB")))
    caption = "Wall time and the high-water mark of memory of every stage, in the order in which they ran."
    return [Section("What it cost", caption, charts, layout="pairs")] if charts else []


# ---- small tools -----------------------------------------------------------------------------------------------


def _part(data: Data, key: str) -> Data:
    """A mapping inside a mapping; empty if it isn't there."""
    value = data.get(key)
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _bits(recipe: Data) -> Bits | None:
    try:
        return Bits.parse(str(recipe.get("bits")))
    except SpinfoldError:
        return None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _column(table_LW: Any, wires: Sequence[str], wire: str) -> list[float | None]:
    return [_number(float(value)) for value in table_LW[:, wires.index(wire)]] if wire in wires else []


def _words(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | Mapping | list | tuple):
        return str(value)
    return f"{value:,}" if isinstance(value, int | float) else _plain_json(value)


def _shell_word(word: str) -> str:
    return word if all(c.isalnum() or c in "._-/" for c in word) else "'" + word.replace("'", "'\\''") + "'"


def _plain_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
