"""Every method on every kind of family: its maps fold into the same function, come back from a file, and repeat."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
import zoo
from torch import Tensor

from spinfold.errors import SpinfoldError
from spinfold.evaluation import prove_same_function, take_fingerprint
from spinfold.fitting.end_to_end import FitLog
from spinfold.fitting.layerwise import LayerwiseSettings
from spinfold.fitting.row_objectives import (
    RowObjective,
    fourth_power,
    kurtosis,
    normalised_fourth_power,
    rounding_error,
)
from spinfold.folding import fold, fold_norms
from spinfold.formats import IntFormat
from spinfold.maps import Diagonal, Hadamard, SiteMaps, random_orthogonal
from spinfold.methods import METHODS, FitTask, optrot
from spinfold.methods.dfrot import massive
from spinfold.methods.optrot import residual_term, total_of, value_term
from spinfold.methods.optrot_plus import error_bound
from spinfold.methods.smoothquant import smoothing_scales
from spinfold.networks import Network
from spinfold.recipe import Recipe

FAMILIES = ("llama_biases", "qwen3", "phi3", "granite")
LAYERWISE = ("optrot", "optrot-plus", "kurtail", "dartquant", "dfrot")


def tiny(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Network:
    return Network(zoo.FAMILIES[family](seed, 96, torch.float32)).to(dtype=dtype)


def recipe_of(method: str, **changes: object) -> Recipe:
    settings = {"method": method, "compute": "fp32", "calibration__seq_len": 24, "calibration__samples": 4}
    return Recipe().with_(**settings | {"fit__steps": 3, "fit__batch": 2} | changes)


def fit(network: Network, recipe: Recipe, sites: tuple[str, ...] | None = None) -> tuple[SiteMaps, FitLog]:
    """What the pipeline does: norms folded if the stream is rotated, in place, then the method."""
    sites = METHODS[recipe.method].sites if sites is None else sites
    if "residual" in sites:
        fold_norms(network)

    def windows(seq_len: int, count: int) -> Tensor:
        return zoo.random_tokens(recipe.seed, count, seq_len)

    return METHODS[recipe.method].fit(FitTask(network, recipe, sites, windows))


@cache
def fitted(method: str, family: str, seed: int = 0) -> SiteMaps:
    return fit(tiny(family), recipe_of(method, seed=seed))[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_fitted_method_folds_to_the_same_function(method: str, family: str) -> None:
    maps = fitted(method, family)
    assert maps.explain()
    network = tiny(family, dtype=torch.float64)
    original = take_fingerprint(network, zoo.random_tokens(0, 2, 24))
    if maps.residual is not None:
        fold_norms(network)
    fold(network, maps)
    assert (proof := prove_same_function(network, original)).ok, proof
    assert set(maps.sites) == set(METHODS[method].sites)


@pytest.mark.parametrize("method", METHODS)
def test_maps_come_back_from_their_parts(method: str) -> None:
    maps = fitted(method, "granite")
    back = SiteMaps.from_parts(*maps.to_parts())
    assert back.sites == maps.sites
    for (name, one), (other_name, other) in zip(maps.each(), back.each(), strict=True):
        assert name == other_name
        assert torch.equal(one.matrix(), other.matrix())


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_gives_the_same_bits_and_leaves_the_network_alone(method: str) -> None:
    network, twin = tiny("llama_biases"), tiny("llama_biases")
    maps, _ = fit(network, recipe_of(method))
    for (_, one), (_, other) in zip(maps.each(), fitted(method, "llama_biases").each(), strict=True):
        assert torch.equal(one.matrix(), other.matrix())
    if "residual" in METHODS[method].sites:
        fold_norms(twin)
    for name, value in twin.model.state_dict().items():
        assert torch.equal(network.model.state_dict()[name], value), name
    assert not any(len(layer.wire(wire).ops) for layer in network.layers for wire in layer.wires)


@pytest.mark.parametrize("method", LAYERWISE)
def test_seeds_differ_and_the_learned_maps_leave_their_start(method: str) -> None:
    first, other = fitted(method, "qwen3"), fitted(method, "qwen3", seed=1)
    start = fitted("quarot", "qwen3")
    assert not torch.equal(first.residual.matrix(), other.residual.matrix())  # type: ignore[union-attr]
    moved = (first.residual.matrix() - start.residual.matrix()).abs().max()  # type: ignore[union-attr]
    assert moved > 1e-4
    assert isinstance(first.down[0], Hadamard) and isinstance(first.query_key[0], Hadamard)  # type: ignore[index]


@pytest.mark.parametrize("method", LAYERWISE)
def test_each_site_can_be_left_out(method: str) -> None:
    for sites in (("residual",), ("value",), ("value", "down"), ("residual", "query_key")):
        maps, _ = fit(tiny("phi3"), recipe_of(method), sites)
        assert maps.sites == sites


@pytest.mark.parametrize("method", LAYERWISE)
def test_an_objective_that_is_not_the_methods_is_refused(method: str) -> None:
    wrong = "kurtosis" if method.startswith("optrot") else "literal"
    with pytest.raises(SpinfoldError, match=method):
        fit(tiny("llama"), recipe_of(method, fit__objective=wrong))


# ── what each is for ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("objective", "power"), [("literal", fourth_power), ("normalised", normalised_fourth_power)])
def test_optrot_flattens_the_folded_weights(objective: str, power) -> None:  # type: ignore[no-untyped-def]
    """The sum over the weights as they are after folding falls: learned against Hadamard, all four sites in place."""
    totals = {}
    for method in ("quarot", "optrot"):
        network = tiny("llama_biases", seed=2)
        extra = {"fit__steps": 80, "fit__objective": objective} if method == "optrot" else {}
        maps, _ = fit(network, recipe_of(method, **extra))
        fold(network, maps)
        totals[method] = sum(float(power(linear.weight_OI).sum()) for linear in network.linears)
    assert totals["optrot"] < 0.97 * totals["quarot"]


@pytest.mark.parametrize("family", ["llama_biases", "phi3"])
def test_optrot_terms_are_the_cost_of_the_folded_weights(family: str) -> None:
    """The terms turn weights as folding does: every reader and writer once, on the right side, the right heads."""
    network = tiny(family, seed=1)
    fold_norms(network)
    layers, head_dim = range(len(network.layers)), network.layers[0].head_dim
    residual = SiteMaps(residual=random_orthogonal(96, 0))
    value = SiteMaps(value=tuple(random_orthogonal(head_dim, 1 + i) for i in layers))
    cost, draws = total_of(fourth_power), torch.Generator()

    def folded(maps: SiteMaps, roles: str) -> float:
        twin = network.copy()
        fold(twin, maps)
        return sum(float(fourth_power(x.weight_OI).sum()) for x in twin.linears if x.role in roles.split())

    R_DD = residual.residual.matrix().float()  # type: ignore[union-attr]
    whole = float(residual_term(network, cost, len(layers), torch.full((len(layers),), -1))(R_DD, draws))
    assert whole == pytest.approx(folded(residual, "q k v o gate up down"), rel=1e-5)
    one_by_one = residual_term(network, cost, 1, torch.full((len(layers),), -1))
    assert sum(float(one_by_one(R_DD, draws)) for _ in layers) / len(layers) == pytest.approx(whole, rel=1e-5)
    B_LHH = torch.stack([one.matrix().float() for one in value.value])  # type: ignore[union-attr]
    assert float(value_term(network, cost)(B_LHH, draws)) == pytest.approx(folded(value, "v o"), rel=1e-5)


def test_optrot_plus_bound_is_above_gptqs_error_and_reads_as_written() -> None:
    """literal: rows ‖W‖₄² tr D. normalised: one term per row and group. ‖·‖₄ is at least the largest entry."""
    w = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    D = torch.rand(2, 12, generator=torch.Generator().manual_seed(1)) + 0.1
    literal = sum(5 * float((w[i] ** 4).sum().sqrt() * D[i].sum()) for i in range(2))
    assert float(error_bound(w, D, None, per_unit=False)) == pytest.approx(literal, rel=1e-5)
    unit = sum(
        float((w[i, o, g : g + 4] ** 4).sum().sqrt() * D[i, g : g + 4].sum())
        for i in range(2)
        for o in range(5)
        for g in range(0, 12, 4)
    )
    assert float(error_bound(w, D, 4, per_unit=True)) == pytest.approx(unit, rel=1e-5)
    steps = w.abs().unflatten(-1, (-1, 4)).amax(-1).square()
    assert unit >= float((steps * D.unflatten(-1, (-1, 4)).sum(-1)[:, None]).sum())


@pytest.mark.parametrize("objective", ["literal", "normalised"])
def test_optrot_plus_lowers_its_bound(objective: str) -> None:
    changes = {"fit__objective": objective, "fit__steps": 40, "calibration__samples": 8}
    _, log = fit(tiny("llama", seed=3), recipe_of("optrot-plus", **changes), ("residual", "down"))
    assert log.losses[-1] < 0.99 * log.losses[0]
    _, log = fit(tiny("llama", seed=3), recipe_of("optrot-plus", **changes), ("value",))
    assert log.losses[-1] < log.losses[0]


def test_large_layers_are_turned_in_parts_to_the_same_place(monkeypatch: pytest.MonkeyPatch) -> None:
    together, log = fit(tiny("llama"), recipe := recipe_of("optrot-plus"))
    monkeypatch.setattr(optrot, "LARGE", 0)
    monkeypatch.setattr(optrot, "PART", 1)
    in_turns, same = fit(tiny("llama"), recipe)
    assert log.losses == pytest.approx(same.losses, rel=1e-4)
    for (_, one), (_, other) in zip(together.each(), in_turns.each(), strict=True):
        torch.testing.assert_close(other.matrix(), one.matrix(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("method", "objective"),
    [("kurtail", kurtosis), ("dartquant", kurtosis), ("dfrot", partial(rounding_error, format=IntFormat(4, True)))],
)
def test_activation_methods_improve_what_is_quantized(method: str, objective: RowObjective) -> None:
    """Measured on the folded network's own wires, on other tokens than those of the fit."""
    means = {}
    for name in ("quarot", method):
        network = tiny("llama_biases", seed=4)
        rate = {"fit__learning_rate": 0.02} if name == "dartquant" else {}
        maps, _ = fit(network, recipe_of(name, fit__steps=40, fit__batch=64, calibration__samples=16, **rate))
        fold(network, maps)
        seen: list[Tensor] = []
        for layer in network.layers:
            for wire in ("qkv_input", "mlp_input"):
                layer.wire(wire).register_forward_hook(lambda _, __, x: seen.append(objective(x).mean()))  # noqa: B023
        network.hidden(zoo.random_tokens(99, 4, 24))
        means[name] = float(torch.stack(seen).mean())
    assert means[method] < 0.97 * means["quarot"]


