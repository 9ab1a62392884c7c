"""Where and how exactly products are computed: device, and one of three precisions.

fp32   IEEE products, TF32 off: proofs, and everything that is folded
tf32   fp32 tensors, products in TF32 where the device has it (10 bits of mantissa)
bf16   fp32 residual stream and norms, linear layers and attention in bf16 (torch.autocast)

Shapes: T tokens, I in features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from spinfold.distributed import local_rank, world
from spinfold.errors import SpinfoldError

__all__ = [
    "exact_products",
    "leading_bits",
    "pick_device",
    "pick_precision",
    "precision",
    "products",
    "settle_vector_functions",
    "square",
]

_VECTOR_FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "cosh", "erf", "erfc", "exp", "expm1"),
    *("log", "log10", "log1p", "sin", "sinh", "sqrt", "tan", "tanh", "trunc"),
)
"""What PyTorch computes on a CPU by oneMKL's vector library."""


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`. Raises `SpinfoldError` for a device that is not there.

    Of several processes each has the GPU of its number.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world() > 1:
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SpinfoldError(
            f"There is no device {name!r}.", "Its name is not known.", "Use auto, cpu or cuda."
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SpinfoldError(
            f"Device {name!r} can't be used.",
            f"This PyTorch sees {torch.cuda.device_count()} CUDA devices.",
            "Use --device cpu, or install a PyTorch with CUDA on a machine that has a GPU.",
        )
    if device.type == "cuda" and world() > 1:
        torch.cuda.set_device(device)
    return device


def settle_vector_functions() -> None:
    """Call each function of oneMKL's vector library once, on one number and so in one thread, before it matters.

    oneMKL looks for the code of a function in its first call. In 2024.2, which PyTorch's wheels contain, a thread that
    makes this call while another does may compute with the least accurate code there is, this once: cosines of half the
    tokens are off by 1e-4, and the same call is right from then on (https://github.com/pytorch/pytorch/issues/188792).
    """
    for dtype in (torch.float32, torch.float64):
        number = torch.full((1,), 0.5, dtype=dtype, device="cpu")
        for name in _VECTOR_FUNCTIONS:
            getattr(number, name)()


def pick_precision(name: str, device: torch.device) -> str:
    """Resolve `auto`: TF32 on a GPU, bf16 on a CPU with fast bf16 products, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "tf32"
    return (
        "bf16" if torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_amx_tile_supported() else "fp32"
    )


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """Compute in `name` (see the module's table) inside the block."""
    with products(name), torch.autocast(device.type, dtype=torch.bfloat16, enabled=name == "bf16"):
        yield


@contextmanager
def products(name: str) -> Iterator[None]:
    """Without the casts: for a backward pass, which has the dtypes of the forward pass."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name != "fp32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def exact_products(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """For products of fp32 tensors whose numbers `dtype` holds: those of bf16 numbers a CPU may take from its tiles.

    Each product is exact, and the sums are in fp32, as without; at best it takes a third of the time.
    """
    if dtype != torch.bfloat16 or device.type != "cpu" or pick_precision("auto", device) != "bf16":
        yield
        return
    matmul = cast(Any, torch.backends.mkldnn).matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def square(x_TI: Tensor) -> Tensor:
    """xᵀx in fp32: on a GPU from two TF32 products, which take a third of the time of one with IEEE arithmetic.

    With x = h + l, h the leading 11 bits, it is hᵀh + s + sᵀ, s = hᵀl; what is left out, lᵀl, is 2^-22 of it.
    Elsewhere five eighths of it are computed, and the rest is their mirror image.
    """
    if not x_TI.is_cuda:
        size = x_TI.shape[1]
        square_II = x_TI.new_empty(size, size)
        for low in range(0, size, step := max(1, -(-size // 4))):
            rows_PI = torch.mm(x_TI[:, low : low + step].T, x_TI[:, low:])
            square_II[low : low + step, low:] = rows_PI
            square_II[low:, low : low + step] = rows_PI.T
        return square_II
    h_TI = leading_bits(x_TI)
    with products("tf32"):
        square_II, s_II = h_TI.T @ h_TI, h_TI.T @ (x_TI - h_TI)
    return square_II.add_(s_II).add_(s_II.T)


def leading_bits(x: Tensor) -> Tensor:
    """fp32 numbers cut to the 11 significant bits that TF32 has."""
    return (x.contiguous().view(torch.int32) & -(1 << 13)).view(torch.float32)
