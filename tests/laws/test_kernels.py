"""Each Triton kernel gives the bits of the torch function that defines it.

On a CUDA device the kernels run as they are; elsewhere this file runs itself once more in Triton's interpreter,
if Triton is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from spinfold.formats import FLOAT_FORMATS, FloatFormat, IntFormat
from spinfold.formats.activation import _on_blocks, _on_grid, _range_gradient
from spinfold.formats.integer import scale_and_zero
from spinfold.rounding import gptq
from spinfold.rounding.gptq import round_block

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
NARROW = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter truncates to bf16 where devices round
direct = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs CUDA, or runs in the interpreter")


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels are tested directly")
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_agree_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:]


def bits(x: Tensor) -> Tensor:
    """The bit pattern, with every NaN as one pattern: -0 differs from 0, NaN equals NaN."""
    integer = {2: torch.int16, 4: torch.int32}[x.element_size()]
    return x.contiguous().view(integer).masked_fill(x.isnan(), -1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


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
    y = fake_quant(x, ratio, fmt.group_of(shape[-1]), fmt.low, fmt.high, fmt.symmetric)
    assert torch.equal(bits(y), bits(_on_grid(x, ratio, fmt)))


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
    assert torch.equal(bits(_on_blocks(x, ratio, fmt)), bits(_on_grid(x, ratio, fmt)))


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


@direct
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("num_columns", "num_outputs"), [(1, 5), (7, 33), (32, 40)] + [(128, 576)] * (DEVICE == "cuda")
)
def test_gptq_block(symmetric, num_columns, num_outputs):
    from spinfold.kernels.gptq_block import gptq_block

    fmt = IntFormat(4, symmetric)
    w_BO = random(num_columns, num_outputs)
    u_BB = random(num_columns, num_columns, seed=1).mul_(0.2).triu_()
    u_BB.diagonal().copy_(random(num_columns, seed=2).abs() + 0.5)
    low_BO, high_BO = w_BO - w_BO.abs() - 1, w_BO + w_BO.abs() + 1  # a grid for each column, as with groups
    scale_BO, zero_BO = scale_and_zero(low_BO.clamp(max=0), high_BO.clamp(min=0), fmt)
    defined_BO, computed_BO = w_BO.clone(), w_BO.clone()
    error_BO = round_block(defined_BO, u_BB, scale_BO, zero_BO, fmt)
    computed_error_BO = gptq_block(computed_BO, u_BB, scale_BO, zero_BO, fmt.low, fmt.high)
    # Where the definition's addr fuses multiply and add, one row in thousands may round a near-tie the other way.
    same_O = (computed_BO == defined_BO).all(0)
    assert same_O.float().mean() > (0.99 if DEVICE == "cuda" else 0.999)
    torch.testing.assert_close(computed_error_BO[:, same_O], error_BO[:, same_O], rtol=0, atol=2e-5)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
@pytest.mark.parametrize("fmt", [IntFormat(4, True), IntFormat(3, False, 64)], ids=str)
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_on_the_device_is_gptq_on_the_cpu(fmt, act_order):
    w_OI, x_TI = random(300, 576), random(2000, 576, seed=1) @ random(576, 576, seed=2)
    h_II = x_TI.double().T @ x_TI.double()
    rounded, report = gptq(w_OI, h_II, fmt, act_order=act_order)
    on_cpu, report_on_cpu = gptq(w_OI.cpu(), h_II.cpu(), fmt, act_order=act_order)
    assert (rounded.q_OI.cpu() == on_cpu.q_OI).float().mean() > 0.98
    assert report.error == pytest.approx(report_on_cpu.error, rel=1e-2)
    assert report.error < report.nearest_error
