"""What the report promises: one file that needs nothing else, data that arrive in the figures, text that stays text.

- nothing is loaded from anywhere, and the policy forbids it and every script but the two in the file;
- what comes from names, paths and recipes can't become markup or end a script;
- a part of a run that is missing leaves its section out and nothing else.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from spinfold.errors import SpinfoldError
from spinfold.evaluation.outliers import MEASURED_WIRES, Outliers, Surface
from spinfold.recipe import Recipe
from spinfold.report import build_report, comparison_table, figures, write_report
from spinfold.report.tables import human_bytes, human_seconds

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"' & {{ 7 * 7 }}"
LOADING = {"src", "href", "srcset", "data", "action", "poster", "background", "ping", "formaction", "xlink:href"}

RUN: dict[str, Any] = {
    "schema_version": 1,
    "spinfold": "0.1.0",
    "created": "2026-01-02T03:04:05Z",
    "command": "spinfold quantize tiny -o run",
    "model": {"name": "Tiny-1M", "family": "llama", "parameters": 1_000_000, "fingerprint": "abc", "bytes": 2_000_000},
    "recipe": Recipe().model_dump(mode="json"),
    "device": {"name": "a CPU", "torch": "2.13"},
    "text": {"calibration": "sotu", "evaluation": "last fifth of sotu", "evaluation_tokens": 4088, "seq_len": 512},
    "stages": [
        {"name": "fit rotations", "seconds": 71.25, "peak_bytes": 1_500_000_000},
        {"name": "round", "seconds": 3, "peak_bytes": 2_000_000_000},
    ],
    "proofs": [
        {"statement": "same function", "measured": 3e-7, "tolerance": 1e-5, "ok": True},
        {"statement": "reloads", "measured": 0.5, "tolerance": 1e-2, "ok": False, "detail": "layer 3"},
    ],
    "fit": {"losses": [4.0, 3.5, 3.25, 3.0], "seconds": 71.25, "orthogonality": {"residual": 1e-15, "value": 0.0}},
    "rounding": [
        {"layer": layer, "role": role, "error": error, "nearest_error": 10.0**-1.5, "bits_per_weight": 4.1}
        for layer in range(3)
        for role, error in (("q", 1e-2), ("k", 1e-2), ("down", 1e-3))
    ],
    "sizes": {"original_bytes": 2_000_000, "quantized_bytes": 500_000, "bits_per_weight": 4.1},
    "metrics": {
        "tokens": 4096,
        "rows": [
            {"name": "original", "perplexity": 17.3, "kl": 0.0, "top1": 1.0, "seconds": 2.0},
            {"name": "none", "perplexity": 5000.4, "kl": 5.5, "top1": 0.05, "seconds": 20.0},
            {"name": "spinquant", "perplexity": 19.84, "kl": 0.123456, "top1": 0.801, "seconds": 95.0},
        ],
    },
}


def outliers(scale: float, places: tuple[tuple[int, str], ...] = ((1, "down"), (2, "qkv_input"))) -> Outliers:
    tables = np.random.default_rng(0).uniform(2, 90, (4, 3, len(MEASURED_WIRES))) * scale
    peaks = np.linspace(0, scale, 20, dtype=np.float32).reshape(4, 5)
    return Outliers(MEASURED_WIRES, *tables, tokens=64, surfaces=tuple(Surface(*p, peaks, 2, 3) for p in places))


BEFORE, AFTER = outliers(8.0), outliers(1.0)


class Page(HTMLParser):
    """The elements of a page, its scripts and what can be read in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            attrs, text = self.scripts[-1]
            self.scripts[-1] = attrs, text + data
        elif self.cdata_elem is None:
            self.text += data

    @property
    def lines(self) -> list[str]:
        return [line.strip() for line in self.text.splitlines() if line.strip()]

    @property
    def figures(self) -> list[dict[str, Any]]:
        return next((json.loads(t) for a, t in self.scripts if a.get("type") == "application/json"), [])

    @property
    def code(self) -> list[str]:
        return [text for attrs, text in self.scripts if "type" not in attrs]

    @property
    def policy(self) -> str:
        metas = (attrs for tag, attrs in self.tags if tag == "meta")
        return next(str(a["content"]) for a in metas if a.get("http-equiv") == "Content-Security-Policy")


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(build_report(RUN, BEFORE, AFTER, folder="run"))


def poisoned(data: Any) -> Any:
    """The same data with every string, keys of fits included, replaced by an attack."""
    if isinstance(data, dict):
        return {key: poisoned(value) for key, value in data.items()}
    if isinstance(data, list):
        return [poisoned(value) for value in data]
    return EVIL if isinstance(data, str) else data


