"""What the kernels share: round-half-to-even without a library call, so the interpreter can run it too."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["round_even"]

# 1.5 · 2^23: above it, neighbouring fp32 numbers are 1 apart, so adding it rounds half to even.
_MAGIC = tl.constexpr(12582912.0)


@triton.jit
def round_even(x):
    """torch.round of fp32 with |x| < 2^22, the sign of zero included. Beyond, off by 1 at most (callers clamp)."""
    rounded = (x + _MAGIC) - _MAGIC
    return tl.where(rounded == 0.0, x * 0.0, rounded)
