"""Laws of the floating-point formats: their elements, their scales, and the rules of the papers written out.

Other people's implementations are in `tests/reference/test_microscaling_reference.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spinfold.errors import SpinfoldError
from spinfold.formats import (
    FLOAT_FORMATS,
    ClipSearch,
    FloatFormat,
    IntFormat,
    QuantizedWeight,
    fake_quantize,
    fit_grid,
)
from spinfold.formats.base import extent
from spinfold.formats.microscaling import ELEMENTS, Element
from spinfold.rounding import gptq, round_nearest

MX = [
    replace(FLOAT_FORMATS[name], element=element, scale=rule)
    for name, element in (
        ("mxfp4", "e2m1"), ("mxfp6", "e2m3"), ("mxfp6", "e3m2"), ("mxfp8", "e4m3"), ("mxfp8", "e5m2"),
    )
    for rule in ("floor", "even", "ceil", "real")
]  # fmt: skip
AMX = [replace(FLOAT_FORMATS["amxfp4"], scale=rule) for rule in ("e5m2", "e4m3", "real", "floor")]
NV = [replace(FLOAT_FORMATS["nvfp4"], outer=outer) for outer in ("tensor", "row")]
FP8 = [FloatFormat(element, group) for element in ("e4m3", "e5m2") for group in (None, 32)]


def name_of(fmt: FloatFormat) -> str:
    signs, outer = "+-" if fmt.by_sign else "", fmt.outer or ""
    return f"{fmt.element}x{fmt.group_size or 'row'}-{fmt.scale}{signs}{outer}"


every = pytest.mark.parametrize("fmt", MX + AMX + NV + FP8, ids=name_of)
some = pytest.mark.parametrize("fmt", [MX[0], MX[5], AMX[0], *NV, FP8[0]], ids=name_of)


def numbers(seed: int = 0, rows: int = 40) -> Tensor:
    """Rows of 64 of many sizes; ties, zeros, blocks of one sign, of equal numbers, of tiny and of subnormal ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 64, generator=generator) * torch.exp(3 * torch.randn(rows, 1, generator=generator))
    x[0] = torch.arange(64) / 8 - 4
    x[1] = torch.cat([torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(4), torch.full((32,), -7.0)])
    x[2, :32], x[2, 32:] = 0, -0.0
    x[3, :32], x[3, 32:] = x[3, :32].abs(), -x[3, 32:].abs()
    x[4] = 3.3
    x[5] *= 1e-30 / x[5].abs().max()
    x[6] *= 1e-40 / x[6].abs().max()
    x[7, 40:] *= 1e-9
    return x


