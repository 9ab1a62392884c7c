"""How fast a model and its text are read here: the tokenizer, a few weights and a piece of the text are.

A slow disk, weights in blocks that have to be undone, a host that is shared: no count of operations tells what reading
takes, and a little of it takes little. What the system has of a file in memory counts as fast, and it has what was read
a moment ago.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from math import inf
from statistics import median

from spinfold.fitting.text import Text, tokenize
from spinfold.networks.sources import Checkpoint

__all__ = ["CHARACTERS", "UNREAD", "Reading", "measure_reading"]

CHARACTERS = 4
"""Of a token, about; it has a few more if anything."""
FEW_WEIGHTS, FEW_CHARACTERS = 1 << 23, 1 << 20
"""A text is one string to its tokenizer, which reads a short one half again as fast as a long one."""


@dataclass(frozen=True)
class Reading:
    """The seconds until a tokenizer and a network without weights stand, and the weights and the characters of text
    that are read in a second.
    """

    opening: float
    weights: float
    characters: float

    @classmethod
    def median(cls, several: Iterable[Reading]) -> Reading:
        """The median of each, so that one slow moment of a shared host is not told as the rule."""
        return cls(*map(median, zip(*map(astuple, several), strict=True)))


UNREAD = Reading(0.0, inf, inf)
"""For a look at memory alone."""


def measure_reading(checkpoint: Checkpoint, text: Text) -> Reading:
    """Do a little of what a run begins with; raises what that would raise (`Checkpoint.load_tokenizer`)."""
    start = time.perf_counter()
    tokenizer = checkpoint.load_tokenizer()
    checkpoint.open_model()
    opened = time.perf_counter()
    weights = sum(weight.numel() for weight in checkpoint.read_some(FEW_WEIGHTS))
    read = time.perf_counter()
    tokenize(text.text[:FEW_CHARACTERS], tokenizer)
    tokenized = time.perf_counter()
    characters = min(len(text.text), FEW_CHARACTERS)
    return Reading(opened - start, weights / (read - opened), characters / (tokenized - read))
