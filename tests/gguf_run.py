"""A finished run without the time that fitting and rounding take: a network of the zoo, rounded to nearest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_tokenizers
from transformers import AutoTokenizer, PreTrainedModel

from spinfold.checkpoint import save_clips, save_maps, save_model
from spinfold.export.contents import Contents
from spinfold.maps import SiteMaps
from spinfold.networks import Network
from spinfold.recipe import Recipe
from spinfold.rounding import round_network
from spinfold.run import write_json

__all__ = ["make_run"]

W4 = {"bits": "W4A16", "group_size": 32}


def make_run(
    path: Path,
    model: PreTrainedModel,
    tokenizer: Callable[[Path], Path] = tiny_tokenizers.byte_level,
    **changes: Any,
) -> Contents:
    """A run folder at `path`, opened; `changes` are recipe fields, W4A16 in groups of 32 without any."""
    plain = {"method": "none", "rounding__method": "rtn", "weights__clip_search": False}
    recipe = Recipe().with_(**(plain | W4 | changes))
    network = Network(model, AutoTokenizer.from_pretrained(tokenizer(path / "tokenizer")), "tiny/model")
    network.untie()
    rounded = [] if recipe.weight_format is None else [x for layer in round_network(network, recipe) for x in layer]
    save_model(path / "model", network, rounded)
    save_maps(path, SiteMaps())
    save_clips(path, {})
    write_json(path / "run.json", {"recipe": recipe.model_dump(mode="json"), "model": {"name": "tiny/model"}})
    return Contents.open(path)
