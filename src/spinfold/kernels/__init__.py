"""Triton kernels. Each computes what a plain torch function elsewhere defines, only faster.

Triton is optional: the modules beside this one import it and are themselves imported only when
`kernels_run_on` says so. They take tensors and numbers, and know nothing of the rest of spinfold.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Elements", "kernels_run_on"]


class Elements(NamedTuple):
    """A kind of floating-point number: the bits of its mantissa, 2^(1 - bias), and the largest number."""

    mantissa_bits: int
    smallest_normal: float
    largest: float


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None


def kernels_run_on(x: Tensor) -> bool:
    """Is `x` on a CUDA device, in a dtype of at most 32 bits, with Triton installed?"""
    return x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and _triton_installed()
