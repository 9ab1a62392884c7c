"""SpinOut: outliers that stand where they should and leave nothing behind, scores and searches with known answers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spinfold.errors import SpinfoldError
from spinfold.fitting.end_to_end import FitLog
from spinfold.fitting.injection import OUTLIER_WIRES, Injection, inject
from spinfold.folding import fold_norms
from spinfold.formats import IntFormat, fake_quantize
from spinfold.maps import Hadamard, Orthogonal, SiteMaps, random_orthogonal
from spinfold.maps.manifold import orthogonality_gap
from spinfold.methods import METHODS, FitTask
from spinfold.methods.quarot import hadamard_maps
from spinfold.methods.spinout import Trials, choose_layers, search_subset, standard_score, token_kurtosis
from spinfold.networks import Network
from spinfold.progress import Quiet
from spinfold.recipe import Recipe
from spinfold.runtime import Quantize, quantize_wires

FAMILIES = ("llama_biases", "qwen3", "phi3", "granite", "gemma2", "mixtral")
SEQ_LEN = 24


def tiny(family: str = "llama_biases", dtype: torch.dtype = torch.float32) -> Network:
    network = Network((zoo.FAMILIES | zoo.EXPERTS)[family](0, 96, torch.float32)).to(dtype=dtype)
    network.untie()
    return network


def task_for(network: Network, windows: Callable[[int, int], Tensor] | None = None, **fit: Any) -> FitTask:
    recipe = Recipe(method="spinout", compute="fp32").with_(
        calibration__seq_len=SEQ_LEN,
        **{f"fit__{key}": value for key, value in ({"steps": 3, "batch": 2} | fit).items()},
    )
    fold_norms(network)
    windows = windows or (lambda seq_len, count: zoo.random_tokens(0, count, seq_len))
    return FitTask(network, recipe, METHODS["spinout"].sites, windows)


def same(one: SiteMaps, other: SiteMaps) -> bool:
    return all(torch.equal(a.matrix(), b.matrix()) for (_, a), (_, b) in zip(one.each(), other.each(), strict=True))


# ── injection ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", FAMILIES)
def test_compensated_outliers_leave_the_function_alone_and_literal_ones_do_not(family: str) -> None:
    network, ids_BT = tiny(family, torch.float64), zoo.random_tokens(0, 2, SEQ_LEN)
    original = network(ids_BT)
    for compensated, bound in ((True, 1e-10), (False, 1e-2)):
        take_off = inject(network, (0, 1), Injection(7.3, compensated), SEQ_LEN)
        error = float((network(ids_BT) - original).norm() / original.norm())
        assert (error < bound) == compensated, error
        take_off()
        assert torch.equal(network(ids_BT), original)


def test_a_factor_of_one_is_the_identity() -> None:
    network, ids_BT = tiny(), zoo.random_tokens(0, 2, SEQ_LEN)
    quantize_wires(network, Recipe())
    original = network(ids_BT)
    for compensated in (True, False):
        take_off = inject(network, (0, 1), Injection(1.0, compensated), SEQ_LEN)
        assert torch.equal(network(ids_BT), original)
        take_off()


@pytest.mark.parametrize("compensated", [True, False])
def test_outliers_pass_through_the_map(compensated: bool) -> None:
    """What the quantizer sees is x R D' with D' = Rᵀ diag(d) R, token by token, and R's gradient knows of it."""
    network, R_DD = tiny(), random_orthogonal(96, 1).matrix().requires_grad_()
    fmt, wire = IntFormat(4, symmetric=False), network.layers[1].wire("mlp_input")
    x_BTD = torch.randn(2, SEQ_LEN, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    take_off = inject(network, (1,), Injection(8.0, compensated=False), SEQ_LEN)
    d_TD = wire(torch.ones(1, SEQ_LEN, 96, dtype=torch.float64))[0]  # no op yet: the bare factors
    take_off()

    take_off = inject(network, (1,), Injection(8.0, compensated), SEQ_LEN)
    wire.ops.append(Quantize(fmt, Orthogonal(R_DD), scale_gradient=True))
    seen_BTD = wire(x_BTD)
    take_off()
    D_TDD = R_DD.T @ torch.diag_embed(d_TD) @ R_DD
    expected_BTD = fake_quantize(torch.einsum("btd,tde->bte", x_BTD @ R_DD, D_TDD), fmt)
    if compensated:
        expected_BTD = torch.einsum("btd,tde->bte", expected_BTD, torch.linalg.inv(D_TDD))
    torch.testing.assert_close(seen_BTD, expected_BTD @ R_DD.T, rtol=1e-9, atol=1e-9)

    target_BTD = torch.randn_like(x_BTD)
    with_outliers = torch.autograd.grad((seen_BTD * target_BTD).sum(), R_DD)[0]
    without = torch.autograd.grad((wire(x_BTD) * target_BTD).sum(), R_DD)[0]
    assert (with_outliers - without).norm() > 1e-2 * without.norm()


def test_outliers_are_few_always_hit_the_first_token_and_belong_to_their_layer() -> None:
    network, length = tiny(), 2000

    def factors(layers: tuple[int, ...], seed: int = 0) -> list[Tensor]:
        take_off = inject(network, layers, Injection(8.0, False, channel_share=0.02, seed=seed), length)
        ones_TD = torch.ones(1, length, 96)
        found = [layer.wire(wire)(ones_TD)[0] for layer in network.layers for wire in OUTLIER_WIRES]
        take_off()
        return found

    def of_two_windows() -> Tensor:
        take_off = inject(network, (0,), Injection(8.0, False, channel_share=0.02), length)
        factors_TD = network.layers[0].wire("qkv_input")(torch.ones(1, 2 * length, 96))[0]
        take_off()
        return factors_TD

    both, second = factors((0, 1)), factors((1,))
    for d_TD in both:
        hit_TD = d_TD == 8
        assert hit_TD[0].sum() == 2 and hit_TD.any(0).sum() == 2  # round(0.02 · 96) channels
        assert 0.03 < hit_TD.any(1).float().mean() < 0.07
        assert ((d_TD == 1) | hit_TD).all()
    assert all(torch.equal(a, b) for a, b in zip(both[3:], second[3:], strict=True))
    assert all((d_TD == 1).all() for d_TD in second[:3])
    assert torch.equal(of_two_windows(), both[0].repeat(2, 1)), "experts get all windows as one"
    assert not torch.equal(both[0], both[3]) and not torch.equal(both[0], factors((0,), seed=1)[0])


# ── score and search ─────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=20)
@given(st.floats(0.01, 100), st.floats(-10, 10))
def test_kurtosis_of_known_distributions(scale: float, shift: float) -> None:
    """Neither scale nor mean counts. Tolerance: six standard errors, √(24/n) for the Gaussian."""
    draws, count = torch.Generator().manual_seed(0), 200_000
    gaussian = torch.randn(count, generator=draws, dtype=torch.float64)
    uniform = torch.rand(count, generator=draws, dtype=torch.float64)
    for values, expected in ((gaussian, 3.0), (uniform, 1.8)):
        assert float(token_kurtosis((values + shift) * scale)) == pytest.approx(expected, abs=0.07)


@given(st.lists(st.integers(-10_000, 10_000), min_size=2, max_size=9, unique=True))
def test_standard_scores_have_mean_zero_and_variance_one(values: list[int]) -> None:
    x_L = torch.tensor(values, dtype=torch.float64)
    z_L = standard_score(x_L)
    torch.testing.assert_close(z_L.mean(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(z_L.square().mean(), torch.ones((), dtype=torch.float64))
    assert torch.equal(x_L.argsort(), z_L.argsort())
    assert torch.equal(standard_score(0 * x_L), 0 * x_L)


@given(st.integers(1, 40), st.integers(0, 1000))
def test_the_search_is_nested_then_greedy_within_its_budget(count: int, seed: int) -> None:
    score_L = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    order = score_L.argsort(descending=True).tolist()
    tried: list[frozenset[int]] = []
    losses = random.Random(seed)
    loss_of_tried: dict[frozenset[int], float] = {}

    def loss_of(layers: frozenset[int]) -> float:
        tried.append(layers)
        return loss_of_tried.setdefault(layers, losses.random())

    chosen = search_subset(score_L, loss_of)
    sizes = sorted({m for m in (1, 2, 4, 8, count // 4, count // 2) if 1 <= m <= count})
    assert [frozenset(order[:m]) for m in sizes] == tried[: len(sizes)]
    assert len(tried) == len(set(tried)) <= 14 and all(tried)
    assert loss_of_tried[chosen] == min(loss_of_tried.values())


@pytest.mark.parametrize("planted", [{0}, {3, 5}, {1, 2, 3, 4, 6}])
def test_the_search_finds_a_planted_subset(planted: set[int]) -> None:
    """With a loss that counts wrong layers, from scores that rank the planted ones first but for one swap."""
    order = [*sorted(planted), *sorted(set(range(12)) - planted)]
    size = len(planted)
    order[size - 1], order[size] = order[size], order[size - 1]
    score_L = torch.zeros(12)
    score_L[order] = torch.arange(12.0).flip(0)
    assert search_subset(score_L, lambda layers: len(layers ^ planted)) == planted


def planted_network(sensitive: int) -> tuple[Network, Callable[[int, int], Tensor]]:
    """Three layers of which only `sensitive` matters and has outliers, and text that the network itself continues.

    The down input of that layer is a multiple of one row u for all tokens, u H = e: the fixed Hadamard makes a spike of
    it. The other layers add next to nothing to the stream.
    """
    network = tiny("llama_tied")
    for layer in network.layers:
        linears = layer.linears
        if layer.index != sensitive:
            linears["o"].weight_OI.mul_(1e-4)
            linears["down"].weight_OI.mul_(1e-4)
        else:
            up_FD, gate_FD = linears["up"].weight_OI, linears["gate"].weight_OI
            u_F = Hadamard(len(up_FD)).inverse().matrix()[0].float()
            up_FD.copy_(u_F[:, None] * up_FD[:1] * 10)
            gate_FD.copy_(gate_FD[:1].expand_as(gate_FD).clone())

    def windows(seq_len: int, count: int) -> Tensor:
        ids_NT = zoo.random_tokens(0, count, 4)
        with torch.no_grad():
            while ids_NT.shape[1] < seq_len:
                ids_NT = torch.cat([ids_NT, network(ids_NT)[:, -1].argmax(-1, keepdim=True)], 1)
        return ids_NT

    return network, windows


@pytest.mark.parametrize("sensitive", range(3))
def test_scores_and_search_find_the_planted_layer(sensitive: int) -> None:
    network, windows = planted_network(sensitive)
    task = task_for(network, windows)
    with Quiet().stage("search layers") as bar:
        trials = Trials(task, hadamard_maps(task, random_value=True), Injection(16.0, compensated=False), bar)
    kurtosis_L, damage_L = trials.kurtosis(), trials.damage()
    assert kurtosis_L.argmax() == sensitive == damage_L.argmax()
    assert damage_L[sensitive] > 0.01
    score_L = standard_score(kurtosis_L.log()) + standard_score(damage_L)
    assert search_subset(score_L, lambda layers: len(layers ^ {sensitive})) == {sensitive}


# ── the fit ──────────────────────────────────────────────────────────────────────────────────────────────


def fit(network: Network, **changes: Any) -> tuple[SiteMaps, FitLog]:
    return METHODS["spinout"].fit(task_for(network, **changes))


def test_without_injection_it_is_spinquant_at_this_budget() -> None:
    maps, log = fit(tiny(), injection="none")
    other, other_log = METHODS["spinquant"].fit(task_for(tiny()))
    assert same(maps, other) and log == other_log
    assert not same(maps, fit(tiny(), injection="safe", layers="all")[0])


def test_the_default_budget_is_a_quarter_of_spinquants() -> None:
    _, log = fit(tiny(), steps=None, batch=None, seq_len=4, layers="all")
    spinquant = Recipe.load("spinquant").fit
    assert (len(log.losses), log.samples) == (50, 200)
    assert spinquant.steps == 2 * 50 and spinquant.steps * (spinquant.batch or 0) == 4 * 200
    published = Recipe.load("spinout").fit
    assert (published.steps, published.batch, published.injection) == (50, 4, "literal")


@pytest.mark.parametrize("layers", ["searched", "kurtosis", "performance", "random", "all"])
def test_every_window_that_passes_the_network_is_counted(layers: str) -> None:
    network, seen = tiny(), 0

    def count(_: object, __: object, kwargs: dict[str, Tensor]) -> None:
        nonlocal seen
        seen += len(kwargs["input_ids"])

    network.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    maps, log = fit(network, layers=layers)
    assert log.samples == seen >= 6
    for one in (maps.residual, *(maps.value or ())):
        assert orthogonality_gap(one.matrix()) < 1e-10  # type: ignore[union-attr]


@pytest.mark.parametrize("injection", ["safe", "literal"])
def test_the_network_comes_back_and_checkpointing_changes_nothing(injection: str) -> None:
    network = tiny()
    fold_norms(network)
    ids_BT = zoo.random_tokens(3, 2, SEQ_LEN)
    before, state = network(ids_BT), {key: value.clone() for key, value in network.model.state_dict().items()}
    maps, log = fit(network, injection=injection, checkpointing=True)
    assert torch.equal(network(ids_BT), before)
    assert all(torch.equal(value, state[key]) for key, value in network.model.state_dict().items())
    for layer in network.layers:
        for name in layer.wires:
            wire = layer.wire(name)
            assert not len(wire.ops) and not wire._forward_hooks and not wire._forward_pre_hooks
    other, other_log = fit(tiny(), injection=injection)
    assert other_log == log and same(other, maps)


@pytest.mark.parametrize("clip", ["searched", "learned"])
def test_it_fits_with_clip_ratios_that_are_not_given(clip: str) -> None:
    task = task_for(tiny(), layers="kurtosis")
    recipe = task.recipe.with_(activations__clip=clip)
    _, log = METHODS["spinout"].fit(FitTask(task.network, recipe, task.sites, task.windows))
    assert bool(log.clips) == (clip == "learned")


def test_a_random_subset_is_as_large_as_the_one_found() -> None:
    injection, found = Injection(), {}
    for layers in ("searched", "random"):
        task = task_for(tiny("llama_tied"), layers=layers, steps=1, batch=1)
        found[layers], _ = choose_layers(task, hadamard_maps(task, random_value=True), injection)
    assert len(found["random"]) == len(found["searched"]) > 0


def test_without_quantized_activations_there_is_nothing_to_inject_before() -> None:
    task = task_for(tiny())
    for bits, injection, refused in (("W4A16", None, True), ("W4A16KV4", "safe", True), ("W4A16KV4", "none", False)):
        recipe = task.recipe.with_(bits=bits, fit__injection=injection)
        assert bool(METHODS["spinout"].suits(recipe)) is not refused
        if not refused:
            METHODS["spinout"].fit(FitTask(task.network, recipe, task.sites, task.windows))


@pytest.mark.parametrize("field", [{"gamma": 0.5}, {"injection": "some"}, {"layers": "first"}])
def test_settings_out_of_range_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(SpinfoldError, match=next(iter(field))):
        Recipe.parse({"fit": field})
