"""The contract of a method: which maps stand at which sites, and how they are fitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from spinfold.fitting.end_to_end import FitLog
from spinfold.maps import SiteMaps
from spinfold.networks import Network
from spinfold.progress import Progress, Quiet
from spinfold.recipe import Recipe

__all__ = ["FitTask", "Method"]


@dataclass(frozen=True)
class FitTask:
    """All that a method may look at: a network whose norms are folded, the recipe, the sites, and calibration.

    `windows(seq_len, count)` gives up to `count` windows `(N, seq_len)` of the calibration text, the same for the
    same arguments. The network must come back as it was given.
    """

    network: Network
    recipe: Recipe
    sites: tuple[str, ...]
    windows: Callable[[int, int], Tensor]
    progress: Progress = field(default_factory=Quiet)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A published way to choose the maps. `sites` are its own default; `allowed` are all that it can serve."""

    name: str
    summary: str
    paper: str
    sites: tuple[str, ...]
    fit: Callable[[FitTask], tuple[SiteMaps, FitLog]]
    needs_data: bool = False
    needs_backprop: bool = False
    allowed: tuple[str, ...] = ("residual", "value", "query_key", "down")
