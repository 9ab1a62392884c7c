"""One batch of calibration tokens waits at each wire, and gives what running the layer anew for each wire gives."""

from __future__ import annotations

import pytest
import torch
import zoo

from spinfold.networks import Network
from spinfold.recipe import Recipe
from spinfold.rounding import round_network
from spinfold.rounding.stream import Stream

IDS = zoo.random_tokens(3)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "mixtral"])
def test_the_same_weights_either_way(family: str, compute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe().with_(bits="W4A16", compute=compute)
    states = []
    for in_one in (True, False):
        if not in_one:
            monkeypatch.setattr(Stream, "is_one_batch", False)
        network = Network((zoo.FAMILIES | zoo.EXPERTS)[family]())
        for _ in round_network(network, recipe, IDS):
            pass
        states.append([linear.weight_OI for linear in network.linears])
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_a_layer_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(zoo.FAMILIES["llama"]())
    runs = []
    for layer in network.layers:
        layer.module.register_forward_pre_hook(lambda *_, i=layer.index: runs.append(i))
    for _ in round_network(network, Recipe().with_(bits="W4A16"), IDS):
        pass
    assert runs == [layer.index for layer in network.layers]
