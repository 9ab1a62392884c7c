"""Figures and proofs: perplexity, KL and agreement; zero-shot tasks; the same function; where the outliers are."""

from spinfold.evaluation.cast import cast_tolerance, prove_perplexity_kept
from spinfold.evaluation.invariance import TOLERANCE, Fingerprint, Proof, prove_same_function, take_fingerprint
from spinfold.evaluation.perplexity import Quality, Reference, measure_quality
from spinfold.evaluation.tasks import TaskResult, average, evaluate_tasks, read_tasks

__all__ = [
    "TOLERANCE",
    "Fingerprint",
    "Proof",
    "Quality",
    "Reference",
    "TaskResult",
    "average",
    "cast_tolerance",
    "evaluate_tasks",
    "measure_quality",
    "prove_perplexity_kept",
    "prove_same_function",
    "read_tasks",
    "take_fingerprint",
]
