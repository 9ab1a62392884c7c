"""Linears on grids of their own: what a recipe asks for is refused or had, kept in the run, resumed, and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import zoo
from tiny_run import Hook, contents, quantize
from transformers import AutoModelForCausalLM

import spinfold
from spinfold.checkpoint import load_run
from spinfold.compute import pick_device
from spinfold.errors import SpinfoldError
from spinfold.export.packed import PackedLinear
from spinfold.plan import plan_run
from spinfold.recipe import Recipe

OVERRIDES = [{"match": "layers.*.down", "bits": 8, "group_size": 16}, {"match": "layers.0.*", "symmetric": False}]


FLOATS = [{"match": "layers.*.down", "format": "mxfp8"}, {"match": "layers.0.[qk]", "format": "int", "bits": 3}]


@pytest.mark.parametrize("change", [
    {"overrides": OVERRIDES},
    {"overrides": FLOATS},
    {"overrides": FLOATS, "format": "nvfp4"},
    {"budget": 4.75, "group_size": 32},
    {"budget": 5.0, "format": "mxfp4"},
    {"budget": 5.5, "candidates": ("int", "nvfp4", "mxfp8"), "group_size": 32},
], ids=str)  # fmt: skip
def test_a_run_is_read_back_as_it_was(change: dict[str, Any], model: Path, text: Path, tmp_path: Path) -> None:
    settings = change | {"method": "none", "bits": "W4A16", "compute": "fp32", "weights__clip_search": False}
    run = quantize(model, tmp_path / "run", text, evaluate_on=str(text), **settings)
    measured = run.data["metrics"]["rows"][-1]["perplexity"]
    found = spinfold.evaluate(run.path, text=str(text), seq_len=32, max_tokens=4096, device="cpu", compute="fp32")
    assert found["perplexity"] == pytest.approx(measured, rel=1e-5)
    bits = {f"layers.{x['layer']}.{x['role']}": x["bits_per_weight"] for x in run.data["rounding"]}
    assert len(set(bits.values())) > 1
    asked, had = Recipe.load(run.path / "recipe.yaml"), Recipe.parse(run.data["recipe"])
    if asked.budget is not None:
        assert asked.overrides == () and len(had.overrides) == len(bits)
        assert 0.97 * asked.budget < run.data["sizes"]["bits_per_weight"] <= asked.budget
    else:
        assert asked == had
    for linear in load_run(run.path, pick_device("cpu")).linears:
        format = had.weight_format_of(f"layers.{linear.layer}.{linear.role}")
        assert format is not None
        assert max(len(row.unique()) for row in format.split(linear.weight_OI).flatten(0, 1)) <= 2**format.bits
    with pytest.raises(SpinfoldError, match=r"one weight grid|are integers, not"):
        spinfold.export(run.path, "compressed-tensors", tmp_path / "out", device="cpu")
    exported = spinfold.export(run.path, "transformers", tmp_path / "plugin", text=str(text), device="cpu")
    assert [proof["measured"] for proof in exported.data["proofs"]] == [0, 0, 0]
    model_there = AutoModelForCausalLM.from_pretrained(tmp_path / "plugin")
    formats = {m.weight.format for m in model_there.modules() if isinstance(m, PackedLinear)}
    assert formats == {had.weight_format_of(name) for name in bits}


@pytest.mark.parametrize("place", [("measure sensitivity", 2), ("round weights (gptaq)", 2)], ids=str)
def test_a_run_with_a_budget_goes_on(place: tuple[str, int], model: Path, text: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": "none", "bits": "W4A16", "budget": 4.75, "rounding__method": "gptaq"}
    settings |= {"weights__clip_search": False, "overrides": [{"match": "layers.0.q", "bits": 8}]}

    def stop(*here: object) -> None:
        if here == place:
            raise KeyboardInterrupt

    whole = contents(quantize(model, tmp_path / "whole", text, **settings).path)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "run", text, progress=Hook(stop), **settings)
    progress = Hook(lambda *_: None)
    assert contents(quantize(model, tmp_path / "run", text, resume=True, progress=progress, **settings).path) == whole
    measured_anew = "measure sensitivity" in [record.name for record in progress.records]
    assert measured_anew == (place[0] == "measure sensitivity")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"overrides": [{"match": "layers.*.dwon", "bits": 8}]}, "dwon"),
        ({"overrides": [{"match": "layers.7.down", "bits": 8}]}, "layers.1.ROLE"),
        ({"overrides": [{"match": "layers.*.down", "group_size": 7}]}, "7 does not divide"),
        ({"overrides": [{"match": "layers.*", "bits": 8}], "bits": "W16A4"}, "16 bits"),
        ({"budget": 4.25, "bits": "W16A4"}, "16 bits"),
        ({"budget": 2.25, "group_size": 8}, "2.25"),
        ({"overrides": [{"match": "layers.*", "bits": 8}], "format": "mxfp4"}, "floating point of 4 bits"),
        ({"overrides": [{"match": "layers.*", "format": "mxfp4", "group_size": 16}]}, "blocks by definition"),
        ({"overrides": [{"match": "layers.*", "format": "fp8", "symmetric": True}]}, "symmetric, all"),
        ({"candidates": ["mxfp4"]}, "there is none"),
        ({"candidates": ["mxfp4", "mxfp6"], "budget": 4.0}, "4.25 bits"),
    ],
    ids=str,
)
def test_what_this_model_has_not_is_refused_before_work(change: dict[str, Any], named: str) -> None:
    config = zoo.FAMILIES["llama"]().config
    with pytest.raises(SpinfoldError, match=named):
        plan_run(config, Recipe.parse({"calibration": {"seq_len": 32}}).with_(**change))


def test_a_pattern_means_the_roles_of_experts_too() -> None:
    config = zoo.EXPERTS["qwen3_moe"]().config
    overrides = [{"match": "layers.?.down", "bits": 8, "group_size": 16}]
    plan_run(config, Recipe.parse({"calibration": {"seq_len": 32}, "overrides": overrides}))
