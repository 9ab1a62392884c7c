"""Layer-wise fits: what is captured is what flowed, objectives are their formulas, and fits find known optima."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import cos, sin

import pytest
import torch
import zoo
from torch import Tensor

from spinfold.errors import SpinfoldError
from spinfold.fitting.capture import capture, channel_maxima, pooled, second_moments
from spinfold.fitting.feedback import feedback, lower_one, pair, turned_feedback, upper_one
from spinfold.fitting.layerwise import (
    LayerwiseSettings,
    alternate_procrustes,
    at_once,
    choose,
    fit_layerwise,
    fit_to_activations,
    rows_term,
    weighted,
)
from spinfold.fitting.row_objectives import (
    RowObjective,
    fourth_power,
    gap_to_uniform,
    in_blocks,
    kurtosis,
    normalised_fourth_power,
    rounding_error,
    unit_rms,
    whip,
)
from spinfold.folding import fold_norms
from spinfold.formats import FLOAT_FORMATS, FloatFormat, Format, IntFormat, fake_quantize
from spinfold.maps import Orthogonal, SiteMaps, orthogonality_gap, procrustes, random_orthogonal, skew_gradient
from spinfold.networks import Network

OPTIMISERS = ("adam", "spectral", "capped", "qr")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def turn(angle: float) -> Tensor:
    """The rotation of the plane by `angle`, as a map on row vectors."""
    return torch.tensor([[cos(angle), sin(angle)], [-sin(angle), cos(angle)]], dtype=torch.float64)


def spikes(count: int = 64, seed: int = 0) -> Tensor:
    """Rows of the plane with one entry ±1 and one 0: flat, (±1, ±1)/√2, exactly when turned by 45°."""
    which = torch.randint(2, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.eye(2)[which] * normal(count, 1, seed=seed, dtype=torch.float32).sign()


# ── capture ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["llama_biases", "qwen3", "phi3", "granite", "gemma2"])
def test_captured_rows_are_what_flowed(family: str) -> None:
    """All tokens in small batches equal one hook on one pass; a subsample has rows of these, the same on each wire."""
    network = Network(zoo.FAMILIES[family](0, 96, torch.float32))
    ids_WT = zoo.random_tokens(0, 3, 24)
    wires = ("qkv_input", "mlp_input", "value", "attention_out", "down")
    flowed: dict[str, Tensor] = {}
    layer = network.layers[1]
    for name in wires:
        layer.wire(name).register_forward_hook(lambda _, __, x, name=name: flowed.__setitem__(name, x))
    network.hidden(ids_WT)
    expected = {name: x.transpose(1, 2) if name == "value" else x for name, x in flowed.items()}

    everything = capture(network, ids_WT, wires, None, seed=0, compute="fp32")
    some = capture(network, ids_WT, wires, 17, seed=3, compute="fp32")
    chosen = torch.randperm(72, generator=torch.Generator().manual_seed(3))[:17].sort().values
    for name in wires:
        x = expected[name].flatten(0, 1)
        torch.testing.assert_close(everything[1, name], x.flatten(0, -2))
        torch.testing.assert_close(some[1, name], x[chosen].flatten(0, -2))
    assert pooled(some, "qkv_input", "mlp_input").shape == (2 * 17 * len(network.layers), 96)
    norms = "qkv_input", "mlp_input"
    together = capture(network, ids_WT, [norms], 17, seed=3, compute="fp32")
    whole = pooled(together, *norms)
    assert torch.equal(whole, pooled(some, *norms))
    assert all(rows.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for rows in together.values())
    assert not network.layers[0].wire("down")._forward_hooks


def test_moments_and_maxima_are_those_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spinfold.fitting.capture._TOKENS_PER_BATCH", {"cpu": 30})  # one window a batch
    network = Network(zoo.FAMILIES["llama"](0, 96, torch.float32))
    ids_WT = zoo.random_tokens(1, 4, 24)
    wires = ("attention_out", "value")
    rows = capture(network, ids_WT, wires, None, seed=0, compute="fp32")
    moments = dict(second_moments(network, ids_WT, wires, compute="fp32"))
    maxima = channel_maxima(network, ids_WT, wires, compute="fp32")
    for wire in wires:
        for layer in range(len(network.layers)):
            x = rows[layer, wire]
            torch.testing.assert_close(moments[layer][wire].float(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(maxima[layer, wire], x.abs().amax(0))


# ── objectives ───────────────────────────────────────────────────────────────────────────────────────────


def test_objectives_have_the_values_of_their_table() -> None:
    n, uniform = 1 << 18, torch.linspace(-1, 1, 1 << 18, dtype=torch.float64)
    flat, gauss, spike = torch.ones(n), unit_rms(normal(n)), torch.zeros(n)
    spike[7] = -3.0
    uniform = unit_rms(uniform)
    table: list[tuple[Callable[[Tensor], Tensor], float, float, float]] = [
        (kurtosis, 1.0, 1.8, 3.0),
        (normalised_fourth_power, 1.0, 1.8, 3.0),
        (lambda y: fourth_power(y) / n, 1.0, 1.8, 3.0),
        (gap_to_uniform, 0.8, 0.0, 1.2),
        (lambda y: whip(y) / n, 0.36788, 0.4761, 0.5237),
    ]
    for objective, *expected in table:
        assert [float(objective(y)) for y in (flat, uniform, gauss)] == pytest.approx(expected, abs=0.03)
    assert float(kurtosis(spike)) == n
    assert kurtosis(normal(3, 5, 8)).shape == (3, 5)


def test_normalised_fourth_power_sums_over_groups() -> None:
    y = normal(4, 12)
    expected = sum((g**4).sum(-1) / (g**2).sum(-1) for g in y.split(3, dim=-1))
    torch.testing.assert_close(normalised_fourth_power(y, 3), expected.float())  # type: ignore[union-attr]
    torch.testing.assert_close(normalised_fourth_power(5 * y, 3), 25 * normalised_fourth_power(y, 3))
    torch.testing.assert_close(fourth_power(5 * y), 625 * fourth_power(y))
    assert float(normalised_fourth_power(torch.zeros(6), 3)) == 0


def test_fourth_power_has_the_closed_form_gradients() -> None:
    """∂‖W R‖₄⁴/∂R = 4 Wᵀ (W R)³ and ∂‖Rᵀ W‖₄⁴/∂R = 4 W ((Rᵀ W)³)ᵀ, of the readers and of the writers."""
    R = random_orthogonal(6, 0).R_NN.float().requires_grad_()
    reader, writer = normal(9, 6, dtype=torch.float32), normal(6, 5, seed=1, dtype=torch.float32)
    (grad,) = torch.autograd.grad(fourth_power(reader @ R).sum(), R)
    torch.testing.assert_close(grad, 4 * reader.T @ (reader @ R) ** 3)
    (grad,) = torch.autograd.grad(fourth_power(R.mT @ writer).sum(), R)
    torch.testing.assert_close(grad, 4 * writer @ ((R.mT @ writer) ** 3).T)


FLOATS = [replace(format, outer=format.outer and "row") for format in FLOAT_FORMATS.values()]


@pytest.mark.parametrize(
    "format",
    [
        *(IntFormat(4, True), IntFormat(3, False), IntFormat(4, False, group_size=4, clip=0.9)),
        *(replace(format, group_size=format.group_size and 4) for format in FLOATS),
    ],
    ids=str,
)
def test_rounding_error_and_its_gradients(format: Format) -> None:
    y = normal(5, 8, dtype=torch.float32).requires_grad_()
    gap = (y - fake_quantize(y, format)).detach()
    held, noise = rounding_error(y, format, scale_gradient=False), rounding_error(y, format)
    torch.testing.assert_close(held, gap.square().mean(-1))
    torch.testing.assert_close(noise, held)
    (grad,) = torch.autograd.grad(held.sum(), y)
    torch.testing.assert_close(grad, 2 * gap / 8)
    if format.clip == 1:
        # e² s^-2 is constant under the second picture, and the step s has degree 1 in y: Euler's ⟨∇f, y⟩ = 2 f.
        (grad,) = torch.autograd.grad(noise.sum(), y)
        torch.testing.assert_close((grad * y).sum(-1), 2 * noise, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("format", [IntFormat(b, s, g, c) for b in (2, 4) for s in (True, False) for g in (None, 4)
                                    for c in (1.0, 0.7)], ids=str)  # fmt: skip
def test_the_rounding_error_of_integers_has_the_gradient_of_fake_quantization(format: IntFormat) -> None:
    y = normal(9, 16, dtype=torch.float32)
    y[1], y[2], y[3], y[4, :3] = y[1].abs(), -y[2].abs(), 0, y[4].max()  # one sign, nothing, and ties
    weight = normal(9, dtype=torch.float32, seed=1)
    leaves = [y.clone().requires_grad_() for _ in range(2)]
    by_steps = rounding_error(leaves[0], format)
    by_parts = (leaves[1] - fake_quantize(leaves[1], format, scale_gradient=True)).square().mean(-1)
    torch.testing.assert_close(by_steps, by_parts)
    grads = [torch.autograd.grad(e, x, weight)[0] for e, x in zip((by_steps, by_parts), leaves, strict=True)]
    torch.testing.assert_close(*grads)


def test_feedback_is_the_diagonal_of_the_ldl_factor() -> None:
    """H = (I + U) D (I + U)ᵀ put together from known factors; and its bounds n det^(1/n) ≤ tr(D) ≤ tr(H)."""
    upper = torch.eye(7, dtype=torch.float64) + normal(3, 7, 7).triu(1)
    D = normal(3, 7, seed=1).square() + 0.1
    H = upper @ torch.diag_embed(D) @ upper.mT
    torch.testing.assert_close(feedback(H, damp=0), D)
    lower = 7 * torch.linalg.det(H) ** (1 / 7)
    trace = H.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert (lower <= D.sum(-1)).all() and (D.sum(-1) <= trace).all()
    values, vectors = torch.linalg.eigh(H)
    torch.testing.assert_close(feedback(vectors.mT @ H @ vectors, damp=0).sum(-1), values.sum(-1))
    damped = H + 0.01 * (trace / 7)[:, None, None] * torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(feedback(H), feedback(damped, damp=0))
    assert torch.autograd.gradcheck(lambda h: feedback(h + h.mT), (H / 2).requires_grad_())


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("grid", [None, 4])
def test_feedback_in_the_basis_of_a_rotation_and_its_gradient_along_the_group(heads: int, grid: int | None) -> None:
    """As autograd finds them through products and factor; off the group there is no gradient."""
    x = normal(2, 40, 12) * torch.linspace(0.1, 3, 12, dtype=torch.float64)
    H, size = x.mT @ x / 40, 12 // heads
    R = torch.stack([random_orthogonal(size, seed).R_NN for seed in (range(1) if heads == 1 else range(2))])
    R, weights = (R[0] if heads == 1 else R), normal(2, 12, seed=1).square()
    if grid:
        weights = weights.unflatten(-1, (-1, grid)).mean(-1).repeat_interleave(grid, -1)

    def whole(R: Tensor) -> Tensor:
        M = R if heads == 1 else torch.stack([torch.block_diag(*[one] * heads) for one in R])
        return feedback(M.mT @ H @ M)

    found = []
    for function in (whole, lambda R: turned_feedback(H, R)):
        own = R.clone().requires_grad_()
        value = function(own)
        found.append((value.detach(), *torch.autograd.grad((value * weights).sum(), own)))
    torch.testing.assert_close(found[1][0], found[0][0])
    along = [skew_gradient(R, G) for _, G in found]
    torch.testing.assert_close(along[1], along[0])
    torch.testing.assert_close(R.mT @ found[1][1], along[1])
    assert along[0].abs().max() > 1e-2


def test_two_symmetric_matrices_lie_in_the_memory_of_one() -> None:
    x = normal(2, 5, 7, 7)
    first, second = x + x.mT
    both = torch.stack([pair(*of_layer) for of_layer in zip(first, second, strict=True)])
    assert both.shape == (5, 7, 8)
    assert torch.equal(lower_one(both), first)
    assert torch.equal(upper_one(both), second)


def test_gradients_found_at_once_are_those_of_the_way_back() -> None:
    inputs = normal(3, 4).requires_grad_(), normal(4, seed=1).requires_grad_(), None, normal(4, seed=2)

    def term(power: int, x: Tensor, y: Tensor, _: None, z: Tensor) -> Tensor:
        return (x.pow(power) @ (y * z if power == 2 else z)).sum()  # y has no part in one of them

    terms = [partial(term, power) for power in (2, 3)]
    whole, found = torch.stack([one(*inputs) for one in terms]).sum(), at_once(terms, *inputs)
    torch.testing.assert_close(found, whole)
    grads = [torch.autograd.grad(3 * value, inputs[:2]) for value in (found, whole)]
    torch.testing.assert_close(*grads)
    with torch.no_grad():
        torch.testing.assert_close(at_once(terms, *inputs), whole)


# ── fits with a known optimum ────────────────────────────────────────────────────────────────────────────

RATE = {"adam": 0.05, "spectral": 0.05, "capped": 0.2, "qr": 0.02}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("objective", [kurtosis, fourth_power, normalised_fourth_power, whip])
def test_spikes_become_flat_at_45_degrees(optimiser: str, objective: Callable[[Tensor], Tensor]) -> None:
    x_SN = spikes() * 2**0.5  # unit RMS
    settings = LayerwiseSettings(150, RATE[optimiser], optimiser, "cosine")  # type: ignore[arg-type]
    R_NN, losses = fit_layerwise(turn(0.2).float(), rows_term(x_SN, objective, 32), settings, seed=0)
    torch.testing.assert_close((x_SN.double() @ R_NN).abs(), torch.ones(64, 2, dtype=torch.float64), rtol=0, atol=2e-3)
    assert orthogonality_gap(R_NN) < 1e-12
    assert R_NN.dtype == torch.float64
    assert len(losses) == 150
    assert losses[-1] < losses[0]


def test_the_gap_to_uniform_closes() -> None:
    """2 (cos⁴ + sin⁴) = 1.8 has a solution, past which the plain kurtosis would go on to 1."""
    x_SN = spikes()
    R_NN, _ = fit_layerwise(turn(0.05), rows_term(x_SN, gap_to_uniform, 32), LayerwiseSettings(300, 0.02), seed=0)
    torch.testing.assert_close(kurtosis(x_SN @ R_NN.float()), torch.full((64,), 1.8), rtol=0, atol=0.01)


def test_feedback_fit_reaches_the_determinant_bound() -> None:
    """In the plane tr(D) = 2 √det H can be reached, from an eigenbasis turned a little, where tr(D) is near tr(H)."""
    H = torch.diag(torch.tensor([9.0, 1.0]))
    R_NN, losses = fit_layerwise(
        turn(0.05), lambda R, _: feedback(R.mT @ H @ R, damp=0).sum(), LayerwiseSettings(200, 0.05), seed=0
    )
    turned = R_NN.mT @ H.double() @ R_NN
    assert losses[0] > 9
    assert float(feedback(turned, damp=0).sum()) == pytest.approx(6, rel=1e-3)


@pytest.mark.parametrize("format", [IntFormat(4, True), IntFormat(4, False)])
def test_rounding_error_falls_to_that_of_the_planted_basis(format: IntFormat) -> None:
    """Rows of two levels in a hidden basis, ±1 or 0 and 1: there they are the ends of the grid, and nothing is lost."""
    flat = normal(512, 8, dtype=torch.float32).sign()
    flat = flat if format.symmetric else (flat + 1) / 2
    hidden = random_orthogonal(8, 3).R_NN.float()
    x_SN, start = (
        flat @ hidden.mT,
        hidden @ torch.linalg.matrix_exp(0.15 * (g := normal(8, 8, seed=4)) - 0.15 * g.mT).float(),
    )
    term = rows_term(x_SN, partial(rounding_error, format=format), 256)
    R_NN, losses = fit_layerwise(start, term, LayerwiseSettings(300, 0.03), seed=0)
    assert losses[0] > 1e-3
    assert float(rounding_error(x_SN @ R_NN.float(), format).mean()) < 0.02 * losses[0]


@pytest.mark.parametrize("format", [format for format in FLOATS if format.bits < 8], ids=str)
def test_the_rounding_error_of_floats_falls(format: FloatFormat) -> None:
    """Rows with a few loud channels. With eight bits the error is nearly the same in every basis."""
    x_SN = normal(512, 64, dtype=torch.float32) * (1 + 20 * (torch.arange(64) % 21 == 3))
    term = rows_term(x_SN, partial(rounding_error, format=format), 256)
    R_NN, _ = fit_layerwise(torch.eye(64), term, LayerwiseSettings(60, 0.02), seed=0)
    before, after = (float(rounding_error(rows, format).mean()) for rows in (x_SN, x_SN @ R_NN.float()))
    assert after < before


def test_procrustes_by_turns_finds_a_planted_grid() -> None:
    """Rows on a 4-bit grid in a hidden basis: from near it, the error goes to nothing and the basis comes back."""
    format = IntFormat(4, symmetric=True)
    levels = torch.randint(-7, 8, (400, 6), generator=torch.Generator().manual_seed(0)).double()
    levels[:, 0] = 7
    hidden = random_orthogonal(6, 1).R_NN
    x_SN = ((levels[:, torch.randperm(6, generator=torch.Generator().manual_seed(1))]) @ hidden.mT).float()
    g = normal(6, 6, seed=2)
    start = hidden @ torch.linalg.matrix_exp(0.01 * (g - g.mT))
    R_NN, errors = alternate_procrustes(x_SN, start, lambda y: fake_quantize(y, format), steps=40)
    assert errors[0] > 1e-3 > 1e-6 > min(errors)
    torch.testing.assert_close(R_NN, hidden, rtol=0, atol=1e-4)


def test_procrustes_by_turns_keeps_the_best_and_meets_the_closed_form() -> None:
    """With a fixed target one turn is Procrustes' solution; with a quantizer that gets worse the first R is kept."""
    x_SN, target = normal(50, 5), normal(50, 5, seed=1)
    R_NN, errors = alternate_procrustes(x_SN, torch.eye(5), lambda y: target.to(y), steps=3)
    torch.testing.assert_close(R_NN, procrustes(x_SN, target), rtol=0, atol=1e-5)
    assert errors[1] < errors[0]
    assert errors[2] == pytest.approx(errors[1], rel=1e-5)

    turns = iter(range(10))
    start = random_orthogonal(5, 0).R_NN
    kept, errors = alternate_procrustes(x_SN, start, lambda y: y.roll(1, -1) * (1 + next(turns)), steps=4)
    assert errors[0] == min(errors)
    torch.testing.assert_close(kept, start)


