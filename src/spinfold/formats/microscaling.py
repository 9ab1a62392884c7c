"""Floating-point formats of 4 to 8 bits: the elements, and the scales that a block of them shares.

    element      bias  smallest  step below  largest         all are ± 2^e (1 + k / 2^m), or ± 2^(1 - bias) k / 2^m
                       normal    that        (saturates)     (subnormal); a code is sign, exponent, mantissa
    E2M1  4 bits    1  1         0.5         6
    E2M3  6 bits    1  1         0.125       7.5
    E3M2  6 bits    3  2^-2      2^-4        28
    E4M3  8 bits    7  2^-6      2^-9        448
    E5M2  8 bits   15  2^-14     2^-16       57344

    format      block   scale X of a block whose largest |x| is a, elements up to L = 2^emax c
    MX (OCP)    32      floor   2^(floor(log2 a) - emax), at least 2^-127, as E8M0; saturates above L X
                        even    twice that if the mantissa of a rounds up to 2 in the element's bits
                        ceil    twice that if the mantissa of a is above c: nothing saturates
    NVFP4       16      E4M3(g a / 6) / g with g = 448 · 6 / (largest |x| of the tensor, or of a token's row), in fp32
    AMXFP4      32      E5M2(max x / 6) for the positive numbers and E5M2(-min x / 6) for the negative ones
    FP8         row     a / L, in fp32

Then q = sat(RNE(x / X)) and x̂ = q X: ties to even, |q| ≤ L. Where X = 0, q = 0. The rules are options of each format.

Sources: OCP Microscaling Formats v1.0; NVIDIA's NVFP4, as compressed-tensors 0.20 has it; AMXFP4, arXiv 2411.09909.

Shapes: x (..., I) in groups (..., G, g); low, high and scales (..., G, 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

import torch
from torch import Tensor

from spinfold.errors import SpinfoldError
from spinfold.formats.base import Format
from spinfold.kernels import Elements

__all__ = ["ELEMENTS", "FLOAT_FORMATS", "Element", "FloatFormat", "Scale"]

Scale = Literal["floor", "even", "ceil", "real", "e4m3", "e5m2"]

_INTEGER: Final = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF << 52)}


def power_below(x: Tensor) -> Tensor:
    """2^floor(log2 |x|), read off the exponent's bits; 0 for zero and subnormal `x`, infinity for NaN and infinity."""
    integer, mask = _INTEGER[x.dtype]
    return (x.view(integer) & mask).view(x.dtype)


