"""Laws of the back-ends beside GPTQ: what each minimises, what it equals, and that it is never worse than nearest."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

from spinfold.errors import SpinfoldError
from spinfold.formats import FLOAT_FORMATS, ClipSearch, Format, IntFormat, QuantizedWeight
from spinfold.networks import INPUT_WIRE, Network
from spinfold.recipe import Override, Recipe, Rounding
from spinfold.rounding import (
    MEASURED_WINDOWS,
    absorb_outliers,
    allocate,
    autoround,
    gptaq,
    gptq,
    ldlq,
    meet_budget,
    round_nearest,
    round_network,
)
from spinfold.rounding.autoround import _Learned
from spinfold.rounding.gptaq import asymmetric_target
from spinfold.rounding.osaq import quiet_directions
from spinfold.rounding.stream import Stream

FORMATS = [IntFormat(b, s, g) for b, s, g in itertools.product((2, 4), (True, False), (None, 8))]
formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{'s' if f.symmetric else 'a'}{f.bits}g{f.group_size}")
seeds = pytest.mark.parametrize("seed", range(3))


def inputs(seed: int, size: int = 40, tokens: int = 240) -> tuple[Tensor, Tensor, Tensor]:
    """fp64 weights, inputs x with strong correlations, and the x° that they were before noise and a bias."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing_II = randn(size, size) * torch.logspace(0, -1.5, size, dtype=torch.float64)[:, None]
    x_TI = randn(tokens, size) @ mixing_II
    return randn(12, size), x_TI, x_TI @ (torch.eye(size) + 0.1 * randn(size, size)) + 0.3 * randn(tokens, size)


def moments(x_TI: Tensor, original_TI: Tensor) -> tuple[Tensor, Tensor]:
    return x_TI.T @ x_TI / len(x_TI), (original_TI - x_TI).T @ x_TI / len(x_TI)


def same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors().values(), other.tensors().values(), strict=True))


def proxy(w_OI: Tensor, rounded: QuantizedWeight, h_II: Tensor) -> float:
    e_OI = w_OI - rounded.dequantize(torch.float64)
    return float((e_OI @ h_II * e_OI).sum())


# ---- GPTAQ ---------------------------------------------------------------------------------------------------------


def test_the_asymmetric_target_is_the_least_squares_weight() -> None:
    w_OI, x_TI, original_TI = inputs(0)
    x_TI = x_TI + 0.1 * original_TI  # better conditioned
    best_IO = torch.linalg.lstsq(x_TI, original_TI @ w_OI.T).solution
    target_OI = asymmetric_target(w_OI, *moments(x_TI, original_TI), alpha=1, damp=1e-14)
    torch.testing.assert_close(target_OI, best_IO.T, rtol=1e-6, atol=1e-8)
    quarter_OI = asymmetric_target(w_OI, *moments(x_TI, original_TI), alpha=0.25, damp=1e-14)
    torch.testing.assert_close(quarter_OI - w_OI, (target_OI - w_OI) / 4)


@formats
@seeds
def test_gptaq_is_closest_to_the_original_output(fmt: IntFormat, seed: int) -> None:
    w_OI, x_TI, original_TI = inputs(seed)
    hessian_II, drift_II = moments(x_TI, original_TI)

    def error(rounded: QuantizedWeight) -> float:
        return float((original_TI @ w_OI.T - x_TI @ rounded.dequantize(torch.float64).T).square().sum())

    ours, report = gptaq(w_OI, hessian_II, drift_II, fmt, alpha=1)
    assert error(ours) < 0.7 * min(error(gptq(w_OI, hessian_II, fmt)[0]), error(round_nearest(w_OI, fmt)))
    assert report.error < report.nearest_error


@formats
def test_without_drift_gptaq_is_gptq(fmt: IntFormat) -> None:
    w_OI, x_TI, original_TI = inputs(1)
    hessian_II, drift_II = moments(x_TI, original_TI)
    expected, report = gptq(w_OI, hessian_II, fmt)
    for drift, alpha in ((torch.zeros_like(drift_II), 1.0), (drift_II, 0.0)):
        rounded, other = gptaq(w_OI, hessian_II, drift, fmt, alpha=alpha)
        assert same(rounded, expected)
        assert other.error == report.error
        assert other.nearest_error == pytest.approx(report.nearest_error, rel=1e-6)