# ---- self-containment ------------------------------------------------------------------------------------------


def test_nothing_is_loaded(page: Page) -> None:
    for tag, attrs in page.tags:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form", "img", "video", "audio"}
        assert not LOADING & attrs.keys(), (tag, attrs)
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        assert attrs.get("http-equiv", "Content-Security-Policy") == "Content-Security-Policy"
    style = build_report({}).split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_the_policy_runs_these_scripts_and_forbids_the_rest(page: Page) -> None:
    rules = dict(rule.strip().split(" ", 1) for rule in page.policy.split(";"))
    assert rules["default-src"] == "'none'"
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in page.code}
    assert set(rules["script-src"].split()) == hashes
    assert len(hashes) == 2
    assert not re.search(r"https?:|unsafe-eval|\*", page.policy)


def test_plotly_is_embedded_once_and_only_if_there_is_something_to_draw(page: Page) -> None:
    assert sum(len(text) > 1_000_000 for text in page.code) == 1
    assert len(build_report({"model": {"name": "x"}})) < 50_000


# ---- untrusted text --------------------------------------------------------------------------------------------


def test_no_text_becomes_markup(page: Page) -> None:
    run = poisoned(RUN)
    run["fit"]["orthogonality"] = {EVIL: 1e-9}
    bad = Page(build_report(run, BEFORE, AFTER, folder=EVIL))
    attacks = sum(tag == "img" or "onerror" in attrs for tag, attrs in bad.tags)
    assert attacks == 0
    assert bad.code == page.code
    assert len(bad.scripts) == 3
    assert bad.text.count("alert(1)") > 10  # it is there, to be read
    assert "49" not in bad.lines[2]  # and no template of its own
    for figure in bad.figures:
        assert "<script" not in json.dumps(figure)


# ---- the data arrive -------------------------------------------------------------------------------------------


def test_the_first_screen_says_what_to_what_and_how_well(page: Page) -> None:
    for text in (
        "Tiny-1M",
        "W4A4KV4: weights 4 bit, activations 4 bit, KV cache 4 bit",
        "GPTQ, one scale per output row",
        "19.84",
        "original 17.30",
        "0.1235",
        "80.1%",
        "4.0× smaller",
        "500 kB",
        "3e-07 ≤ 1e-05",
        "0.5 is not ≤ 0.01",
        "Measured on: last fifth of sotu, 4,088 predicted tokens in windows of 512.",
        "evaluate('run', text=",
        "spinfold evaluate run --text",
        "method: spinfold",
        "spinfold quantize tiny -o run",
    ):
        assert text in page.text, text


@pytest.mark.parametrize(
    ("proof", "held"),
    [
        ({"measured": 1, "tolerance": 2}, True),
        ({"measured": 1, "tolerance": 2, "ok": True}, True),
        ({"measured": 1, "tolerance": 2, "ok": False}, False),
        ({"measured": 3, "tolerance": 2, "ok": True}, False),
        ({"measured": float("nan"), "tolerance": 2, "ok": True}, False),
        ({"ok": True}, False),
    ],
)
def test_a_proof_holds_by_its_numbers(proof: dict[str, Any], held: bool) -> None:
    text = Page(build_report({"proofs": [{"statement": "s", **proof}]})).text
    assert ("✓" in text, "✗" in text) == (held, not held)


def test_every_figure_is_valid_and_colours_follow_the_page(page: Page) -> None:
    style = build_report({}).split("<style>")[1].split("</style>")[0]
    variables = set(re.findall(r"(--[a-z]+):", style))
    assert len(page.figures) == sum(attrs.get("class") == "plot" for _, attrs in page.tags) == 4 + 12 + 2 + 2 + 2 + 2
    for figure in page.figures:
        go.Figure(figure)  # raises on a property that Plotly does not know
        assert set(re.findall(r"var\((--[a-z]+)\)", json.dumps(figure))) <= variables


def test_surfaces_share_scale_and_keep_peaks(page: Page) -> None:
    pictures = [figure for figure in page.figures if figure["data"][0]["type"] == "surface"]
    assert [np.max(figure["data"][0]["z"]) for figure in pictures] == [8, 1, 8, 1]
    assert {figure["data"][0]["cmax"] for figure in pictures} == {8}
    assert pictures[0]["data"][0]["x"] == [0, 3, 6, 9, 12]
    assert pictures[0]["data"][0]["y"] == [0, 2, 4, 6]


