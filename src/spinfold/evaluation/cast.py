"""Still the same function after its weights were rounded to 16 bits? Two bounds that rounding alone keeps.

    relative logit error           at most 2 eps sqrt(L), for L layers
    relative change of perplexity  at most 0.5 %, on a text that the model reads better than by guessing

Independent roundings add up in quadrature, hence the root. Measured, they take less than two thirds of the first bound
on random networks of 2 and 3 layers, and a fifth of it on SmolLM2 (0.017 in bfloat16), where the least harmful of the
forgotten norm gains takes four times the bound (0.35).
"""

from __future__ import annotations

import math

import torch

from spinfold.evaluation.invariance import Proof
from spinfold.evaluation.perplexity import Quality

__all__ = ["cast_tolerance", "prove_perplexity_kept"]


def cast_tolerance(dtype: torch.dtype | None, layers: int) -> float | None:
    """The bound on the relative logit error of a model stored in `dtype`; None if that is not one of 16 bits."""
    return 2 * torch.finfo(dtype).eps * math.sqrt(layers) if dtype in (torch.float16, torch.bfloat16) else None


def prove_perplexity_kept(before: Quality, after: Quality, vocabulary: int) -> Proof:
    """Is the perplexity where it was? One no better than guessing says nothing, and then infinity is the tolerance."""
    detail = f"perplexity from {before.perplexity:.4g} to {after.perplexity:.4g} on {before.tokens:,} tokens"
    gap = abs(after.perplexity / before.perplexity - 1)
    tolerance = 5e-3 if before.perplexity < vocabulary else math.inf
    return Proof("same function: relative change of perplexity", gap, tolerance, detail)
