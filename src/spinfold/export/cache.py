"""A KV cache that is held as integers: each token of each head one row of bytes.

    row = integers, b bits each, packed densely | scale, 4 bytes | zero point, 1 byte if the grid is asymmetric

A head of 64 numbers takes 37 bytes at 4 bits, where bfloat16 takes 128. A row is dynamic fake quantization cut in two,

    fake_quantize(x) = decode_rows(encode_rows(x))        bit for bit

so a network computes the same with this cache, with any other, and without one. Since a row belongs to one token, the
layers of Transformers' dynamic cache cut, reorder and repeat rows as they do keys.

Shapes: B batch, H heads, T tokens, N head size, R bytes of a row.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from spinfold.export.packing import pack, unpack
from spinfold.formats import IntFormat
from spinfold.formats.base import compute_dtype, extent
from spinfold.formats.integer import from_integers, nearest_integers, scale_and_zero
from spinfold.runtime import Quantize

__all__ = ["CacheOps", "QuantizedCache", "QuantizedLayer", "decode_rows", "encode_rows", "quantize_cache"]


def encode_rows(x: Tensor, format: IntFormat) -> Tensor:
    """Each row of `x (..., N)` as bytes `(..., R)`, uint8. NaN or infinity makes its whole row NaN."""
    x = x.to(compute_dtype(x))
    scale, zero = scale_and_zero(*extent(x), format)
    scale = scale.masked_fill(~scale.isfinite(), torch.nan)
    u = nearest_integers(x, scale, zero, format).sub_(format.low).nan_to_num_(0).to(torch.uint8)
    parts = [pack(u.flatten(0, -2), format.bits).unflatten(0, u.shape[:-1]), scale.view(torch.uint8)]
    return torch.cat(parts if zero is None else [*parts, zero.nan_to_num(0).to(torch.uint8)], -1)


def decode_rows(rows: Tensor, format: IntFormat, size: int, dtype: torch.dtype) -> Tensor:
    """The numbers `(..., size)` that rows of bytes stand for, in the `dtype` that they were encoded from."""
    wide = torch.promote_types(dtype, torch.float32)
    end = -(-size * format.bits // 8)
    q = unpack(rows[..., :end].flatten(0, -2), format.bits, size).unflatten(0, rows.shape[:-1]).to(wide)
    scale = rows[..., end : end + wide.itemsize].contiguous().view(wide)
    zero = None if format.symmetric else rows[..., -1:].to(wide)
    return from_integers(q.add_(format.low), scale, zero).to(dtype)


class CacheOps(nn.Module):
    """The ops of a key or value wire, the quantizer last, which a `QuantizedLayer` does once per token.

    What it decodes carries a mark, and passes the wire as it is; all else meets the ops here. The mark is on the tensor
    itself, so nothing can be mistaken for it.
    """

    def __init__(self, ops: nn.ModuleList) -> None:
        super().__init__()
        self.ops = ops
        self.format = cast(IntFormat, cast(Quantize, ops[-1]).format)

    def forward(self, x_BHTN: Tensor) -> Tensor:
        if getattr(x_BHTN, "is_from_quantized_cache", False):
            return x_BHTN
        for op in self.ops:
            x_BHTN = op(x_BHTN)
        return x_BHTN

    def encode(self, x_BHTN: Tensor) -> Tensor:
        """`(B, H, T, R)`."""
        for op in self.ops[:-1]:
            x_BHTN = op(x_BHTN)
        return encode_rows(x_BHTN, self.format)

    def decode(self, rows_BHTR: Tensor, like: Tensor) -> Tensor:
        """`(B, H, T, N)`, marked; size and dtype as `like`."""
        x_BHTN = decode_rows(rows_BHTR, self.format, like.shape[-1], like.dtype)
        x_BHTN.is_from_quantized_cache = True  # type: ignore[attr-defined]
        return x_BHTN


class _HoldsRows(CacheLayerMixin):  # type: ignore[misc]
    """A layer whose `keys` and `values` are rows, uint8 `(B, H, T, R)`, for all that the layer's own class does."""

    def __init__(self, key_ops: CacheOps, value_ops: CacheOps, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.key_ops, self.value_ops = key_ops, value_ops

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new keys and values as they are before their wires; all that are visible, behind the wires."""
        rows = self.key_ops.encode(key_states), self.value_ops.encode(value_states)
        key_rows, value_rows = super().update(*rows, *args, **kwargs)
        return self.key_ops.decode(key_rows, key_states), self.value_ops.decode(value_rows, value_states)


class QuantizedLayer(_HoldsRows, DynamicLayer):  # type: ignore[misc]
    """The whole context of one layer."""


class QuantizedSlidingLayer(_HoldsRows, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """The sliding window of one layer."""


class QuantizedCache(DynamicCache):  # type: ignore[misc]
    """A cache for a decoder that `quantize_cache` has seen."""

    def __init__(self, decoder: Any) -> None:
        super().__init__(config=decoder.config)
        self.layers: list[Any] = _quantized(self.layers, decoder)


def quantize_cache(decoder: Any) -> None:
    """Let a decoder with quantizers on its key and value wires hold its cache as rows of integers, by default."""
    for layer in decoder.layers:
        wires = [layer.wires["key"], layer.wires["value"]]
        if all(len(wire.ops) and isinstance(wire.ops[-1], Quantize) for wire in wires):
            for wire in wires:
                wire.ops = nn.ModuleList([CacheOps(wire.ops)])
    if any(isinstance(module, CacheOps) for module in decoder.modules()):
        decoder.register_forward_pre_hook(_give_cache, with_kwargs=True)


def _give_cache(decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward pre-hook: the decoder makes a quantized cache where it would make its own.

    `generate` hands over an empty one of Transformers', which is given quantized layers. A cache that is not dynamic,
    or not empty, is left alone: it holds what it is given, and the wires quantize what it returns.
    """
    cache, wanted = kwargs.get("past_key_values"), kwargs.get("use_cache")
    if cache is None and (decoder.config.use_cache if wanted is None else wanted):
        kwargs["past_key_values"] = QuantizedCache(decoder)
    elif isinstance(cache, DynamicCache) and not cache.offloading and not cache.get_seq_length():
        cache.layers = _quantized(cache.layers, decoder)
    return args, kwargs


def _quantized(layers: list[Any], decoder: Any) -> list[Any]:
    """A decoder's cache layers, with quantized ones in place of those that can be."""
    return [_quantized_layer(plain, layer.wires) for plain, layer in zip(layers, decoder.layers, strict=False)]


def _quantized_layer(plain: Any, wires: Any) -> Any:
    ops = [op for wire in ("key", "value") for op in wires[wire].ops if isinstance(op, CacheOps)]
    if len(ops) == 2 and type(plain) is DynamicLayer:
        return QuantizedLayer(*ops)
    if len(ops) == 2 and type(plain) is DynamicSlidingWindowLayer:
        sliding = QuantizedSlidingLayer(*ops, sliding_window=plain.sliding_window)
        sliding.record_past = plain.record_past
        return sliding
    return plain
