"""What happened in a run, as figures: the rounding errors, the course of the fit, and what each stage took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spinfold.report import figures
from spinfold.report.document import Chart, Section
from spinfold.report.values import Data, items, number, part

__all__ = ["cost_sections", "fit_sections", "rounding_sections"]

ORTHOGONALITY_TOLERANCE = 1e-6


def rounding_sections(run: Data) -> list[Section]:
    """The errors of nearest and of the run's own rounding: as colours over layers and linears, and as lines."""
    settings = part(part(run, "recipe"), "rounding")
    how = str(settings.get("method") or "rounded")
    ours = ("OSAQ, " if settings.get("absorb") else "") + ("nearest" if how == "rtn" else how.upper())
    series = _errors_by_role(run, {"nearest": "nearest_error", ours: "error"})
    span = figures.value_range(values for of in series.values() for values in of.values())
    if span is None:
        return []
    names = dict.fromkeys(name for of in series.values() for name in of)
    maps = {name: {role: of[name] for role, of in series.items() if name in of} for name in names}
    gains = [
        nearest - mine
        for of in series.values()
        for nearest, mine in zip(of.get("nearest", []), of.get(ours, []), strict=False)
        if ours != "nearest" and mine is not None and nearest is not None
    ]
    gain = f" {ours} is {sum(gains) / len(gains):.1f} dB better than nearest on average." if gains else ""
    target = " GPTAQ's is the distance from what it aims at, which leans towards the unrounded network's output."
    caption = (
        "Squared error of a linear's output due to rounding its weights, relative to the output, in decibels: 10 dB "
        f"lower is a tenth of the error; the brighter, the larger.{target if how == 'gptaq' else ''}{gain}"
    )
    shared: list[tuple[str, dict[str, list[figures.Number]]]] = []
    for role, of in series.items():
        if shared and shared[-1][1] == of:
            shared[-1] = f"{shared[-1][0]}, {role}", of
        else:
            shared.append((role, of))
    legend = {name: "before" if name in figures.BASELINES else "after" for name in names}
    return [
        Section(
            "Rounding error",
            caption,
            [Chart(name, figures.heat(rows, "dB", span)) for name, rows in maps.items()],
            "pairs" if len(maps) > 1 else "wide",
        ),
        Section(
            "Rounding error of each linear",
            "The same numbers, linear by linear; those with the same errors share a panel.",
            [Chart(roles, figures.lines(of, "error, dB", span)) for roles, of in shared],
            "panels",
            legend,
        ),
    ]


def _errors_by_role(run: Data, keys: Mapping[str, str]) -> dict[str, dict[str, list[figures.Number]]]:
    """The error of each layer in decibels, by role and name of a series; of experts, which share a role, the mean."""
    entries = [entry for entry in items(run.get("rounding")) if isinstance(entry, Mapping)]
    places = {layer: i for i, layer in enumerate(sorted({int(entry["layer"]) for entry in entries}))}
    found: dict[str, dict[str, list[list[float]]]] = {}
    for entry in entries:
        for name, key in keys.items():
            if (error := number(entry.get(key))) is not None:
                layers = found.setdefault(str(entry["role"]), {}).setdefault(name, [[] for _ in places])
                layers[places[int(entry["layer"])]].append(error)
    return {
        role: {name: [figures.decibels(_mean(errors)) for errors in layers] for name, layers in of.items()}
        for role, of in found.items()
    }


def fit_sections(run: Data) -> list[Section]:
    """The objective over the steps, and how far the maps are from orthogonal."""
    fit = part(run, "fit")
    sections = []
    if losses := [number(loss) for loss in items(fit.get("losses"))]:
        caption = "The objective on each step's batch, and its running mean: it should fall, and be flat at the end."
        sections.append(Section("The fit", caption, [Chart("loss over steps", figures.curve(losses))]))
    gaps = fit.get("orthogonality")
    if not isinstance(gaps, Mapping):
        listed = items(gaps) or [gaps]
        gaps = {f"map {i}" if len(listed) > 1 else "all maps": gap for i, gap in enumerate(listed)}
    if named := {str(name): gap for name, value in gaps.items() if (gap := number(value)) is not None}:
        caption = (
            "How far each map is from orthogonal after the fit; up to the dotted line is allowed, and rounding noise "
            "is near 1e-15 in fp64, 1e-7 in fp32."
        )
        figure = figures.dots(named, "largest entry of |RRᵀ − I|", reference=ORTHOGONALITY_TOLERANCE)
        sections.append(Section("Orthogonality", caption, [Chart("distance from orthogonal", figure)]))
    return sections


def cost_sections(run: Data) -> list[Section]:
    """Time and memory of each stage."""
    stages = [stage for stage in items(run.get("stages")) if isinstance(stage, Mapping)]
    seconds: dict[str, figures.Number] = {}
    gigabytes: dict[str, figures.Number] = {}
    for stage in stages:
        name = str(stage.get("name", ""))
        if (value := number(stage.get("seconds"))) is not None:
            seconds[name] = (seconds.get(name) or 0) + value
        if (value := number(stage.get("peak_bytes"))) is not None:
            gigabytes[name] = max(gigabytes.get(name) or 0, value / 1e9)
    charts = []
    if seconds:
        charts.append(Chart("time", figures.bars(seconds, "seconds")))
    if gigabytes:
        charts.append(Chart("memory", figures.bars(gigabytes, "peak so far, GB")))
    caption = "Wall time and the high-water mark of memory of every stage, in the order in which they ran."
    return [Section("What it cost", caption, charts, layout="pairs")] if charts else []


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
