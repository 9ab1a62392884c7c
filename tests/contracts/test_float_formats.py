"""Floating-point formats through a whole run: asked for, refused, stored, loaded, kept from runtimes without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_run
import torch
from test_plan import config

import spinfold
from spinfold.checkpoint import load_maps, load_run
from spinfold.errors import SpinfoldError
from spinfold.formats import FLOAT_FORMATS, FloatFormat, IntFormat
from spinfold.maps import Map
from spinfold.plan import plan_run
from spinfold.recipe import Recipe

BITS = {name: f"W{fmt.bits}A{fmt.bits}KV8" for name, fmt in FLOAT_FORMATS.items()}


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "nvfp4", "amxfp4"])
def test_a_run_is_what_it_was_when_it_is_loaded(name: str, model: Path, text: Path, tmp_path: Path) -> None:
    settings = {"format": name, "bits": BITS[name], "method": "block-hadamard", "compute": "fp32"}
    settings |= {"kv__format": "fp8"} if name == "fp8" else {}
    settings |= {"rounding__method": "rtn" if name == "nvfp4" else "gptq", "weights__clip_search": False}
    run = tiny_run.quantize(model, tmp_path / "run", text, evaluate_on=str(text), **settings)
    measured = run.data["metrics"]["rows"][-1]["perplexity"]
    loaded = spinfold.evaluate(run.path, text=str(text), seq_len=32, max_tokens=4096, device="cpu", compute="fp32")
    assert loaded["perplexity"] == pytest.approx(measured, rel=1e-6)
    network = load_run(tmp_path / "run", torch.device("cpu"))
    formats = {op.format for op in network.layers[0].wire("down").ops if hasattr(op, "format")}
    assert [type(fmt) for fmt in formats] == [FloatFormat]
    cached = network.layers[0].wire("key").ops[-1].format
    assert isinstance(cached, FloatFormat if name == "fp8" else IntFormat)
    assert all(x["error"] > 0 and x["nearest_error"] > 0 and x["expert"] is None for x in run.data["rounding"])
    assert len({x["error"] for x in run.data["rounding"]}) == len(run.data["rounding"])
    assert all(fmt.outer in (None, "row") for fmt in formats)
    size = FLOAT_FORMATS[name].group_size or 32
    residual = load_maps(run.path).residual
    assert isinstance(residual, Map)
    blocks = residual.matrix().abs().unflatten(1, (-1, size)).unflatten(0, (-1, size)).amax((1, 3))
    assert torch.equal(blocks > 0, torch.eye(len(blocks), dtype=torch.bool))
    with pytest.raises(SpinfoldError, match=f"(?s)integers, not {name}.*--format int.*Or export to transformers"):
        spinfold.export(tmp_path / "run", "compressed-tensors", tmp_path / "out")
    exported = spinfold.export(run.path, "transformers", tmp_path / "plugin", text=str(text), device="cpu")
    assert [proof["measured"] for proof in exported.data["proofs"]] == [0, 0, 0]


@pytest.mark.parametrize(("changes", "why"), [
    ({"format": "mxfp4", "bits": "W4A8"}, "4 bits, not 8"),
    ({"format": "fp8", "bits": "W4A16"}, "8 bits, not 4"),
    ({"format": "mxfp4", "bits": "W4A4", "group_size": 32}, "blocks are of 32"),
    ({"format": "nvfp4", "bits": "W4A4", "activations__per_head": True}, "blocks are of 16"),
    ({"format": "mxfp6", "bits": "W6A6", "floats__element": "e4m3"}, "e4m3 has 8"),
    ({"format": "nvfp4", "bits": "W4A4", "floats__scale": "ceil"}, "end of an FP8"),
    ({"format": "int", "floats__element": "e4m3"}, "floating-point"),
    ({"kv__format": "mxfp4", "bits": "W4A4K4V2"}, "4 bits, not 2"),
    ({"kv__format": "mxfp4", "bits": "W4A4K4V16", "kv__key_group": 32}, "along the tokens"),
])  # fmt: skip
def test_what_a_format_can_not_be_is_refused_with_its_reason(changes: dict[str, object], why: str) -> None:
    recipe = Recipe().with_(method="quarot", calibration__seq_len=64)
    with pytest.raises(SpinfoldError, match=why):
        plan_run(config(), recipe.with_(**changes))


@pytest.mark.parametrize("name", FLOAT_FORMATS)
@pytest.mark.parametrize("bits", ["W{0}A{0}KV4", "W{0}A16", "W16A{0}KV16"])
def test_its_own_bits_and_sixteen_are_accepted(name: str, bits: str) -> None:
    recipe = Recipe().with_(method="quarot", calibration__seq_len=64, format=name)
    plan_run(config(), recipe.with_(bits=bits.format(FLOAT_FORMATS[name].bits)))


def test_rows_are_made_of_whole_blocks() -> None:
    recipe = Recipe().with_(method="quarot", calibration__seq_len=64, format="mxfp4", bits="W4A4")
    with pytest.raises(SpinfoldError, match="whole blocks of 32"):
        plan_run(config(intermediate_size=176), recipe)
    plan_run(config(intermediate_size=176), recipe.with_(format="nvfp4"))