@dataclass(frozen=True)
class Element:
    """A floating-point number of few bits, without infinity; `largest` of either sign is where it saturates."""

    exponent_bits: int
    mantissa_bits: int
    largest: float

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def emax(self) -> int:
        """The exponent of the largest element."""
        return math.frexp(self.largest)[1] - 1

    @property
    def smallest_normal(self) -> float:
        """2^(1 - bias)."""
        return math.ldexp(1.0, 2 - (1 << self.exponent_bits - 1))

    @property
    def for_kernels(self) -> Elements:
        """What the kernels need to know of it."""
        return Elements(self.mantissa_bits, self.smallest_normal, self.largest)

    def nearest(self, x: Tensor) -> Tensor:
        """The nearest element, ties to even, saturating; NaN stays NaN. fp32 or fp64, a new tensor."""
        x = x.clamp(-self.largest, self.largest)
        step = self.step_at(x)
        return x.div_(step).round_().mul_(step)

    def step_at(self, x: Tensor) -> Tensor:
        """How far apart the elements around `x` are."""
        return power_below(x).clamp_(min=self.smallest_normal).mul_(2.0**-self.mantissa_bits)

    def magnitudes(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """All elements from 0 to the largest, each at the index that is its code; infinity at reserved codes."""
        return _magnitudes(self).to(device, dtype)


@cache
def _magnitudes(element: Element) -> Tensor:
    code = torch.arange(1 << element.exponent_bits + element.mantissa_bits, dtype=torch.float64)
    fraction, exponent = code % 2**element.mantissa_bits, code // 2**element.mantissa_bits
    significand = (exponent > 0) + fraction / 2**element.mantissa_bits
    values = element.smallest_normal * significand * torch.exp2((exponent - 1).clamp(min=0))
    return values.masked_fill(values > element.largest, torch.inf)


ELEMENTS: Final = {
    "e2m1": Element(2, 1, 6.0),
    "e2m3": Element(2, 3, 7.5),
    "e3m2": Element(3, 2, 28.0),
    "e4m3": Element(4, 3, 448.0),
    "e5m2": Element(5, 2, 57344.0),
}

_STORED: Final = {
    "floor": torch.float8_e8m0fnu,
    "even": torch.float8_e8m0fnu,
    "ceil": torch.float8_e8m0fnu,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
"""The dtype that holds a scale, by its rule; a real one's is a choice."""


@dataclass(frozen=True)
class FloatFormat(Format):
    """Elements of a kind, `group_size` of them (None: a row) under one scale found by the rule `scale`.

    `by_sign`: one scale for the positive numbers, one for the negative ones. `outer`: the scales have a scale in turn,
    one for the whole tensor, or one for each row of it, which suits activations: no token's grid depends on another
    token. `clip` multiplies the largest number before the scale is found.
    """

    element: str
    group_size: int | None = None
    scale: Scale = "real"
    by_sign: bool = False
    outer: Literal["tensor", "row"] | None = None
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.outer and self.scale not in ELEMENTS:
            raise SpinfoldError(
                f"Scales by the rule {self.scale!r} can't have a scale in common.",
                "It brings the largest of them to the end of an FP8 format.",
                "Choose e4m3 or e5m2.",
            )
        assert not (self.outer and self.by_sign)
        super().__post_init__()

    @property
    def elements(self) -> Element:
        """What the numbers are."""
        return ELEMENTS[self.element]

    @property
    def bits(self) -> int:  # type: ignore[override]
        return self.elements.bits

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    @property
    def second(self) -> str:
        return "negative" if self.by_sign else "outer"

    def seconds_of(self, groups: int) -> int:
        return 1 if self.outer else groups

    def whole_of(self, low: Tensor, high: Tensor) -> Tensor | None:
        if self.outer is None or (self.outer == "tensor" and not low.numel()):
            return None
        most = torch.maximum(high, -low)
        return (most.amax() if self.outer == "tensor" else most.amax(-2, keepdim=True)).expand_as(most)

    def grid(
        self, low: Tensor, high: Tensor, *, whole: Tensor | None = None, scale_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        low, high = low * self.clip, high * self.clip
        most = torch.maximum(high, -low)
        spoilt = 0 * most.abs()  # NaN where a number is not finite; it would otherwise saturate
        if self.by_sign:
            return self._scale(high, None, scale_dtype) + spoilt, self._scale(-low, None, scale_dtype) + spoilt
        outer = None
        if whole is not None:
            outer = whole.new_full((), ELEMENTS[self.scale].largest * self.elements.largest) / whole
            outer = outer.masked_fill(outer.isinf(), 1.0)
            spoilt = spoilt + 0 * whole
        return self._scale(most, outer, scale_dtype) + spoilt, outer

    def _scale(self, most: Tensor, outer: Tensor | None, scale_dtype: torch.dtype | None) -> Tensor:
        """X by the rule, or g X where there is an outer scale g; `most` is the largest number."""
        element = self.elements
        if self.scale in ("floor", "even", "ceil"):
            power = power_below(most)
            mantissa = most / power
            if self.scale == "even":
                power = torch.where(mantissa >= 2 - 0.5 ** (element.mantissa_bits + 1), 2 * power, power)
            elif self.scale == "ceil":
                power = torch.where(mantissa > element.largest / 2**element.emax, 2 * power, power)
            return power.mul(2.0**-element.emax).clamp(2.0**-127, 2.0**127)
        scale = most / most.new_full((), element.largest)  # a tensor: CUDA multiplies by a number's reciprocal
        if self.scale != "real":
            return ELEMENTS[self.scale].nearest(scale if outer is None else outer * scale)
        if scale_dtype is not None and scale_dtype != scale.dtype:
            scale = scale.clamp(max=torch.finfo(scale_dtype).max).to(scale_dtype).to(scale.dtype)
        return scale

    def nearest_scale(self, scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
        if self.scale in ELEMENTS:
            return ELEMENTS[self.scale].nearest(scale)
        if self.scale == "real":
            return super().nearest_scale(scale, scale_dtype)
        return power_below(math.sqrt(2) * scale).clamp(2.0**-127, 2.0**127)  # nearest in its exponent

    def step_of(self, x: Tensor, scale: Tensor, second: Tensor | None) -> Tensor:
        """X for each number, as its sign and the grid have it; broadcasts against `x`."""
        if second is None:
            return scale
        return torch.where(x.signbit(), second, scale) if self.by_sign else scale / second

    def nearest(self, x: Tensor, scale: Tensor, second: Tensor | None) -> Tensor:
        step = self.step_of(x, scale, second)
        return self.elements.nearest(x / step.masked_fill(step == 0, torch.inf))

    def values(self, q: Tensor, scale: Tensor, second: Tensor | None) -> Tensor:
        return q.mul_(self.step_of(q, scale, second))

    def beyond(self, low: Tensor, high: Tensor, scale: Tensor, second: Tensor | None) -> Tensor:
        ends = [self.elements.largest * self.step_of(x, scale, second) for x in (low - 1, high)]
        return torch.cat([-low - ends[0], high - ends[1]], -1).clamp_(min=0)

    def stored(self, scale: Tensor, second: Tensor | None, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        dtype = _STORED.get(self.scale, scale_dtype)
        if second is not None:
            wide = torch.float64 if scale_dtype == torch.float64 else torch.float32
            second = second.to(dtype if self.by_sign else wide)
        return scale.to(dtype), second

    def encode(self, q: Tensor) -> Tensor:
        magnitudes = self.elements.magnitudes(q.dtype, q.device)
        codes = torch.bucketize(q.abs().contiguous(), magnitudes, out_int32=True).to(torch.uint8)
        return codes | q.signbit().to(torch.uint8) << self.bits - 1

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        magnitudes = self.elements.magnitudes(dtype, codes.device)
        return torch.cat([magnitudes, -magnitudes])[codes.int()]  # uint8 would be a mask

    def bits_per_number(self, width: int, scale_bits: int = 32) -> float:
        """One number for a whole tensor is not counted."""
        own = scale_bits if self.scale == "real" else 8
        return self.bits + own * (1 + self.by_sign) / self.group_of(width) + (self.outer == "row") * 32 / width


FLOAT_FORMATS: Final = {
    "fp8": FloatFormat("e4m3"),
    "mxfp4": FloatFormat("e2m1", 32, "floor"),
    "mxfp6": FloatFormat("e2m3", 32, "floor"),
    "mxfp8": FloatFormat("e4m3", 32, "floor"),
    "nvfp4": FloatFormat("e2m1", 16, "e4m3", outer="tensor"),
    "amxfp4": FloatFormat("e2m1", 32, "e5m2", by_sign=True),
}
"""The formats by name, as weights have them. Activations take `outer="row"` in place of `"tensor"`."""
