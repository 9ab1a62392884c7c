"""The comparison of methods as a table: one definition of its columns for terminal, documentation and page.

A row is a mapping with `name` and any of the measured quantities; a column appears if some row has its value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Column", "cells", "columns_of", "comparison_table", "human_bytes", "human_seconds", "perplexity_text"]

Row = Mapping[str, Any]
ABSENT = "–"


@dataclass(frozen=True)
class Column:
    """One quantity: its key in a row, its heading, how it is written, and what it means."""

    key: str
    title: str
    write: Callable[[Any], str]
    meaning: str

    def text(self, row: Row) -> str:
        """The cell's text; a dash where nothing was measured."""
        value = row.get(self.key)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ABSENT
        return self.write(value)


def human_seconds(seconds: float) -> str:
    """`0.42 s`, `12.3 s`, `4 min 05 s`, `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {rest:02d} s"


def human_bytes(size: float) -> str:
    """`512 B`, `1.5 MB`: three significant digits in powers of 1000."""
    unit = "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size /= 1000 if unit != "TB" else 1
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"


def perplexity_text(value: float) -> str:
    """`24.10`, `2,412`, `3.10e+07`."""
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"


COLUMNS = (
    Column("name", "method", str, "what stood on the wires before rounding"),
    Column("bits", "bits", str, "weights, activations, KV cache"),
    Column("perplexity", "perplexity", perplexity_text, "exp of the mean loss per token; lower is better"),
    Column("kl", "KL", "{:.4f}".format, "divergence from the original's predictions, nats per token; 0 is identical"),
    Column("top1", "top-1", "{:.1%}".format, "tokens where the original's first choice is kept"),
    Column("seconds", "time", human_seconds, "time to make this row"),
)


def columns_of(rows: Sequence[Row], columns: Sequence[Column] = COLUMNS) -> list[Column]:
    """The columns that some row has a value for; the name always."""
    return [c for c in columns if c.key == "name" or any(c.text(row) != ABSENT for row in rows)]


def cells(rows: Sequence[Row], columns: Sequence[Column] = COLUMNS) -> list[list[str]]:
    """The text of every cell, row by row."""
    shown = columns_of(rows, columns)
    return [[column.text(row) for column in shown] for row in rows]


def comparison_table(rows: Sequence[Row], columns: Sequence[Column] = COLUMNS) -> str:
    """GitHub-flavoured Markdown, numbers to the right, padded so that it is a table in a terminal too."""
    head = [_one_line(column.title) for column in columns_of(rows, columns)]
    body = [[_one_line(text) for text in line] for line in cells(rows, columns)]
    widths = [max(3, *(len(line[i]) for line in [head, *body])) for i in range(len(head))]

    def line(texts: Sequence[str]) -> str:
        padded = (t.ljust(w) if i == 0 else t.rjust(w) for i, (t, w) in enumerate(zip(texts, widths, strict=True)))
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(head), line(rule), *map(line, body)]) + "\n"


def _one_line(text: str) -> str:
    """A pipe or a line break in a name must not make a cell or a row."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
