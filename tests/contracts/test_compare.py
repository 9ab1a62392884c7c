"""A comparison's promises: stages are shared without a trace in the numbers, a killed one goes on, one job has one
owner, a failure is a row, and the tables say the same."""

from __future__ import annotations

import csv
import functools
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
import zoo
from pydantic import BaseModel
from task_items import write_items

import spinfold
from spinfold import bench, comparison, rotation
from spinfold.bench import ROTATION_READS, ROUNDING_READS, fit_key, online_cost
from spinfold.cli import main
from spinfold.comparison import compare, hold_jobs
from spinfold.errors import CheckFailed, SpinfoldError
from spinfold.evaluation import take_fingerprint
from spinfold.fitting.layerwise import LayerwiseSettings
from spinfold.folding import fold
from spinfold.grid import Grid
from spinfold.maps import Hadamard, SiteMaps
from spinfold.methods import METHODS
from spinfold.networks import Network
from spinfold.progress import Quiet
from spinfold.recipe import Recipe
from spinfold.report import figures
from spinfold.rotation import sites_of
from spinfold.rounding import ROUNDINGS, round_network
from spinfold.subject import Subject

HOSTILE = "</script><img src=x onerror=alert(1)> | & 'x'"
GRID: dict[str, Any] = {
    "entries": [
        "quarot",
        {"label": HOSTILE, "source": "quarot", "recipe": {"activations": {"clip": 0.9}}},
        {"label": "kurtail", "source": "kurtail", "bits": ["W4A4", "W4A16", "W16A4"], "rounding": ["gptq"]},
        "broken=dfrot:fit.objective=kurtosis",
    ],
    "rounding": ["rtn"],
    "seeds": [0, 1],
}
TIMES = re.compile("seconds")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.tiny_model(tmp_path_factory.mktemp("model") / "tiny", "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "rain.txt"
    path.write_text(tiny_run.TEXT, "utf-8")
    return path


def run(model: Path | None, output: Path, text: Path, grid: Any, **options: Any) -> spinfold.Comparison:
    base, place = tiny_run.recipe(text, compute="fp32"), None if model is None else str(model)
    given = {"recipe": base, "text": str(text), "max_tokens": 64, "device": "cpu"} | options
    return compare(place, output, grid if isinstance(grid, Grid) else Grid.parse(grid), **given)


@pytest.fixture(scope="module")
def whole(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> spinfold.Comparison:
    return run(model, tmp_path_factory.mktemp("whole") / "out", text, GRID, second_text=str(text))


def timeless(data: Any) -> Any:
    """Without what a clock says."""
    if isinstance(data, dict):
        return {key: timeless(value) for key, value in data.items() if not TIMES.search(key)}
    return [timeless(value) for value in data] if isinstance(data, list) else data


def records(output: Path) -> dict[str, Any]:
    return {path.stem: timeless(json.loads(path.read_text())) for path in (output / "cells").glob("*.json")}


def grid_of(data: Any, **base: Any) -> list[Any]:
    return Grid.parse(data).cells(Recipe().with_(**base))


# ---- the grid ------------------------------------------------------------------------------------------------------


def test_cells_are_the_product_seed_by_seed_as_listed() -> None:
    cells = grid_of(
        {"entries": ["quarot", "none"], "bits": ["W4A4KV4", "W3A16"], "rounding": ["gptq", "rtn"], "seeds": [0, 1]}
    )
    found = [(c.recipe.seed, c.label, c.recipe.bits, c.rounding) for c in cells]
    product = [
        (seed, label, bits, rounding)
        for seed in (0, 1)
        for label in ("quarot", "none")
        for bits in ("W4A4KV4", "W3A16KV16")
        for rounding in ("gptq", "rtn")
    ]
    assert found == product
    assert len({cell.name for cell in cells}) == len(cells)


FORMATS: dict[str, Any] = {
    "formats": {
        "INT4": {},
        "groups": {"group_size": 8, "weights": {"scale_dtype": "float16"}},
        "MXFP4": {"format": "mxfp4"},
        "MXFP6": {"format": "mxfp6", "bits": ["W6A16"]},
    },
    "entries": ["none", {"label": "block", "source": "block-hadamard", "formats": ["MXFP4", "INT4"]}],
    "bits": ["W4A4", "W4A16"],
    "rounding": ["rtn"],
}


def test_formats_are_an_axis_with_names_and_bits_of_their_own() -> None:
    cells = grid_of(FORMATS)
    found = [(c.label, c.format, c.recipe.bits, c.recipe.format, c.recipe.group_size) for c in cells]
    four = ("W4A4KV16", "W4A16KV16")
    assert found == [
        *(("none", "INT4", bits, "int", None) for bits in four),
        *(("none", "groups", bits, "int", 8) for bits in four),
        *(("none", "MXFP4", bits, "mxfp4", None) for bits in four),
        ("none", "MXFP6", "W6A16KV16", "mxfp6", None),
        *(("block", "MXFP4", bits, "mxfp4", None) for bits in four),
        *(("block", "INT4", bits, "int", None) for bits in four),
    ]
    assert len({cell.name for cell in cells}) == len(cells)
    by_row = sorted(cells, key=lambda cell: cell.order)
    assert [(c.format, c.label) for c in by_row if c.recipe.bits == four[0]] == [
        ("INT4", "none"), ("INT4", "block"), ("groups", "none"), ("MXFP4", "none"), ("MXFP4", "block"),
    ]  # fmt: skip
    with pytest.raises(SpinfoldError, match="no format is called 'FP4'"):
        grid_of(FORMATS | {"entries": [{"label": "a", "source": "none", "formats": ["FP4"]}]})


def test_a_cell_keeps_its_name_when_recipes_get_another_field() -> None:
    (cell,) = grid_of({"entries": ["quarot"]})
    assert cell.format is None
    identity = json.loads(cell.recipe.identity())
    assert set(identity["rounding"]) == {
        *("method", "damp", "act_order", "block_size", "alpha", "passes"),
        *("steps", "batch", "learning_rate", "absorb"),
    }
    assert set(identity["kv"]) == {"symmetric", "clip"}
    (other,) = grid_of({"entries": ["quarot:rounding.static_groups=false"]})
    assert json.loads(other.recipe.identity())["rounding"]["static_groups"] is False


def test_there_is_nothing_to_round_in_16_bits() -> None:
    cells = grid_of({"entries": ["none"], "bits": ["W16A4"], "rounding": ["gptq", "rtn"]})
    assert [cell.rounding for cell in cells] == ["none"]


@pytest.mark.parametrize(
    ("word", "label", "changes"),
    [
        ("quarot", "quarot", {}),
        ("quarot:kv.clip=0.9", "quarot:kv.clip=0.9", {"kv.clip": 0.9}),
        ("a=spinfold:fit.steps=0:activations.clip=0.85", "a", {"fit.steps": 0, "activations.clip": 0.85}),
        ("b=dfrot.yaml", "b", {"fit.steps": 100, "fit.batch": 1, "fit.seq_len": 2048, "calibration.samples": 128}),
    ],
)
def test_an_entry_in_a_word(word: str, label: str, changes: dict[str, Any]) -> None:
    (cell,) = grid_of({"entries": [word]})
    assert cell.label == label
    assert changes.items() <= cell.changes.items()
    assert cell.recipe.method == word.partition(":")[0].rpartition("=")[2].removesuffix(".yaml")


def test_what_an_entry_does_not_name_is_the_bases(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: kurtail\nfit: {steps: 7}\n")
    (cell,) = grid_of({"entries": [str(path)]}, kv__clip=0.5, fit__batch=3)
    assert (cell.recipe.method, cell.recipe.kv.clip) == ("kurtail", 0.5)
    assert (cell.recipe.fit.steps, cell.recipe.fit.batch) == (7, 3)
    assert cell.changes == {"fit.steps": 7}


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"entries": ["quarott"]}, "quarot"),
        ({"entries": ["a=none", "a=quarot"]}, "'a'"),
        ({"entries": ["original=none"]}, "'original'"),
        ({"entries": ["quarot:fit.stebs=3"]}, "steps"),
        ({"entries": ["quarot:steps"]}, "field=value"),
        ({"entries": ["nowhere.yaml"]}, "nowhere"),
        ({"entries": ["none"], "bits": ["W4"]}, "W4A4KV4"),
        ({"entries": ["none"], "rounding": ["up"]}, "rounding"),
        ({"entries": ["none"], "sheds": [1]}, "sheds"),
        ({"entries": [{"label": "x", "recipe": [1]}]}, "recipe"),
    ],
)
def test_a_grid_that_is_none_is_refused_by_name(data: Any, named: str) -> None:
    with pytest.raises(SpinfoldError, match=named):
        grid_of(data)