@pytest.mark.parametrize(("name", "most", "least", "count"), [
    ("e2m1", 6.0, 0.5, 8), ("e2m3", 7.5, 0.125, 32), ("e3m2", 28.0, 2.0**-4, 32),
    ("e4m3", 448.0, 2.0**-9, 127), ("e5m2", 57344.0, 2.0**-16, 124),
])  # fmt: skip
def test_elements_are_those_of_the_specification(name, most, least, count):
    element = ELEMENTS[name]
    finite = element.magnitudes()[element.magnitudes().isfinite()]
    assert (finite[-1], finite[1], len(finite)) == (most, least, count)
    assert (finite.diff() > 0).all()
    if name == "e2m1":
        assert finite.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@pytest.mark.parametrize("element", ELEMENTS.values(), ids=ELEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_nearest_element_is_that_of_a_search_with_ties_to_even_codes(element: Element, dtype):
    finite = [value for value in element.magnitudes().tolist() if math.isfinite(value)]
    middles = [(low + high) / 2 for low, high in pairwise(finite)]
    nudged = [math.nextafter(middle, to) for middle in middles for to in (0, math.inf)]
    x = torch.tensor([*finite, *middles, *(nudged if dtype == torch.float64 else []), 1.5 * finite[-1], math.inf])
    if dtype == torch.float32:
        x = torch.cat([x, torch.nextafter(x, x + 1), torch.nextafter(x, x - 1)]).abs()
    x = x.to(dtype)
    found = element.nearest(x)
    for value, nearest in zip(x.tolist(), found.tolist(), strict=True):
        best = min(range(len(finite)), key=lambda code: (abs(finite[code] - min(value, finite[-1])), code % 2))
        assert nearest == finite[best], value
    assert torch.equal(element.nearest(-x), -found)
    assert element.nearest(torch.tensor([math.nan], dtype=dtype)).isnan()


def literal_microxcaling(block: list[float], element: Element) -> Iterator[float]:
    """OCP's rule, one number at a time: shared exponent floor(log2 amax) - emax, at least -127; round, saturate."""
    most = max(abs(x) for x in block)
    emax = math.floor(math.log2(element.largest))
    shared = max(-127, math.floor(math.log2(most)) - emax) if most else -127
    for x in block:
        scaled = abs(x) / 2.0**shared
        private = max(math.floor(math.log2(scaled)), math.floor(math.log2(element.smallest_normal))) if scaled else 0
        step = 2.0 ** (private - element.mantissa_bits)
        yield math.copysign(min(round(scaled / step) * step, element.largest) * 2.0**shared, x)


def literal_amxfp4(block: list[float], scale: Element | None) -> Iterator[float]:
    """AMXFP4: each number over the scale of its own sign."""
    for x in block:
        most = max([0.0, *(abs(y) for y in block if math.copysign(1, y) == math.copysign(1, x))])
        step = torch.tensor(most) / torch.tensor(6.0)
        step = scale.nearest(step) if scale else step
        q = ELEMENTS["e2m1"].nearest(torch.tensor(x) / step) if step else torch.tensor(0.0)
        yield (q * step).item()


@pytest.mark.parametrize("fmt", [one for one in MX if one.scale == "floor"], ids=name_of)
def test_mx_is_the_rule_of_microxcaling(fmt):
    x = numbers()
    expected = [list(literal_microxcaling(block.tolist(), fmt.elements)) for block in x.view(-1, 32)]
    assert torch.equal(fake_quantize(x, fmt), torch.tensor(expected).view_as(x))


@pytest.mark.parametrize("fmt", AMX[:3], ids=name_of)
def test_amxfp4_is_the_rule_of_its_paper(fmt):
    x = numbers(rows=16)
    expected = [list(literal_amxfp4(block.tolist(), ELEMENTS.get(fmt.scale))) for block in x.view(-1, 32)]
    assert torch.equal(fake_quantize(x, fmt), torch.tensor(expected).view_as(x))


@pytest.mark.parametrize("fmt", MX, ids=name_of)
def test_the_scale_rules_differ_as_they_say(fmt):
    x = numbers()[:4]
    most = x.view(4, 2, 32).abs().amax(-1)
    scale = fit_grid(x, fmt).scale_OG.float()
    top = most / scale / fmt.elements.largest
    if fmt.scale != "real":
        assert (scale.log2() == scale.log2().round()).all()
        one_step = {"floor": 2.0, "even": 2.0, "ceil": 1.0}[fmt.scale]
        assert (top[most > 0] <= one_step).all()
        assert (top[most > 0] > 0.25).all()


@every
def test_activations_and_weights_share_one_definition_and_what_is_stored_comes_back(fmt):
    w_OI = numbers()
    grid = fit_grid(w_OI, fmt)
    codes_OI = grid.quantize(w_OI)
    stored = QuantizedWeight(codes_OI, grid.scale_OG, grid.second_OG, fmt)
    again = QuantizedWeight.from_tensors({key: t.clone() for key, t in stored.tensors().items()}, fmt)
    assert int(codes_OI.max()) < 2**fmt.bits
    assert torch.equal(again.dequantize(), fake_quantize(w_OI, fmt))
    assert torch.equal(fmt.encode(fmt.decode(codes_OI, torch.float32)), codes_OI)
    top, bottom = stored.split([10, 30])
    assert torch.equal(torch.cat([top.dequantize(), bottom.dequantize()]), stored.dequantize())


@every
def test_a_rounded_tensor_is_a_fixed_point_of_its_grid(fmt):
    w_OI = numbers()
    grid = fit_grid(w_OI, fmt)
    codes_OI = grid.quantize(w_OI)
    values = grid.dequantize(codes_OI, torch.float64)
    moved = grid.dequantize(grid.quantize(values), torch.float64) - values
    assert (moved.abs() <= values.abs() * 2.0**-20).all()


@every
def test_the_error_is_at_most_half_a_step_unless_the_block_saturates(fmt):
    x = numbers().double()
    y, (low, high) = fake_quantize(x, fmt), extent(fmt.split(x))
    grid = fmt.grid(low, high, whole=fmt.whole_of(low, high))
    scale = fmt.step_of(fmt.split(x), *grid).expand_as(fmt.split(x)).flatten(-2)
    inside = (x.abs() <= scale * fmt.elements.largest) & (scale > 0)
    at = torch.maximum((x / scale).abs(), torch.tensor(fmt.elements.smallest_normal))
    step = torch.exp2(at.log2().floor() - fmt.elements.mantissa_bits) * scale
    assert ((x - y).abs() <= step / 2 * (1 + 1e-6))[inside].all()
    assert (y.abs() <= scale * fmt.elements.largest * (1 + 1e-6)).all()


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scale_gradient", [False, True])
def test_nan_and_infinity_spoil_what_shares_a_scale_and_nothing_else(fmt, bad, scale_gradient):
    x = numbers()[8:12]
    x[1, 40] = bad
    y = fake_quantize(x, fmt, scale_gradient=scale_gradient)
    width = {"tensor": 64 * 4, "row": 64}.get(fmt.outer or "", fmt.group_of(64))
    assert y[1, 40 - 40 % fmt.group_of(64) : 41].isnan().all()
    assert y.isnan().sum() == width


def test_the_largest_numbers_of_fp32_are_numbers():
    x = torch.tensor([[3e38, -3e38] * 32])
    y = fake_quantize(x, FLOAT_FORMATS["mxfp4"])
    assert torch.equal(y, torch.tensor([[6.0, -6.0] * 32]) * 2.0**125)
    for fmt in (AMX[2], *NV):
        assert fake_quantize(x, fmt).isfinite().all()


@every
@given(exponent=st.integers(-12, 12), seed=st.integers(0, 99))
@settings(max_examples=3)
def test_powers_of_two_scale_through(fmt, exponent, seed):
    if fmt.scale in ELEMENTS and not fmt.outer:
        exponent = max(-3, min(exponent, 3))  # the scales themselves have few exponents
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) + 0.01
    factor = 2.0**exponent
    same = fake_quantize(x, fmt) * factor == fake_quantize(x * factor, fmt)
    assert same.all() or (fmt.scale in ELEMENTS and not fmt.outer and same.float().mean() > 0.8)


