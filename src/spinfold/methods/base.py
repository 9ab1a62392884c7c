"""The contract of a method: which maps stand at which sites, and how they are fitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from spinfold.errors import Verdict
from spinfold.fitting.end_to_end import FitLog
from spinfold.fitting.journal import Journal
from spinfold.maps import SiteMaps
from spinfold.networks import Network
from spinfold.progress import Progress, Quiet
from spinfold.recipe import Recipe

__all__ = ["QUANTIZERS", "FitTask", "Method"]

QUANTIZERS = ("weights.symmetric", "group_size", "weight_format", "activations", "activation_format", "kv", "kv_format")
"""What a fit reads, as `Method.reads`, that looks at the network as it will be quantized."""


@dataclass(frozen=True)
class FitTask:
    """All that a method may look at: a network whose norms are folded, the recipe, the sites, and calibration.

    `windows(seq_len, count)` gives up to `count` windows `(N, seq_len)` of the calibration text, the same for the
    same arguments. The network must come back as it was given. The loops of a fit are those of `journal`, so that a fit
    that was stopped goes on.
    """

    network: Network
    recipe: Recipe
    sites: tuple[str, ...]
    windows: Callable[[int, int], Tensor]
    progress: Progress = field(default_factory=Quiet)
    journal: Journal = field(default_factory=Journal)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A published way to choose the maps. `sites` are its own default; `allowed` are all that it can serve.

    `reads` names the attributes of a recipe that the fit looks at, besides method, sites, seed and compute: recipes
    that agree in them have the same maps. A section's name stands for all of its fields; the default is all there is.
    With `skips` the method needs an op on the skip connections. `suits` says, before a weight is read, if it can do
    what a recipe asks.
    """

    name: str
    summary: str
    paper: str
    sites: tuple[str, ...]
    fit: Callable[[FitTask], tuple[SiteMaps, FitLog]]
    needs_data: bool = False
    needs_backprop: bool = False
    allowed: tuple[str, ...] = ("residual", "value", "query_key", "down")
    reads: tuple[str, ...] = tuple(Recipe.model_fields)
    skips: bool = False
    suits: Callable[[Recipe], Verdict] = lambda _: Verdict(True)
