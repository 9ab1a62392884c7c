"""The floating-point formats against implementations that are not ours: torch's FP8 casts, compressed-tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spinfold.formats import FLOAT_FORMATS, fake_quantize, fit_grid
from spinfold.formats.microscaling import ELEMENTS


def adversarial(width: int = 64, seed: int = 0) -> Tensor:
    """Rows of many sizes; ties of E2M1 under power-of-two scales, one sign, equal numbers, nearly empty blocks."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, width, generator=generator) * torch.exp(2 * torch.randn(200, 1, generator=generator))
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(width // 8)
    for i, most in enumerate((6.0, 6.99, 7.0, 7.25, 7.5, 7.99, 4.0, 1.0)):
        x[i] = ties * (torch.arange(width) % 2 * 2 - 1)
        x[i, ::16] = most
        x[i] *= 2.0 ** (3 * i - 9)
    x[8], x[9], x[10] = x[8].abs(), -x[9].abs(), 3.3
    x[11, 1:], x[12, ::5] = 0, 0
    return x


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_fp8_elements_and_codes_are_those_of_torch(name, dtype):
    element, fmt = ELEMENTS[name], replace(FLOAT_FORMATS["fp8"], element=name)
    every_half = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    x = torch.cat([every_half[every_half.isfinite()], adversarial().flatten() * 100, adversarial().flatten() * 1e-5])
    expected = x.clamp(-element.largest, element.largest).to(dtype)
    found = element.nearest(x)
    assert torch.equal(found, expected.float())
    assert torch.equal(fmt.encode(found), expected.view(torch.uint8))
    assert torch.equal(fmt.decode(expected.view(torch.uint8), torch.float32), found)


def test_per_token_fp8_is_scaled_to_the_end_of_e4m3():
    x = adversarial()
    scale = x.abs().amax(-1, keepdim=True) / torch.tensor(448.0)
    expected = (x / scale).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(fake_quantize(x, FLOAT_FORMATS["fp8"]), expected)


class TestCompressedTensors:
    """Scales by `calculate_qparams`, numbers by `fake_quantize`, of the schemes that its checkpoints name."""

    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("compressed_tensors")

    def rounded(self, x: Tensor, scheme: str, size: int, *, with_outer: bool = False) -> tuple[Tensor, Tensor]:
        """Their rounded numbers and scales."""
        from compressed_tensors.quantization import preset_name_to_scheme
        from compressed_tensors.quantization.lifecycle.forward import fake_quantize as theirs
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

        args = preset_name_to_scheme(scheme, ["Linear"]).weights
        blocks = x.unflatten(-1, (-1, size))
        outer = generate_gparam(x.min(), x.max()) if with_outer else None
        scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, outer)
        return theirs(x, scale, zero, args, global_scale=outer), scale

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("factor", [1.0, 1e-4, 37.0])
    def test_nvfp4(self, seed, factor):
        x, fmt = adversarial(seed=seed) * factor, FLOAT_FORMATS["nvfp4"]
        expected, scale = self.rounded(x, "NVFP4", 16, with_outer=True)
        assert torch.equal(fake_quantize(x, fmt), expected)
        ours = fit_grid(x, fmt).scale_OG.float()
        assert torch.equal(ours.masked_fill(ours == 0, 0.125), scale.float())  # its stand-in for a scale of zero

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize(("name", "scheme"), [("mxfp4", "MXFP4"), ("mxfp6", "MXFP6A16")])
    def test_mx_with_even_scales(self, name, scheme, seed):
        x, fmt = adversarial(seed=seed), replace(FLOAT_FORMATS[name], scale="even")
        x = x[x.unflatten(-1, (-1, 32)).any(-1).all(-1)]  # where all numbers are zero it has no scale
        assert torch.equal(fake_quantize(x, fmt), self.rounded(x, scheme, 32)[0])

    def test_mxfp8_but_for_its_own_threshold(self):
        """Its scales double from a mantissa of 1.75 on, as E2M1's should: those blocks are left out."""
        x = adversarial()
        most = x.unflatten(-1, (-1, 32)).abs().amax(-1)
        x = x[((most.frexp().mantissa < 0.875) & (most > 0)).all(-1)]
        assert len(x) > 100
        for rule in ("floor", "even", "ceil"):
            fmt = replace(FLOAT_FORMATS["mxfp8"], scale=rule)
            assert torch.equal(fake_quantize(x, fmt), self.rounded(x, "MXFP8", 32)[0])