# ---- sharing -------------------------------------------------------------------------------------------------------


class Watched:
    """A recipe that notes what is read of it; properties and methods are looked into."""

    def __init__(self, of: Any, seen: set[str], known: tuple[str, ...], prefix: str = "") -> None:
        self.of, self.seen, self.known, self.prefix = of, seen, known, prefix

    def with_(self, **changes: Any) -> Watched:
        return Watched(self.of.with_(**changes), self.seen, self.known)

    def __getattr__(self, name: str) -> Any:
        path, member = self.prefix + name, getattr(type(self.of), name, None)
        if path in self.known:
            return getattr(self.of, name)
        if isinstance(member, property):
            assert member.fget is not None
            return member.fget(self)
        if callable(member):
            return functools.partial(member, self)
        value = getattr(self.of, name)
        if isinstance(value, BaseModel):
            return Watched(value, self.seen, self.known, f"{path}.")
        self.seen.add(path)
        return value


def tiny_network() -> Network:
    return Network(zoo.FAMILIES["llama"]())


@pytest.mark.parametrize("bits", ["W4A4KV4", "W4A16", "W16A4"])
@pytest.mark.parametrize("method", METHODS)
def test_a_rotated_network_depends_on_what_is_declared(method: str, bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [module for name, module in sys.modules.items() if name.startswith("spinfold.methods.")]:
        for name, value in list(vars(module).items()):
            if isinstance(value, LayerwiseSettings):
                monkeypatch.setattr(module, name, replace(value, steps=1))
    monkeypatch.setattr(rotation, "sites_of", lambda watched: sites_of(watched.of))
    fit = {"steps": 1, "batch": 1, "seq_len": 16, "tokens": 16, "weight_bits": 8 if "A4" in bits else None}
    if method == "spinout":
        fit |= {"injection": "none" if "A16" in bits else "safe", "layers": "all"}
    small = {"samples": 2, "seq_len": 16}
    recipe = Recipe.parse({"method": method, "bits": bits, "fit": fit, "calibration": small})
    network, seen = tiny_network(), set[str]()

    class Seen(Subject):
        def windows(self, seq_len: int, count: int, seed: int) -> torch.Tensor:
            seen.add("calibration.source")
            return super().windows(seq_len, count, seed)

    unused: Any = None
    ids_BT = zoo.random_tokens(0, 1, 64)
    subject = Seen(network, unused, ids_BT[0], "ids", ids_BT, take_fingerprint(network, ids_BT), unused, unused)
    declared = (*ROTATION_READS, "sites", *METHODS[method].reads)
    watched: Any = Watched(recipe, seen, declared)
    rotation.rotate_network(subject, watched, Quiet())
    assert not {path for path in seen if not {path, path.partition(".")[0]} & set(declared)}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("budget", [None, 4.5])
def test_rounding_reads_what_is_declared(rounding: str, budget: float | None) -> None:
    seen: set[str] = set()
    recipe = Recipe().with_(rounding__method=rounding, rounding__steps=1, weights__clip_search=False, budget=budget)
    watched: Any = Watched(recipe, seen, ROUNDING_READS)
    assert list(round_network(tiny_network(), watched, zoo.random_tokens(0)))
    assert seen <= {"method"}


def test_shared_stages_leave_no_trace(
    whole: spinfold.Comparison, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every cell alone, in a job of its own, is what it is in the whole comparison, bit for bit."""
    calls: list[str] = []

    def count(stage: str) -> None:
        real = getattr(bench, stage)
        monkeypatch.setattr(bench, stage, lambda *a, **k: calls.append(stage) or real(*a, **k))  # type: ignore[func-returns-value]

    count("rotate_network")
    count("round_network")
    grid = Grid.parse(GRID | {"seeds": [1]})
    run(model, tmp_path / "shared", text, grid, second_text=str(text))
    assert sorted(calls) == ["rotate_network"] * 3 + ["round_network"] * 2
    calls.clear()
    monkeypatch.setattr(comparison, "fit_key", lambda recipe: recipe.to_yaml())
    run(model, tmp_path / "alone", text, grid, second_text=str(text))
    assert sorted(calls) == ["rotate_network"] * 6 + ["round_network"] * 4
    expected = {name: record for name, record in records(whole.path).items() if record["seed"] == 1}
    assert len(expected) == 6
    assert expected.items() <= records(tmp_path / "alone").items()
    assert expected.items() <= records(tmp_path / "shared").items()


def test_a_fit_at_other_bits_is_shared_exactly_where_nothing_it_reads_differs() -> None:
    def shared(method: str, *bits: str, **changes: Any) -> bool:
        base = Recipe().with_(method=method)
        return len({fit_key(base.with_(bits=one, **changes)) for one in bits}) == 1

    for method in ("none", "quarot", "optrot", "optrot-plus", "kurtail", "dartquant", "smoothquant"):
        assert shared(method, "W4A4KV16", "W3A16", "W16A8")
    for method in ("dfrot", "spinquant", "respinquant", "spinfold", "spinout"):
        assert not shared(method, "W4A4", "W4A8")
        assert shared(method, "W4A4", "W16A4") or method != "dfrot"
    assert not shared("quarot", "W4A4KV4", "W4A4KV16")  # the latter has no map at query_key


# ---- stopped, shared, sharded --------------------------------------------------------------------------------------


def test_a_killed_comparison_goes_on(whole: spinfold.Comparison, model: Path, text: Path, tmp_path: Path) -> None:
    output, plan, base = tmp_path / "out", tmp_path / "plan.yaml", tmp_path / "base.yaml"
    plan.write_text(json.dumps(GRID), "utf-8")
    base.write_text(tiny_run.recipe(text, compute="fp32").to_yaml(), "utf-8")
    words = ["compare", model, "--plan", plan, "--recipe", base, "--text", text, "--second-text", text, "-o", output]
    words = [str(word) for word in [*words, "--max-tokens", 64, "--device", "cpu", "--quiet"]]
    source = str(Path(spinfold.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-m", "spinfold", *words], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": source}
    )
    assert process.stdout is not None
    for _ in range(2):
        assert process.stdout.readline()
    process.kill()
    process.communicate(timeout=60)
    done = records(output)
    assert 3 <= len(done) < len(records(whole.path))  # two cells and the original
    assert main(words) == 2  # not without --resume
    assert main([*words, "--resume"]) == 1  # a cell failed
    assert records(output) == records(whole.path)
    assert done.items() <= records(output).items()
    assert timeless(json.loads((output / "table.json").read_text())) == timeless(whole.data)


def test_what_is_done_is_not_done_again(
    whole: spinfold.Comparison, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "prepare", lambda *_, **__: pytest.fail("the model was loaded"))
    before = {path: path.stat().st_mtime_ns for path in (whole.path / "cells").iterdir()}
    again = run(model, whole.path, text, GRID, second_text=str(text), resume=True)
    assert again.data == whole.data
    assert before == {path: path.stat().st_mtime_ns for path in (whole.path / "cells").iterdir()}


def test_a_job_has_one_owner_until_it_dies(model: Path, text: Path, tmp_path: Path) -> None:
    output, grid = tmp_path / "out", Grid.parse({"entries": ["none", "quarot"], "rounding": ["rtn"]})
    run(model, output, text, grid, seconds=0.0)
    assert not records(output)  # nothing is started when it is late
    (other, _) = grid.cells(tiny_run.recipe(text, compute="fp32"))
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:  # it computes nothing, so it may be forked from a process with threads
        with hold_jobs(output / "cells", [fit_key(other.recipe)]) as (ours,):
            os.write(writer, bytes([ours]))
            signal.pause()
    try:
        assert os.read(reader, 1) == b"\x01"
        run(model, output, text, grid, resume=True)
        assert {record["label"] for record in records(output).values()} == {"original", "quarot"}
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    run(model, output, text, grid, resume=True)
    assert {record["label"] for record in records(output).values()} == {"original", "none", "quarot"}


def test_shards_merge_to_the_whole(whole: spinfold.Comparison, model: Path, text: Path, tmp_path: Path) -> None:
    parts = [tmp_path / f"part{i}" for i in range(3)]
    for i, part in enumerate(parts):
        run(model, part, text, GRID, second_text=str(text), shard=(i, 3))
    assert sum(len(records(part)) - 1 for part in parts) == len(records(whole.path)) - 1
    merged = compare(None, tmp_path / "merged", merge=parts)
    assert timeless(merged.data) == timeless(whole.data)
    assert records(merged.path) == records(whole.path)


# ---- failures and refusals -----------------------------------------------------------------------------------------


def test_a_failure_is_a_row_and_the_rest_goes_on(whole: spinfold.Comparison) -> None:
    failed = [row for row in whole.data["rows"] if row["failed"]]
    assert [row["name"] for row in failed] == ["broken"]
    assert failed[0]["failed"].startswith("2 of 2: The method 'dfrot' has no objective 'kurtosis'.")
    assert failed[0]["seeds"] == 0 and failed[0]["perplexity"] is None
    assert all(row["perplexity"] > 1 for row in whole.data["rows"] if not row["failed"])
    assert len(whole.failed) == 1 and "broken W4A4KV4 rtn" in whole.failed[0]


@pytest.mark.parametrize(
    ("stage", "error", "said"),
    [
        ("rotate_network", CheckFailed("It is not the same.", "0.1 > 1e-05"), "It is not the same. 0.1 > 1e-05"),
        ("rotate_network", torch.OutOfMemoryError("CUDA out of memory."), "Out of memory. CUDA out of memory."),
        ("round_network", MemoryError(), "Out of memory."),
        ("measure_quality", ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
    ],
)
def test_any_stage_may_fail(
    stage: str, error: Exception, said: str, model: Path, text: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    real, seen = getattr(bench, stage), list[int]()

    def fails(*given: Any, **named: Any) -> Any:
        seen.append(1)
        if len(seen) == 1:
            raise error
        return real(*given, **named)

    monkeypatch.setattr(bench, stage, fails)
    grid = {"entries": ["quarot", "none"], "rounding": ["rtn"], "bits": ["W4A16"]}
    found = run(model, tmp_path / "out", text, grid)
    by_name = {row["name"]: row["failed"] for row in found.data["rows"]}
    assert said in by_name["quarot"] and by_name["none"] is None
    (trace,) = [record["traceback"] for record in records(found.path).values() if record.get("failed")]
    assert bool(trace) == isinstance(error, ZeroDivisionError)


def no_work(*_: Any, **__: Any) -> None:
    pytest.fail("work was begun")


@pytest.mark.parametrize(
    ("grid", "named"),
    [
        ({"entries": ["none", "a=quarot:sites=[qkv_input]"]}, "sites"),
        ({"entries": ["none", "smoothquant:sites=[down]"]}, "smoothquant"),
        ({"entries": ["none", "quarot:group_size=7"]}, "group size of 7"),
        ({"entries": ["none", "spinquant:fit.seq_len=9999"]}, "9999"),
    ],
)
def test_what_the_model_cant_have_is_refused_before_any_work(
    grid: Any, named: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "prepare", no_work)
    with pytest.raises(SpinfoldError, match=named):
        run(model, tmp_path / "out", text, grid)
    assert not (tmp_path / "out").exists()


def test_a_folder_belongs_to_one_comparison(
    whole: spinfold.Comparison, model: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(SpinfoldError, match="--resume"):
        run(model, whole.path, text, GRID, second_text=str(text))
    for other in ({"second_text": None}, {"max_tokens": 96}, {"recipe": tiny_run.recipe(text, kv__clip=0.5)}):
        with pytest.raises(SpinfoldError, match="another"):
            run(model, whole.path, text, GRID, **{"second_text": str(text), "resume": True} | other)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SpinfoldError, match=r"thesis\.tex"):
        run(model, tmp_path, text, GRID)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("smollm2", "--methods"),
        ("--methods none", "--merge"),
        ("smollm2 --methods none --shard 2/2", "2/2"),
        ("--merge nowhere", "nowhere"),
    ],
)
def test_the_command_line_explains_itself(
    words: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *words.split(), "-o", str(tmp_path / "out")]) == 2
    assert named in capsys.readouterr().err


# ---- the tables and the page ---------------------------------------------------------------------------------------


def test_the_tables_agree(whole: spinfold.Comparison) -> None:
    rows = json.loads((whole.path / "table.json").read_text())["rows"]
    assert rows == whole.data["rows"]
    with (whole.path / "table.csv").open(newline="", encoding="utf-8") as file:
        for row, line in zip(rows, csv.DictReader(file), strict=True):
            assert line == {key: "" if value is None else str(value) for key, value in row.items()}
    head, _, *lines = [split(line) for line in (whole.path / "table.md").read_text("utf-8").splitlines()]
    assert len(lines) == len(rows)
    for row, line in zip(rows, lines, strict=True):
        shown = dict(zip(head, line, strict=True))
        assert shown["method"].replace("\\|", "|") == row["name"]
        assert shown["bits"] == row["bits"]
        for title, key in (("perplexity, rain", "perplexity"), ("sd, rain", "perplexity_sd")):
            assert shown[title] == "–" if row[key] is None else close(shown[title], row[key]), title


def split(line: str) -> list[str]:
    return [text.strip() for text in re.split(r"(?<!\\)\|", line)[1:-1]]


def close(text: str, value: float) -> bool:
    return float(text.replace(",", "")) == pytest.approx(value, rel=0.01, abs=0.01)


def test_a_row_is_the_mean_of_its_cells(whole: spinfold.Comparison) -> None:
    for row in whole.data["rows"]:
        same = [
            record["perplexity"]
            for record in records(whole.path).values()
            if [record[key] for key in ("label", "bits", "rounding")] == [row["name"], row["bits"], row["rounding"]]
            and "perplexity" in record
        ]
        if same:
            assert row["perplexity"] == pytest.approx(sum(same) / len(same))
            assert [row["perplexity_min"], row["perplexity_max"]] == [min(same), max(same)]
            assert len(same) == (row["seeds"] or 1)
    assert whole.data["rows"][0]["name"] == "original"


def test_both_texts_are_measured_alike(whole: spinfold.Comparison) -> None:
    """The second text is the first again here."""
    for record in records(whole.path).values():
        for key in ("perplexity", "kl", "top1"):
            assert record.get(f"second_{key}") == record.get(key)


class Page(HTMLParser):
    """Elements by name, and the text of the table's rows."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_shows_every_row_and_runs_nothing_foreign(whole: spinfold.Comparison) -> None:
    html = (whole.path / "index.html").read_text("utf-8")
    page = Page(html)
    assert page.tags.count("script") == 4  # the figures' data, Plotly, page.js, compare.js
    assert "img" not in page.tags and not [name for name in page.attributes if name.startswith("on")]
    assert [text.strip() for text in page.text].count(HOSTILE) == 2  # in the table and as an entry: as text
    assert page.tags.count("tr") >= len(whole.data["rows"])
    for row in whole.data["rows"]:
        assert row["name"] in page.text
    assert "has no objective" in html


@pytest.mark.parametrize("seed", range(5))
def test_a_point_is_on_the_front_exactly_if_no_other_beats_it(seed: int) -> None:
    draws = torch.randint(5, (12, 2), generator=torch.Generator().manual_seed(seed)).float().tolist()
    points = {str(i): (x, y) for i, (x, y) in enumerate(draws)}
    best = figures.front(points)
    for name, (x, y) in points.items():
        better = [other for other, (a, b) in points.items() if a <= x and b <= y and (a, b) != (x, y)]
        twins = [other for other in best if points[other] == (x, y) and other != name]
        assert (name in best) == (not better and not twins)


def test_the_online_cost_is_that_of_the_maps_on_the_wires() -> None:
    network = tiny_network()
    layers = len(network.layers)
    head, wide = Hadamard(network.layers[0].head_dim), Hadamard(160)
    assert online_cost(network).flops == online_cost(network).bytes == 0
    fold(network, SiteMaps(query_key=(head,) * layers, down=(wide,) * layers))
    heads = network.layers[0].num_heads + network.layers[0].num_kv_heads
    assert online_cost(network).flops == layers * (heads * head.cost().flops + wide.cost().flops)
    assert online_cost(network).bytes == layers * (2 * head.cost().bytes + wide.cost().bytes)


def test_tasks_are_those_of_evaluate(model: Path, text: Path, tmp_path: Path) -> None:
    names, folder = ("piqa", "winogrande"), write_items(tmp_path / "items")
    entry = {"label": "untouched", "source": "none", "bits": ["W16A16KV16"]}
    found = run(model, tmp_path / "out", text, {"entries": [entry, "quarot"]}, tasks=names, task_data=folder)
    accuracy = {row["name"]: row["task_accuracy"] for row in found.data["rows"]}
    alone = spinfold.evaluate(str(model), tasks=names, task_data=folder, compute="fp32", device="cpu")["tasks"]
    assert accuracy["original"] == accuracy["untouched"] == alone["average"]["acc_norm"]
    assert accuracy["quarot"] is not None
    cells = {cell["label"]: cell["tasks"] for cell in records(found.path).values()}
    assert cells["original"] == {name: alone[name] for name in names}
    with pytest.raises(SpinfoldError, match="another tasks"):
        run(model, found.path, text, {"entries": ["quarot"]}, resume=True)
    with pytest.raises(SpinfoldError, match="no task 'pika'"):
        run(model, tmp_path / "typo", text, {"entries": ["quarot"]}, tasks=["pika"], task_data=folder)
    assert not (tmp_path / "typo").exists()


def test_a_table_of_formats_has_bits_per_weight_and_what_a_layer_takes(model: Path, text: Path, tmp_path: Path) -> None:
    found = run(model, tmp_path / "out", text, FORMATS | {"entries": ["none"]})
    rows = {(row["format"], row["bits"]): row for row in found.data["rows"]}
    widths = [rows[name, "W4A4KV16"]["bits_per_weight"] for name in ("INT4", "groups", "MXFP4")]
    assert widths[1:] == [6.0, 4.25] and 4 < widths[0] < 5
    assert rows["MXFP6", "W6A16KV16"]["bits_per_weight"] == 6.25
    layers = zoo.FAMILIES["llama"]().config.num_hidden_layers
    for row in rows.values():
        if row["name"] != "original":
            assert 0 < layers * row["rounding_layer_seconds"] <= row["rounding_seconds"]
    header = (found.path / "table.md").read_text().splitlines()[0]
    assert all(word in header for word in ("format", "bits per weight", "round a layer"))
    page = (found.path / "index.html").read_text()
    assert "MXFP4, W4A4KV16, rtn" in page
    untouched = run(model, tmp_path / "whole", text, {"entries": ["none"], "bits": ["W16A4"]}).data["rows"][-1]
    assert untouched["bits_per_weight"] == 16 and untouched["rounding_layer_seconds"] is None
