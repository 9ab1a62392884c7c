"""How far ranges are clipped: weights by a search, activations and cache by a number, a search, or a fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

from spinfold.fitting.clipping import CLIP_RATIOS, LearnedClips, search_clips
from spinfold.formats import ClipSearch, fake_quantize, fit_grid
from spinfold.maps import Hadamard, SiteMaps
from spinfold.networks import Network
from spinfold.recipe import Recipe
from spinfold.rounding import round_network
from spinfold.runtime import Quantize, quantize_wires, quantized_wires

IDS = zoo.random_tokens(3)
WIRES = ("qkv_input", "mlp_input", "attention_out", "down", "key", "value")


def recipe_of(**changes: Any) -> Recipe:
    return Recipe().with_(bits="W16A4KV4", **changes)


def test_a_number_reaches_every_wire() -> None:
    network = Network(zoo.FAMILIES["llama"]())
    quantize_wires(network, recipe_of(activations__clip=0.9, kv__clip=0.8))
    for layer in network.layers:
        for wire in WIRES:
            (op,) = layer.wire(wire).ops
            assert isinstance(op, Quantize)
            assert op.format.clip == (0.8 if wire in ("key", "value") else 0.9)


@pytest.mark.parametrize(
    ("changes", "wires"),
    [
        ({"activations__clip": "searched"}, WIRES[:4]),
        ({"kv__clip": "searched"}, WIRES[4:]),
        ({"kv__clip": "learned", "activations__clip": 0.9}, WIRES[4:]),
        ({"activations__clip": 0.9}, ()),
    ],
)
@pytest.mark.parametrize("mapped", [False, True])
def test_a_search_finds_the_ratio_of_least_error_on_each_wire(
    changes: dict[str, Any], wires: tuple[str, ...], mapped: bool
) -> None:
    """Seen through the map that the quantizer acts through, on the wires that are left to it and no others."""
    recipe, network = recipe_of(**changes), Network(zoo.FAMILIES["llama"]())
    maps = SiteMaps(residual=Hadamard(96, 0), down=tuple(Hadamard(160, i) for i in range(2))) if mapped else SiteMaps()
    clips = search_clips(network, recipe, IDS, maps)
    assert set(clips) == {f"{layer.index}.{wire}" for layer in network.layers for wire in wires}
    seen: dict[str, Tensor] = {}
    for layer in network.layers:
        for wire in wires:
            name = f"{layer.index}.{wire}"
            layer.wire(wire).register_forward_hook(lambda _, __, x, name=name: seen.update({name: x}))
    network(IDS)
    for layer in network.layers:
        for wire, (format, map) in quantized_wires(layer, recipe, maps).items():
            if (name := f"{layer.index}.{wire}") in clips:
                y = seen[name] if map is None else map.apply(seen[name])
                errors = [float((fake_quantize(y, replace(format, clip=c)) - y).square().sum()) for c in CLIP_RATIOS]
                assert errors[CLIP_RATIOS.index(clips[name])] <= min(errors) * (1 + 1e-5)


def test_learning_goes_downhill_from_the_search_and_stays_in_bounds() -> None:
    """Adam on the ratios finds what the search finds, from its start, where the loss is the rounding error."""
    x_TI = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    format = recipe_of(activations__clip="learned").activation_format
    assert format is not None

    def error(ratio: Tensor) -> Tensor:
        return (fake_quantize(x_TI, format, clip=ratio, scale_gradient=True) - x_TI).square().mean()

    clips = LearnedClips({"0.down": 1.0, "0.key": 0.31}, torch.device("cpu"), learning_rate=0.01)
    best = min(error(torch.tensor(ratio)).item() for ratio in CLIP_RATIOS)
    for _ in range(40):
        clips.zero_grad()
        (error(clips.leaves["0.down"]) + clips.leaves["0.key"]).backward()
        clips.step(1.0)
    settled = clips.settled()
    assert error(torch.tensor(settled["0.down"])).item() <= 1.01 * best < 0.99 * error(torch.tensor(1.0)).item()
    assert settled["0.key"] == pytest.approx(0.3)


def test_weights_are_searched_per_channel_if_the_recipe_says_so() -> None:
    """Each row of a rounded linear has the range that the search gives it alone; without, its whole range."""
    assert recipe_of(weights__clip_search=False).clip_search is None
    assert recipe_of(weights__clip_exponent=2.0).clip_search == ClipSearch(exponent=2.0)
    scales: dict[bool, list[Tensor]] = {}
    for search in (True, False):
        network = Network(zoo.FAMILIES["llama"]())
        recipe = Recipe().with_(bits="W3A16", rounding__method="rtn", weights__clip_search=search)
        before = {x.name: x.weight_OI.clone() for x in network.linears}
        rounded = [one for layer in round_network(network, recipe) for one in layer]
        scales[search] = [one.weight.scale_OG for one in rounded]
        format = recipe.weight_format
        assert format is not None
        for linear, one in list(zip(network.linears, rounded, strict=True))[:7]:
            rows = before[linear.name][:3].split(1)
            alone = [fit_grid(w_1I, format, search=recipe.clip_search).scale_OG for w_1I in rows]
            assert torch.equal(one.weight.scale_OG[:3], torch.cat(alone))
    pairs = list(zip(scales[True], scales[False], strict=True))
    assert all(bool((a <= b).all()) for a, b in pairs)
    assert any(bool((a < b).any()) for a, b in pairs)