# ---- LDLQ ----------------------------------------------------------------------------------------------------------


@formats
@seeds
@pytest.mark.parametrize("search", [None, ClipSearch(steps=10)], ids=["range", "search"])
def test_gptq_in_natural_order_is_ldlq(fmt: IntFormat, seed: int, search: ClipSearch | None) -> None:
    w_OI, x_TI, _ = inputs(seed)
    h_II = x_TI.T @ x_TI
    h_II[7], h_II[:, 7] = 0, 0
    one, report = ldlq(w_OI, h_II, fmt, search=search)
    other, expected = gptq(w_OI, h_II, fmt, search=search, act_order=False)
    assert same(one, other)
    assert report.error == pytest.approx(expected.error, rel=1e-9)
    assert report.nearest_error == expected.nearest_error
    assert report.dead_columns == 1


@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_both_are_the_same_on_floating_point_grids(name: str) -> None:
    w_OI, x_TI, _ = inputs(0, size=64)
    h_II, fmt = x_TI.T @ x_TI, FLOAT_FORMATS[name]
    assert same(ldlq(w_OI, h_II, fmt)[0], gptq(w_OI, h_II, fmt, act_order=False)[0])
    errors = [proxy(w_OI, ldlq(w_OI, h_II, fmt, passes=n, damp=1e-12)[0], h_II) for n in range(3)]
    assert errors == sorted(errors, reverse=True)


