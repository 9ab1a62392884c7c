"""Figures of the report: numbers in, plain Plotly figure dictionaries out.

Nothing here imports Plotly or draws. Colours are names of CSS variables, which the page resolves for the light
and the dark scheme; text that comes from outside is escaped, since Plotly reads a few HTML tags in labels.

| figure        | shows                                                            |
|---------------|------------------------------------------------------------------|
| `surface`     | abs(x) over tokens and channels at one wire                      |
| `lines`       | one quantity over layers, some series in one small panel         |
| `heat`        | one quantity over layers, a row of colours per named thing       |
| `curve`       | a fit's loss over its steps                                      |
| `bars`        | one quantity per named thing, from zero                          |
| `dots`        | one small quantity per named thing, logarithmic                  |
| `pareto`      | what an error costs: named points, and those that none beats     |
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from spinfold.evaluation.outliers import Surface

__all__ = [
    "Figure",
    "bars",
    "curve",
    "decibels",
    "dots",
    "front",
    "heat",
    "lines",
    "pareto",
    "surface",
    "value_range",
]

Figure = dict[str, Any]
Number = float | int | None

BEFORE, AFTER, TEXT, GRID = "var(--before)", "var(--after)", "var(--text)", "var(--grid)"
BASELINES = ("before", "nearest")  # series that another is compared with; they look alike in all figures
SMOOTHING = 0.8


def surface(place: Surface, ceiling: float) -> Figure:
    """A turnable surface; `ceiling` is the top of the height and colour scale, shared by pictures to be compared."""
    rows, columns = place.peaks_TC.shape
    trace = {
        "type": "surface",
        "x": [j * place.step_channels for j in range(columns)],
        "y": [i * place.step_tokens for i in range(rows)],
        "z": [[_short(value) for value in row] for row in place.peaks_TC],
        "colorscale": "Viridis",
        "cmin": 0,
        "cmax": ceiling,
        "showscale": False,
        "hovertemplate": "token %{y}, channel %{x}<br>|x| = %{z}<extra></extra>",
    }
    scene = {
        "xaxis": _scene_axis("channel"),
        "yaxis": _scene_axis("token"),
        "zaxis": _scene_axis("largest |x|") | {"range": [0, ceiling]},
        "aspectmode": "manual",
        "aspectratio": {"x": 1.3, "y": 1.3, "z": 0.8},
        "camera": {"eye": {"x": 1.55, "y": -1.7, "z": 1.0}, "center": {"x": 0, "y": 0, "z": -0.17}},
        "dragmode": "turntable",
    }
    layout = _layout(340) | {"scene": scene, "margin": {"l": 0, "r": 0, "t": 0, "b": 0}}
    return {"data": [trace], "layout": layout}


def lines(
    series: Mapping[str, Sequence[Number]],
    unit: str,
    span: tuple[float, float],
    *,
    log: bool = False,
    reference: Number = None,
) -> Figure:
    """Series over layers; `span` is the range of the vertical axis, shared by panels to be compared.

    Told apart by colour and by mark. `reference` is a value to compare with, drawn as a dotted line.
    """
    traces = []
    for name, values in series.items():
        color, mark = (BEFORE, "circle") if name in BASELINES else (AFTER, "diamond")
        trace = {
            "type": "scatter",
            "mode": "lines+markers",
            "name": html.escape(name),
            "x": list(range(len(values))),
            "y": [_short(value) for value in values],
            "line": {"color": color, "width": 1.75},
            "marker": {"color": color, "size": 5, "symbol": mark},
            "hovertemplate": f"{html.escape(name)}, layer %{{x}}: %{{y:.4~g}}<extra></extra>",
        }
        traces.append(trace)
    bounds = [math.log10(bound) for bound in span] if log else list(span)
    vertical = _axis(unit) | {"range": bounds} | (_log_ticks(span) if log else {"nticks": 6})
    layers = max(map(len, series.values()), default=0)
    layout = _layout(210) | {"xaxis": _counts("layer", layers), "yaxis": vertical, "showlegend": False}
    if reference is not None:
        dotted = {"color": TEXT, "width": 1, "dash": "dot"}
        line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": reference, "y1": reference, "line": dotted}
        layout["shapes"] = [line]
    return {"data": traces, "layout": layout}


def heat(rows: Mapping[str, Sequence[Number]], unit: str, span: tuple[float, float]) -> Figure:
    """A row of cells per name, a column per layer, the first name on top; `span` is the range of colours, shared by
    pictures to be compared. A gap is a value that isn't there.
    """
    layers = max(map(len, rows.values()), default=0)
    trace = {
        "type": "heatmap",
        "x": list(range(layers)),
        "y": [html.escape(name) for name in rows],
        "z": [[_short(value) for value in values] for values in rows.values()],
        "colorscale": "Viridis",
        "zmin": span[0],
        "zmax": span[1],
        "xgap": 1,
        "ygap": 1,
        "hoverongaps": False,
        "colorbar": {"title": {"text": html.escape(unit)}, "thickness": 12, "outlinewidth": 0, "nticks": 6},
        "hovertemplate": f"%{{y}}, layer %{{x}}: %{{z:.4~g}} {html.escape(unit)}<extra></extra>",
    }
    bare = {"showgrid": False}
    layout = _layout(110 + 24 * len(rows)) | {"xaxis": _counts("layer", layers) | bare, "yaxis": _names() | bare}
    return {"data": [trace], "layout": layout}


def curve(losses: Sequence[Number]) -> Figure:
    """Each step's loss and its running mean (weights 0.8ᵏ, normalised, so that the start isn't biased)."""
    smooth: list[Number] = []
    total = weight = 0.0
    for loss in losses:
        if loss is not None and math.isfinite(loss):
            total, weight = SMOOTHING * total + loss, SMOOTHING * weight + 1
        smooth.append(_short(total / weight) if weight else None)
    steps = list(range(1, len(losses) + 1))
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "one step",
            "x": steps,
            "y": [_short(loss) for loss in losses],
            "marker": {"color": BEFORE, "size": 5, "opacity": 0.55},
        },
        {
            "type": "scatter",
            "mode": "lines",
            "name": "running mean",
            "x": steps,
            "y": smooth,
            "line": {"color": AFTER, "width": 2.5},
        },
    ]
    layout = _layout(300) | {"xaxis": _counts("step", len(losses)), "yaxis": _axis("loss"), "hovermode": "x unified"}
    return {"data": traces, "layout": layout | {"legend": {"orientation": "h", "y": 1.12, "x": 0}}}


def bars(values: Mapping[str, Number], unit: str) -> Figure:
    """Horizontal bars from zero in the given order, the first on top."""
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": [html.escape(name) for name in values],
        "x": [_short(value) for value in values.values()],
        "marker": {"color": AFTER},
        "hovertemplate": f"%{{y}}: %{{x:.4~g}} {html.escape(unit)}<extra></extra>",
    }
    layout = _layout(110 + 26 * len(values)) | {"yaxis": _names(), "bargap": 0.35}
    return {"data": [trace], "layout": layout | {"xaxis": _axis(unit) | {"rangemode": "tozero"}}}


def dots(values: Mapping[str, float], unit: str, *, reference: float) -> Figure:
    """A dot per name on a logarithmic axis from 1e-17, where smaller values stand too, to beyond `reference`."""
    low, high = 1e-17, 10 * max(reference, *values.values())
    trace = {
        "type": "scatter",
        "mode": "markers",
        "y": [html.escape(name) for name in values],
        "x": [_short(max(value, low)) for value in values.values()],
        "customdata": [_short(value) for value in values.values()],
        "marker": {"color": AFTER, "size": 10, "symbol": "diamond"},
        "hovertemplate": f"%{{y}}: %{{customdata:.2~g}} {html.escape(unit)}<extra></extra>",
    }
    bounds = [math.log10(low) - 0.2, math.log10(high)]
    horizontal = _axis(unit) | {"type": "log", "range": bounds, "dtick": 3, "exponentformat": "power"}
    line = {"type": "line", "yref": "paper", "x0": reference, "x1": reference, "y0": 0, "y1": 1}
    shapes = [line | {"line": {"color": TEXT, "width": 1, "dash": "dot"}}]
    layout = _layout(110 + 26 * len(values)) | {"xaxis": horizontal, "yaxis": _names(), "shapes": shapes}
    return {"data": [trace], "layout": layout}


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points `(cost, error)` that no other point is better than in one and as good in the other; of
    equal points the first. The cheapest comes first.
    """
    best, names = math.inf, list[str]()
    for name, (_, error) in sorted(points.items(), key=lambda item: item[1]):
        if error < best:
            best = error
            names.append(name)
    return names


