"""The table of a comparison: the records of its cells as rows, and the rows as Markdown and CSV.

A row is a label at its bits and rounding: means over seeds of what varies, extremes of what is bounded. `COLUMNS` has
one definition of every column; table.json and table.csv have all of the rows' keys, unrounded.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spinfold.report.tables import Column, comparison_table, human_bytes, human_seconds, perplexity_text

__all__ = ["comparison_columns", "comparison_csv", "comparison_markdown", "comparison_rows", "settings_text"]

Data = Mapping[str, Any]

_MEANS = ("bits_per_weight", "fit_seconds", "rounding_seconds", "rounding_layer_seconds", "evaluation_seconds")
_MAXIMA = (
    *("fit_peak_bytes", "rounding_peak_bytes", "rounding_layer_bytes"),
    *("online_flops", "online_bytes", "samples", "invariance"),
)
KEYS = (
    *("name", "method", "format", "bits", "rounding", "seeds"),
    *(prefix + key for prefix in ("", "second_") for key in ("perplexity", "perplexity_sd")),
    *(prefix + key for prefix in ("", "second_") for key in ("perplexity_min", "perplexity_max", "kl", "top1")),
    *("task_accuracy", *_MEANS, *_MAXIMA, "needs_data", "needs_backprop", "settings", "failed"),
)
"""The keys of a row, and the columns of table.csv."""


def comparison_rows(cells: Iterable[Data]) -> list[dict[str, Any]]:
    """The rows: the original, then by bits, format, rounding and entry, as the grid lists them."""
    groups: dict[tuple[Any, ...], list[Data]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.get("order") or [-1], cell["label"], cell["seed"])):
        groups.setdefault(tuple(cell.get(key) for key in ("label", "format", "bits", "rounding")), []).append(cell)
    return [_row(same) for same in groups.values()]


def _row(cells: Sequence[Data]) -> dict[str, Any]:
    """One row of the cells that differ in their seed alone. Figures are those of the seeds that did not fail."""
    first, failures = cells[0], [cell for cell in cells if cell.get("failed")]
    row: dict[str, Any] = dict.fromkeys(KEYS)
    row |= {"name": first["label"]} | {key: first.get(key) for key in ("method", "format", "bits", "rounding")}
    row |= {key: first.get(key) for key in ("needs_data", "needs_backprop")}
    row["settings"] = settings_text(first.get("changes") or {}) or None
    row["seeds"] = len(cells) - len(failures) if first["label"] != "original" else None
    for prefix in ("", "second_"):
        if found := _values(cells, f"{prefix}perplexity"):
            row[f"{prefix}perplexity_min"], row[f"{prefix}perplexity_max"] = min(found), max(found)
            row[f"{prefix}perplexity_sd"] = statistics.stdev(found) if len(found) > 1 else None
        row |= {prefix + key: _mean(_values(cells, prefix + key)) for key in ("perplexity", "kl", "top1")}
    row |= {key: _mean(_values(cells, key)) for key in ("task_accuracy", *_MEANS)}
    row |= {key: max(_values(cells, key), default=None) for key in _MAXIMA}
    if failures:
        row["failed"] = f"{len(failures)} of {len(cells)}: {failures[0]['failed']}"
    return row


def _values(cells: Sequence[Data], key: str) -> list[Any]:
    """The numbers that there are."""
    return [value for cell in cells if (value := cell.get(key)) is not None and math.isfinite(value)]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def settings_text(changes: Data) -> str:
    """`activations.clip=0.9, fit.steps=0`: what differs from the base."""
    return ", ".join(f"{key}={value}" for key, value in changes.items())


def comparison_columns(texts: Sequence[str]) -> list[Column]:
    """The columns for people; the titles say which text a figure is of where there are two."""
    columns = [
        Column("name", "method", str, "the entry's label"),
        Column("format", "format", str, "the number format of weights and activations"),
        Column("bits", "bits", str, "weights, activations, KV cache"),
        Column("bits_per_weight", "bits per weight", "{:.2f}".format, "of the linears, scales included"),
        Column("rounding", "rounding", str, "how weights got onto the grid"),
        Column("seeds", "seeds", str, "number of seeds that the means are over"),
    ]
    for prefix, text in zip(("", "second_"), texts, strict=False):
        of = f", {text}" if len(texts) > 1 else ""
        columns += [
            Column(f"{prefix}perplexity", f"perplexity{of}", perplexity_text, f"on {text}: exp of the mean loss"),
            Column(f"{prefix}perplexity_sd", f"sd{of}", _spread, "standard deviation over seeds"),
            Column(f"{prefix}perplexity_min", f"min{of}", perplexity_text, "the best seed"),
            Column(f"{prefix}perplexity_max", f"max{of}", perplexity_text, "the worst seed"),
            Column(f"{prefix}kl", f"KL{of}", "{:.4f}".format, "divergence from the original, nats per token"),
            Column(f"{prefix}top1", f"top-1{of}", "{:.1%}".format, "tokens whose first choice is the original's"),
        ]
    return [
        *columns,
        Column(
            "task_accuracy", "tasks", "{:.2%}".format, "mean accuracy on zero-shot tasks, acc_norm where there is one"
        ),
        Column("fit_seconds", "fit", human_seconds, "time to fit, fold and prove"),
        Column("rounding_seconds", "round", human_seconds, "time to round the weights, and to search clip ratios"),
        Column("rounding_layer_seconds", "round a layer", human_seconds, "mean time to round the linears of a layer"),
        Column("evaluation_seconds", "evaluate", human_seconds, "time to measure"),
        Column("samples", "samples", "{:,}".format, "windows or rows that the fit saw, repeats counted"),
        Column(
            "fit_peak_bytes", "fit memory", human_bytes, "most GPU memory of the fit, beyond the model and the texts"
        ),
        Column("rounding_peak_bytes", "round memory", human_bytes, "the same of the rounding"),
        Column("rounding_layer_bytes", "layer memory", human_bytes, "most of the rounding of a layer"),
        Column("online_flops", "online flops", human_count, "of online maps, per token"),
        Column("online_bytes", "online bytes", human_bytes, "parameters of online maps, read once per token"),
        Column("invariance", "invariance", "{:.0e}".format, "relative logit error of the folded network, unrounded"),
        Column("needs_data", "data", _yes_no, "does the fit need calibration text"),
        Column("needs_backprop", "backprop", _yes_no, "does the fit need gradients through the whole network"),
        Column("settings", "settings", str, "what differs from the base recipe"),
        Column("failed", "failed", str, "seeds without a result, and why"),
    ]


def comparison_markdown(data: Data) -> str:
    """The contents of table.md."""
    return comparison_table(data["rows"], comparison_columns(data["texts"]))


def comparison_csv(data: Data) -> str:
    """The contents of table.csv: every key of every row, numbers as they are, nothing where there is no value."""
    text = io.StringIO()
    writer = csv.DictWriter(text, KEYS)
    writer.writeheader()
    writer.writerows(data["rows"])
    return text.getvalue()


def human_count(number: float) -> str:
    """`950`, `1.2 M`: three significant digits in powers of 1000."""
    unit = ""
    for unit in ("", "k", "M", "G", "T"):
        if number < 999.5:
            break
        number /= 1000 if unit != "T" else 1
    return f"{number:.3g} {unit}".rstrip()


def _spread(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else perplexity_text(value)


def _yes_no(value: bool) -> str:
    return "yes" if value else "no"
