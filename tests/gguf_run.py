"""A finished run without the time that fitting and rounding take: a network of the zoo, rounded to nearest.

Without maps, or with Hadamards at the sites that are folded into weights: with those the norms' gains are all 1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_tokenizers
from transformers import AutoTokenizer, PreTrainedModel

from spinfold.checkpoint import save_clips, save_maps, save_model
from spinfold.export.contents import Contents
from spinfold.files import write_json
from spinfold.folding import fold, fold_norms
from spinfold.maps import Hadamard, SiteMaps
from spinfold.networks import Network
from spinfold.recipe import Recipe
from spinfold.rounding import round_network

__all__ = ["make_run"]

W4 = {"bits": "W4A16", "group_size": 32}


def make_run(
    path: Path,
    model: PreTrainedModel,
    tokenizer: Callable[[Path], Path] = tiny_tokenizers.byte_level,
    rotated: bool = False,
    **changes: Any,
) -> Contents:
    """A run folder at `path`, opened; `changes` are recipe fields, W4A16 in groups of 32 without any."""
    method = {"method": "quarot", "sites": ("residual", "value")} if rotated else {"method": "none"}
    plain = {"rounding__method": "rtn", "weights__clip_search": False}
    recipe = Recipe().with_(**(method | plain | W4 | changes))
    network = Network(model, AutoTokenizer.from_pretrained(tokenizer(path / "tokenizer")), "tiny/model")
    network.untie()
    maps = hadamards(network) if rotated else SiteMaps()
    if rotated:
        fold_norms(network)
        fold(network, maps)
    rounded = [] if recipe.weight_format is None else [x for layer in round_network(network, recipe) for x in layer]
    save_model(path / "model", network, rounded)
    save_maps(path, maps)
    save_clips(path, {})
    write_json(path / "run.json", {"recipe": recipe.model_dump(mode="json"), "model": {"name": "tiny/model"}})
    return Contents.open(path)


def hadamards(network: Network) -> SiteMaps:
    """One on the residual stream and another in each layer's heads, so that a layer mixed up with another shows."""
    value = tuple(Hadamard(layer.head_dim, seed=1 + layer.index) for layer in network.layers)
    return SiteMaps(residual=Hadamard(network.hidden_size, seed=0), value=value)
