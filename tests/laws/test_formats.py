"""Laws of the integer grids: what every bit width, symmetry, group size and input must obey."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spinfold.errors import SpinfoldError
from spinfold.formats import ClipSearch, IntFormat, QuantizedWeight, fake_quantize, fit_grid

SHAPES = [((5, 40), 8), ((5, 40), None), ((1, 7), None), ((16, 96), 32), ((3, 1), None)]
FORMATS = [IntFormat(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]
formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{'s' if f.symmetric else 'a'}{f.bits}")
shapes = pytest.mark.parametrize(("shape", "group_size"), SHAPES, ids=str)


def weights(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).mul(0.1).to(dtype)


def grouped(fmt: IntFormat, group_size: int | None, clip: float = 1.0) -> IntFormat:
    return IntFormat(fmt.bits, fmt.symmetric, group_size, clip)


@formats
@shapes
def test_error_is_at_most_half_a_step_and_integers_stay_in_range(fmt, shape, group_size):
    fmt = grouped(fmt, group_size)
    w_OI = weights(shape)
    grid = fit_grid(w_OI, fmt)
    q_OI = grid.quantize(w_OI)
    assert q_OI.dtype == (torch.int8 if fmt.symmetric else torch.uint8)
    assert fmt.low <= q_OI.min()
    assert q_OI.max() <= fmt.high
    step_OI = grid.scale_OG.repeat_interleave(fmt.group_of(shape[1]), dim=1)
    assert ((w_OI - grid.dequantize(q_OI)).abs() <= step_OI * (0.5 + 1e-5)).all()


@formats
@shapes
@pytest.mark.parametrize("search", [None, ClipSearch(steps=8)], ids=["range", "search"])
def test_rounding_twice_changes_nothing(fmt, shape, group_size, search):
    grid = fit_grid(weights(shape), grouped(fmt, group_size), search=search)
    q_OI = grid.quantize(weights(shape))
    assert torch.equal(grid.quantize(grid.dequantize(q_OI)), q_OI)


def test_the_integers_are_those_of_the_formulas():
    symmetric = fit_grid(torch.tensor([[-3.5, 7.0, 0.5, 1.5, 2.5]]), IntFormat(4, True))
    assert symmetric.scale_OG.tolist() == [[1.0]]
    assert symmetric.quantize(torch.tensor([[-3.5, 7.0, 0.5, 1.5, 2.5]])).tolist() == [[-4, 7, 0, 2, 2]]  # ties to even
    assert symmetric.quantize(torch.tensor([[-100.0, 100.0, -8.4, 0.0, -0.0]])).tolist() == [[-8, 7, -8, 0, 0]]
    asymmetric = fit_grid(torch.tensor([[-5.0, 10.0, 0.0]]), IntFormat(4, False))
    assert (asymmetric.scale_OG.item(), asymmetric.second_OG.item()) == (1.0, 5)
    assert asymmetric.quantize(torch.tensor([[-5.0, 10.0, 2.5]])).tolist() == [[0, 15, 7]]


@formats
def test_zero_is_exact_and_zero_rows_have_scale_one(fmt):
    w_OI = weights((4, 12)) + torch.tensor([[0.0], [5.0], [-5.0], [0.0]])  # rows 1 and 2 do not straddle zero
    w_OI[3] = 0
    w_OI[:3, 5] = 0
    grid = fit_grid(w_OI, fmt)
    rounded_OI = grid.dequantize(grid.quantize(w_OI))
    assert (rounded_OI[w_OI == 0] == 0).all()
    assert grid.scale_OG[3] == 1


@formats
@given(exponent=st.integers(-20, 20), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_powers_of_two_scale_through(fmt, exponent, seed):
    factor = math.ldexp(1.0, exponent)
    w_OI = weights((3, 16), seed)
    one, other = fit_grid(w_OI, fmt), fit_grid(w_OI * factor, fmt)
    assert torch.equal(one.scale_OG * factor, other.scale_OG)
    assert torch.equal(one.quantize(w_OI), other.quantize(w_OI * factor))
    assert torch.equal(fake_quantize(w_OI, fmt) * factor, fake_quantize(w_OI * factor, fmt))


@formats
@pytest.mark.parametrize("exponent", [2.0, 2.4, 4.0])
def test_clip_search_is_never_worse_in_its_own_metric(fmt, exponent):
    fmt = grouped(fmt, 8)
    w_OI = weights((64, 40))
    w_OI[0] = 0

    def loss(search: ClipSearch | None) -> Tensor:
        grid = fit_grid(w_OI, fmt, search=search)
        return (w_OI - grid.dequantize(grid.quantize(w_OI))).abs().pow(exponent).unflatten(1, (-1, 8)).sum(-1)

    full, searched = loss(None), loss(ClipSearch(exponent))
    assert (searched <= full * (1 + 1e-5)).all()
    if fmt.bits < 8:
        assert searched.sum() < 0.98 * full.sum()


def test_clip_search_finds_what_brute_force_finds():
    w_O = weights((6, 32), dtype=torch.float64)
    fmt, search = IntFormat(3, True), ClipSearch(steps=20)
    found_O = fit_grid(w_O, fmt, search=search, scale_dtype=torch.float64).scale_OG[:, 0]
    for w_I, found in zip(w_O, found_O, strict=True):
        scales = [w_I.abs().max() * (1 - 0.04 * k) / 3 for k in range(20)]
        losses = [(w_I - s * (w_I / s).round().clamp(-4, 3)).abs().pow(2.4).sum() for s in scales]
        assert found == pytest.approx(scales[int(torch.stack(losses).argmin())].item(), rel=1e-12)


def test_clip_search_does_not_depend_on_its_chunks():
    w_OI = weights((70, 4096))  # more than one chunk
    whole, *parts = (
        fit_grid(w, IntFormat(4, False), search=ClipSearch(steps=5)).scale_OG for w in (w_OI, *w_OI.split(7))
    )
    assert torch.equal(whole, torch.cat(parts))


@formats
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_stored_weight_comes_back_bit_for_bit(fmt, scale_dtype):
    w_OI = weights((6, 40))
    fmt = grouped(fmt, 8)
    grid = fit_grid(w_OI, fmt, search=ClipSearch(steps=8), scale_dtype=scale_dtype)
    stored = QuantizedWeight(grid.quantize(w_OI), grid.scale_OG, grid.second_OG, fmt)
    assert stored.scale_OG.dtype == scale_dtype
    again = QuantizedWeight.from_tensors({k: v.clone() for k, v in stored.tensors().items()}, fmt)
    assert torch.equal(again.dequantize(), stored.dequantize())
    assert torch.equal(again.grid.quantize(again.dequantize()), stored.q_OI)
    scale_bits = torch.finfo(scale_dtype).bits
    assert stored.bits_per_weight == fmt.bits + (scale_bits + (0 if fmt.symmetric else fmt.bits)) / 8
    top, bottom = stored.split([2, 4])
    assert torch.equal(torch.cat([top.dequantize(), bottom.dequantize()]), stored.dequantize())


@formats
def test_scales_too_small_for_their_dtype_round_to_zero_not_to_nan(fmt):
    w_OI = weights((2, 8)) * 1e-12
    grid = fit_grid(w_OI, fmt, scale_dtype=torch.float16)
    assert (grid.dequantize(grid.quantize(w_OI)) == 0).all()


def test_groups_that_do_not_fit_name_the_nearest_divisors():
    with pytest.raises(SpinfoldError, match="96 or 144"):
        fit_grid(weights((2, 576)), IntFormat(4, True, group_size=128))
    with pytest.raises(SpinfoldError, match="96 or 144"):
        fake_quantize(weights((2, 576)), IntFormat(4, True, group_size=128))


@pytest.mark.parametrize(
    "wrong", [{"bits": 1}, {"bits": 9}, {"bits": 16}, {"clip": 0.0}, {"clip": 1.1}, {"group_size": 0}]
)
def test_impossible_formats_are_refused(wrong):
    with pytest.raises(SpinfoldError):
        IntFormat(**({"bits": 4, "symmetric": True} | wrong))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    w_OI = weights((2, 8))
    w_OI[1, 3] = bad
    with pytest.raises(SpinfoldError, match="NaN or infinity"):
        fit_grid(w_OI, IntFormat(4, True))


@formats
@shapes
@pytest.mark.parametrize("clip", [1.0, 0.7])
def test_activations_and_weights_share_one_definition(fmt, shape, group_size, clip):
    fmt = grouped(fmt, group_size, clip)
    x_TI = weights(shape)
    grid = fit_grid(x_TI, fmt)
    assert torch.equal(fake_quantize(x_TI, fmt), grid.dequantize(grid.quantize(x_TI)))
    assert torch.equal(fake_quantize(x_TI, fmt, scale_gradient=True), fake_quantize(x_TI, fmt))


@formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_activations_keep_shape_and_dtype_and_are_computed_in_fp32(fmt, dtype):
    x = weights((2, 3, 5, 16), dtype=dtype).transpose(1, 2)
    y = fake_quantize(x, fmt)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(y, fake_quantize(x.to(wide), fmt).to(dtype))
    assert fake_quantize(x[:0], fmt).shape == x[:0].shape


@formats
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scale_gradient", [False, True])
def test_nan_and_infinity_spoil_their_group_and_no_other(fmt, bad, scale_gradient):
    x_TI = weights((3, 16))
    x_TI[1, 9] = bad
    y_TI = fake_quantize(x_TI, grouped(fmt, 8), scale_gradient=scale_gradient)
    assert y_TI[1, 8:].isnan().all()
    assert y_TI.isfinite().sum() == 3 * 16 - 8


@formats
def test_published_gradient_is_the_identity(fmt):
    x_TI = weights((4, 16)).requires_grad_()
    towards_TI = weights((4, 16), seed=1)
    (gradient_TI,) = torch.autograd.grad(fake_quantize(x_TI, grouped(fmt, 8, clip=0.6)), x_TI, towards_TI)
    assert torch.equal(gradient_TI, towards_TI)


@formats
@pytest.mark.parametrize("clip", [1.0, 0.3])
def test_scale_gradient_is_the_derivative_with_the_roundings_frozen(fmt, clip):
    """Hold each r = RNE(t) - t, and which elements are clipped: all is smooth, and differences tell the truth."""
    x_I = weights((12,), seed=3, dtype=torch.float64)
    towards_I = weights((12,), seed=4, dtype=torch.float64)
    fmt = grouped(fmt, None, clip)

    def steps(x_I: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = x_I.min().clamp(max=0) * clip, x_I.max().clamp(min=0) * clip
        scale = (torch.maximum(high, -low) if fmt.symmetric else high - low) / fmt.high
        return scale, x_I / scale, scale * 0 if fmt.symmetric else -low / scale

    _, t_I, t_zero = steps(x_I)
    r_I, r_zero = t_I.round() - t_I, t_zero.round() - t_zero
    q_I = t_I.round() + t_zero.round()
    clipped_I = (q_I < fmt.low) | (q_I > fmt.high)
    assert clip == 1 or clipped_I.any()

    def smooth(x_I: Tensor) -> Tensor:
        scale, t_I, t_zero = steps(x_I)
        zero = t_zero + r_zero
        return (torch.where(clipped_I, q_I.clamp(fmt.low, fmt.high), t_I + r_I + zero) - zero) * scale

    torch.testing.assert_close(fake_quantize(x_I, fmt), smooth(x_I), rtol=1e-12, atol=1e-14)
    shifts = 1e-6 * torch.eye(12, dtype=torch.float64)
    slopes = [((smooth(x_I + s) - smooth(x_I - s)) @ towards_I) / 2e-6 for s in shifts]
    x_I.requires_grad_()
    (gradient_I,) = torch.autograd.grad(fake_quantize(x_I, fmt, scale_gradient=True), x_I, towards_I)
    torch.testing.assert_close(gradient_I, torch.stack(slopes), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "fmt", [IntFormat(b, s, g) for b in (2, 3, 4, 8) for s in (True, False) for g in (None, 16)], ids=str
)
def test_the_clip_search_stops_early_only_where_nothing_better_can_come(fmt):
    """The factor found is that of trying all of them, each by itself."""
    weights = torch.randn(24, 64, generator=torch.Generator().manual_seed(fmt.bits)) ** 3
    weights[3] = weights[3].abs()
    search = ClipSearch()
    found = fit_grid(weights, fmt, search=search)

    def loss(scale):
        clipped = fit_grid(weights, replace(fmt, clip=scale))
        error = (clipped.dequantize(clipped.quantize(weights)) - weights).abs() ** search.exponent
        return fmt.split(error).sum(-1)

    best = torch.stack([loss(factor) for factor in search.factors()]).amin(0)
    error = (found.dequantize(found.quantize(weights)) - weights).abs() ** search.exponent
    torch.testing.assert_close(fmt.split(error).sum(-1), best, rtol=1e-3, atol=1e-6)


class _Round(torch.autograd.Function):
    """Round half to even with derivative 1."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def through_autograd(x, fmt, clip):
    """Fake quantization with both roundings straight-through and everything else left to autograd."""
    x_Gg = fmt.split(x)
    low, high = clip * x_Gg.amin(-1, keepdim=True).clamp(max=0), clip * x_Gg.amax(-1, keepdim=True).clamp(min=0)
    scale = (torch.maximum(high, -low) if fmt.symmetric else high - low) / fmt.high
    scale = torch.where(scale == 0, 1.0, scale)
    zero = 0 if fmt.symmetric else _Round.apply(-low / scale).clamp(fmt.low, fmt.high)
    return (((_Round.apply(x_Gg / scale) + zero).clamp(fmt.low, fmt.high) - zero) * scale).flatten(-2)


@pytest.mark.parametrize("clip", [1.0, 0.8, 0.5])
@pytest.mark.parametrize("fmt", [IntFormat(b, s, g) for b in (2, 4) for s in (True, False) for g in (None, 8)], ids=str)
def test_the_range_gradient_is_autograds(fmt, clip):
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(fmt.bits), dtype=torch.float64)
    x[1], x[2], x[3] = x[1].abs(), -x[2].abs(), 0
    grad = torch.randn(9, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for quantize in (through_autograd, lambda x, fmt, clip: fake_quantize(x, fmt, scale_gradient=True, clip=clip)):
        leaf, ratio = x.clone().requires_grad_(), torch.tensor(clip, dtype=torch.float64, requires_grad=True)
        y = quantize(leaf, fmt, ratio)
        results.append((y.detach(), *torch.autograd.grad(y, (leaf, ratio), grad)))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
