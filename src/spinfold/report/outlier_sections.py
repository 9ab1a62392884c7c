"""Where a network's outliers are, before and after: surfaces to turn, and two statistics over the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from spinfold.evaluation.outliers import Outliers
from spinfold.report import figures
from spinfold.report.document import Chart, Section
from spinfold.report.values import number

__all__ = ["WIRE_TITLES", "outlier_panels", "surfaces"]

WIRE_TITLES = {
    "qkv_input": "input of q, k, v",
    "key": "keys, per head",
    "value": "values, per head",
    "attention_out": "input of o",
    "mlp_input": "input of gate, up",
    "down": "input of down",
}


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


def _column(table_LW: Any, wires: Sequence[str], wire: str) -> list[float | None]:
    return [number(float(value)) for value in table_LW[:, wires.index(wire)]] if wire in wires else []