def pareto(points: Mapping[str, tuple[float, float]], cost: str, error: str) -> Figure:
    """Named points `(cost, error)` and the steps of their front. Axes are logarithmic where all values are positive."""
    best = front(points)
    steps = [points[name] for name in best]
    traces: list[Figure] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [_short(x) for x, _ in steps],
            "y": [_short(y) for _, y in steps],
            "line": {"color": AFTER, "width": 1.5, "shape": "hv"},
            "hoverinfo": "skip",
        }
    ]
    for names, color, mark in (
        ([name for name in points if name not in best], BEFORE, "circle"),
        (best, AFTER, "diamond"),
    ):
        labels = [html.escape(name) for name in names]
        trace = {
            "type": "scatter",
            "mode": "markers+text" if names is best else "markers",  # names of all would lie on each other
            "x": [_short(points[name][0]) for name in names],
            "y": [_short(points[name][1]) for name in names],
            "text": labels,
            "textposition": ["top right" if 2 * i < len(names) else "top left" for i in range(len(names))],
            "textfont": {"size": 11},
            "marker": {"color": color, "size": 9, "symbol": mark},
            "cliponaxis": False,
            "hovertemplate": "%{text}<br>"
            + "<br>".join(f"{html.escape(what)}: %{{{axis}:.4~g}}" for what, axis in ((cost, "x"), (error, "y")))
            + "<extra></extra>",
        }
        traces.append(trace)
    axes = {}
    for key, title, index in (("xaxis", cost, 0), ("yaxis", error, 1)):
        values = [point[index] for point in points.values()]
        span = value_range([values], log=True) if min(values, default=0) > 0 else None
        logarithmic = _log_ticks(span) | {"range": [math.log10(bound) for bound in span]} if span else {}
        axes[key] = _axis(title) | logarithmic
    return {"data": traces, "layout": _layout(380) | axes | {"showlegend": False}}


