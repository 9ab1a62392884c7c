"""Linear maps: what they are, which Hadamard orders exist, and how to move on the orthogonal group."""

from __future__ import annotations

from spinfold.maps.base import Cost, Map
from spinfold.maps.composed import BlockDiagonal, Chain, Kronecker
from spinfold.maps.hadamard import Hadamard, kronecker_hadamard, random_hadamard
from spinfold.maps.hadamard_orders import factorise, hadamard_matrix, is_base_order
from spinfold.maps.held import Dense, as_held
from spinfold.maps.linear import (
    Diagonal,
    Identity,
    Orthogonal,
    Permutation,
    random_orthogonal,
)
from spinfold.maps.lowrank import LowRankCorrection, chain_of_bases, low_rank_rotation
from spinfold.maps.manifold import (
    CayleySGD,
    RiemannianAdam,
    StepRule,
    cayley,
    cayley_step,
    orthogonality_gap,
    procrustes,
    project,
    qr_orthogonal,
    skew_gradient,
    spectral_norm,
)
from spinfold.maps.serialise import from_parts, to_parts
from spinfold.maps.sites import SiteMaps

__all__ = [
    "BlockDiagonal",
    "CayleySGD",
    "Chain",
    "Cost",
    "Dense",
    "Diagonal",
    "Hadamard",
    "Identity",
    "Kronecker",
    "LowRankCorrection",
    "Map",
    "Orthogonal",
    "Permutation",
    "RiemannianAdam",
    "SiteMaps",
    "StepRule",
    "as_held",
    "cayley",
    "cayley_step",
    "chain_of_bases",
    "factorise",
    "from_parts",
    "hadamard_matrix",
    "is_base_order",
    "kronecker_hadamard",
    "low_rank_rotation",
    "orthogonality_gap",
    "procrustes",
    "project",
    "qr_orthogonal",
    "random_hadamard",
    "random_orthogonal",
    "skew_gradient",
    "spectral_norm",
    "to_parts",
]
