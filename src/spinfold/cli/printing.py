"""Results for people and programs, on standard output: tables, JSON, proofs, forecasts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

if TYPE_CHECKING:
    from spinfold.forecast import Forecast

__all__ = [
    "number_text",
    "print_cell",
    "print_forecast",
    "print_inspection",
    "print_json",
    "print_proof",
    "print_table",
    "print_tasks",
]


def print_json(value: object) -> None:
    """For programs; what JSON does not know is written as text."""
    print(json.dumps(_finite(value), indent=2, default=str))


def _finite(value: object) -> object:
    """JSON has no NaN and no infinity: these become null."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Columns with a heading, as wide as the terminal, or 160 characters in a file."""
    table = Table(*(Column(name, overflow="fold") for name in header), box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def print_cell(cell: Mapping[str, Any]) -> None:
    """A line for a cell of a comparison, as soon as it is measured."""
    names = ("perplexity", "second_perplexity", "kl", "fit_seconds", "rounding_seconds", "evaluation_seconds")
    numbers = ", ".join(f"{name.replace('_', ' ')} {number_text(cell[name])}" for name in names if cell.get(name))
    what = " ".join(str(cell[name]) for name in ("label", "format", "bits", "rounding") if cell.get(name))
    print(f"{what} seed {cell['seed']}: {cell.get('failed') or numbers}", flush=True)


def print_forecast(forecast: Forecast, as_json: bool) -> None:
    """The stages; then `SpinfoldError` if they don't fit."""
    from spinfold.report.tables import human_bytes, human_seconds

    if as_json:
        print_json(forecast.to_dict())
    else:
        rows = [(one.name, one.seconds, one.peak_bytes, one.peak_device_bytes) for one in forecast.stages]
        rows.append(("all", forecast.seconds, forecast.peak_bytes, forecast.peak_device_bytes))
        print_table(
            ("stage", "time", "memory", "GPU memory"),
            (
                (name, human_seconds(s), human_bytes(ram), "-" if gpu is None else human_bytes(gpu))
                for name, s, ram, gpu in rows
            ),
        )
    forecast.fits().require("This run does not fit on this machine.")


def print_inspection(found: Mapping[str, Any]) -> None:
    """What loses how much where, where the outliers are, and what to do."""
    from spinfold.report.inspect_page import place_rows, place_titles, spike_rows

    print_table(place_titles(found), place_rows(found))
    print()
    print_table(("outliers", "where"), spike_rows(found))
    advice = found["advice"]
    print(f"\n{'Rotate' if advice['rotate'] else 'Do not rotate'}. {advice['reason']}")
    print(f"Next: spinfold quantize {found['model']['name']} -o RUN {advice['options']}")


def print_tasks(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Accuracies in percent; how many of the published items stand behind each is said beside it."""
    rows = []
    for name, r in results.items():
        acc, error, norm = ("-" if r[key] is None else f"{100 * r[key]:.2f}" for key in ("acc", "stderr", "acc_norm"))
        rows.append((name, f"{r['items']:,} of {r['split_items']:,}", acc, error, norm))
    print_table(("task", "items", "acc %", "±", "acc_norm %"), rows)


def print_proof(proof: Mapping[str, Any]) -> None:
    """What was measured, and its bound."""
    relation = "≤" if proof["ok"] else ">"
    print(f"{proof['statement']}: {proof['measured']:.2g} {relation} {proof['tolerance']:.2g}")
    if proof.get("detail"):
        print(proof["detail"])


def number_text(value: object) -> str:
    """Four significant digits; a dash where there is nothing."""
    if value is None:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
