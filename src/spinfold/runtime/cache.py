"""The KV cache as attention sees it where not every token is quantized at once (`formats.cache`).

A token that an early query sees in floating point and a later one quantized stands there twice, and the mask says who
sees which:

    keys and values   of all tokens, as the last query sees them   |   of those quantized on the way, as they were
    mask              as given, but for the early queries           |   as given, for the early queries alone

Softmax over both parts is softmax over one copy of each token. A single query, as in decoding, has the first part only.

Shapes: B batch, H heads, T queries, S tokens, E tokens that stand there twice, N head size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from spinfold.errors import SpinfoldError
from spinfold.formats import CacheFormat, Format
from spinfold.formats.base import compute_dtype
from spinfold.networks import Attended, Rope

__all__ = ["QuantizeCache"]


class QuantizeCache(nn.Module):
    """The op on a layer's cache wire, fake quantization of a whole text; `key` and `value` quantize whole groups.

    A real cache does that itself, and marks its keys by `early`, the keys and values of the tokens that stand twice.
    """

    def __init__(self, format: CacheFormat, key: nn.Module | None, value: nn.Module | None, rope: Rope) -> None:
        super().__init__()
        self.format, self.key, self.value, self.rope = format, key, value, rope

    @property
    def exact_format(self) -> CacheFormat:
        """The format with the clip ratios of the quantizers."""
        key, value = (None if op is None else cast(Format, op.format) for op in (self.key, self.value))
        return replace(self.format, key=key, value=value)

    def forward(self, seen: Attended) -> Attended:
        key_BHSN, value_BHSN, mask, num_queries = seen
        before = key_BHSN.shape[2] - num_queries
        early = getattr(key_BHSN, "early", None)
        if early is None:
            if before:
                raise SpinfoldError(
                    "This KV cache can't be used here.",
                    "The recipe keeps some tokens in floating point, and this cache does not know which.",
                    "Leave past_key_values out, or give an empty DynamicCache(config=model.config).",
                )
            twice = slice(*self.format.early(0, num_queries))
            early = key_BHSN[:, :, twice], value_BHSN[:, :, twice]
            key_BHSN, value_BHSN = self._quantized_keys(key_BHSN), self._quantized_values(value_BHSN)
        if early[0].shape[2]:
            mask = self._mask(mask, num_queries, key_BHSN)
            key_BHSN, value_BHSN = (torch.cat(pair, 2) for pair in zip((key_BHSN, value_BHSN), early, strict=True))
        return Attended(key_BHSN, value_BHSN, mask, num_queries)

    def inputs(self, seen: Attended) -> dict[str, Tensor]:
        """What its quantizers are given when the whole text is there, `(B, H, T, N)`."""
        first, end = self.format.span(seen.num_queries)
        key_BHTN, value_BHTN = (x[:, :, first:end] for x in (seen.key_BHSN, seen.value_BHSN))
        return {"key": self.as_quantized(key_BHTN, self.rope.positions_BT[:, first:end]), "value": value_BHTN}

    def as_quantized(self, key_BHTN: Tensor, positions_BT: Tensor) -> Tensor:
        """Keys in the basis in which they are quantized: before RoPE, if the format says so."""
        if not self.format.before_rope:
            return key_BHTN
        return self.rope.turn_back(key_BHTN.to(compute_dtype(key_BHTN)), positions_BT)

    def as_attended(self, key_BHTN: Tensor, positions_BT: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `as_quantized`."""
        return self.rope.turn(key_BHTN, positions_BT).to(dtype) if self.format.before_rope else key_BHTN

    def _quantized_keys(self, key_BHSN: Tensor) -> Tensor:
        if self.key is None:
            return key_BHSN
        first, end = self.format.span(key_BHSN.shape[2])
        positions_BT = self.rope.positions_BT[:, first:end]
        quantized_BHTN = self.key(self.as_quantized(key_BHSN[:, :, first:end], positions_BT))
        quantized_BHTN = self.as_attended(quantized_BHTN, positions_BT, key_BHSN.dtype)
        return torch.cat([key_BHSN[:, :, :first], quantized_BHTN, key_BHSN[:, :, end:]], 2)

    def _quantized_values(self, value_BHSN: Tensor) -> Tensor:
        if self.value is None:
            return value_BHSN
        first, end = self.format.span(value_BHSN.shape[2])
        return torch.cat([value_BHSN[:, :, :first], self.value(value_BHSN[:, :, first:end]), value_BHSN[:, :, end:]], 2)

    def _mask(self, mask: Tensor | None, num_queries: int, key_BHSN: Tensor) -> Tensor:
        """The mask over tokens and those that stand twice, `(B or 1, 1, T, S + E)`."""
        tokens, device = key_BHSN.shape[2], key_BHSN.device
        before = tokens - num_queries
        if mask is None:
            mask = torch.ones(1, 1, num_queries, tokens, dtype=torch.bool, device=device).tril(before)
        first, end = self.format.early(before, tokens)
        ends_T1 = self.format.ends(torch.arange(before + 1, tokens + 1, device=device))[:, None]
        quantized_TE = torch.arange(first, end, device=device) < ends_T1
        second = _hide(mask[..., first:end], quantized_TE)
        return torch.cat([mask[..., :first], _hide(mask[..., first:end], ~quantized_TE), mask[..., end:], second], -1)


def _hide(mask: Tensor, hidden_TE: Tensor) -> Tensor:
    """A mask that hides more; one that is no bool is added to scores."""
    return mask & ~hidden_TE if mask.dtype == torch.bool else mask.masked_fill(hidden_TE, torch.finfo(mask.dtype).min)
