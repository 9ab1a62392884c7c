"""A KV cache that is held as codes: each token of each head one row of bytes.

    row = codes, b bits each, packed densely | scales | second numbers
          integers    a scale of 4 bytes, and a zero point of 1 byte if the grid is asymmetric
          MX          a byte per block
          AMXFP4      two bytes per block, for the numbers of either sign
          NVFP4       a byte per block, and the scale of the scales, 4 bytes

A head of 64 numbers takes 37 bytes in integers of 4 bits, 34 in MXFP4, where bfloat16 takes 128. A row is dynamic fake
quantization cut in two,

    fake_quantize(x) = decode_rows(encode_rows(x))        bit for bit

so a network computes the same with this cache, with any other, and without one. Since a row belongs to one token, the
layers of Transformers' dynamic cache cut, reorder and repeat rows as they do keys.

Where tokens are quantized in groups, or some are kept in floating point (`formats.cache`), a layer is a `HeldLayer`:

    sink tokens, as they are | rows | tokens that are not quantized yet, as they are

where a row belongs to a token, or to one channel of a group. Such a network computes the same with this cache and
without one, whatever the text is cut into.

Shapes: B batch, H heads, T tokens, S tokens held, N head size, R bytes of a row, U rows of a head (tokens, or groups).
"""

from __future__ import annotations

from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from spinfold.errors import SpinfoldError
from spinfold.export.packing import as_codes, as_unsigned, pack, unpack
from spinfold.formats import Format
from spinfold.formats.base import compute_dtype, extent
from spinfold.formats.cache import tokens_of
from spinfold.runtime import Quantize, QuantizeCache

__all__ = [
    "CacheOps",
    "HeldLayer",
    "QuantizedCache",
    "QuantizedLayer",
    "decode_rows",
    "encode_rows",
    "quantize_cache",
]


def encode_rows(x: Tensor, format: Format) -> Tensor:
    """Each row of `x (..., N)` as bytes `(..., R)`, uint8. NaN or infinity makes NaN of all that shares a scale."""
    x = x.to(compute_dtype(x))
    x_Gg = format.split(x)
    low_G1, high_G1 = extent(x_Gg)
    scale_G1, second_G1 = format.grid(low_G1, high_G1, whole=format.whole_of(low_G1, high_G1))
    scale_G1 = scale_G1.masked_fill(~scale_G1.isfinite(), torch.nan)
    codes = as_unsigned(format.encode(format.nearest(x_Gg, scale_G1, second_G1).nan_to_num_(0)), format.bits)
    if second_G1 is not None:
        second_G1 = second_G1[..., : format.seconds_of(second_G1.shape[-2]), :].nan_to_num(0)
    parts = [pack(codes.flatten(0, -3).flatten(1), format.bits).unflatten(0, x.shape[:-1])]
    for numbers_G1 in format.stored(scale_G1, second_G1, x.dtype):
        parts += [] if numbers_G1 is None else [numbers_G1.flatten(-2).contiguous().view(torch.uint8)]
    return torch.cat(parts, -1)


def decode_rows(rows: Tensor, format: Format, size: int, dtype: torch.dtype) -> Tensor:
    """The numbers `(..., size)` that rows of bytes stand for, in the `dtype` that they were encoded from."""
    wide = torch.promote_types(dtype, torch.float32)
    groups, end = size // format.group_of(size), -(-size * format.bits // 8)
    codes = unpack(rows[..., :end].flatten(0, -2), format.bits, size).unflatten(0, rows.shape[:-1])
    numbers: list[Tensor | None] = []
    for stored, count in zip(format.stored_dtypes(wide), (groups, format.seconds_of(groups)), strict=False):
        start, end = end, end + count * stored.itemsize
        part = rows[..., start:end].clone(memory_format=torch.contiguous_format).view(stored)
        numbers.append(part.to(wide).unsqueeze(-1))
    scale_G1, second_G1 = (*numbers, None)[:2]
    assert scale_G1 is not None
    q_Gg = format.decode(format.split(as_codes(codes, format.bits, format.dtype)), wide)
    return format.values(q_Gg, scale_G1, second_G1).flatten(-2).to(dtype)


def _encode_units(x_BHTN: Tensor, format: Format | None) -> Tensor:
    """Tokens or whole groups of them as rows, uint8 `(B, H, U, R)`; as they are, without a format."""
    if format is None:
        return x_BHTN
    if (tokens := tokens_of(format)) is None:
        return encode_rows(x_BHTN, format)
    return encode_rows(x_BHTN.unflatten(2, (-1, tokens)).mT, format).flatten(-2)


def _decode_units(rows_BHUR: Tensor, format: Format | None, like: Tensor) -> Tensor:
    """The inverse, `(B, H, T, N)`, head size and dtype as `like`."""
    if format is None:
        return rows_BHUR
    size = like.shape[-1]
    if (tokens := tokens_of(format)) is None:
        return decode_rows(rows_BHUR, format, size, like.dtype)
    return decode_rows(rows_BHUR.unflatten(-1, (size, -1)), format, tokens, like.dtype).mT.flatten(2, 3)


class CacheOps(nn.Module):
    """The ops of a key or value wire, which a cache does once per token.

    What it hands over carries a mark, and passes the wire as it is; all else meets the ops here. The mark is on the
    tensor itself, so nothing can be mistaken for it. A `QuantizedLayer` needs a quantizer as the last op.
    """

    def __init__(self, ops: nn.ModuleList) -> None:
        super().__init__()
        self.ops = ops

    @property
    def format(self) -> Format:
        """The quantizer's."""
        return cast(Quantize, self.ops[-1]).format

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


