"""QuaRot (Ashkboos et al., NeurIPS 2024, arXiv 2404.00456): random and fixed Hadamard matrices, nothing fitted.

    residual   diag(s) H / sqrt(D), one seeded draw of signs s
    value      H / sqrt(head_dim)
    query_key  H / sqrt(head_dim), online after RoPE
    down       H / sqrt(F), online

The paper's Hadamard across heads at the input of o_proj is left out, as in SpinQuant, so that all methods have the
same sites; its clip ratios are the recipe `quarot-paper`.
"""

from __future__ import annotations

from spinfold.fitting.end_to_end import FitLog
from spinfold.maps import Hadamard, SiteMaps
from spinfold.methods.base import FitTask, Method

__all__ = ["QUAROT", "hadamard_maps"]


def hadamard_maps(task: FitTask, *, random_value: bool = False) -> SiteMaps:
    """A Hadamard at each of the task's sites: seeded signs at the residual and, if asked, the value site."""
    layers, seed = task.network.layers, task.recipe.seed
    head_dim = layers[0].head_dim
    maps = SiteMaps(
        residual=Hadamard(task.network.hidden_size, seed=seed),
        value=tuple(Hadamard(head_dim, seed=seed + 1 + x.index if random_value else None) for x in layers),
        query_key=tuple(Hadamard(head_dim) for _ in layers),
        down=tuple(Hadamard(x.mlp_width) for x in layers),
    )
    return SiteMaps(**{site: getattr(maps, site) for site in task.sites})


def _fit(task: FitTask) -> tuple[SiteMaps, FitLog]:
    return hadamard_maps(task), FitLog()


QUAROT = Method(
    name="quarot",
    summary="random Hadamard matrices",
    paper="arXiv 2404.00456",
    sites=("residual", "value", "query_key", "down"),
    fit=_fit,
    reads=(),
)
