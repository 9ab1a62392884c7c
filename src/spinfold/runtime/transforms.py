"""Online transforms: a map and the dynamic quantizer behind it in one step, with one kernel where there is one.

    fake_quantize_through(x, M, f)    x M on the grid of each row or group, in x's dtype
    encode_through(x, M, f)           the same as codes, scales and second numbers
    add_change(b, x, M, c)            b + (x M - x) / c
    residual_sum(b, x, M)             b + x M

x M is not rounded before the quantizer meets it. The torch functions define all four. On a GPU, a Hadamard map and a
format whose grids depend on no other row are one kernel (`kernels.hadamard`, `kernels.heads`), a low-rank map and the
sum are two (`kernels.low_rank`), or one where the sum before knew the map. Their x M deviates by 2e-4 of its norm if x
has 16 bits, by 3e-7 in fp32. So a number that near to the middle between two elements may go to the other one: 1 of
about 1000 in 4 bits, of 100 in 8.

Shapes: x (..., I) in groups (..., G, g).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from spinfold.formats import FloatFormat, Format, IntFormat, fake_quantize
from spinfold.formats.base import compute_dtype, extent
from spinfold.formats.microscaling import ELEMENTS
from spinfold.kernels import kernels_run_on
from spinfold.maps import Hadamard, LowRankCorrection, Map
from spinfold.maps.hadamard import SHORT

__all__ = [
    "Encoded",
    "add_change",
    "as_stored",
    "encode",
    "encode_through",
    "fake_quantize_through",
    "numbers",
    "residual_sum",
    "rope",
]


class Encoded(NamedTuple):
    """Codes `(..., I)`, or `(..., I / 2)` bytes of two codes of 4 bits each, the first in the low half; scales
    `(..., G)` and, where the format has them, second numbers: of each group, or `(..., 1)` of a row's scales.

    Codes and scales are in the dtypes in which the format stores them, scales that are real numbers in fp32. Codes of
    signed integers of 4 bits are counted from their lowest number.
    """

    codes: Tensor
    scale: Tensor
    second: Tensor | None


def fake_quantize_through(x: Tensor, map: Map, fmt: Format, *, clip: Tensor | None = None) -> Tensor:
    """`x (..., I)` M on the grid of each row or group: same shape, same dtype. `clip` as in `fake_quantize`."""
    if _has_kernel(x, map, fmt):
        heads_first = x.dim() == 4 and x.transpose(1, 2).is_contiguous()
        rows = x.transpose(1, 2) if heads_first else x
        y = map.by_kernel(rows, grid=numbers(fmt), clip=_clip(x, fmt, clip))  # type: ignore[attr-defined]
        return y.transpose(1, 2) if heads_first else y
    y = map.apply(x.to(compute_dtype(x)))
    return fake_quantize(y, fmt, clip=clip).to(x.dtype)


def encode_through(x: Tensor, map: Map, fmt: Format) -> Encoded:
    """`x (..., I)` M as codes and scales. Integers of 4 or 8 bits, or floating-point elements of 4 or 8 bits."""
    if fmt.bits not in (4, 8):
        raise ValueError(f"codes of {fmt.bits} bits can't be packed into bytes")
    if _has_kernel(x, map, fmt):
        codes = map.by_kernel(x, grid=numbers(fmt), clip=_clip(x, fmt, None), packed=True)  # type: ignore[attr-defined]
        return Encoded(codes.codes, *as_stored(fmt, codes.scale, codes.second))
    return encode(map.apply(x.to(compute_dtype(x))), fmt)


def add_change(branch: Tensor, x: Tensor, map: Map, factor: float = 1.0) -> Tensor:
    """branch + (x M - x) / factor: what a change of basis M on a skip connection adds to the branch that joins it."""
    if _is_correction(map, branch, x):
        from spinfold.kernels.low_rank import inner_product, low_rank_sum

        U_NR, V_RN = map.two_factors(x.dtype, 1 / factor)
        return low_rank_sum(x, branch, inner_product(x, U_NR), V_RN, with_x=False)[0]
    return branch + (map.apply(x) - x) / factor


def residual_sum(
    branch: Tensor, x: Tensor, map: Map, *, inner: Tensor | None = None, next_map: Map | None = None
) -> tuple[Tensor, Tensor | None]:
    """y = branch + x M, the stream in its next basis; and what the sum behind `next_map`, given y, takes as `inner`.

    For runtimes that make the sum themselves: with `inner` from the sum before, a kernel reads x once instead of twice.
    None where no kernel takes it, as on a CPU; the result is the same up to rounding.
    """
    if not _is_correction(map, branch, x):
        return branch + map.apply(x), None
    from spinfold.kernels.low_rank import inner_product, low_rank_sum

    U_NR, V_RN = map.two_factors(x.dtype)
    next_U_NR = None
    if _is_correction(next_map, branch, x):
        next_U_NR, _ = next_map.two_factors(torch.promote_types(x.dtype, branch.dtype))
    return low_rank_sum(x, branch, inner_product(x, U_NR) if inner is None else inner, V_RN, next_U_NR=next_U_NR)


def _is_correction(map: Map | None, branch: Tensor, x: Tensor) -> TypeGuard[LowRankCorrection]:
    """Is there a kernel for the map and the sum behind it, and nobody who wants a gradient?"""
    return (
        isinstance(map, LowRankCorrection)
        and kernels_run_on(x)
        and not (torch.is_grad_enabled() and (x.requires_grad or branch.requires_grad))
        and map.rank <= 256
        and x.shape == branch.shape
    )


def encode(y: Tensor, fmt: Format) -> Encoded:
    """`y (..., I)` as codes and scales; the definition of what the kernel packs."""
    y_Gg = fmt.split(y.to(compute_dtype(y)))
    low_G1, high_G1 = extent(y_Gg)
    scale_G1, second_G1 = fmt.grid(low_G1, high_G1, whole=fmt.whole_of(low_G1, high_G1))
    codes = fmt.encode(fmt.nearest(y_Gg, scale_G1, second_G1)).flatten(-2)
    if fmt.bits == 4:
        codes = (codes - fmt.low if isinstance(fmt, IntFormat) else codes).to(torch.uint8)
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    second = None if second_G1 is None else second_G1.squeeze(-1)
    scale, second = fmt.stored(scale_G1.squeeze(-1), second, torch.float32)
    return Encoded(codes, scale, second if second is None else second[..., : fmt.seconds_of(second.shape[-1])])


def _has_kernel(x: Tensor, map: Map, fmt: Format) -> bool:
    """Is there one kernel for all of it, and nobody who wants a gradient?"""
    if not kernels_run_on(x) or (torch.is_grad_enabled() and x.requires_grad):
        return False
    if not isinstance(map, Hadamard) or map.block_size < map.size or (map.transposed and map.signs_N is not None):
        return False
    if isinstance(fmt, FloatFormat) and (fmt.by_sign or fmt.outer == "tensor" or (fmt.outer and map.size in SHORT)):
        return False
    return map.has_kernel(x, fmt.group_size or 0)


def rope(x_BTHN: Tensor, cos_BTN: Tensor, sin_BTN: Tensor) -> Tensor:
    """Rotary embedding of heads, in fp32: x ∘ [cos, cos] + [-x₂, x₁] ∘ [sin, sin], x = [x₁, x₂]; cos and sin are those
    of half the channels, `(B or 1, T, N / 2)`. A rotation and `encode` behind it are what `kernels.heads` computes.
    """
    first, second = x_BTHN.float().chunk(2, -1)
    cos, sin = cos_BTN[:, :, None].float(), sin_BTN[:, :, None].float()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@lru_cache(maxsize=64)
def numbers(fmt: Format) -> object:
    """A format as the kernel takes it."""
    from spinfold.kernels.grids import IntGrid, float_grid

    if isinstance(fmt, IntFormat):
        return IntGrid(fmt.bits, fmt.group_size or 0, fmt.low, fmt.high, fmt.symmetric)
    assert isinstance(fmt, FloatFormat)
    element, scale = (one.for_kernels for one in (fmt.elements, ELEMENTS.get(fmt.scale, fmt.elements)))
    return float_grid(fmt.group_size or 0, fmt.scale, fmt.outer == "row", fmt.bits, element, scale)


def _clip(x: Tensor, fmt: Format, clip: Tensor | None) -> Tensor | None:
    if clip is not None:
        return clip.float()
    return None if fmt.clip == 1 else _number(fmt.clip, x.device)


@lru_cache(maxsize=64)
def _number(value: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((), value, device=device)


def as_stored(fmt: Format, scale: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Bytes of scales as the dtype that they are."""
    dtype = {"real": torch.float32, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
    if isinstance(fmt, FloatFormat):
        scale = scale.view(dtype.get(fmt.scale, torch.float8_e8m0fnu))
    return scale, second