@formats
@seeds
def test_no_pass_of_coordinate_descent_is_a_step_back(fmt: IntFormat, seed: int) -> None:
    w_OI, x_TI, _ = inputs(seed)
    h_II = x_TI.T @ x_TI
    errors = [proxy(w_OI, ldlq(w_OI, h_II, fmt, passes=n, damp=1e-12)[0], h_II) for n in range(4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < errors[0]


def test_after_enough_passes_no_single_integer_can_be_bettered() -> None:
    w_OI, x_TI, _ = inputs(3)
    h_II, fmt = x_TI.T @ x_TI, IntFormat(3, True)
    found = ldlq(w_OI, h_II, fmt, passes=50, damp=1e-12)[0]
    least = proxy(w_OI, found, h_II)
    for o, i, step in itertools.product(range(12), range(40), (-1, 1)):
        q_OI = found.q_OI.clone()
        q_OI[o, i] = (q_OI[o, i] + step).clamp(fmt.low, fmt.high)
        other = QuantizedWeight(q_OI, found.scale_OG, found.second_OG, fmt)
        assert proxy(w_OI, other, h_II) >= least * (1 - 1e-9)


# ---- OSAQ ----------------------------------------------------------------------------------------------------------


def outliers(seed: int) -> tuple[Tensor, Tensor]:
    """Weights with one loud entry in each row, and inputs that span half of the space."""
    generator = torch.Generator().manual_seed(seed)
    w_OI = torch.randn(12, 40, generator=generator, dtype=torch.float64)
    w_OI[torch.arange(12), torch.randint(40, (12,), generator=generator)] = 8
    x_TI = torch.randn(200, 20, generator=generator, dtype=torch.float64)
    return w_OI, x_TI @ torch.randn(20, 40, generator=generator, dtype=torch.float64)


@formats
@seeds
def test_absorbing_outliers_changes_no_output_and_helps(fmt: IntFormat, seed: int) -> None:
    w_OI, x_TI = outliers(seed)
    h_II = x_TI.T @ x_TI
    flat_OI = absorb_outliers(w_OI, h_II, fmt, share=1e-9)
    torch.testing.assert_close(x_TI @ flat_OI.T, x_TI @ w_OI.T, rtol=1e-8, atol=1e-8)
    moved_O = (flat_OI != w_OI).any(1)
    assert moved_O.any()
    assert (flat_OI.abs().amax(1) < w_OI.abs().amax(1))[moved_O].all()
    nearest, ours = round_nearest(w_OI, fmt), round_nearest(flat_OI, fmt)
    assert proxy(w_OI, ours, h_II) < 0.99 * proxy(w_OI, nearest, h_II)


def test_quiet_directions_hold_no_more_than_their_share() -> None:
    _, x_TI, _ = inputs(0)
    h_II = x_TI.T @ x_TI
    sizes = []
    for share in (1e-12, 1e-4, 1e-2, 0.5):
        n_KI = quiet_directions(h_II, share)
        sizes.append(len(n_KI))
        assert (n_KI @ h_II * n_KI).sum() <= share * h_II.trace() * (1 + 1e-9)
        torch.testing.assert_close(n_KI @ n_KI.T, torch.eye(len(n_KI), dtype=torch.float64))
    assert sizes == sorted(sizes) and sizes[0] == 0 < sizes[-1]


def test_nothing_is_absorbed_where_no_direction_is_quiet() -> None:
    w_OI = outliers(0)[0]
    assert torch.equal(absorb_outliers(w_OI, torch.eye(40), IntFormat(4, True)), w_OI)


# ---- learned rounding ----------------------------------------------------------------------------------------------

RECIPE = Recipe.parse({"bits": "W3A16", "compute": "fp32", "weights": {"clip_search": False}})


def learn(network: Network, fmt: Format, **settings: Any) -> tuple[dict[str, QuantizedWeight], float, float]:
    stream = Stream(network, zoo.random_tokens(0, 8, 16), "fp32")
    layer, before = network.layers[0], list(stream.batches)
    stream.pass_through(layer)
    keys = dict.fromkeys(layer.linears, fmt)
    given = Rounding(method="autoround", batch=4, **settings)
    return autoround(layer, keys, before, stream.batches, stream.kwargs_of[0], given, seed=0)


@pytest.mark.parametrize(("family", "fmt"), [
    *itertools.product(("llama", "phi3", "qwen3_moe"), (IntFormat(3, True, 16), IntFormat(3, False, 16))),
    *(("llama", FLOAT_FORMATS[name]) for name in ("mxfp4", "nvfp4", "amxfp4", "fp8")),
    ("qwen3_moe", FLOAT_FORMATS["nvfp4"]),
], ids=str)  # fmt: skip
def test_autoround_starts_at_nearest_and_is_better_when_it_ends(family: str, fmt: Format) -> None:
    network = Network((zoo.FAMILIES | zoo.EXPERTS)[family]())
    before = {key: x.weight_OI.clone() for key, x in network.layers[0].linears.items()}
    start, error, nearest_error = learn(network, fmt, steps=0)
    assert error == nearest_error > 0
    assert all(same(start[key], round_nearest(w_OI, fmt)) for key, w_OI in before.items())
    learned, error, other = learn(network, fmt, steps=30)
    assert other == nearest_error
    assert error < (0.95 if fmt.bits < 8 else 0.995) * nearest_error
    again = learn(network, fmt, steps=30)[0]
    assert all(same(again[key], weight) for key, weight in learned.items())
    assert all(torch.equal(x.weight_OI, before[key]) for key, x in network.layers[0].linears.items())
    for key, weight in learned.items():  # what is stored is what was measured
        network.layers[0].linears[key].weight_OI.copy_(weight.dequantize())
    original = Network((zoo.FAMILIES | zoo.EXPERTS)[family]())
    streams = [Stream(one, zoo.random_tokens(0, 8, 16), "fp32") for one in (network, original)]
    for stream, one in zip(streams, (network, original), strict=True):
        stream.pass_through(one.layers[0])
    ours, wanted = (stream.batches[0].double() for stream in streams)
    assert float((ours - wanted).square().sum() / wanted.square().sum()) == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6", "nvfp4", "amxfp4", "fp8"])
@pytest.mark.parametrize("rule", ["floor", "even", "real"])
def test_learned_floats_are_elements_beside_the_weight(name: str, rule: Any) -> None:
    """Whatever was learned, each weight is one of the two elements around it, or the end; scales are such as stored."""
    network, generator = Network(zoo.FAMILIES["llama"]()), torch.Generator().manual_seed(0)
    fmt = replace(FLOAT_FORMATS[name], scale=rule) if name.startswith("mx") else FLOAT_FORMATS[name]
    one = _Learned(network.layers[0].linears["down"], fmt, None, torch.float16)
    one.w_OI[0], one.w_OI[1] = 0, one.w_OI[1].abs()
    with torch.no_grad():
        one.v_OI.copy_(torch.rand(one.v_OI.shape, generator=generator) - 0.5)
        one.c_OG.copy_(torch.rand(one.c_OG.shape, generator=generator) + 0.5)
    weight = one.settled()
    assert torch.equal(weight.dequantize(), one.weight_OI())
    assert torch.equal(weight.grid.quantize(weight.dequantize()), weight.q_OI) or fmt.by_sign
    scale_OG1, second_OG1 = one.moved()
    step_OGg = fmt.step_of(fmt.split(one.w_OI), scale_OG1, second_OG1)
    ratio_OI = (fmt.split(one.w_OI) / step_OGg.masked_fill(step_OGg == 0, torch.inf)).flatten(1).detach()
    magnitudes = fmt.elements.magnitudes()
    magnitudes = magnitudes[magnitudes.isfinite()]
    above_OI = torch.bucketize(ratio_OI.abs(), magnitudes).clamp(max=len(magnitudes) - 1)
    found_OI = torch.bucketize(fmt.decode(weight.q_OI, torch.float32).abs(), magnitudes)
    assert bool(((found_OI == above_OI) | (found_OI == above_OI - 1)).all())
    assert bool((found_OI < above_OI).any() and (found_OI == above_OI).any())


def test_autoround_keeps_the_best_even_if_every_step_is_bad() -> None:
    network = Network(zoo.FAMILIES["llama"]())
    _, error, nearest_error = learn(network, IntFormat(4, True), steps=3, learning_rate=0.49)
    assert error <= nearest_error


# ---- through a network ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"rounding__method": "gptaq"},
        {"rounding__method": "ldlq", "rounding__passes": 1},
        {"rounding__method": "autoround", "rounding__steps": 4, "rounding__batch": 2},
        {"rounding__method": "gptq", "rounding__absorb": 1e-3},
        {"rounding__method": "rtn", "rounding__absorb": 1e-3},
        {"rounding__method": "gptaq", "overrides": [{"match": "layers.*.[kv]", "bits": 8}]},
        {"rounding__method": "gptq", "budget": 5, "overrides": [{"match": "layers.[12].*", "bits": 3}]},
    ],
    ids=str,
)
def test_rounding_goes_on_where_it_was_stopped(change: dict[str, Any]) -> None:
    kept = 2
    recipe, ids_NT = RECIPE.with_(**change), zoo.random_tokens(1, 4, 24)
    whole_network, network = (Network(zoo.FAMILIES["llama_tied"]()) for _ in range(2))
    whole = list(round_network(whole_network, recipe, ids_NT))
    rest = list(round_network(network, recipe, ids_NT, done=whole[:kept]))
    assert len(rest) == len(whole) - kept == 3 - kept
    for one, other in zip(itertools.chain(*rest), itertools.chain(*whole[kept:]), strict=True):
        assert same(one.weight, other.weight)
        assert (one.name, one.error, one.nearest_error) == (other.name, other.error, other.nearest_error)
        assert one.error is not None and one.nearest_error is not None
    for one, other in zip(network.linears, whole_network.linears, strict=True):
        assert torch.equal(one.weight_OI, other.weight_OI)