class HeldLayer(DynamicLayer):  # type: ignore[misc]
    """The context of one layer by a `CacheFormat`; also of a sliding window, of which nothing is thrown away.

    `keys` and `values` are the rows of the tokens that are quantized, `kept_keys` and `kept_values` all others. Numbers
    that were quantized are gone, so it can't go back to an earlier state.
    """

    is_croppable = False
    _TENSORS: Final = ("keys", "values", "kept_keys", "kept_values", "positions")

    def __init__(self, wires: Any, is_sliding: bool) -> None:
        super().__init__()
        self.wires, self.is_sliding = wires, is_sliding
        self.op = cast(QuantizeCache, wires["cache"].ops[-1])
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        keys, values = key_states[:, :, :0], value_states[:, :, :0]
        self.kept_keys, self.kept_values = keys, values
        self.positions = self.op.rope.positions_BT[:, :0].expand(len(keys), 0)
        self.keys, self.values = self._encode(keys, values, self.positions)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new keys and values as they are before their wires; all of them as the last query sees them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        format, before, now = self.op.format, self.length, self.length + key_states.shape[2]
        positions_BT = self.op.rope.positions_BT.expand(len(key_states), -1)
        self.positions, self.length = torch.cat([self.positions, positions_BT], 1), now
        key_BHSN = torch.cat([self.kept_keys, self.wires["key"](key_states)], 2)
        value_BHSN = torch.cat([self.kept_values, self.wires["value"](value_states)], 2)

        first, end = format.span(now)
        done = max(format.span(before)[1], first)  # those before it are in rows, or sinks
        ripe = slice(first, first + end - done)
        rows = self._encode(key_BHSN[:, :, ripe], value_BHSN[:, :, ripe], self.positions[:, done:end])
        self.keys, self.values = (torch.cat(pair, 2) for pair in zip((self.keys, self.values), rows, strict=True))
        self.kept_keys, self.kept_values = (
            torch.cat([x[:, :, :first], x[:, :, ripe.stop :]], 2) for x in (key_BHSN, value_BHSN)
        )
        start, stop = (place - done + first for place in format.early(before, now))
        early = key_BHSN[:, :, start:stop], value_BHSN[:, :, start:stop]
        return self._shown(first, end, early)

    def _encode(self, key_BHTN: Tensor, value_BHTN: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        format = self.op.format
        key_BHTN = self.op.as_quantized(key_BHTN, positions_BT) if format.key else key_BHTN
        return _encode_units(key_BHTN, format.key), _encode_units(value_BHTN, format.value)

    def _shown(self, first: int, end: int, early: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Everything in order, marked, the keys also by what stands there twice."""
        format, positions_BT = self.op.format, self.positions[:, first:end]
        like_key = self.op.as_quantized(self.kept_keys[:, :, :0], positions_BT[:, :0])
        key_BHTN = _decode_units(self.keys, format.key, like_key)
        if format.key:
            key_BHTN = self.op.as_attended(key_BHTN, positions_BT, self.dtype)
        value_BHTN = _decode_units(self.values, format.value, self.kept_values)
        key_BHSN, value_BHSN = (
            torch.cat([kept[:, :, :first], x, kept[:, :, first:]], 2)
            for kept, x in ((self.kept_keys, key_BHTN), (self.kept_values, value_BHTN))
        )
        for x in (key_BHSN, value_BHSN):
            x.is_from_quantized_cache = True  # type: ignore[attr-defined]
        key_BHSN.early = early  # type: ignore[attr-defined]
        return key_BHSN, value_BHSN

    def get_seq_length(self) -> int:
        """The tokens that it holds."""
        return self.length

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, but for nothing."""
        if tokens_to_remove:
            raise SpinfoldError(
                "This KV cache can't go back.",
                "Its older tokens are quantized, and some of them should be in floating point again.",
                "Generate without assistants and other ways of guessing ahead.",
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Its rows of the batch in another order."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch so many times."""
        for name in self._TENSORS if self.length else ():
            setattr(self, name, getattr(self, name).repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows of the batch."""
        for name in self._TENSORS if self.length else ():
            setattr(self, name, getattr(self, name)[indices.to(self.device)])

    def offload(self) -> None:
        """To the CPU."""
        for name in self._TENSORS if self.length else ():
            setattr(self, name, getattr(self, name).to("cpu"))

    def prefetch(self) -> None:
        """And back."""
        for name in self._TENSORS if self.length else ():
            setattr(self, name, getattr(self, name).to(self.device))


class QuantizedCache(DynamicCache):  # type: ignore[misc]
    """A cache for a decoder that `quantize_cache` has seen."""

    def __init__(self, decoder: Any) -> None:
        super().__init__(config=decoder.config)
        self.layers: list[Any] = _quantized(self.layers, decoder)


def quantize_cache(decoder: Any) -> None:
    """Let a decoder with quantizers of keys and values hold its cache as rows of codes, by default."""
    for layer in decoder.layers:
        wires = [layer.wires["key"], layer.wires["value"]]
        if len(layer.wires["cache"].ops) or all(len(wire.ops) and isinstance(wire.ops[-1], Quantize) for wire in wires):
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
    if len(wires["cache"].ops) and type(plain) in (DynamicLayer, DynamicSlidingWindowLayer):
        return HeldLayer(wires, plain.is_sliding)
    ops = [op for wire in ("key", "value") for op in wires[wire].ops if isinstance(op, CacheOps)]
    if len(ops) == 2 and type(plain) is DynamicLayer:
        return QuantizedLayer(*ops)
    if len(ops) == 2 and type(plain) is DynamicSlidingWindowLayer:
        sliding = QuantizedSlidingLayer(*ops, sliding_window=plain.sliding_window)
        sliding.record_past = plain.record_past
        return sliding
    return plain
