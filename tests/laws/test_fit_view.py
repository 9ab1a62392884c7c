"""The fit view is the folded network: rounding seen through maps equals rounding in the maps' own basis."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import zoo

from spinfold.fitting.end_to_end import Schedule, fit_end_to_end
from spinfold.folding import fold, fold_norms
from spinfold.formats import IntFormat, fake_quantize
from spinfold.maps import CayleySGD, Diagonal, Orthogonal, SiteMaps, random_orthogonal
from spinfold.networks import Network
from spinfold.recipe import Recipe
from spinfold.runtime import quantize_wires, round_weights_through

FAMILIES = ["llama_biases", "qwen3", "phi3", "granite"]


def prepared(family: str) -> tuple[Network, SiteMaps]:
    network = Network(zoo.FAMILIES[family](1, 96, torch.float32)).to(dtype=torch.float64)
    fold_norms(network)
    first, layers = network.layers[0], range(len(network.layers))
    width = first.linears["down"].weight_OI.shape[1]
    scale_F = torch.rand(width, generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 0.5
    maps = SiteMaps(
        residual=random_orthogonal(network.hidden_size, 1),
        value=tuple(random_orthogonal(first.head_dim, 10 + i) for i in layers),
        query_key=tuple(random_orthogonal(first.head_dim, 20 + i) for i in layers),
        down=tuple(Diagonal(scale_F) for _ in layers),
    )
    return network, maps


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", [None, IntFormat(4, True), IntFormat(3, False, 8)], ids=str)
def test_rounding_through_maps_is_rounding_after_the_fold(family: str, weights: IntFormat | None) -> None:
    network, maps = prepared(family)
    recipe, ids_BT = Recipe(bits="W4A6KV5"), zoo.random_tokens(3, 2, 16)
    folded = network.copy()
    take_off = [quantize_wires(network, recipe, maps)]
    if weights is not None:
        take_off.append(round_weights_through(network, weights, maps))
    with torch.no_grad():
        seen = network(ids_BT)
        fold(folded, maps)
        if weights is not None:
            for linear in folded.linears:
                linear.weight_OI.copy_(fake_quantize(linear.weight_OI.clone(), weights))
        unrounded = folded(ids_BT)
        quantize_wires(folded, recipe)
        expected = folded(ids_BT)
        torch.testing.assert_close(seen, expected, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(seen, unrounded, atol=1e-2), "nothing was quantized"
        for undo in take_off:
            undo()
        torch.testing.assert_close(network(ids_BT), prepared(family)[0](ids_BT), rtol=0, atol=0)


def test_the_gradient_reaches_the_maps_through_rounded_weights() -> None:
    network, maps = prepared("llama_biases")
    leaf = maps.residual.matrix().requires_grad_()  # type: ignore[union-attr]
    take_off = round_weights_through(network, IntFormat(3, True), SiteMaps(residual=Orthogonal(leaf)))
    network(zoo.random_tokens(0, 1, 16)).square().mean().backward()  # type: ignore[no-untyped-call]
    take_off()
    assert leaf.grad is not None and leaf.grad.abs().max() > 0


def spread(network: Network, ids_BT: torch.Tensor) -> torch.Tensor:
    return network(ids_BT).logsumexp(-1).mean()


def test_a_step_does_not_depend_on_how_many_windows_fit() -> None:
    """Passes of one window or of all give the same maps."""
    results = []
    for tokens in (16, 1 << 20):
        network, maps = prepared("mistral")
        leaf = maps.residual.matrix().requires_grad_()  # type: ignore[union-attr]
        take_off = quantize_wires(
            network, Recipe(bits="W16A4"), SiteMaps(residual=Orthogonal(leaf)), scale_gradient=True
        )
        ids_NT = zoo.random_tokens(5, 6, 16)
        schedule = Schedule(steps=3, batch=4, tokens_per_pass=tokens)
        log = fit_end_to_end(
            network,
            partial(spread, network),
            [ids_NT],
            [CayleySGD([leaf], 0.05)],
            schedule,
            "fp32",
        )
        take_off()
        assert len(log.losses) == 3 and log.samples == 12
        results.append(leaf.detach())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-9)