def test_longer_rows_count_more_in_procrustes() -> None:
    """Two kinds of rows want opposite turns; the ones multiplied by γ get theirs."""
    format = IntFormat(2, symmetric=True)
    rows, wanted = torch.tensor([[1.0, 0.0], [0.8, 0.6]]), []
    for long in (0, 1):
        x_SN = rows.clone()
        x_SN[long] *= 100
        R_NN, _ = alternate_procrustes(x_SN, turn(0.3), lambda y: fake_quantize(y, format), steps=30)
        wanted.append(float(rounding_error(rows[long] @ R_NN.float(), format)))
    assert max(wanted) < 1e-3


def test_a_stack_is_fitted_as_each_alone() -> None:
    """Rotations fitted side by side don't feel each other: each is what it is alone, with the same draws."""
    x_LSN = torch.stack([spikes(seed=i) * (1 + i) @ turn(0.1 * i).float() for i in range(3)])
    start = torch.stack([turn(0.2).float()] * 3)
    settings = LayerwiseSettings(60, 0.05)
    whole, _ = fit_layerwise(start, rows_term(x_LSN, kurtosis, 16), settings, seed=5)
    for i in range(3):
        alone, _ = fit_layerwise(start[i], rows_term(x_LSN[i], kurtosis, 16), settings, seed=5)
        torch.testing.assert_close(whole[i], alone, rtol=0, atol=1e-4)


