"""Hadamard matrices of the format's own block: the rotation of MR-GPTQ (arXiv 2509.23202) and of block rotations for
MXFP4 (arXiv 2511.04214).

    residual   I ⊗ diag(s) H_b / sqrt(b), one seeded draw of signs s
    value      I ⊗ H_b / sqrt(b) in each head
    query_key  H / sqrt(head_dim), online after RoPE: keys have no blocks
    down       I ⊗ H_b / sqrt(b), online

b is the block that shares a scale: 32 for MX formats, 16 for NVFP4, a group of integers, 32 if a row has one scale; or
the largest power of two that divides both it and the width at hand. A global rotation hands each outlier to every block
of the token, and each power-of-two scale has to cover it; within its block it is spread over the numbers that it would
have cost their bits anyway. Block-diagonal matrices fold like any other, and online a block costs log2(b) additions per
number.
"""

from __future__ import annotations

import math

from spinfold.fitting.end_to_end import FitLog
from spinfold.maps import BlockDiagonal, Hadamard, Map, SiteMaps
from spinfold.methods.base import FitTask, Method

__all__ = ["BLOCK_HADAMARD", "hadamard_blocks"]

_USUAL = 32


def hadamard_blocks(block: int, size: int, seed: int | None = None) -> Map:
    """Hadamard matrices on the diagonal, of the largest power of two that divides both `block` and `size`."""
    common = math.gcd(block, size)
    part = common & -common
    return BlockDiagonal(Hadamard(part, seed=seed), size // part)


def _fit(task: FitTask) -> tuple[SiteMaps, FitLog]:
    recipe, layers = task.recipe, task.network.layers
    format = recipe.weight_format or recipe.activation_format
    block = (format and format.group_size) or _USUAL

    maps = SiteMaps(
        residual=hadamard_blocks(block, task.network.hidden_size, recipe.seed),
        value=tuple(hadamard_blocks(block, x.head_dim) for x in layers),
        query_key=tuple(Hadamard(x.head_dim) for x in layers),
        down=tuple(hadamard_blocks(block, x.mlp_width) for x in layers),
    )
    return SiteMaps(**{site: getattr(maps, site) for site in task.sites}), FitLog()


BLOCK_HADAMARD = Method(
    name="block-hadamard",
    summary="Hadamard matrices of the format's block",
    paper="arXiv 2509.23202",
    sites=("residual", "value", "query_key", "down"),
    fit=_fit,
    reads=("weight_format", "activation_format"),
)