@pytest.mark.parametrize("settings", [
    {"method": "rtn"}, {"method": "rtn", "absorb": 1e-3}, {"method": "gptq"}, {"method": "ldlq", "passes": 1},
    {"method": "autoround", "steps": 2},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("format", ["int", "nvfp4"])
def test_each_linear_has_its_own_error(settings: dict[str, Any], format: str) -> None:
    """The error of its output on what the rounded network gives it, measured here without any Hessian."""
    recipe = RECIPE.with_(format=format, rounding=settings, **({} if format == "int" else {"bits": "W4A16"}))
    network, ids_NT = Network(zoo.FAMILIES["llama"]()), zoo.random_tokens(1, 4, 24)
    weights = {(x.layer, x.key): x.weight_OI.double() for x in network.linears}
    rounded = [one for layer in round_network(network, recipe, ids_NT) for one in layer]
    seen: dict[tuple[int, str], Tensor] = {}
    wires = list(network.layers[0].groups)
    ids_NT = ids_NT[:MEASURED_WINDOWS] if settings == {"method": "rtn"} else ids_NT
    for layer, wire in itertools.product(network.layers, wires):
        layer.wire(wire).register_forward_hook(lambda _, __, x, at=(layer.index, wire): seen.update({at: x}))
    network(ids_NT)
    assert len({one.error for one in rounded}) == len(rounded) == len(weights)
    for one in rounded:
        w_OI, x = weights[one.layer, one.key], seen[one.layer, INPUT_WIRE[one.role]].double()
        left, output = (float((x @ y_OI.T).square().sum()) for y_OI in (w_OI - one.weight.dequantize(x.dtype), w_OI))
        assert one.error == pytest.approx(left / output, rel=1e-4)
        assert one.nearest_error is not None
        assert one.nearest_error == one.error or settings != {"method": "rtn"}


def test_overrides_reach_the_linears_that_they_name() -> None:
    overrides = [
        {"match": "layers.*.down", "bits": 8, "group_size": 16},
        {"match": "layers.1.*", "symmetric": False},
        {"match": "layers.1.down", "group_size": "row"},
    ]
    recipe = RECIPE.with_(group_size=8, overrides=overrides)
    layers = round_network(Network(zoo.FAMILIES["llama"]()), recipe, zoo.random_tokens(0))
    assert {one.name: one.weight.format for layer in layers for one in layer} == {
        f"layers.{i}.{role}": IntFormat(8, not i, None if i else 16) if role == "down" else IntFormat(3, not i, 8)
        for i in range(2)
        for role in ("q", "k", "v", "o", "gate", "up", "down")
    }


# ---- budgets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_allocation_is_the_best_of_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (4,), generator=generator).tolist()
    costs = [{b: b * 64 * size + 32 for b in (2, 3, 4, 8)} for size in sizes]
    errors = [dict(zip(cost, torch.rand(4, generator=generator).tolist(), strict=True)) for cost in costs]
    budget = int(4.25 * 64 * sum(sizes))
    every = [
        (sum(e[b] for e, b in zip(errors, widths, strict=True)), widths)
        for widths in itertools.product((2, 3, 4, 8), repeat=4)
        if sum(c[b] for c, b in zip(costs, widths, strict=True)) <= budget
    ]
    assert tuple(allocate(costs, errors, budget)) == min(every)[1]


def test_a_budget_holds_also_where_units_are_coarse() -> None:
    costs = [{b: b * 1_000_003 + 7 * i for b in (2, 4, 8)} for i in range(50)]
    errors = [{b: (1 + i) * 4.0**-b for b in (2, 4, 8)} for i in range(50)]
    budget = 4_250_000 * 50
    widths = allocate(costs, errors, budget)
    spent = sum(cost[b] for cost, b in zip(costs, widths, strict=True))
    assert 0.97 * budget < spent <= budget
    assert widths == sorted(widths)  # the more sensitive, the wider


def test_a_budget_that_nothing_meets_is_refused() -> None:
    with pytest.raises(SpinfoldError, match="budget"):
        allocate([{2: 100}], [{2: 1.0}], 99)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_network_gets_what_its_budget_buys(family: str) -> None:
    network, ids_NT = Network((zoo.FAMILIES | zoo.EXPERTS)[family]()), zoo.random_tokens(0, 4, 32)
    before = {name: value.clone() for name, value in network.model.state_dict().items()}
    pinned = {"match": "layers.0.q", "bits": 8}
    recipe = RECIPE.with_(group_size=16, budget=6.25, overrides=[pinned], rounding__method="rtn")
    spent = meet_budget(network, recipe, ids_NT)
    assert all(torch.equal(value, before[name]) for name, value in network.model.state_dict().items())
    assert meet_budget(network, spent, ids_NT) is spent
    assert spent.weight_format_of("layers.0.q") == IntFormat(8, True, 16)
    rounded = [one for layer in round_network(network, spent, ids_NT) for one in layer]
    weights = sum(one.weight.q_OI.numel() for one in rounded)
    bits = sum(one.weight.bits_per_weight * one.weight.q_OI.numel() for one in rounded) / weights
    assert 6.1 < bits <= 6.25
    assert len({one.weight.format.bits for one in rounded}) > 1


def test_the_last_override_wins() -> None:
    first, last = Override(match="layers.*", bits=2), Override(match="*.down", bits=8)
    assert Recipe(overrides=(first, last)).weight_format_of("layers.3.down@5") == IntFormat(8, True)
    assert Recipe(overrides=(last, first)).weight_format_of("layers.3.down@5") == IntFormat(2, True)
    assert Recipe(bits="W16A16KV16", overrides=(first,)).weight_format_of("layers.3.down") is None
