"""ReSpinQuant (arXiv 2604.11080, ICML 2026): a learned residual basis at every boundary, joined by rank-r skip ops.

    fit     orthogonal R_0 … R_2L-1 and value rotations, on the next-token loss of the quantized network
    fold    every R_i into the linears that read or write the stream at boundary i, offline
    online  C_i of rank(C_i - I) <= r on the skip connection between boundaries i and i + 1 (fit.rank)

All bases start from one random Hadamard, so that T_i = R_iᵀ R_{i+1} stays near I and a low rank can serve for it. What
the rank leaves out is dealt with in one of two ways (fit.chain):

    exact      C_i is the part of T_i that the rank allows, and the bases are rebuilt one after the other such that
               B_{i+1} = B_i C_i holds (`maps.chain_of_bases`): the folded network is the same function at any rank.
               Our own; at rank 0 it is one global rotation.
    published  the learned R_i are folded as they are, and C_i stands in for T_i: another function below full rank.

The paper's body and code were not at hand: the layout of the bases and the rank-r projection are known from its
abstract, notes and counts of parameters; its learning rate and schedule are not stated, and are taken from a public
reproduction in the recipe `respinquant`. The paper trains a 2L+1st basis before the head. No quantizer reads the stream
there, so nothing pulls on it while weights stay in 16 bits: here it is R_2L-1, which makes the last skip op vanish.

Shapes: D residual width, H head_dim, B matrices of one kind.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from spinfold.fitting.end_to_end import FitLog
from spinfold.maps import Identity, Map, Orthogonal, SiteMaps, chain_of_bases, low_rank_rotation
from spinfold.methods.base import QUANTIZERS, FitTask, Method
from spinfold.methods.quarot import hadamard_maps
from spinfold.methods.spinquant import fit_on_loss, fixed, settled

__all__ = ["RESPINQUANT", "joined", "learnable_boundaries"]

_RANK = 32


def learnable_boundaries(maps: SiteMaps, num_layers: int, device: torch.device) -> tuple[SiteMaps, list[Tensor]]:
    """The maps on `device` with one residual basis per boundary, all equal to the one given; and the matrices that are
    to be learned: the residual bases and the value rotations. Each is a leaf of its own, since the views of a common
    one would take part in every capture of a CUDA graph.
    """
    learned: list[Tensor] = []

    def leaf(start: Map) -> Orthogonal:
        learned.append(start.matrix().float().to(device).requires_grad_())
        return Orthogonal(learned[-1])

    here = maps.to(device).each_replaced(partial(fixed, device=device), ("query_key", "down"))
    if isinstance(here.residual, Map):
        bases = tuple(leaf(here.residual) for _ in range(2 * num_layers))
        here = replace(here, residual=(*bases, bases[-1]))
    if here.value is not None:
        here = replace(here, value=tuple(leaf(one) for one in here.value))
    return here, learned


def joined(maps: SiteMaps, rank: int, chain: Literal["exact", "published"] = "exact") -> SiteMaps:
    """The maps with a change of basis of at most `rank` on each skip connection, and, for an exact chain, with the
    residual bases that these changes reach: a single one if no change is left. An exact chain ends at the last MLP,
    since no quantizer reads the stream before the head.
    """
    if not isinstance(maps.residual, tuple):
        return maps
    R = [one.matrix() for one in maps.residual]
    if chain == "published":
        changes = [low_rank_rotation(here.T @ after, rank) for here, after in pairwise(R)]
        return replace(maps, skip=tuple(changes))
    B, changes = chain_of_bases(R[:-1], rank)
    if all(isinstance(change, Identity) for change in changes):
        return replace(maps, residual=Orthogonal(B[0]))
    bases = tuple(Orthogonal(B_DD) for B_DD in (*B, B[-1].clone()))
    return replace(maps, residual=bases, skip=(*changes, Identity(bases[-1].size)))


def _fit(task: FitTask) -> tuple[SiteMaps, FitLog]:
    fit = task.recipe.fit
    start = hadamard_maps(task, random_value=True)
    maps, learned = learnable_boundaries(start, len(task.network.layers), task.network.device)
    log = fit_on_loss(task, maps, learned)
    with task.progress.stage("join bases"):
        rank = _RANK if fit.rank is None else fit.rank
        return joined(settled(maps, start), rank, fit.chain or "exact"), log


RESPINQUANT = Method(
    name="respinquant",
    summary="a learned residual basis per block boundary, rank-r changes of basis on the skips",
    paper="arXiv 2604.11080",
    sites=("residual", "value", "query_key", "down"),
    fit=_fit,
    reads=("fit", "calibration", *QUANTIZERS),
    needs_data=True,
    needs_backprop=True,
    skips=True,
)
