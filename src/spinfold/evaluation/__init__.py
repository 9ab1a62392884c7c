"""Figures and proofs: perplexity, KL and agreement; the same function; where the outliers are."""

from spinfold.evaluation.cast import cast_tolerance, prove_perplexity_kept
from spinfold.evaluation.invariance import TOLERANCE, Fingerprint, Proof, prove_same_function, take_fingerprint
from spinfold.evaluation.perplexity import Quality, Reference, measure_quality

__all__ = [
    "TOLERANCE",
    "Fingerprint",
    "Proof",
    "Quality",
    "Reference",
    "cast_tolerance",
    "measure_quality",
    "prove_perplexity_kept",
    "prove_same_function",
    "take_fingerprint",
]
