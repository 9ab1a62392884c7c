"""What a run's data may hold, read so that what is missing or of another kind is left out: pages are drawn of any."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Data", "in_words", "items", "number", "part", "plain_json"]

Data = Mapping[str, Any]


def part(data: Data, key: str) -> Data:
    """A mapping inside a mapping; empty if it isn't there."""
    value = data.get(key)
    return value if isinstance(value, Mapping) else {}


def items(value: Any) -> Sequence[Any]:
    """A list; an empty one if it is none."""
    return value if isinstance(value, list | tuple) else ()


def number(value: Any) -> float | None:
    """A finite number, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def in_words(value: Any) -> str:
    """Text as it is, numbers with commas, the rest as JSON."""
    if isinstance(value, bool) or not isinstance(value, int | float | Mapping | list | tuple):
        return str(value)
    return f"{value:,}" if isinstance(value, int | float) else plain_json(value)


def plain_json(value: Any) -> str:
    """JSON on one line; what it does not know is written as text."""
    return json.dumps(value, ensure_ascii=False, default=str)
