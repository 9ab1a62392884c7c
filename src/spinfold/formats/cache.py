"""What of the KV cache is on a grid, and from when on: one definition for fake quantization and for a real cache.

Tokens are counted as they enter the cache. To a query at position t, which sees t + 1 tokens, the tokens

    sink ≤ j < sink + g ⌊(t + 1 - residual - sink) / g⌋        (none, if that is negative)

are quantized, and all others are in floating point: the first `sink`, the last `residual`, the query's own among them,
and the last ones of a group of g that is not complete yet. So a token is quantized once, from its own numbers, when it
and its group have left the window; what an earlier query saw of it does not change. That is what a cache does that is
filled token by token, and it makes one pass over a text compute the same: there each query has its own count.

An integer format with a `group_size` has one grid per channel of as many successive tokens (KIVI, arXiv 2402.02750);
one without has a grid per token and head. Floating-point formats have their blocks along the head, token by token. g is
the least common multiple of both groups of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from spinfold.formats.base import Format
from spinfold.formats.integer import IntFormat

__all__ = ["CacheFormat", "tokens_of"]


@dataclass(frozen=True)
class CacheFormat:
    """The grids of keys and values, None where they stay as they are; with `before_rope`, keys as they are before RoPE.

    `sink` first and `residual` last tokens are kept in floating point.
    """

    key: Format | None
    value: Format | None
    before_rope: bool = False
    sink: int = 0
    residual: int = 0

    @property
    def group(self) -> int:
        """g, the number of tokens that are quantized together."""
        return math.lcm(*(tokens_of(one) or 1 for one in (self.key, self.value) if one))

    @property
    def by_token(self) -> bool:
        """Is every token quantized at once, as attention is given it? Then quantizers on two wires are all it takes."""
        return not (self.before_rope or self.sink or self.residual) and self.group == 1

    def span(self, tokens: int) -> tuple[int, int]:
        """First and end of the tokens that are quantized when the cache holds so many."""
        first = min(self.sink, tokens)
        return first, first + max(0, tokens - self.residual - first) // self.group * self.group

    def ends(self, tokens_T: Tensor) -> Tensor:
        """The end of the span for each number of tokens, int64."""
        return self.sink + (tokens_T - self.residual - self.sink).clamp(min=0) // self.group * self.group

    def early(self, before: int, tokens: int) -> tuple[int, int]:
        """First and end of the tokens that some query sees in floating point and a later one quantized, while the cache
        grows from `before` to `tokens`.
        """
        first, end = self.span(tokens)
        if self.group == 1 and self.residual == 0:  # no query sees its own token in floating point
            return end, end
        return max(first, self.span(before + 1)[1]), end


def tokens_of(format: Format) -> int | None:
    """How many successive tokens of a channel share a grid in the cache; None where a token's grids are its own."""
    return format.group_size if isinstance(format, IntFormat) else None