def test_terms_add_up_with_their_weights() -> None:
    x_SN, R_NN = normal(20, 4, dtype=torch.float32), random_orthogonal(4, 0).R_NN.float()
    draws = torch.Generator().manual_seed(0)
    both = weighted((1.0, rows_term(x_SN, kurtosis, 8)), (0.5, rows_term(x_SN, whip, 8)))(R_NN, draws)
    draws.manual_seed(0)
    one = rows_term(x_SN, kurtosis, 8)(R_NN, draws)
    torch.testing.assert_close(both, one + 0.5 * rows_term(x_SN, whip, 8)(R_NN, draws))


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_the_same_seed_gives_the_same_bits_and_another_does_not(optimiser: str) -> None:
    x_SN, start = normal(300, 12, dtype=torch.float32) ** 3, random_orthogonal(12, 0).R_NN
    settings = LayerwiseSettings(5, 0.05, optimiser)  # type: ignore[arg-type]
    first, again, other = (fit_layerwise(start, rows_term(x_SN, kurtosis, 32), settings, seed=s)[0] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_steps_give_back_the_start() -> None:
    start = random_orthogonal(8, 0).R_NN
    R_NN, losses = fit_layerwise(start, rows_term(normal(9, 8), kurtosis, 4), LayerwiseSettings(0, 0.1), seed=0)
    torch.testing.assert_close(R_NN, start, rtol=0, atol=1e-6)
    assert losses == ()


def test_sites_are_fitted_to_their_own_wires() -> None:
    """Each site's objective falls on its own rows; sites that are not asked for, and other maps, stay."""
    network = Network(zoo.FAMILIES["llama_biases"](0, 96, torch.float32))
    fold_norms(network)
    captured = capture(
        network, zoo.random_tokens(0, 4, 40), ("qkv_input", "mlp_input", "value"), None, 0, compute="fp32"
    )
    head_dim, layers = network.layers[0].head_dim, range(len(network.layers))
    start = SiteMaps(residual=random_orthogonal(96, 0), value=tuple(random_orthogonal(head_dim, i) for i in layers))
    settings = LayerwiseSettings(40, 0.05)
    objectives, both = {"residual": kurtosis, "value": kurtosis}, {"residual": settings, "value": settings}
    maps, log = fit_to_activations(start, captured, objectives, both, 128, seed=0)

    assert isinstance(maps.residual, Orthogonal) and maps.value is not None and isinstance(start.residual, Orthogonal)
    x = pooled(captured, "qkv_input", "mlp_input")
    assert kurtosis(maps.residual.apply(x)).mean() < 0.9 * kurtosis(start.residual.apply(x)).mean()
    assert log.losses[-1] < log.losses[0]
    for i, (before, after) in enumerate(zip(start.value or (), maps.value, strict=True)):
        v = captured[i, "value"]
        assert kurtosis(after.apply(v)).mean() < kurtosis(before.apply(v)).mean()

    only, _ = fit_to_activations(SiteMaps(residual=start.residual), captured, objectives, both, 128, seed=0)
    assert only.sites == ("residual",)


def test_an_objective_of_another_method_is_refused() -> None:
    assert choose(None, {"a": 1, "b": 2}, "kurtail") == 1
    assert choose("b", {"a": 1, "b": 2}, "kurtail") == 2
    with pytest.raises(SpinfoldError, match="kurtail"):
        choose("literal", {"a": 1}, "kurtail")


@pytest.mark.parametrize("power", [0, 1, 2])
def test_fourth_powers_have_autograds_gradient(power: int) -> None:
    y = torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    objective = {0: fourth_power, 1: normalised_fourth_power, 2: kurtosis}[power]
    plain = (32 if power == 2 else 1) * (y**4).sum(-1) / (y**2).sum(-1) ** power
    weights = torch.linspace(-1, 1, 15).view(5, 3)
    found, expected = (torch.autograd.grad((value * weights).sum(), y)[0] for value in (objective(y), plain))
    torch.testing.assert_close(objective(y), plain)
    torch.testing.assert_close(found, expected)
    zeros = torch.zeros(2, 32, requires_grad=True)
    assert torch.equal(torch.autograd.grad(objective(zeros).sum(), zeros)[0], torch.zeros(2, 32))


@pytest.mark.parametrize("objective", [fourth_power, kurtosis, partial(rounding_error, format=IntFormat(4, False))])
def test_some_rows_at_a_time_are_all_rows(objective: RowObjective) -> None:
    y = torch.randn(
        3, 700, 96, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()  # some blocks, one not full
    weights = torch.linspace(-1, 1, 2100).view(3, 700)
    whole, parts = objective(y), in_blocks(objective)(y)
    assert torch.equal(whole, parts)
    expected, found = (torch.autograd.grad((x * weights).sum(), y)[0] for x in (whole, parts))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(in_blocks(objective)(y.detach()), whole)
