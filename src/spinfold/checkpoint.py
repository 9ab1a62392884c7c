"""A run's quantized model on disk: integers and scales as rounding produced them, and back into a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from spinfold.errors import SpinfoldError
from spinfold.folding import place_online
from spinfold.formats import QuantizedWeight
from spinfold.maps import SiteMaps
from spinfold.networks import Network
from spinfold.recipe import Recipe
from spinfold.rounding import RoundedLinear
from spinfold.run import RunFolder, load_tensors, read_json, save_tensors, write_json
from spinfold.runtime import quantize_wires

__all__ = ["load_maps", "load_run", "save_maps", "save_model"]


def save_maps(folder: Path, maps: SiteMaps) -> None:
    """Write `maps.json` and `maps.safetensors`."""
    configs, tensors = maps.to_parts()
    save_tensors(folder / "maps.safetensors", tensors)
    write_json(folder / "maps.json", configs)


def load_maps(folder: Path) -> SiteMaps:
    """The inverse of `save_maps`; every map is checked to be what it claims."""
    maps = SiteMaps.from_parts(read_json(folder / "maps.json"), load_tensors(folder / "maps.safetensors")[0])
    maps.explain().require(f"{folder} holds a broken map.")
    return maps


def rounded_tensors(rounded: Sequence[RoundedLinear]) -> dict[str, torch.Tensor]:
    """The tensors of rounded linears, such as `layers.3.down.q` and `.scale`."""
    return {f"{x.name}.{key}": value for x in rounded for key, value in x.weight.tensors().items()}


def save_model(folder: Path, network: Network, rounded: Sequence[RoundedLinear]) -> None:
    """Write config, tokenizer and tensors; a rounded linear is written as its integers and scales alone.

    A module of fused linears is left out only if all of its parts are rounded, which they are or none is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = {network.layers[x.layer].linears[x.role].name + ".weight" for x in rounded}
    tensors = {name: value for name, value in network.model.state_dict().items() if name not in names}
    save_tensors(folder / "model.safetensors", tensors | rounded_tensors(rounded), {"format": "spinfold"})
    config = json.loads(network.config.to_json_string(use_diff=False))
    write_json(folder / "config.json", {k: v for k, v in config.items() if not k.startswith("_attn")})
    if network.tokenizer is not None:
        network.tokenizer.save_pretrained(folder)


def load_run(path: Path, device: torch.device) -> Network:
    """The quantized network of a finished run: dequantized weights, online maps and quantizers in place."""
    if not RunFolder(path).finished:
        raise SpinfoldError(f"{path} holds no finished run.", "run.json is missing.", "Finish it with --resume.")
    recipe = Recipe.load(path / "recipe.yaml")
    folder = path / "model"
    tensors, _ = load_tensors(folder / "model.safetensors")
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    network = Network(model, AutoTokenizer.from_pretrained(folder), path.name)
    if recipe.weight_format is not None:
        for linear in network.linears:
            prefix = f"layers.{linear.layer}.{linear.role}."
            parts = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
            linear.weight_OI.copy_(QuantizedWeight.from_tensors(parts, recipe.weight_format).dequantize())
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    rounded = {linear.name + ".weight" for linear in network.linears} if recipe.weight_format else set()
    if unexpected or set(missing) - rounded:
        odd = (list(unexpected) + sorted(set(missing) - rounded))[0]
        raise SpinfoldError(f"{folder} is not this run's model.", f"Tensor {odd} does not fit.", "Make the run again.")
    network.to(device)
    place_online(network, load_maps(path))
    quantize_wires(network, recipe)
    return network
