"""How fast a model and its text are read here: the tokenizer, a few weights and a piece of the text are.

A slow disk, weights in blocks that have to be undone, a host that is shared: no count of operations tells what reading
takes, and a little of it takes little. What the system has of a file in memory counts as fast, and it has what was read
a moment ago.
"""

from __future__ import annotations

import time
from dataclasses import astuple, dataclass
from statistics import mean

from spinfold.fitting.text import Text, tokenize
from spinfold.networks.sources import Checkpoint

__all__ = ["CHARACTERS", "UNREAD", "Reading", "measure_reading"]

CHARACTERS = 4
"""Of a token, about; it has a few more if anything."""
FEW_WEIGHTS, FEW_CHARACTERS = 1 << 23, 1 << 21
"""A text is one string to its tokenizer, which reads a short one half again as fast as a long one."""


@dataclass(frozen=True)
class Reading:
    """Seconds until a tokenizer and a network without weights stand, those of a weight, and of a character of text."""

    opening: float
    weight: float
    character: float

    @classmethod
    def mean(cls, *moments: Reading) -> Reading:
        """A shared host has slow moments, and one alone is not to be told as the rule."""
        return cls(*map(mean, zip(*map(astuple, moments), strict=True)))


UNREAD = Reading(0.0, 0.0, 0.0)
"""For a look at memory alone."""


def measure_reading(checkpoint: Checkpoint, text: Text, *, again: bool = False) -> Reading:
    """Do a little of what a run begins with; raises what that would raise (`Checkpoint.load_tokenizer`).

    `again`: with other weights, since those of the first time need no disk.
    """
    start = time.perf_counter()
    tokenizer = checkpoint.load_tokenizer()
    checkpoint.open_model()
    opened = time.perf_counter()
    weights = sum(weight.numel() for weight in checkpoint.read_some(FEW_WEIGHTS, but=FEW_WEIGHTS * again))
    read = time.perf_counter()
    tokenize(text.text[:FEW_CHARACTERS], tokenizer)
    tokenized = time.perf_counter()
    characters = min(len(text.text), FEW_CHARACTERS)
    return Reading(opened - start, (read - opened) / weights, (tokenized - read) / characters)
