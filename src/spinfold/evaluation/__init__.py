"""Figures and proofs: perplexity, KL and agreement; the same function; where the outliers are."""

from spinfold.evaluation.invariance import TOLERANCE, Fingerprint, Proof, prove_same_function, take_fingerprint
from spinfold.evaluation.perplexity import Quality, Reference, measure_quality

__all__ = [
    "TOLERANCE",
    "Fingerprint",
    "Proof",
    "Quality",
    "Reference",
    "measure_quality",
    "prove_same_function",
    "take_fingerprint",
]