def test_statistics_arrive(page: Page) -> None:
    panels = [f for f in page.figures if f["layout"].get("yaxis", {}).get("title", {}).get("text") == "kurtosis"]
    assert len(panels) == len(MEASURED_WIRES)
    for i, panel in enumerate(panels):
        for trace, source in zip(panel["data"], (BEFORE, AFTER), strict=True):
            np.testing.assert_allclose(trace["y"], source.kurtosis_LW[:, i], rtol=1e-3)


def heat_maps(page: Page) -> list[dict[str, list[float | None]]]:
    """Of each: the errors over layers, by linear."""
    traces = [figure["data"][0] for figure in page.figures if figure["data"][0]["type"] == "heatmap"]
    return [dict(zip(trace["y"], trace["z"], strict=True)) for trace in traces]


def test_rounding_error_of_each_layer_and_linear_by_both_roundings(page: Page) -> None:
    nearest = {role: [-15.0] * 3 for role in ("q", "k", "down")}
    assert heat_maps(page) == [nearest, {"q": [-20.0] * 3, "k": [-20.0] * 3, "down": [-30.0] * 3}]
    spans = {(f["data"][0]["zmin"], f["data"][0]["zmax"]) for f in page.figures if f["data"][0]["type"] == "heatmap"}
    assert len(spans) == 1, "what is compared shares its colours"


def test_rounding_to_nearest_has_one_heat_map_and_gaps_where_nothing_was_measured() -> None:
    run = copy.deepcopy(RUN) | {"recipe": Recipe().with_(rounding__method="rtn").model_dump(mode="json")}
    for entry in run["rounding"]:
        entry["error"] = entry["nearest_error"] = None if entry["layer"] == 1 else 0.1 * (entry["layer"] == 0)
    shown = Page(build_report(run))
    assert heat_maps(shown) == [{role: [-10.0, None, None] for role in ("q", "k", "down")}]
    assert "better than nearest" not in shown.text


def test_rounding_in_decibels_with_nearest_beside_it(page: Page) -> None:
    panels = [f for f in page.figures if f["layout"].get("yaxis", {}).get("title", {}).get("text") == "error, dB"]
    assert [[trace["name"] for trace in panel["data"]] for panel in panels] == [["nearest", "GPTQ"]] * 2
    assert panels[0]["data"][0]["y"] == [-15.0] * 3
    assert [panel["data"][1]["y"] for panel in panels] == [[-20.0] * 3, [-30.0] * 3]
    assert "8.3 dB better than nearest" in page.text
    assert {"q, k", "down"} <= set(page.lines), "linears with the same errors share a panel"


def test_the_error_of_experts_is_their_mean() -> None:
    run = copy.deepcopy(RUN)
    run["rounding"] = [{"layer": 0, "role": "up", "error": error, "nearest_error": None} for error in (0.02, 0.18)]
    (panel,) = (
        f
        for f in Page(build_report(run)).figures
        if f["layout"].get("yaxis", {}).get("title", {}).get("text") == "error, dB"
    )
    assert [trace["y"] for trace in panel["data"]] == [[-10.0]]


@pytest.mark.parametrize(
    ("rounding", "name", "words"),
    [
        ({"method": "gptq"}, "GPTQ", "Squared error of a linear's output"),
        ({"method": "ldlq", "absorb": 1e-4}, "OSAQ, LDLQ", "Squared error of a linear's output"),
        ({"method": "rtn", "absorb": 1e-4}, "OSAQ, nearest", "Squared error of a linear's output"),
        ({"method": "gptaq"}, "GPTAQ", "from what it aims at"),
        ({"method": "autoround"}, "AUTOROUND", "Squared error of a linear's output"),
    ],
)
def test_the_caption_says_what_the_error_is_of(rounding: dict[str, Any], name: str, words: str) -> None:
    run = copy.deepcopy(RUN)
    run["recipe"]["rounding"] |= rounding
    page = Page(build_report(run))
    assert words in page.text
    assert f"{name} is 8.3 dB better than nearest on average." in page.text


def test_the_first_screen_says_how_it_runs_and_whether_that_was_proved() -> None:
    run = copy.deepcopy(RUN)
    assert "not exported yet" in Page(build_report(run)).text
    run["exports"] = {"gguf": {"files": {"tiny.gguf": "0"}}}
    assert "not exported yet" in Page(build_report(run)).text, "an export that was not checked proves nothing"
    run["proofs"].append(
        {"statement": "gguf: relative change of perplexity", "measured": 0, "tolerance": 0.1, "ok": True}
    )
    page = Page(build_report(run))
    assert "not exported yet" not in page.text
    assert "llama-cli -m CHECKPOINT/tiny.gguf" in page.lines


