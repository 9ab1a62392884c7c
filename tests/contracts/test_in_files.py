"""A whole run whose layers stay in the checkpoint's files leaves the bytes that it leaves otherwise."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run
import torch
import zoo

import spinfold
from spinfold import inspection, subject
from spinfold.checkpoint import load_run
from spinfold.errors import SpinfoldError
from spinfold.forecast import UNREAD, Machine, forecast, stays_in_files
from spinfold.networks.sources import resolve
from spinfold.recipe import Recipe


@pytest.mark.parametrize("bits", ["W4A4KV4", "W16A4KV4"])
def test_a_whole_run_in_files_leaves_the_same_bytes(bits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = tiny_run.tiny_model(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text(tiny_run.TEXT, "utf-8")
    outputs = []
    for in_files in (False, True):
        monkeypatch.setattr(subject, "stays_in_files", lambda *_, answer=in_files: answer)
        outputs.append(tmp_path / f"run-{in_files}")
        tiny_run.quantize(model, outputs[-1], text, bits=bits, fit__loss="kl", compute="fp32")
    assert tiny_run.contents(outputs[0]) == tiny_run.contents(outputs[1])


def test_a_rotated_folder_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, written = tiny_run.tiny_model(tmp_path / "model"), []
    for in_files in (False, True):
        monkeypatch.setattr(subject, "stays_in_files", lambda *_, answer=in_files: answer)
        written.append(spinfold.rotate(str(model), tmp_path / f"out-{in_files}", dtype="bfloat16", device="cpu"))
    assert tiny_run.contents(written[0]) == tiny_run.contents(written[1])


@pytest.mark.parametrize("bits", ["W4A4KV4", "W16A8"])
@pytest.mark.parametrize("family", ["llama_tied", "phi3", "mixtral"])
def test_a_run_opened_layer_by_layer_is_the_run(family: str, bits: str, tmp_path: Path) -> None:
    model = zoo.write_tiny_tokenizer(zoo.save((zoo.FAMILIES | zoo.EXPERTS)[family](), tmp_path / "model"))
    text = tmp_path / "text.txt"
    text.write_text(tiny_run.TEXT, "utf-8")
    run = tiny_run.quantize(model, tmp_path / "run", text, bits=bits, method="quarot", rounding__method="rtn").path
    here, away = (load_run(run, torch.device("cpu"), room) for room in (None, 0))
    assert here.resident and not away.resident
    ids_BT = zoo.random_tokens(0, 2, 32)
    assert torch.equal(here(ids_BT), away(ids_BT))


def test_a_forecast_counts_what_is_there(tmp_path: Path) -> None:
    checkpoint = resolve(tiny_run.tiny_model(tmp_path / "model"))
    large = Machine("cuda", 3e11, 1e11, 5e10, 2e9, 10**12, 10**12)
    small = replace(large, free_device_bytes=4 * checkpoint.num_parameters)
    assert [stays_in_files(checkpoint, machine) for machine in (large, small)] == [False, True]
    more, less = (
        forecast(checkpoint, Recipe(), machine, reading=UNREAD, text_tokens=10**5, held_out_tokens=4096)
        .stages[0]
        .peak_device_bytes
        for machine in (large, small)
    )
    assert more is not None and less is not None
    layer = 4 * sum(math.prod(shape) for name, shape in checkpoint.shapes.items() if ".layers.0." in name)
    assert more - less == pytest.approx((checkpoint.config.num_hidden_layers - 1) * layer, rel=0.05)


def test_what_needs_all_weights_at_once_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_run.tiny_model(tmp_path / "model")
    monkeypatch.setattr(inspection, "stays_in_files", lambda *_: True)
    with pytest.raises(SpinfoldError, match="too large to inspect"):
        inspection.inspect(str(model), device="cpu")
