"""Each Triton kernel gives the bits of the torch function that defines it.

On a CUDA device the kernels run as they are; elsewhere this file runs itself once more in Triton's interpreter,
if Triton is installed.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from on_device import (
    DEVICE,
    NARROW,
    compiles_instead_of_running,
    direct,
    elsewhere,
    passes_in_the_interpreter,
    random,
)
from torch import Tensor

from spinfold.formats import FLOAT_FORMATS, FloatFormat, IntFormat, fit_grid
from spinfold.formats.activation import _on_blocks, _on_grid, _range_gradient
from spinfold.rounding import gptq, ldlq
from spinfold.rounding.columns import round_block, round_block_by_kernel


@elsewhere
def test_the_kernels_agree_in_the_interpreter():
    passes_in_the_interpreter(__file__)


@elsewhere
def test_the_kernels_compile_for_a_gpu_that_is_not_here(monkeypatch):
    from spinfold.kernels.fake_quant import fake_quant, fake_quant_gradient

    compiled = compiles_instead_of_running(monkeypatch)
    x, clip = torch.zeros(8, 4096, dtype=torch.bfloat16), torch.ones(())
    for symmetric, width, ratio in ((True, 4096, 0.9), (False, 4096, clip), (True, 32, 0.9)):
        fake_quant(x, ratio, width, -8, 7, symmetric)
    fake_quant_gradient(x, x, 0.9, 4096, 0, 15, False)
    for name in ("mxfp4", "nvfp4", "amxfp4", "fp8"):
        fmt = FLOAT_FORMATS[name]
        _on_blocks(x, 0.9, replace(fmt, outer=fmt.outer and "row"))
    _on_blocks(x, clip, FLOAT_FORMATS["nvfp4"])
    w_BO = torch.zeros(16, 64)
    for fmt, second_BO in (
        *((IntFormat(4, True), None), (IntFormat(3, False), w_BO)),
        *((FLOAT_FORMATS["mxfp4"], None), (FLOAT_FORMATS["amxfp4"], w_BO)),
    ):
        round_block_by_kernel(w_BO, w_BO, w_BO, second_BO, fmt, w_BO)
    assert len(compiled) == 13
    assert all("ld.global.v4" in ptx for ptx in compiled)  # numbers are read four at a time


def bits(x: Tensor) -> Tensor:
    """The bit pattern, with every NaN as one pattern: -0 differs from 0, NaN equals NaN."""
    integer = {2: torch.int16, 4: torch.int32}[x.element_size()]
    return x.contiguous().view(integer).masked_fill(x.isnan(), -1)


@direct
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 4, 8])
@pytest.mark.parametrize(("shape", "group_size"), [((5, 40), 8), ((2, 3, 576), None), ((3, 64), None), ((1, 1536), 96)])
@pytest.mark.parametrize(("dtype", "clip"), [(torch.float32, 1.0), (torch.float32, 0.9), (NARROW, 0.7)])
def test_fake_quantization(symmetric, num_bits, shape, group_size, dtype, clip):
    from spinfold.kernels.fake_quant import fake_quant

    fmt = IntFormat(num_bits, symmetric, group_size)
    x = random(*shape)
    x[0] = (x[0] * 4).round() / 2  # ties
    rows = x.view(-1, shape[-1])
    rows[-1, : fmt.group_of(shape[-1])] = 0
    if len(rows) > 2:
        rows[1, 3], rows[2, 5] = float("nan"), float("inf")
    x = x.to(dtype)
    ratio = torch.tensor(clip, device=DEVICE)
    expected = bits(_on_grid(x, ratio, fmt))
    for same in (ratio, float(ratio)):
        y = fake_quant(x, same, fmt.group_of(shape[-1]), fmt.low, fmt.high, fmt.symmetric)
        assert torch.equal(bits(y), expected)


@direct
@pytest.mark.parametrize(
    "fmt",
    [
        *FLOAT_FORMATS.values(),
        replace(FLOAT_FORMATS["nvfp4"], outer="row"),
        *(replace(FLOAT_FORMATS["mxfp6"], element="e3m2", scale=rule) for rule in ("even", "ceil", "real", "e4m3")),
        *(replace(FLOAT_FORMATS["amxfp4"], scale=rule) for rule in ("floor", "real", "e4m3")),
        FloatFormat("e5m2", 96, "ceil"),
    ],
    ids=lambda f: f"{f.element}x{f.group_size}-{f.scale}-{f.by_sign}-{f.outer}",
)
@pytest.mark.parametrize(("dtype", "clip"), [(torch.float32, 1.0), (torch.float32, 0.9), (NARROW, 0.7)])
def test_fake_quantization_of_floats(fmt, dtype, clip):
    x = random(9, 96)
    x[0] = (x[0] * 4).round() / 2  # ties
    x[1], x[2], x[3, :32], x[4, :32] = x[1].abs(), -x[2].abs(), 0, -0.0
    x[5] *= 1e-38
    x[6] *= 1e6
    if fmt.outer != "tensor":
        x[7, 3], x[8, 50] = float("nan"), float("inf")
    x = x.to(dtype).view(3, 3, 96)
    ratio = torch.tensor(clip, device=DEVICE)
    expected = bits(_on_grid(x, ratio, fmt))
    assert torch.equal(bits(_on_blocks(x, ratio, fmt)), expected)
    assert torch.equal(bits(_on_blocks(x, float(ratio), fmt)), expected)


@direct
@pytest.mark.parametrize(
    "fmt", [IntFormat(b, s, g, c) for b in (2, 4) for s in (True, False) for g, c in ((None, 1.0), (8, 0.7))], ids=str
)
def test_the_gradients_of_fake_quantization(fmt):
    from spinfold.kernels.fake_quant import fake_quant_gradient

    x, grad = random(7, 40, seed=1).requires_grad_(), random(7, 40, seed=2)
    clip = torch.tensor(fmt.clip, device=DEVICE)
    expected = _range_gradient(x.detach(), grad, clip, fmt)
    actual = fake_quant_gradient(x.detach(), grad, clip, fmt.group_of(40), fmt.low, fmt.high, fmt.symmetric)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


GRIDS = [
    *(IntFormat(bits, symmetric, 4) for bits in (2, 4) for symmetric in (True, False)),
    *(replace(fmt, group_size=4) for fmt in FLOAT_FORMATS.values()),
    replace(FLOAT_FORMATS["nvfp4"], group_size=4, outer="row"),
    replace(FLOAT_FORMATS["amxfp4"], group_size=4, scale="real"),
]


@direct
@pytest.mark.parametrize("fmt", GRIDS, ids=str)
@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize(("num_columns", "num_outputs"), [(4, 5), (16, 33)] + [(128, 576)] * (DEVICE == "cuda"))
def test_a_block_of_columns(fmt, based, num_columns, num_outputs):
    w_BO = random(num_columns, num_outputs)
    w_BO[:, 0] = 0  # a scale of zero
    u_BB = random(num_columns, num_columns, seed=1).mul_(0.2).triu_()
    u_BB.diagonal().copy_(random(num_columns, seed=2).abs() + 0.5)
    grid = fit_grid(w_BO.T, fmt)
    scale_BO, second_BO = (
        None if t is None else t.T.float().repeat_interleave(4, 0).contiguous() for t in (grid.scale_OG, grid.second_OG)
    )
    base_BO = random(num_columns, num_outputs, seed=3) if based else None
    defined_BO, computed_BO = w_BO.clone(), w_BO.clone()
    error_BO = round_block(defined_BO, u_BB, scale_BO, second_BO, fmt, base_BO)
    computed_error_BO = round_block_by_kernel(computed_BO, u_BB, scale_BO, second_BO, fmt, base_BO)
    # Where the definition's addr fuses multiply and add, one row in thousands may round a near-tie the other way.
    same_O = (bits(computed_BO) == bits(defined_BO)).all(0)
    assert same_O.float().mean() > (0.99 if DEVICE == "cuda" else 0.999)
    torch.testing.assert_close(computed_error_BO[:, same_O], error_BO[:, same_O], rtol=0, atol=2e-5)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
@pytest.mark.parametrize("fmt", [IntFormat(4, True), IntFormat(3, False, 64), *FLOAT_FORMATS.values()], ids=str)
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_on_the_device_is_gptq_on_the_cpu(fmt, act_order):
    w_OI, x_TI = random(300, 576), random(2000, 576, seed=1) @ random(576, 576, seed=2)
    h_II = x_TI.double().T @ x_TI.double()
    rounded, report = gptq(w_OI, h_II, fmt, act_order=act_order)
    on_cpu, report_on_cpu = gptq(w_OI.cpu(), h_II.cpu(), fmt, act_order=act_order)
    assert (rounded.q_OI.cpu() == on_cpu.q_OI).float().mean() > 0.98
    assert report.error == pytest.approx(report_on_cpu.error, rel=1e-2)
    assert report.error < report.nearest_error


@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
@pytest.mark.parametrize("fmt", [IntFormat(3, True), *FLOAT_FORMATS.values()], ids=str)
def test_ldlq_on_the_device_is_ldlq_on_the_cpu(fmt):
    w_OI, x_TI = random(300, 576), random(2000, 576, seed=1) @ random(576, 576, seed=2)
    h_II = x_TI.double().T @ x_TI.double()
    rounded, report = ldlq(w_OI, h_II, fmt, passes=2)
    on_cpu, report_on_cpu = ldlq(w_OI.cpu(), h_II.cpu(), fmt, passes=2)
    assert (rounded.q_OI.cpu() == on_cpu.q_OI).float().mean() > 0.95
    assert report.error == pytest.approx(report_on_cpu.error, rel=1e-2)
    assert report.error < report.nearest_error
