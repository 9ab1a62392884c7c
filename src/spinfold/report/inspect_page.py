"""What an inspection found, for people: rows of a table for the terminal and the page, and the page.

inspect.json, outliers  →  figures.py  →  inspect.html, drawn by document.py  →  index.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spinfold.evaluation.outliers import Outliers
from spinfold.report import figures
from spinfold.report.document import Chart, Section, render
from spinfold.report.outlier_sections import WIRE_TITLES, outlier_panels, surfaces
from spinfold.report.tables import ABSENT, human_seconds, perplexity_text

__all__ = ["build_inspection", "place_rows", "place_titles", "spike_rows"]

Data = Mapping[str, Any]
_BASES = {"plain": "before", "rotated": "after"}  # as the figures call and colour them


def build_inspection(data: Data, before: Outliers, after: Outliers) -> str:
    """The page's HTML, of the contents of inspect.json and the outliers as the model is and rotated."""
    advice, whole, model = data["advice"], data["whole"], data["model"]
    bits = data["recipe"]["bits"]
    tiles = [
        ("original", perplexity_text(data["original"]["perplexity"]), "perplexity"),
        (f"{bits}, as it is", f"{whole['plain']['kl']:.3g}", "nats per token lost"),
        (f"{bits}, rotated", f"{whole['rotated']['kl']:.3g}", "nats per token lost"),
        ("time", human_seconds(data["seconds"]), "on {} × {} tokens".format(*data["text"]["windows"])),
    ]
    return render(
        "inspect.html",
        [*_losses(data["places"]), *surfaces(before, after), *outlier_panels(before, after)],
        name=model["name"],
        answer="Rotate" if advice["rotate"] else "Don't rotate",
        reason=advice["reason"],
        tiles=tiles,
        command=f"spinfold quantize {model['name']} -o RUN {advice['options']}",
        unsafe=[_unsafe(one) for one in advice["unsafe"]],
        safe_kl=f"{data['safe_kl']:g}",
        titles=place_titles(data),
        rows=place_rows(data),
        spikes=spike_rows(data),
    )


def place_titles(data: Data) -> list[str]:
    """The heading of each column of `place_rows`."""
    bits = _all_bits(data["places"])
    return ["place", "safe bits", "rotated", *(f"{b} bits" for b in bits), *(f"{b} bits, rotated" for b in bits)]


def place_rows(data: Data) -> list[list[str]]:
    """Of each place its name, the safe bits, and the loss at each number of bits: as the model is, and rotated."""
    bits = _all_bits(data["places"])
    rows = []
    for place in data["places"]:
        safe = [str(place[basis]["safe_bits"] or "16") for basis in _BASES]
        losses = [place[basis]["kl"].get(str(b)) for basis in _BASES for b in bits]
        rows.append([_title(place), *safe, *(ABSENT if kl is None else f"{kl:.2g}" for kl in losses)])
    return rows


def spike_rows(data: Data) -> list[tuple[str, str]]:
    """Where the outliers are, in words: the channels of each wire that has some, and the massive tokens."""
    rows = []
    for wire in data["wires"]:
        layers_of: dict[str, list[tuple[int, float]]] = {}
        for layer, channels in wire["channels"].items():
            for channel, times in channels.items():
                layers_of.setdefault(str(channel), []).append((int(layer), times))
        most = sorted(layers_of.items(), key=lambda item: (-len(item[1]), -max(times for _, times in item[1])))
        if most:
            words = [
                f"{channel} ({_count(len(where), 'layer')}, up to {max(times for _, times in where):.0f} times)"
                for channel, where in most[:5]
            ]
            rest = f", and {len(most) - 5} more" if len(most) > 5 else ""
            rows.append((WIRE_TITLES.get(wire["wire"], wire["wire"]), f"channel {', '.join(words)}{rest}"))
    for token in data["tokens"]:
        layers = token["layers"]
        where = f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
        name = f"window {token['window']}, token {token['position']}"
        rows.append((name, f"{token['text']!r}: |x| up to {token['largest']:,.0f} on the stream into {where}"))
    return rows or [("none", "no channel and no token stands out")]


def _losses(places: Sequence[Data]) -> list[Section]:
    """The loss of each place over bits."""
    series = {
        _title(place): {_BASES[basis]: {int(b): kl for b, kl in place[basis]["kl"].items()} for basis in _BASES}
        for place in places
    }
    span = figures.value_range([of.values() for both in series.values() for of in both.values()], log=True)
    if span is None:
        return []
    bits = _all_bits(places)
    charts = []
    for title, both in series.items():
        figure = figures.lines({name: [of.get(b) for b in bits] for name, of in both.items()}, "KL", span, log=True)
        for trace in figure["data"]:
            trace["x"] = bits
            trace["hovertemplate"] = trace["hovertemplate"].replace("layer", "bits")
        figure["layout"]["xaxis"] |= {"tickvals": bits, "title": {"text": "bits"}}
        charts.append(Chart(title, figure))
    caption = "KL to the original in nats per token with this place alone on the grid; a hundredth is safe."
    return [Section("What each place loses", caption, charts, "panels", {"as it is": "before", "rotated": "after"})]


def _unsafe(one: Data) -> str:
    need = f"{one['safe_bits']} bits are safe" if one["safe_bits"] else "no number of bits that was tried is safe"
    return f"{_title(one)}: {need}"


def _title(place: Data) -> str:
    wire = str(place["wire"])
    if place["kind"] == "weights":
        return f"weights of {', '.join(place['roles'])}"
    return WIRE_TITLES.get(wire, wire)


def _all_bits(places: Sequence[Data]) -> list[int]:
    return sorted({int(bits) for place in places for basis in _BASES for bits in place[basis]["kl"]})


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + "s" * (number != 1)
