"""Laws of the rounding back-ends: optimality, invariances, and what happens to Hessians that are none."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch
from torch import Tensor

from spinfold.errors import SpinfoldError
from spinfold.formats import ClipSearch, IntFormat, QuantizedWeight, fit_grid
from spinfold.recipe import RoundingMethod
from spinfold.rounding import ROUNDINGS, HessianAccumulator, gptq, round_nearest
from spinfold.rounding.columns import round_block, round_columns
from spinfold.rounding.hessian import inverse_factor

SETTINGS = [
    (IntFormat(bits, symmetric, group_size), act_order, static)
    for bits, symmetric, group_size in itertools.product((2, 4), (True, False), (None, 8))
    for act_order, static in ((True, True), (False, True), (False, False), (True, False))
]
settings = pytest.mark.parametrize(
    ("fmt", "act_order", "static_groups"),
    SETTINGS,
    ids=lambda x: f"{'s' if x.symmetric else 'a'}{x.bits}g{x.group_size}" if isinstance(x, IntFormat) else str(x)[0],
)


def problem(seed: int, rows: int = 12, size: int = 40) -> tuple[Tensor, Tensor]:
    """fp64 weights, and the Hessian of inputs with strong correlations and a few loud channels."""
    generator = torch.Generator().manual_seed(seed)
    w_OI = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    mixing_II = torch.randn(size, size, generator=generator, dtype=torch.float64)
    mixing_II *= torch.logspace(0, -1.5, size, dtype=torch.float64)[:, None]
    x_TI = torch.randn(4 * size, size, generator=generator, dtype=torch.float64) @ mixing_II
    x_TI[:, ::7] *= 5
    return w_OI, x_TI.T @ x_TI / len(x_TI)


def relative_error(w_OI: Tensor, rounded: QuantizedWeight, h_II: Tensor) -> float:
    e_OI = w_OI - rounded.dequantize(torch.float64)
    return float((e_OI @ h_II * e_OI).sum() / (w_OI @ h_II * w_OI).sum())


def same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors().values(), other.tensors().values(), strict=True))


@settings
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("search", [None, ClipSearch(steps=10)], ids=["range", "search"])
def test_gptq_beats_nearest_and_reports_both_errors(fmt, act_order, static_groups, seed, search):
    w_OI, h_II = problem(seed)
    rounded, report = gptq(w_OI, h_II, fmt, search=search, act_order=act_order, static_groups=static_groups)
    nearest = round_nearest(w_OI, fmt, search)
    assert report.error == pytest.approx(relative_error(w_OI, rounded, h_II), rel=1e-9)
    assert report.nearest_error == pytest.approx(relative_error(w_OI, nearest, h_II), rel=1e-9)
    assert report.error < 0.9 * report.nearest_error
    assert (report.damping, report.diagonal, report.dead_columns) == (0.01, False, 0)


@settings
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_without_correlations_gptq_is_rounding_to_nearest(fmt, act_order, static_groups, dtype):
    w_OI = problem(0)[0].to(dtype)
    for h_II in (torch.eye(40), torch.diag(torch.arange(1.0, 41.0))):
        rounded, report = gptq(w_OI, h_II, fmt, act_order=act_order, static_groups=static_groups)
        assert same(rounded, round_nearest(w_OI, fmt))
        assert report.error == report.nearest_error


@settings
def test_rows_do_not_know_of_each_other(fmt, act_order, static_groups):
    w_OI, h_II = problem(1)
    options = {"act_order": act_order, "static_groups": static_groups}
    order_O = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    whole = gptq(w_OI, h_II, fmt, **options)[0]
    shuffled = gptq(w_OI[order_O], h_II, fmt, **options)[0]
    assert torch.equal(shuffled.q_OI, whole.q_OI[order_O])
    assert torch.equal(shuffled.scale_OG, whole.scale_OG[order_O])


@pytest.mark.parametrize("symmetric", [True, False])
def test_act_order_is_a_permutation_done_inside(symmetric):
    w_OI, h_II = problem(2)
    fmt = IntFormat(4, symmetric)
    inside = gptq(w_OI, h_II, fmt, act_order=True)[0]
    order_I = torch.argsort(h_II.diagonal(), descending=True)
    outside = gptq(w_OI[:, order_I], h_II[order_I][:, order_I], fmt, act_order=False)[0]
    assert torch.equal(outside.q_OI, inside.q_OI[:, order_I])
    other_I = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    elsewhere = gptq(w_OI[:, other_I], h_II[other_I][:, other_I], fmt, act_order=True)[0]
    assert torch.equal(elsewhere.q_OI, inside.q_OI[:, other_I])


@pytest.mark.parametrize("fmt", [IntFormat(4, True, 8), IntFormat(2, False, 8)], ids=str)
def test_refitted_groups_go_in_order_of_what_their_inputs_bring(fmt):
    w_OI, h_II = problem(2)
    inside = gptq(w_OI, h_II, fmt, act_order=True, static_groups=False)[0]
    diagonal_I = h_II.diagonal()
    groups = sorted(range(5), key=lambda g: -float(diagonal_I[8 * g : 8 * g + 8].sum()))
    order_I = torch.cat([8 * g + torch.argsort(diagonal_I[8 * g : 8 * g + 8], descending=True) for g in groups])
    outside = gptq(w_OI[:, order_I], h_II[order_I][:, order_I], fmt, act_order=False, static_groups=False)[0]
    assert torch.equal(outside.q_OI, inside.q_OI[:, order_I])
    assert torch.equal(outside.scale_OG, inside.scale_OG[:, groups])


@settings
def test_the_block_size_changes_nothing(fmt, act_order, static_groups):
    w_OI, h_II = problem(3)
    options = {"act_order": act_order, "static_groups": static_groups}
    first, *others = (gptq(w_OI, h_II, fmt, block_size=size, **options)[0] for size in (128, 8, 7, 1))
    assert all(same(first, other) for other in others)


def test_the_same_input_gives_the_same_bits_and_stays_as_it_was():
    w_OI, h_II = problem(4)
    w_OI = w_OI.float()
    before = w_OI.clone(), h_II.clone()
    results = [gptq(w_OI, h_II, IntFormat(4, False, 8), search=ClipSearch(steps=10)) for _ in range(2)]
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert torch.equal(w_OI, before[0])
    assert torch.equal(h_II, before[1])


@pytest.mark.parametrize("factor", [2.0, 2.0**-40, 2.0**40])
def test_the_scale_of_the_hessian_does_not_matter(factor):
    w_OI, h_II = problem(5)
    h_II[3], h_II[:, 3] = 0, 0
    assert same(gptq(w_OI, h_II, IntFormat(4, True))[0], gptq(w_OI, h_II * factor, IntFormat(4, True))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_can_be_stored_narrow(dtype):
    w_OI, h_II = problem(6)
    rounded, report = gptq(w_OI.float(), h_II, IntFormat(4, False, 8), scale_dtype=dtype)
    assert rounded.scale_OG.dtype == dtype
    assert report.error == pytest.approx(relative_error(w_OI, rounded, h_II), rel=1e-3)


def test_dead_columns_become_zero_and_do_not_widen_the_grid():
    w_OI, h_II = problem(7)
    dead_I = torch.tensor([0, 5, 39])
    h_II[dead_I], h_II[:, dead_I] = 0, 0
    w_OI[:, dead_I] = 1000
    rounded, report = gptq(w_OI, h_II, IntFormat(4, True))
    assert report.dead_columns == 3
    assert (rounded.dequantize()[:, dead_I] == 0).all()
    alive_I = torch.tensor([i for i in range(40) if i not in dead_I])
    alone = gptq(w_OI[:, alive_I], h_II[alive_I][:, alive_I], IntFormat(4, True))[0]
    assert torch.equal(rounded.q_OI[:, alive_I], alone.q_OI)


def test_a_singular_hessian_is_damped_and_still_helps():
    w_OI = problem(8)[0]
    x_TI = torch.randn(6, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for damp in (0.01, 0.0):
        report = gptq(w_OI, x_TI.T @ x_TI, IntFormat(4, True), damp=damp)[1]
        assert not report.diagonal
        assert report.damping == pytest.approx(0.01)
        assert report.error < 0.5 * report.nearest_error


def test_a_slightly_indefinite_hessian_raises_the_damping():
    w_OI, h_II = problem(9)
    values, vectors = torch.linalg.eigh(h_II)
    values[0] = -0.05 * h_II.diagonal().mean()
    report = gptq(w_OI, (vectors * values) @ vectors.T, IntFormat(4, True))[1]
    assert (report.damping, report.diagonal) == (0.1, False)


@pytest.mark.parametrize("act_order", [True, False])
def test_no_hessian_at_all_means_nearest_and_says_so(act_order):
    w_OI, h_II = problem(10)
    for nonsense_II in (-h_II, torch.zeros_like(h_II)):
        rounded, report = gptq(w_OI, nonsense_II, IntFormat(4, False), act_order=act_order)
        assert same(rounded, round_nearest(w_OI, IntFormat(4, False)))
        assert report.diagonal
        assert report.error == report.nearest_error


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(bad):
    w_OI, h_II = problem(11)
    for i, j in ((0, 0), (3, 7)):
        broken_II = h_II.clone()
        broken_II[i, j] = bad
        with pytest.raises(SpinfoldError, match=r"Hessian .* NaN or infinity"):
            gptq(w_OI, broken_II, IntFormat(4, True))
    w_OI[0, 0] = bad
    with pytest.raises(SpinfoldError, match=r"weight .* cannot be quantized"):
        gptq(w_OI, h_II, IntFormat(4, True))


def test_requests_that_contradict_themselves_are_refused():
    w_OI, h_II = problem(12)
    with pytest.raises(SpinfoldError, match="shape"):
        gptq(w_OI, h_II[:-1, :-1], IntFormat(4, True))
    with pytest.raises(SpinfoldError, match="8 or 10"):
        gptq(w_OI, h_II, IntFormat(4, True, 9))


def test_the_hessian_is_the_mean_over_tokens_however_they_arrive():
    x_TI = torch.randn(9001, 8, generator=torch.Generator().manual_seed(0))
    expected_II = x_TI.double().T @ x_TI.double() / 9001
    for pieces in ([x_TI], x_TI.split(1000), [x_TI[:9000].view(3, 3000, 8), x_TI[9000:]]):
        accumulator = HessianAccumulator(8)
        with torch.autocast("cpu", torch.bfloat16):
            for piece in pieces:
                accumulator.add(piece)
        assert accumulator.count == 9001
        torch.testing.assert_close(accumulator.value(), expected_II, rtol=1e-5, atol=1e-6)
    with pytest.raises(SpinfoldError, match="statistics"):
        HessianAccumulator(8).value()


def test_what_bf16_holds_has_the_hessian_of_its_numbers():
    x = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    narrow, wide = HessianAccumulator(200), HessianAccumulator(200)
    narrow.add(x)
    wide.add(x.double().float())
    exact = x.double().T @ x.double() / 300
    for one in (narrow, wide):
        torch.testing.assert_close(one.value(), exact, rtol=0, atol=3e-6)  # sums of 300 in fp32


@pytest.mark.parametrize("size", [5, 97, 256])
def test_the_factor_of_the_inverse_is_triangular_and_exact(size):
    x = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    hessian = x.T @ x / len(x)
    factor = inverse_factor(hessian, damp=0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    assert torch.equal(factor.u_II, factor.u_II.triu())
    torch.testing.assert_close(factor.u_II.T @ factor.u_II @ damped, torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("index", [0, 96])
def test_a_negative_direction_in_either_half_raises_the_damping(index):
    hessian = torch.eye(97, dtype=torch.float64)
    hessian[index, index] = -0.05
    assert inverse_factor(hessian, damp=0.01).damping == pytest.approx(0.1)


@pytest.mark.parametrize("fmt", [IntFormat(b, s) for b in (2, 4) for s in (True, False)], ids=str)
def test_columns_in_units_of_their_steps_are_those_of_the_definition(fmt):
    draws = torch.Generator().manual_seed(0)
    w = torch.randn(24, 40, generator=draws, dtype=torch.float64)
    u = torch.randn(40, 40, generator=draws, dtype=torch.float64).mul(0.1).triu(1) + torch.eye(40).double() * 0.7
    grid = fit_grid(w, fmt, search=ClipSearch())
    scale, second = (None if t is None else t.to(w.dtype).T.expand(40, -1) for t in (grid.scale_OG, grid.second_OG))
    elements = w.T.clone()
    round_block(elements, u, scale, second, fmt)
    assert torch.equal(round_columns(w, u, grid).q_OI, fmt.encode(elements.T))


def test_every_rounding_names_its_needs():
    assert set(ROUNDINGS) == set(get_args(RoundingMethod))
    assert ROUNDINGS["rtn"] == () and ROUNDINGS["gptaq"] == ("hessian", "original")
