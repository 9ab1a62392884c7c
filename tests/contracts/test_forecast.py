"""What a forecast promises: it costs few weights read and no file, it grows with what costs, and what does not fit is
refused at once. How near it comes to what is measured stands in docs/planning.md.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import cycle, pairwise
from math import inf, prod
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_run import TEXT, recipe, tiny_model

import spinfold
from spinfold import pipeline
from spinfold.cli import main
from spinfold.errors import SpinfoldError
from spinfold.fitting.end_to_end import GRAPH_SHARE, Schedule, numbers_of_token
from spinfold.fitting.text import Text
from spinfold.forecast import UNREAD, Forecast, Machine, Reading, Sizes, forecast, measure_machine, measure_reading
from spinfold.forecast import machine as forecast_machine
from spinfold.forecast import reading as forecast_reading
from spinfold.forecast.fits import FITS
from spinfold.forecast.memory import Bytes
from spinfold.methods import METHODS
from spinfold.networks import Network
from spinfold.networks.safetensors_reader import SafetensorsFolder
from spinfold.networks.sources import Checkpoint, resolve
from spinfold.recipe import Recipe

MACHINE = Machine("cpu", 3e11, 1e11, 5e10, 2e9, 10**12)
READING = Reading(0.5, 1e-8, 1e-6)
CUDA = replace(MACHINE, device="cuda", free_device_bytes=10**12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def checkpoint(model: Path) -> Checkpoint:
    return resolve(model)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8")
    return path


def predicted(checkpoint: Checkpoint, machine: Machine = MACHINE, **changes: Any) -> Forecast:
    recipe = Recipe().with_(**changes)
    return forecast(checkpoint, recipe, machine, reading=READING, text_tokens=10**5, held_out_tokens=4096)


# ---- sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2", "phi3", "gemma2", "mixtral", "qwen3_moe"])
def test_the_sizes_are_those_of_the_network(family: str, tmp_path: Path) -> None:
    build = (zoo.FAMILIES | zoo.EXPERTS)[family]
    sizes = Sizes.of(resolve(zoo.write_tiny_tokenizer(zoo.save(build(), tmp_path / "model"))))
    network = Network(build())
    network.untie()
    assert sizes.parameters == sum(parameter.numel() for parameter in network.model.parameters())
    every = [linear for layer in network.layers for linear in layer.foldable]
    assert sizes.linears == sum(linear.weight_OI.numel() for linear in every)
    assert sizes.widest == max(linear.weight_OI.shape[1] for linear in every)
    assert (sizes.active < sizes.linears) is (family in zoo.EXPERTS)


# ---- the forecast ----------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(METHODS)), st.integers(1, 64), st.integers(1, 64))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
def test_more_of_anything_takes_no_less(checkpoint: Checkpoint, method: str, samples: int, steps: int) -> None:
    small = predicted(checkpoint, method=method, calibration__samples=samples, fit__steps=steps)
    for more in ({"calibration__samples": 2 * samples}, {"fit__steps": 2 * steps}, {"calibration__seq_len": 4096}):
        both = {"method": method, "calibration__samples": samples, "fit__steps": steps} | more
        large = predicted(checkpoint, **both)
        assert large.seconds >= small.seconds
        assert large.peak_bytes >= small.peak_bytes
    assert predicted(checkpoint, method=method, rounding__method="rtn").seconds < predicted(
        checkpoint, method=method, rounding__method="gptq").seconds  # fmt: skip


@given(st.floats(1.1, 100))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=20)
def test_a_faster_machine_takes_less_time_and_the_same_memory(checkpoint: Checkpoint, times: float) -> None:
    rates = ("products", "products_fp32", "products_fp64", "passes")
    fast = replace(MACHINE, **{name: times * getattr(MACHINE, name) for name in rates})
    slow, quick = predicted(checkpoint), predicted(checkpoint, fast)
    assert quick.seconds < slow.seconds
    assert quick.peak_bytes == slow.peak_bytes


def test_every_method_has_a_forecast() -> None:
    assert set(FITS) == set(METHODS)


def test_bases_per_boundary_are_counted(checkpoint: Checkpoint) -> None:
    def fit(**changes: Any) -> Any:
        return next(x for x in predicted(checkpoint, fit__steps=10, **changes).stages if x.name == "fit and fold")

    one, each = fit(method="spinquant"), fit(method="respinquant")
    ours, ranked = fit(method="spinfold"), fit(method="spinfold", fit__rank=8)
    for few, many in ((one, each), (ours, ranked)):
        assert many.seconds > few.seconds
        assert many.peak_bytes > few.peak_bytes


def test_checkpointing_trades_time_for_memory(checkpoint: Checkpoint) -> None:
    plain = predicted(checkpoint, method="spinquant")
    kept = predicted(checkpoint, method="spinquant", fit__checkpointing=True)
    assert kept.seconds > plain.seconds
    fits = [stage for found in (plain, kept) for stage in found.stages if stage.name == "fit and fold"]
    assert fits[0].peak_bytes > fits[1].peak_bytes
    n = Sizes.of(checkpoint)
    graph = 4 * Schedule.tokens_per_pass * n.layers * numbers_of_token(n.width, n.mlp_width)
    need = round(10 * n.parameters + graph / GRAPH_SHARE)
    for room, same in ((need - 8, kept), (need + 8, plain)):  # by itself, where there is no room for the whole graph
        assert predicted(checkpoint, replace(MACHINE, free_bytes=room), method="spinquant").stages == same.stages


def test_a_rounding_takes_what_it_does_more(checkpoint: Checkpoint) -> None:
    def rounding(**changes: Any) -> Any:
        stages = predicted(checkpoint, method="quarot", **changes).stages
        return next(stage for stage in stages if stage.name.startswith("round weights"))

    order = [
        rounding(rounding__method="rtn"),
        rounding(),
        rounding(rounding__method="ldlq"),
        rounding(rounding__method="ldlq", rounding__passes=2),
        rounding(rounding__method="ldlq", rounding__passes=4),
    ]
    assert all(less.seconds < more.seconds for less, more in pairwise(order))
    assert rounding(rounding__method="gptaq").seconds > 1.5 * rounding().seconds
    assert rounding(rounding__method="gptaq").peak_bytes > rounding().peak_bytes > order[0].peak_bytes
    assert rounding(rounding__absorb=1e-4).seconds > rounding().seconds
    assert rounding(format="mxfp4").seconds > rounding().seconds
    few, many = (rounding(rounding__method="autoround", rounding__steps=steps).seconds for steps in (100, 200))
    assert 1.5 * few < many < 2 * few


def test_a_budget_is_measured_at_seven_widths(checkpoint: Checkpoint) -> None:
    plain, budget = predicted(checkpoint, bits="W4A16"), predicted(checkpoint, bits="W4A16", budget=4.5)
    more = [stage for stage in budget.stages if stage.name not in {one.name for one in plain.stages}]
    assert [stage.name for stage in more] == ["measure sensitivity"]
    assert more[0].seconds > next(x.seconds for x in plain.stages if x.name.startswith("round"))


def test_what_several_gpus_share_has_a_part_on_each(checkpoint: Checkpoint) -> None:
    """Of a copy in 16 bits that takes more than half of a GPU each holds a part, and two layers whole."""
    n = replace(Sizes.of(checkpoint), layers=80, linears=68 * 10**9, parameters=70 * 10**9)
    recipe = Recipe(method="spinquant")

    def fit(processes: int, free: int = 8 * 10**10) -> float:
        machine = replace(CUDA, free_device_bytes=free, processes=processes)
        return Bytes(n, recipe, machine, in_files=True).fit()

    linears = 2 * n.linears
    assert fit(1) - fit(2) == pytest.approx(linears * (1 / 2 - 2 / 80))
    assert fit(2) - fit(8) == pytest.approx(linears * (1 / 2 - 1 / 8))
    assert fit(2, free=10**12) == fit(1)
    assert fit(8) < 8e10 < fit(1)


def test_on_a_gpu_the_network_is_there_and_not_here(checkpoint: Checkpoint) -> None:
    here, there = predicted(checkpoint), predicted(checkpoint, CUDA)
    assert here.peak_device_bytes is None
    assert there.peak_device_bytes is not None
    assert 4 * Sizes.of(checkpoint).parameters < there.peak_device_bytes < here.peak_bytes


@pytest.mark.parametrize("share", [0.5, 0.99, 1.01])
@pytest.mark.parametrize("where", ["free_bytes", "free_device_bytes"])
def test_what_does_not_fit_is_said(checkpoint: Checkpoint, where: str, share: float) -> None:
    found = predicted(checkpoint, CUDA)
    need = found.peak_bytes if where == "free_bytes" else found.peak_device_bytes
    assert need is not None
    verdict = replace(found, machine=replace(CUDA, **{where: int(share * need)})).fits()
    assert bool(verdict) is (share > 1)
    assert verdict or ("GPU" in verdict.reason) is (where == "free_device_bytes")


# ---- before a run ----------------------------------------------------------------------------------------------


def test_what_is_read_slowly_takes_long(checkpoint: Checkpoint) -> None:
    def seconds(reading: Reading) -> list[float]:
        told = forecast(checkpoint, Recipe(), MACHINE, reading=reading, text_tokens=10**5, held_out_tokens=4096)
        return [stage.seconds for stage in told.stages]

    load, text, *others = seconds(READING)
    assert load == pytest.approx(READING.opening + checkpoint.num_parameters * READING.weight)
    assert text == pytest.approx(4 * 10**5 * READING.character)
    assert seconds(replace(READING, weight=READING.weight * 100))[0] > load
    assert seconds(UNREAD) == [0, 0, *others]


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_few_weights_are_those_of_the_model(kind: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    gguf = zoo.write_gguf(zoo.FAMILIES["llama"](), tmp_path / "tiny.gguf", "llama")
    source = resolve(gguf) if kind == "gguf" else checkpoint
    few = source.read_some(5000)
    sizes = [weight_OI.numel() for weight_OI in few]
    assert sum(sizes) - max(sizes) < 5000 <= sum(sizes)
    every = source.load_model().state_dict().values()
    assert all(any(torch.equal(weight_OI, other) for other in every) for weight_OI in few)
    others = source.read_some(5000, but=5000)
    assert sum(weight_OI.numel() for weight_OI in others) >= 5000
    assert not any(torch.equal(one, other) for one in few for other in others)
    matrices = sum(map(prod, source.layer_matrices.values()))
    for count, but in ((5000, 10**9), (10**9, 5000), (10**9, 10**9)):  # there are not so many
        assert sum(weight_OI.numel() for weight_OI in source.read_some(count, but=but)) >= min(count, matrices)


def test_a_folder_of_the_base_model_has_the_same_sizes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint.load_model().model.save_pretrained(tmp_path / "base")
    base = resolve(zoo.write_tiny_tokenizer(tmp_path / "base"))
    assert Sizes.of(base) == Sizes.of(checkpoint)
    assert len(base.read_some(5000)) == len(checkpoint.read_some(5000)) > 0


def test_reading_is_measured(checkpoint: Checkpoint) -> None:
    reading = measure_reading(checkpoint, Text("text", TEXT, "here"))
    assert reading.opening > 0
    assert 0 < reading.weight < 1
    assert 0 < reading.character < 1


def test_reading_is_measured_before_and_after_the_machine(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = iter([READING, MACHINE, Reading(1.5, 5e-8, 3e-6)])
    monkeypatch.setattr(pipeline, "measure_reading", lambda *_, **__: next(moments))
    monkeypatch.setattr(pipeline, "measure_machine", lambda *_: next(moments))
    told = spinfold.predict(str(model), tmp_path / "out", recipe(text, method="quarot"), device="cpu")
    assert told.machine is MACHINE
    assert told.reading == Reading(1.0, pytest.approx(3e-8), pytest.approx(2e-6))


def test_a_plan_reads_few_weights_and_writes_nothing(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Checkpoint, "load_model", None)
    monkeypatch.setattr(forecast_reading, "FEW_WEIGHTS", 5000)
    names, read = [], SafetensorsFolder.read

    def noted(folder: SafetensorsFolder, asked: list[str]) -> dict[str, torch.Tensor]:
        names.extend(asked)
        return read(folder, asked)

    monkeypatch.setattr(SafetensorsFolder, "read", noted)
    command = ["quantize", str(model), "-o", str(tmp_path / "out"), "--calibration", str(text), "--device", "cpu"]
    command += ["--seq-len", "64", "--samples", "4", "--plan"]
    assert main(command) == 0
    table = capsys.readouterr().out
    for stage in ("load model", "evaluate original", "round weights", "all"):
        assert stage in table
    shapes = resolve(model).shapes
    assert len(names) == len(set(names))  # what was read once needs no disk the second time
    assert 10000 <= sum(prod(shapes[name]) for name in names) < sum(map(prod, shapes.values())) / 3
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["seconds"] == pytest.approx(sum(stage["seconds"] for stage in told["stages"]))
    assert told["fits"]
    assert set(told["reading"]) == {"opening", "weight", "character"}
    assert not (tmp_path / "out").exists()


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "load_model", None)
    monkeypatch.setattr(pipeline, "unmeasured_machine", lambda _: replace(MACHINE, free_bytes=10**8))
    with pytest.raises(SpinfoldError, match=r"does not fit(.|\n)*0\.1 GB are free"):
        tiny_run.quantize(model, tmp_path / "out", text, method="quarot")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{}, {"budget": 5.0, "bits": "W4A16"}], ids=["bits", "budget"])
def test_the_stages_are_those_of_a_run(model: Path, text: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    run = tiny_run.quantize(model, tmp_path / "out", text, method="quarot", **changes)
    parts = {"find outliers", "fold maps", "prove the same function"}  # of "fit and fold"
    stages = [stage["name"] for stage in run.data["stages"]]
    assert parts <= set(stages)
    seen = set(stages) - parts
    asked = recipe(text, method="quarot", **changes)
    told = [stage.name for stage in spinfold.predict(str(model), tmp_path / "new", asked, device="cpu").stages]
    assert seen == set(told) - {"fit and fold"}
    assert [name for name in told if name in seen] == [name for name in stages if name in seen]
    log = (run.path / "log.txt").read_text("utf-8").splitlines()
    assert [line.split("GB  ")[1] for line in log] == stages
    assert all(" done " in line for line in log)


def test_the_machine_is_measured() -> None:
    machine = measure_machine(torch.device("cpu"), "fp32")
    assert machine.products == machine.products_fp32 > machine.products_fp64 > 0
    assert machine.passes > 0
    assert machine.free_bytes > 1 << 20
    assert machine.free_device_bytes is None


def test_what_disturbs_half_of_the_bursts_does_not_change_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = cycle([[1.0, 1.0, 50.0], [1.0, 1e-3, 9.0]])
    monkeypatch.setattr(forecast_machine, "_burst", lambda *_: next(seconds))
    before = torch.backends.cuda.matmul.allow_tf32
    machine = measure_machine(torch.device("cpu"), "tf32")
    assert (machine.passes, machine.products, machine.products_fp32) == (1 << 22, 2 * 2048**3, 2 * 1024**3)
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_a_gpu_waits_for_its_host_at_each_layer(checkpoint: Checkpoint) -> None:
    fast = replace(CUDA, products=inf, products_fp32=inf, products_fp64=inf, passes=inf)
    seconds = {stage.name: stage.seconds for stage in predicted(checkpoint, fast, method="quarot").stages}
    assert seconds["evaluate original"] == 0 < seconds["fit and fold"]
    rtn = predicted(checkpoint, fast, method="quarot", rounding__method="rtn").stages
    nearest = next(stage.seconds for stage in rtn if stage.name.startswith("round"))
    assert 0 < nearest < seconds["round weights (gptq)"]


def test_what_is_tokenized_takes_time_and_memory(checkpoint: Checkpoint) -> None:
    few, many = (
        forecast(checkpoint, Recipe(), MACHINE, reading=READING, text_tokens=count, held_out_tokens=4096)
        for count in (10**5, 10**6)
    )
    assert many.seconds > few.seconds
    assert many.peak_bytes > few.peak_bytes