@some
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_shape_and_dtype_stay_and_arithmetic_is_in_fp32(fmt, dtype):
    x = numbers()[8:24].to(dtype).view(2, 8, 64).transpose(0, 1)
    y = fake_quantize(x, fmt)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(y, fake_quantize(x.to(wide), fmt).to(dtype))
    assert fake_quantize(x[:0], fmt).shape == x[:0].shape


@every
def test_the_published_gradient_is_the_identity(fmt):
    x = numbers()[8:12].requires_grad_()
    towards = numbers(1)[8:12]
    (gradient,) = torch.autograd.grad(fake_quantize(x, replace(fmt, clip=0.6)), x, towards)
    assert torch.equal(gradient, towards)


@every
@pytest.mark.parametrize("ratio", [1.0, 0.4])
def test_the_scale_gradient_is_that_of_a_grid_that_follows_its_range(fmt, ratio):
    """With q and each X / (clip a) held, x̂ is smooth in x and the clip ratio; autograd differentiates that."""
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()
    towards = torch.randn(3, 64, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    clip = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(fake_quantize(x, fmt, scale_gradient=True, clip=clip), (x, clip), towards)

    groups = fmt.split(x)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    with torch.no_grad():
        unclipped = replace(fmt, clip=1.0)
        grid = unclipped.grid(ratio * low, ratio * high, whole=fmt.whole_of(low, high))
        step = fmt.step_of(groups, *grid)
        q = fmt.elements.nearest(groups / step)
        rest, beyond = q - groups / step, (groups / step).abs() > fmt.elements.largest
    assert ratio == 1.0 or beyond.any()
    most = torch.where(groups < 0, -low, high) if fmt.by_sign else torch.maximum(high, -low)
    moving = clip * most * (step / (ratio * most)).detach()
    smooth = torch.where(beyond, q, groups / moving + rest) * moving
    torch.testing.assert_close(fake_quantize(x, fmt, clip=clip.detach()), smooth.detach().flatten(-2))
    expected = torch.autograd.grad(smooth.flatten(-2), (x, clip), towards)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@some
def test_clip_search_finds_what_brute_force_finds(fmt):
    w_OI = numbers()[8:24]
    search = ClipSearch(2.0, steps=12)
    found = fit_grid(w_OI, fmt, search=search)

    def loss(values: Tensor) -> Tensor:
        return fmt.split((values - w_OI).double().square()).sum(-1)

    def clipped(factor: float) -> Tensor:
        grid = fit_grid(w_OI, replace(fmt, clip=factor))
        return loss(grid.dequantize(grid.quantize(w_OI)))

    best = torch.stack([clipped(factor) for factor in search.factors()]).amin(0)
    torch.testing.assert_close(loss(found.dequantize(found.quantize(w_OI))), best, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("fmt", [*FLOAT_FORMATS.values(), IntFormat(3, True, 8), IntFormat(3, False)], ids=str)
def test_clip_factors_may_be_tried_all_at_once(fmt):
    w_OGg = fmt.split(numbers()[8:24])
    low_OG1, high_OG1 = extent(w_OGg)
    whole_OG1 = fmt.whole_of(low_OG1, high_OG1)
    rows = [None if t is None else t.flatten(0, 1) for t in (w_OGg, low_OG1, high_OG1, whole_OG1)]
    first, *others = (ClipSearch(steps=12).best(*rows, fmt, torch.float32, n) for n in (1, 5, 12))
    assert all(torch.equal(first, other) for other in others)


@some
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_keeps_the_blocks_scales_and_beats_rounding_to_nearest(fmt, act_order):
    generator = torch.Generator().manual_seed(0)
    w_OI = torch.randn(24, 64, generator=generator)
    x_TI = torch.randn(400, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    rounded, report = gptq(w_OI, x_TI.T @ x_TI, fmt, act_order=act_order)
    grid = fit_grid(w_OI, fmt)
    assert torch.equal(rounded.scale_OG.float(), grid.scale_OG.float())
    assert rounded.scale_OG.dtype == grid.scale_OG.dtype
    assert report.error < 0.8 * report.nearest_error
    values = grid.dequantize(grid.quantize(rounded.dequantize()))
    torch.testing.assert_close(values, rounded.dequantize(), rtol=1e-6, atol=0)


@some
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_refits_blocks_under_the_scale_that_they_have_in_common(fmt, act_order):
    w_OI, x_TI = (torch.randn(n, 64, generator=torch.Generator().manual_seed(0)) for n in (96, 400))
    alone, _ = gptq(w_OI, torch.eye(64), fmt, act_order=act_order, static_groups=False)
    assert torch.equal(alone.dequantize(), round_nearest(w_OI, fmt).dequantize())  # nothing is coupled
    mixed_II = x_TI @ torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    rounded, report = gptq(w_OI, mixed_II.T @ mixed_II, fmt, act_order=act_order, static_groups=False)
    fixed = fit_grid(w_OI, fmt)
    assert (rounded.scale_OG.float() != fixed.scale_OG.float()).any() == (fmt.group_of(64) < 64)
    if fmt.outer:
        assert torch.equal(rounded.second_OG, fixed.second_OG)
    assert report.error < 0.9 * report.nearest_error


def test_bits_per_number_count_the_scales():
    assert {name: fmt.bits_per_number(1024) for name, fmt in FLOAT_FORMATS.items()} == {
        "fp8": 8 + 32 / 1024, "mxfp4": 4.25, "mxfp6": 6.25, "mxfp8": 8.25, "nvfp4": 4.5, "amxfp4": 4.5,
    }  # fmt: skip
    assert NV[1].bits_per_number(1024) == 4.5 + 32 / 1024
    assert replace(FLOAT_FORMATS["mxfp4"], scale="real").bits_per_number(1024, 16) == 4.5


def test_an_outer_scale_needs_scales_with_an_end():
    with pytest.raises(SpinfoldError, match="floor"):
        replace(FLOAT_FORMATS["nvfp4"], scale="floor")