def test_the_fit_and_the_costs(page: Page) -> None:
    curve = next(f for f in page.figures if f["layout"].get("xaxis", {}).get("title", {}).get("text") == "step")
    assert curve["data"][0]["y"] == RUN["fit"]["losses"]
    bars = [f["data"][0] for f in page.figures if f["data"][0]["type"] == "bar"]
    assert [dict(zip(bar["y"], bar["x"], strict=True)) for bar in bars] == [
        {"fit rotations": 71.25, "round": 3},
        {"fit rotations": 1.5, "round": 2},
    ]


# ---- missing parts ---------------------------------------------------------------------------------------------

SECTIONS = {
    "metrics": "Quality",
    "proofs": "Proofs",
    "sizes": "Size of the linear weights, packed",
    "rounding": "Rounding error",
    "fit": "The fit",
    "stages": "What it cost",
    "recipe": "Recipe",
}


@pytest.mark.parametrize("missing", SECTIONS)
@pytest.mark.parametrize("how", ["absent", "empty", "null"])
def test_a_missing_part_leaves_out_its_section_alone(page: Page, missing: str, how: str) -> None:
    run = copy.deepcopy(RUN)
    if how == "absent":
        del run[missing]
    else:
        run[missing] = None if how == "null" else type(run[missing])()
    lines = Page(build_report(run)).lines
    assert [name for name in SECTIONS.values() if name not in lines] == [SECTIONS[missing]]
    assert all(name in page.lines for name in SECTIONS.values())


@pytest.mark.parametrize(("before", "after"), [(None, None), (BEFORE, None), (None, AFTER)])
def test_outliers_may_be_missing(before: Outliers | None, after: Outliers | None) -> None:
    lines = Page(build_report(RUN, before, after)).lines
    assert ("Kurtosis" in lines) == ("Where the outliers are" in lines) == (before is not after)


def test_an_empty_run_still_makes_a_page() -> None:
    assert "Use it" in Page(build_report({}, folder="run")).lines


def test_nan_makes_gaps_and_not_invalid_json() -> None:
    run = copy.deepcopy(RUN)
    run["fit"]["losses"][1] = run["rounding"][0]["error"] = run["metrics"]["rows"][1]["perplexity"] = float("nan")
    before = outliers(1.0)
    before.kurtosis_LW[0, 0] = np.inf
    before.surfaces[0].peaks_TC[0, 0] = np.nan
    page = Page(build_report(run, before))
    assert page.figures
    assert "NaN" not in json.dumps(page.figures)


# ---- files -----------------------------------------------------------------------------------------------------


def test_write_report_reads_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(RUN), "utf-8")
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert "Kurtosis" not in Page(path.read_text("utf-8")).lines
    BEFORE.save(tmp_path / "outliers-before.npz")
    AFTER.save(tmp_path / "outliers-after.npz")
    assert write_report(tmp_path).read_text("utf-8") == build_report(RUN, BEFORE, AFTER, folder=tmp_path.name)
    assert not [name for name in tmp_path.iterdir() if name.name.startswith(".")]


@pytest.mark.parametrize("content", [None, "", "[1]", "{"])
def test_a_folder_without_a_run_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(SpinfoldError, match="not the folder of a run"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


# ---- tables and numbers ----------------------------------------------------------------------------------------


def test_comparison_table() -> None:
    assert comparison_table(RUN["metrics"]["rows"]) == (
        "| method    | perplexity |     KL |  top-1 |       time |\n"
        "| --------- | ---------: | -----: | -----: | ---------: |\n"
        "| original  |      17.30 | 0.0000 | 100.0% |     2.00 s |\n"
        "| none      |      5,000 | 5.5000 |   5.0% |     20.0 s |\n"
        "| spinquant |      19.84 | 0.1235 |  80.1% | 1 min 35 s |\n"
    )


def test_a_name_stays_in_its_cell_and_absent_columns_stay_away() -> None:
    table = comparison_table([{"name": "a|b\nc", "perplexity": 2.0}, {"name": "d", "perplexity": None}])
    assert table.splitlines()[0].count("|") == 3
    assert "a\\|b c" in table
    assert table.splitlines()[3].split("|")[2].strip() == "–"
    assert len(table.splitlines()) == 4


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.416, "0.42 s"), (12.34, "12.3 s"), (59.99, "60.0 s"), (245, "4 min 05 s"), (7620, "2 h 07 min")],
)
def test_human_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (512, "512 B"), (1500, "1.5 kB"), (538_060_032, "538 MB"), (2e15, "2000 TB")]
)
def test_human_bytes(size: float, text: str) -> None:
    assert human_bytes(size) == text


def test_decibels() -> None:
    assert [figures.decibels(x) for x in (1.0, 0.01, 0.0, None, float("inf"))] == [0.0, -20.0, None, None, None]
