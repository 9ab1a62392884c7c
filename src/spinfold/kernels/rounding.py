"""What the kernels share: rounding to integers and to floating-point elements, without a library call, so that the
interpreter can run it too."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["nearest_element", "power_below", "round_even"]

# 1.5 · 2^23: above it, neighbouring fp32 numbers are 1 apart, so adding it rounds half to even.
_MAGIC = tl.constexpr(12582912.0)
_SIGN = tl.constexpr(-(1 << 31))
_EXPONENT = tl.constexpr(0x7F800000)


@triton.jit
def _signed_as(x, y):
    """`x`, which is zero or has the sign of `y`, with that sign in any case."""
    return (x.to(tl.int32, bitcast=True) | (y.to(tl.int32, bitcast=True) & _SIGN)).to(tl.float32, bitcast=True)


@triton.jit
def round_even(x):
    """torch.round of fp32 with |x| < 2^22, the sign of zero included. Beyond, off by 1 at most (callers clamp)."""
    return _signed_as((x + _MAGIC) - _MAGIC, x)


@triton.jit
def power_below(x):
    """2^floor(log2 |x|); 0 below the normal numbers."""
    return (x.to(tl.int32, bitcast=True) & _EXPONENT).to(tl.float32, bitcast=True)


@triton.jit
def nearest_element(x, STEPS: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr):
    """The nearest element of a kind with `STEPS` = 2^mantissa_bits steps per power of two, ties to even, saturating.

    As `round_even`, with the elements' own step in place of 1.
    """
    size = tl.minimum(tl.abs(x), LARGEST)
    magic = tl.maximum(power_below(size), SMALLEST) * (_MAGIC / STEPS)
    return _signed_as((size + magic) - magic, x)
