"""The page of a comparison: a table to sort, what an error costs, and every entry in detail.

table.json, the cells' records  →  compare.html + compare.js, drawn by document.py  →  index.html
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from spinfold.report import figures
from spinfold.report.compare_table import comparison_columns, settings_text
from spinfold.report.document import Chart, Section, render
from spinfold.report.tables import Column, columns_of, human_seconds, perplexity_text

__all__ = ["build_comparison"]

Data = Mapping[str, Any]

_COSTS = {"fit_seconds": "seconds to fit, fold and prove", "online_flops": "online flops per token"}
_LEGEND = {"none is better and as cheap": "after", "beaten": "before"}


def build_comparison(data: Data, cells: Sequence[Data]) -> str:
    """The page's HTML, of the contents of table.json and the records in cells."""
    rows, columns = data["rows"], comparison_columns(data["texts"])
    shown = columns_of(rows, columns)
    original = next((row for row in rows if row["name"] == "original"), None)
    others = [cell for cell in cells if cell["label"] != "original"]
    entries: dict[str, list[Data]] = {}
    for cell in sorted(others, key=lambda cell: (cell["order"][-1], cell["order"], cell["seed"])):
        entries.setdefault(cell["label"], []).append(cell)
    return render(
        "compare.html",
        [*_fronts(rows, original), *_fits(entries)],
        ["compare.js"],
        name=data["model"],
        lede=_lede(data, others),
        tiles=_tiles(original, rows, others),
        columns=shown,
        rows=[[(column.text(row), _sort_key(row.get(column.key))) for column in shown] for row in rows],
        entries=[_entry(same, columns) for same in entries.values()],
        recipe=yaml.safe_dump(dict(data["recipe"]), sort_keys=False, allow_unicode=True),
    )


def _lede(data: Data, cells: Sequence[Data]) -> str:
    """What was compared, in two sentences."""
    formats = {cell["format"] for cell in cells if cell.get("format")}
    counts = {
        "entries": len({cell["label"] for cell in cells}),
        "bit widths": len({cell["bits"] for cell in cells}),
        "roundings": len({cell["rounding"] for cell in cells}),
        "seeds": len({cell["seed"] for cell in cells}),
    } | ({"formats": len(formats)} if formats else {})
    grid = ", ".join(
        f"{count} {name if count != 1 else name.replace('ies', 'y').rstrip('s')}" for name, count in counts.items()
    )
    return f"{grid}. Calibrated on {data['calibration']}, measured on {' and '.join(data['texts'])}."


def _tiles(original: Data | None, rows: Sequence[Data], cells: Sequence[Data]) -> list[tuple[str, str, str]]:
    """The result in a few numbers: (label, value, remark)."""
    tiles = []
    if original is not None:
        tiles.append(("original", perplexity_text(original["perplexity"]), "perplexity"))
    for bits in dict.fromkeys(row["bits"] for row in rows if row is not original):
        there = [row for row in rows if row["bits"] == bits and row["perplexity"] is not None]
        if there:
            best = min(there, key=lambda row: row["perplexity"])
            tiles.append((bits, perplexity_text(best["perplexity"]), _words(best, "name", "format", "rounding")))
    if failed := sum(bool(cell.get("failed")) for cell in cells):
        tiles.append(("failed", str(failed), f"of {len(cells)} cells"))
    return tiles


def _sort_key(value: Any) -> str:
    """What a column is sorted by, as text: a number, or lower-case words."""
    if isinstance(value, int | float):  # a bool is an int
        return repr(float(value)) if math.isfinite(value) else ""
    return "" if value is None else str(value).lower()


def _fronts(rows: Sequence[Data], original: Data | None) -> list[Section]:
    """For each format, bits and rounding: the error against each cost."""
    if original is None:
        return []
    groups: dict[str, list[Data]] = {}
    for row in rows:
        if row is not original and row["perplexity"] is not None:
            groups.setdefault(_kind(row), []).append(row)
    sections = []
    for kind, same in groups.items():
        charts = []
        for key, title in _COSTS.items():
            points = {row["name"]: (row[key], row["perplexity"] - original["perplexity"]) for row in same}
            charts.append(Chart(f"against {title}", figures.pareto(points, title, "perplexity above the original")))
        caption = "Perplexity above the original's: lower is better, further left is cheaper."
        sections.append(Section(kind, caption, charts, "pairs", _LEGEND))
    return sections


def _kind(row: Data) -> str:
    """`MXFP4, W4A4KV16, gptq`: what rows that can be compared have in common."""
    return _words(row, "format", "bits", "rounding")


def _words(row: Data, *keys: str) -> str:
    """What there is of them, with commas."""
    return ", ".join(row[key] for key in keys if row.get(key))


def _fits(entries: Mapping[str, Sequence[Data]]) -> list[Section]:
    """The objective over steps, of the first fit of each entry that has one."""
    charts = []
    for cells in entries.values():
        fitted = next((cell for cell in cells if cell.get("losses")), None)
        if fitted is not None:
            title = f"{_words(fitted, 'label', 'format', 'bits')}, seed {fitted['seed']}"
            charts.append(Chart(title, figures.curve(fitted["losses"])))
    caption = "Each entry's own objective on each step's batch, and its running mean: only its course can be compared."
    return [Section("The fits", caption, charts, "panels")] if charts else []


def _entry(cells: Sequence[Data], columns: Sequence[Column]) -> dict[str, Any]:
    """An entry's facts, and its cells one by one."""
    first = cells[0]
    needs = [need for need, key in (("text", "needs_data"), ("back-propagation", "needs_backprop")) if first[key]]
    facts = {
        "method": f"{first['method']}: {first['summary']}",
        "paper": first["paper"],
        "sites": ", ".join(first["sites"]),
        "needs": ", ".join(needs) or "nothing",
        "differs from the base recipe in": settings_text(first["changes"]),
    }
    by_key = {column.key: column for column in columns}
    axes = [key for key in ("format", "bits", "rounding") if key in first]
    keys = ["perplexity", "second_perplexity", "kl", "top1"]
    measured = [by_key[key] for key in keys if key in by_key and any(cell.get(key) is not None for cell in cells)]
    seconds = [cell["fit_seconds"] for cell in cells if cell.get("fit_seconds") is not None]
    return {
        "label": first["label"],
        "remark": f"fit {human_seconds(sum(seconds) / len(seconds))}" if seconds else "no result",
        "facts": {key: value for key, value in facts.items() if value},
        "titles": [*axes, "seed", *(column.title for column in measured)],
        "cells": [
            [*(cell[axis] for axis in axes), str(cell["seed"]), *(column.text(cell) for column in measured)]
            for cell in cells
        ],
        "failures": list(dict.fromkeys(f"{_kind(x)}: {x['failed']}" for x in cells if x.get("failed"))),
    }