def decibels(error: Number) -> Number:
    """A relative squared error in dB, 10 log₁₀; None where there is nothing to take a logarithm of."""
    return 10 * math.log10(error) if error is not None and 0 < error < math.inf else None


def value_range(groups: Iterable[Iterable[Number]], *, log: bool = False) -> tuple[float, float] | None:
    """The smallest range that shows every finite value with a little air; None if there is no value."""
    values = [float(v) for group in groups for v in group if v is not None and math.isfinite(v) and (v > 0 or not log)]
    if not values:
        return None
    low, high = min(values), max(values)
    if log:
        return low / 1.3, high * 1.3
    air = 0.06 * (high - low) or 1.0
    return low - air, high + air


def _short(value: Any) -> Number:
    """Four significant digits are more than a picture shows; JSON has no NaN."""
    if value is None or not math.isfinite(value):
        return None
    return float(np.format_float_positional(float(value), precision=4, fractional=False))


def _layout(height: int) -> Figure:
    return {
        "height": height,
        "margin": {"l": 52, "r": 12, "t": 12, "b": 44},
        "font": {"color": TEXT, "family": "system-ui, sans-serif", "size": 12},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hoverlabel": {"font": {"family": "system-ui, sans-serif"}},
        "dragmode": False,  # a finger that scrolls the page must not zoom a figure
    }


def _axis(title: str) -> Figure:
    return {
        "title": {"text": html.escape(title), "font": {"size": 12}, "standoff": 6},
        "gridcolor": GRID,
        "linecolor": GRID,
        "zeroline": False,
        "automargin": True,
    }


def _counts(title: str, number: int) -> Figure:
    """An axis of whole numbers below `number`: no fraction between two layers of a small network."""
    return _axis(title) | ({"dtick": 1} if number < 8 else {"nticks": 7})


def _names() -> Figure:
    return _axis("") | {"type": "category", "autorange": "reversed"}


def _log_ticks(span: tuple[float, float]) -> Figure:
    """Plain numbers at 1, 2 and 5 of each decade, or at 1 alone where that would be crowded."""
    leads = (1, 2, 5) if span[1] < 50 * span[0] else (1,)
    decades = range(math.floor(math.log10(span[0])), math.ceil(math.log10(span[1])) + 1)
    ticks = [lead * 10.0**decade for decade in decades for lead in leads]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _scene_axis(title: str) -> Figure:
    return {
        "title": {"text": title, "font": {"size": 12}},
        "gridcolor": GRID,
        "color": TEXT,
        "showbackground": False,
        "zeroline": False,
        "nticks": 5,
        "tickfont": {"size": 10},
    }
