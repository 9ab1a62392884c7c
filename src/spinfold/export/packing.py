"""Dense bit packing: integers of 2 to 8 bits as one little-endian stream of bits per row, and back.

    byte j of a row = Σ_i of the bits of value i that fall on stream bits 8j … 8j + 7; value i starts at bit b i

    b = 3, values 0 1 2 …    bits 0-2, 3-5, 6-8 …      7 values end in the middle of byte 2: nothing is wasted

Values are unsigned, 0 … 2^b - 1; a signed grid adds 2^(b-1) first. Eight values of b bits are b whole bytes, so both
directions work on such words, or on single bytes where b divides 8.

Shapes: O rows, I values of a row, P packed bytes of a row, W words, V values and Y bytes of a word.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["as_codes", "as_unsigned", "pack", "pack_words", "unpack"]


def pack(u_OI: Tensor, bits: int) -> Tensor:
    """Integers `(O, I)` in 0 … 2^bits - 1 as bytes `(O, ceil(I bits / 8))`, uint8; the last bits of a row are 0."""
    values, bytes_, dtype = _word(bits)
    num_bytes = -(-u_OI.shape[1] * bits // 8)
    u_OWV = F.pad(u_OI.to(dtype), (0, -u_OI.shape[1] % values)).unflatten(1, (-1, values))
    word_OW1 = (u_OWV << _steps(values, bits, u_OWV)).sum(-1, keepdim=True, dtype=dtype)
    packed_OWY = (word_OW1 >> _steps(bytes_, 8, word_OW1)) & 0xFF
    return packed_OWY.to(torch.uint8).flatten(1)[:, :num_bytes].contiguous()


def unpack(packed_OP: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` integers of each packed row: `(O, count)`, uint8, the inverse of `pack`.

    Value i of every word at once, from the byte where it starts and, if it crosses its end, the next: bytes need no
    wider arithmetic, which would cost several times the time.
    """
    values, bytes_, _ = _word(bits)
    packed_OWY = F.pad(packed_OP, (0, -packed_OP.shape[1] % bytes_)).unflatten(1, (-1, bytes_))
    u_OWV = packed_OWY.new_empty(*packed_OWY.shape[:2], values)
    for i in range(values):
        byte, start = divmod(i * bits, 8)
        u_OW = packed_OWY[..., byte] >> start
        if start + bits > 8:
            u_OW |= packed_OWY[..., byte + 1] << 8 - start
        u_OWV[..., i] = u_OW & (1 << bits) - 1
    return u_OWV.flatten(1)[:, :count]


def pack_words(u_OI: Tensor, bits: int) -> Tensor:
    """The same stream in 32-bit words, `(O, ceil(I bits / 32))`, int32, as compressed-tensors stores it."""
    packed_OP = pack(u_OI, bits)
    packed_OW4 = F.pad(packed_OP, (0, -packed_OP.shape[1] % 4)).unflatten(1, (-1, 4)).to(torch.int32)
    return (packed_OW4 << _steps(4, 8, packed_OW4)).sum(-1, dtype=torch.int32)


def as_unsigned(q: Tensor, bits: int) -> Tensor:
    """Integers of a grid as `pack` takes them, uint8: signed ones (int8) are moved up by 2^(bits - 1)."""
    return q if q.dtype == torch.uint8 else (q.to(torch.int16) + (1 << bits - 1)).to(torch.uint8)


def as_codes(u: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `as_unsigned`, in the grid's own `dtype`. Overwrites `u`."""
    return u if dtype == torch.uint8 else u.sub_(1 << bits - 1).view(dtype)  # modulo 256


def _word(bits: int) -> tuple[int, int, torch.dtype]:
    """The fewest values that fill whole bytes, these bytes, and a dtype that holds them."""
    if not 2 <= bits <= 8:
        raise ValueError(f"values have 2 to 8 bits, not {bits}")
    shared = gcd(bits, 8)
    values, bytes_ = 8 // shared, bits // shared
    return values, bytes_, torch.uint8 if bytes_ == 1 else torch.int64


def _steps(count: int, width: int, like: Tensor) -> Tensor:
    """0, width, 2 width, … (count of them)."""
    return torch.arange(0, count * width, width, dtype=like.dtype, device=like.device)
