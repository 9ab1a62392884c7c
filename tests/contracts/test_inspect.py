"""What an inspection promises: outliers that were put in are found, what is said was measured, nothing is changed.

- a channel and a token made large are named, and no others are;
- a place's loss falls with its bits, and rounding one place leaves the network as it was;
- the advice follows from the measured losses alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from test_report import LOADING, Page
from tiny_run import TEXT, tiny_model

import spinfold
from spinfold.cli import main
from spinfold.errors import SpinfoldError
from spinfold.evaluation.outliers import MEASURED_WIRES
from spinfold.evaluation.spikes import find_spikes, massive_tokens, outlier_channels
from spinfold.inspection import SAFE_KL, WORTH, Place, advise, rounded_alone, safe_bits
from spinfold.networks import Network
from spinfold.recipe import Bits, Recipe

SITES = ("residual", "down")
KL = st.floats(1e-5, 20)


def inspected(folder: Path, family: str = "llama_tied", output: Path | None = None, **changes: Any) -> dict[str, Any]:
    text = folder / "text.txt"
    text.write_text(TEXT, "utf-8")
    recipe = Recipe().with_(calibration__source=str(text), **changes)
    model = tiny_model(folder / "model", family)
    return spinfold.inspect(str(model), output, recipe, tokens=128, device="cpu").data


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("inspected")
    return inspected(folder, output=folder / "out"), folder / "out"


# ---- outliers --------------------------------------------------------------------------------------------------


@given(st.integers(0, 39), st.integers(0, 29), st.floats(20, 1e4))
def test_a_large_channel_is_found_and_a_large_token_is_not_a_channel(channel: int, token: int, times: float) -> None:
    x_TC = 1 + torch.rand(30, 40, generator=torch.Generator().manual_seed(0))
    x_TC[token] *= 50
    assert outlier_channels(x_TC) == {}
    x_TC[:, channel] *= -times
    (only,) = outlier_channels(x_TC).items()
    assert only[0] == channel
    assert times / 2 < only[1] < times * 2


@given(st.integers(0, 29), st.integers(0, 39), st.floats(3000, 1e6))
def test_a_massive_token_is_found_whatever_its_scale_relative_to_the_others(token: int, channel: int, x: float) -> None:
    x_TD = torch.rand(30, 40, generator=torch.Generator().manual_seed(1))
    x_TD[token, channel] = -x
    assert massive_tokens(x_TD) == {token: pytest.approx(x)}
    assert massive_tokens(x_TD * (99 / x)) == {}, "no massive token below 100"
    assert massive_tokens(x_TD + x / 999) == {}, "no massive token below a thousand medians"


def test_spikes_are_found_where_they_are_put_and_the_network_is_left_alone() -> None:
    network = Network(zoo.FAMILIES["llama"]())
    ids_NT = zoo.random_tokens(0)
    plain = network(ids_NT)
    network.layers[1].attention_norm.weight[5] = 1e3  # type: ignore[index,operator]
    network.embedding.weight[ids_NT[1, 7], 3] = 1e5
    spikes = find_spikes(network, ids_NT)
    assert next(iter(spikes.channels["qkv_input"][1])) == 5
    assert {place for place in spikes.tokens if ids_NT[place] == ids_NT[1, 7]} == set(spikes.tokens)
    assert (1, 7) in spikes.tokens
    assert spikes.tokens[1, 7][0][0] == 0
    assert not any(layer.module._forward_pre_hooks for layer in network.layers)
    assert plain.shape == network(ids_NT).shape


# ---- bits ------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.integers(2, 8), KL, min_size=1))
def test_safe_bits_are_safe_and_so_are_more(kl: dict[int, float]) -> None:
    safe = safe_bits(kl)
    if safe is not None:
        assert all(kl[bits] <= SAFE_KL for bits in kl if bits >= safe)
    below = [bits for bits in kl if bits < (safe or 99)]
    assert not below or kl[max(below)] > SAFE_KL
    assert safe_bits(kl | {9: float("nan")}) is None


@pytest.mark.parametrize("place", [Place("activations", "down"), Place("cache", "key"), Place("weights", "mlp_input")])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma2"])
def test_a_place_is_rounded_alone_and_given_back(family: str, place: Place) -> None:
    network, ids_NT = Network((zoo.FAMILIES | zoo.EXPERTS)[family]()), zoo.random_tokens(0)
    before = network(ids_NT)
    errors = []
    for bits in (3, 6):
        alone = [
            bits if kind in (place.kind, place.wire) else 16 for kind in ("weights", "activations", "key", "value")
        ]
        with rounded_alone(network, Recipe().with_(bits=str(Bits(*alone))), place):
            errors.append(float((network(ids_NT) - before).norm()))
        assert torch.equal(network(ids_NT), before)
    assert errors[0] > errors[1] > 0


# ---- advice ----------------------------------------------------------------------------------------------------


@given(KL, KL)
def test_a_rotation_is_advised_exactly_where_it_takes_something_away(plain: float, rotated: float) -> None:
    whole = {"plain": {"kl": plain}, "rotated": {"kl": rotated}}
    advice = advise(Bits(4, 4, 4, 4), SITES, whole, [])
    assert advice["rotate"] is (plain > SAFE_KL and rotated <= WORTH * plain)
    assert (advice["method"] == "none") is not advice["rotate"]
    assert bool(advice["sites"]) is ("--sites residual,down" in advice["options"]) is advice["rotate"]


def test_what_is_not_a_number_is_no_reason_to_rotate() -> None:
    whole = {"plain": {"kl": 1.0}, "rotated": {"kl": float("nan")}}
    assert not advise(Bits(4, 4, 4, 4), SITES, whole, [])["rotate"]


# ---- whole inspections -----------------------------------------------------------------------------------------


def test_every_place_is_measured_both_ways(found: tuple[dict[str, Any], Path]) -> None:
    data, _ = found
    weights = [place for place in data["places"] if place["kind"] == "weights"]
    assert [place["wire"] for place in data["places"] if place["kind"] != "weights"] == list(MEASURED_WIRES)
    assert sorted(role for place in weights for role in place["roles"]) == sorted(
        ["q", "k", "v", "o", "gate", "up", "down"]
    )
    for place in data["places"]:
        for basis in ("plain", "rotated"):
            kl = {int(bits): value for bits, value in place[basis]["kl"].items()}
            assert kl[min(kl)] > kl[max(kl)] > 0
            assert place[basis]["safe_bits"] == safe_bits(kl)
            assert max(kl) == 8 or kl[max(kl)] <= SAFE_KL
    assert data["advice"] == json.loads(json.dumps(advise(Bits(4, 4, 4, 4), data["advice"]["sites"] or
        data["recipe"]["sites"], data["whole"], data["places"])))  # fmt: skip


def test_the_folder_holds_the_data_and_a_page_that_loads_nothing(found: tuple[dict[str, Any], Path]) -> None:
    data, output = found
    assert json.loads((output / "inspect.json").read_text()) == json.loads(json.dumps(data))
    page = Page((output / "index.html").read_text("utf-8"))
    assert not any(LOADING & attrs.keys() for _, attrs in page.tags)
    assert len(page.figures) >= len(data["places"])
    assert data["advice"]["reason"].split(",")[0] in page.text
    assert sorted(entry.name for entry in output.iterdir()) == ["index.html", "inspect.json"]


def test_a_family_without_a_residual_site_is_inspected_without_it(tmp_path: Path) -> None:
    data = inspected(tmp_path, "gemma2", bits="W8A8")
    assert data["recipe"]["sites"] == ["value", "down"]
    assert data["recipe"]["bits"] == "W8A8KV16"


def test_a_float_format_is_inspected_at_its_one_width(tmp_path: Path) -> None:
    data = inspected(tmp_path, bits="W4A4", format="mxfp4")
    widths = {place["kind"]: set(place["plain"]["kl"]) for place in data["places"]}
    assert widths["weights"] == widths["activations"] == {"4"}
    assert len(widths["cache"]) > 1


def test_nothing_to_round_too_few_tokens_and_a_full_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpinfoldError, match="nothing to inspect"):
        spinfold.inspect("nowhere", recipe=Recipe().with_(bits="W16A16"))
    with pytest.raises(SpinfoldError, match="63 tokens"):
        spinfold.inspect("nowhere", tokens=63)
    (tmp_path / "diary").touch()
    with pytest.raises(SpinfoldError, match="diary"):
        spinfold.inspect("nowhere", tmp_path)


def test_the_command_line_says_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, "utf-8")
    command = ["inspect", str(tiny_model(tmp_path / "model")), "--calibration", str(text), "--device", "cpu"]
    capsys.readouterr()
    assert main([*command, "--tokens", "64", "--quiet", "--bits", "W4A4"]) == 0
    told = capsys.readouterr()
    assert "weights of gate, up" in told.out
    assert "otate. Rounded to W4A4KV16, the model loses" in told.out
    assert "Next: spinfold quantize" in told.out
    assert not told.err
