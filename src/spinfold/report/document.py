"""What the pages have in common: one HTML file that needs nothing else, no network, no server, no second file.

    template (extends frame.html) + style.css + page.js + Plotly  →  HTML

Names, paths and recipes are untrusted text: Jinja escapes them in HTML, `_script_json` in data, and the content
security policy runs only the scripts whose hashes it holds and forbids every request.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from spinfold.errors import SpinfoldError
from spinfold.report import figures

__all__ = ["Chart", "Section", "render"]


@dataclass
class Chart:
    """One figure of a section; charts of one `pair` turn together."""

    title: str
    figure: figures.Figure
    pair: str = ""


@dataclass
class Section:
    """A heading, one sentence that says how to read the figures, and the figures."""

    title: str
    caption: str
    charts: list[Chart]
    layout: str = "wide"  # or "panels" or "pairs": how many stand side by side
    legend: dict[str, str] = field(default_factory=dict)  # name of a series → "before" or "after"


def render(template: str, sections: Sequence[Section], scripts: Sequence[str] = (), **values: Any) -> str:
    """The HTML of a template with `values`, the charts of its sections drawn, and `scripts` run besides."""
    charts = [chart for section in sections for chart in section.charts]
    texts = [_plotly(), _part("page.js")] if charts else []
    texts += [_part(name) for name in scripts]
    environment = Environment(
        loader=FunctionLoader(_part), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(
        sections=sections,
        data=_script_json([chart.figure for chart in charts]),
        style=Markup(_part("style.css")),
        scripts=[Markup(text) for text in texts],
        policy=_policy(*texts),
        **values,
    )


def _script_json(value: Any) -> Markup:
    """JSON that can't end its script element: no `<`, `>` or `&` survives."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _policy(*scripts: str) -> str:
    """Run the scripts with these very bytes, draw, and ask nobody for anything."""
    digests = (hashlib.sha256(text.encode()).digest() for text in scripts)
    hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests) or "'none'"
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _part(name: str) -> str:
    return (resources.files("spinfold.report") / name).read_text("utf-8").replace("\r\n", "\n")


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise SpinfoldError(
            "The report needs Plotly.", "It is not installed.", "Run `pip install plotly` and `spinfold report` again."
        ) from None
    return str(get_plotlyjs()).replace("\r\n", "\n")