def test_massive_tokens_are_those_that_one_channel_owns() -> None:
    x = torch.ones(3, 100)
    x[1, 7], x[2, 3], x[2, 4] = 30.0, -21.0, 21.0
    assert massive(x).tolist() == [False, True, False]


# ── SmoothQuant ──────────────────────────────────────────────────────────────────────────────────────────


def test_smoothing_balances_activations_and_weights() -> None:
    """After α = ½ both maxima are √(max|x| max|w|) per channel; α = 1 flattens the activations, α = 0 the weights."""
    x_max, w_max = torch.tensor([100.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 2.0])
    s = smoothing_scales(x_max, w_max, 0.5)
    torch.testing.assert_close((x_max / s)[:2], torch.tensor([10.0, 2.0]))
    torch.testing.assert_close((w_max * s)[:2], torch.tensor([10.0, 2.0]))
    assert s.isfinite().all() and (s > 0).all()
    torch.testing.assert_close((x_max / smoothing_scales(x_max, w_max, 1.0))[:2], torch.ones(2))
    torch.testing.assert_close(w_max * smoothing_scales(x_max, w_max, 0.0), torch.ones(3))


@pytest.mark.parametrize("family", ["llama_biases", "gemma2"])
def test_smoothed_wires_carry_smaller_outliers(family: str) -> None:
    """The wire's channels shrink by the scales, also where a gain is stored as an offset from one; the loudest most."""
    network = tiny(family, dtype=torch.float64)
    ids_BT = zoo.random_tokens(0, 4, 24)  # the tokens of the calibration too
    seen: list[Tensor] = []
    for layer in network.layers:
        layer.wire("qkv_input").register_forward_hook(lambda _, __, x: seen.append(x.flatten(0, 1)))
    network.hidden(ids_BT)
    before, num_layers = list(seen), len(network.layers)
    maps, _ = fit(network, recipe_of("smoothquant", fit__alpha=1.0))
    seen.clear()
    fold(network, maps)
    network.hidden(ids_BT)
    for i, (old, new) in enumerate(zip(before, seen[-num_layers:], strict=True)):
        one = maps.qkv_input[i]  # type: ignore[index]
        assert isinstance(one, Diagonal)
        torch.testing.assert_close(new, old * one.scale_N, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(new.abs().amax(0), torch.ones(96, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_scales_go_with_a_rotation_in_its_basis() -> None:
    """A residual rotation and scales behind the norms fold together: x R S, the scales in the rotated basis."""
    network = tiny("llama_biases", dtype=torch.float64)
    original = take_fingerprint(network, zoo.random_tokens(0, 2, 24))
    scales = [Diagonal(row_N) for row_N in torch.rand(4, 96, generator=torch.Generator().manual_seed(0)).double() + 0.5]
    maps = SiteMaps(residual=Hadamard(96, seed=0), qkv_input=tuple(scales[:2]), mlp_input=tuple(scales[2:]))
    fold_norms(network)
    fold(network, maps)
    assert (proof := prove_same_function(network, original)).ok, proof
    assert torch.equal(network.layers[1].mlp_norm.weight, scales[3].scale_N)  # type: ignore[union-attr]


def test_scales_need_a_norm_before_them_and_a_diagonal() -> None:
    with pytest.raises(SpinfoldError, match="norm"):
        fold(tiny("olmo2"), SiteMaps(qkv_input=(Diagonal(torch.ones(96)),) * 2))
    with pytest.raises(ValueError, match="diagonal"):
        fold(tiny("llama"), SiteMaps(mlp_input=(random_orthogonal(96, 0),) * 2))


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_recipe_overrides_a_methods_defaults() -> None:
    default = LayerwiseSettings(steps=300, learning_rate=0.03, optimiser="adam")
    assert LayerwiseSettings.of(Recipe().fit, default, "fp32") == default
    fit = Recipe().with_(fit__steps=0, fit__learning_rate=1.0, fit__step_rule="capped", fit__schedule="constant").fit
    assert LayerwiseSettings.of(fit, default, "fp32") == LayerwiseSettings(0, 1.0, "capped", "constant", "fp32")


@pytest.mark.parametrize("bits", ["W4A4KV4", "W4A16", "W4A8", "W4A16KV4", "W16A4", "W16A16KV4", "W16A16"])
def test_spinfold_fits_to_whatever_is_quantized(bits: str) -> None:
    """Its maps move where something is rounded, and its clip ratios are learned on the wires that are quantized."""
    recipe = recipe_of("spinfold", bits=bits, activations__clip="learned", kv__clip="learned")
    maps, log = fit(tiny("llama"), recipe)
    assert maps.explain()
    assert bool(log.losses) == (bits != "W16A16")
    wires = {name.partition(".")[2] for name in log.clips}
    expected = {"qkv_input", "mlp_input", "attention_out", "down"} if recipe.activation_format else set()
    assert wires == expected | ({"key", "value"} if recipe.kv_format else set())
    assert all(0.3 <= ratio <= 1 for ratio in log.clips.values())
