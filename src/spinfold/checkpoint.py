"""Models on disk: a run's integers and scales, and back into a network; and plain Hugging Face folders.

save_model, load_run     RUN/model, which only spinfold can read: rounded linears as `layers.3.down.q`, `.scale`, ...,
                         those of an expert as `layers.3.down@5.q`
save_folder              a folder that Transformers loads without spinfold
save_maps, load_maps     the maps of a network
save_clips, load_clips   the clip ratios of its wires
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from spinfold.errors import SpinfoldError, reading
from spinfold.files import load_tensors, read_json, save_tensors, whole_folder, write_json
from spinfold.folding import place_online
from spinfold.formats import QuantizedWeight
from spinfold.maps import SiteMaps
from spinfold.networks import WIRES, Network
from spinfold.networks.placement import built_without_weights
from spinfold.networks.sources import transformers_errors
from spinfold.recipe import Recipe
from spinfold.rounding import RoundedLinear
from spinfold.run import RunFolder
from spinfold.runtime import Clips, quantize_wires

__all__ = [
    "load_clips",
    "load_maps",
    "load_run",
    "round_weights",
    "rounded_tensors",
    "run_config",
    "save_clips",
    "save_folder",
    "save_maps",
    "save_model",
]

_SHARD_BYTES = 4_000_000_000
_LOCAL: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


def save_maps(folder: Path, maps: SiteMaps) -> None:
    """Write `maps.json` and `maps.safetensors`."""
    configs, tensors = maps.to_parts()
    save_tensors(folder / "maps.safetensors", tensors)
    write_json(folder / "maps.json", configs)


def load_maps(folder: Path) -> SiteMaps:
    """The inverse of `save_maps`; every map is checked to be what it claims."""
    tensors, _ = load_tensors(folder / "maps.safetensors")
    with reading(folder / "maps.json"):
        maps = SiteMaps.from_parts(read_json(folder / "maps.json"), tensors)
        maps.explain().require(f"{folder} holds a broken map.")
    return maps


def save_clips(folder: Path, clips: Clips) -> None:
    """Write `clips.json`: the clip ratios that were searched or learned, by layer and wire."""
    write_json(folder / "clips.json", dict(clips))


def load_clips(folder: Path) -> Clips:
    """The inverse of `save_clips`."""
    with reading(folder / "clips.json"):
        return {name: float(ratio) for name, ratio in read_json(folder / "clips.json").items()}


def rounded_tensors(rounded: Sequence[RoundedLinear]) -> dict[str, Tensor]:
    """The tensors of rounded linears, such as `layers.3.down.q` and `.scale`."""
    return {f"{x.name}.{key}": value for x in rounded for key, value in x.weight.tensors().items()}


def save_model(path: Path, network: Network, rounded: Sequence[RoundedLinear]) -> None:
    """Write a run's config, tokenizer and tensors; a rounded linear is written as its integers and scales alone.

    A parameter of fused linears is left out only if all of its parts are rounded, which they are or none is.
    """
    places = {(x.layer, x.key) for x in rounded}
    names = {x.parameter for x in network.linears if (x.layer, x.key) in places}
    tensors = network.tensors([name for name in network.model.state_dict() if name not in names])
    shutil.rmtree(path, ignore_errors=True)  # of an attempt that was stopped after this
    with whole_folder(path) as folder:
        save_tensors(folder / "model.safetensors", tensors | rounded_tensors(rounded), {"format": "spinfold"})
        _save_config(folder, network, network.dtype)


def save_folder(network: Network, path: Path, dtype: torch.dtype, also: Iterable[Path] = ()) -> None:
    """Write a network as a plain Hugging Face folder with weights in `dtype`, whole or not at all.

    Shards of at most 4 GB (or one tensor), tokenizer and chat template, and copies of the files `also`; an expert's
    weights under the names of published checkpoints, one tensor each. The head must be untied. Raises `SpinfoldError`
    if a weight is too large for `dtype`, or if an op stands on a wire.
    """
    assert network.head.weight is not network.embedding.weight
    if online := {name for layer in network.layers for name in WIRES if len(layer.wire(name).ops)}:
        raise SpinfoldError(
            "The network can't be written as a plain checkpoint.",
            f"It needs an op at inference on: {', '.join(sorted(online))}. A Hugging Face folder has no place for it.",
            "Choose sites and a method without online ops (`spinfold methods`), or make a run by `spinfold quantize`.",
        )
    tensors = network.model.state_dict()
    if network.family.experts:
        tensors = revert_weight_conversion(network.model, tensors)
    shards = list(_shards(tensors, dtype.itemsize))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    with whole_folder(path) as folder:
        for name, shard in zip(names, shards, strict=True):
            if not network.resident:
                shard = network.tensors(shard.keys())
            save_tensors(
                folder / name, {key: _cast(key, value, dtype) for key, value in shard.items()}, {"format": "pt"}
            )
        if len(shards) > 1:
            num_bytes = sum(value.numel() for shard in shards for value in shard.values()) * dtype.itemsize
            weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
            write_json(folder / "model.safetensors.index.json", index)
        for file in also:
            shutil.copyfile(file, folder / file.name)
        _save_config(folder, network, dtype)


def _shards(tensors: Mapping[str, Tensor], itemsize: int) -> Iterator[dict[str, Tensor]]:
    """Consecutive tensors, as many as fit in a shard."""
    shard: dict[str, Tensor] = {}
    num_bytes = 0
    for name, tensor in tensors.items():
        if shard and num_bytes + tensor.numel() * itemsize > _SHARD_BYTES:
            yield shard
            shard, num_bytes = {}, 0
        shard[name], num_bytes = tensor, num_bytes + tensor.numel() * itemsize
    yield shard


def round_weights(network: Network, dtype: torch.dtype) -> None:
    """Round every weight to `dtype` in place; it is computed with as before. `SpinfoldError` if one is too large."""
    for layer in network.layers:
        layer.change(lambda layer: _round_parameters(layer.module, dtype, layer.prefix))
    layers = {id(parameter) for layer in network.layers for parameter in layer.module.parameters()}
    for name, parameter in network.model.named_parameters():
        if id(parameter) not in layers:
            parameter.copy_(_cast(name, parameter, dtype))


def _round_parameters(module: nn.Module, dtype: torch.dtype, prefix: str) -> None:
    for name, parameter in module.named_parameters():
        parameter.copy_(_cast(f"{prefix}.{name}", parameter, dtype))


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if not bool(torch.isfinite(cast).all()):
        raise SpinfoldError(
            f"The model can't be written in {str(dtype).removeprefix('torch.')}.",
            f"{name} holds {float(tensor.abs().max()):.3g}; the largest number there is {torch.finfo(dtype).max:.3g}.",
            "Use --dtype bfloat16 or float32.",
        )
    return cast


def _save_config(folder: Path, network: Network, dtype: torch.dtype) -> None:
    """config.json and, if there is one, the tokenizer. A name that starts with _ is the loader's business."""
    config = {k: v for k, v in json.loads(network.config.to_json_string()).items() if not k.startswith("_")}
    config |= {
        "architectures": [type(network.model).__name__],
        "dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": False,
    }
    if network.tokenizer is not None:
        network.tokenizer.save_pretrained(folder)
    write_json(folder / "config.json", config)


def run_config(path: Path) -> PreTrainedConfig:
    """The config of a finished run's model."""
    if not RunFolder(path).finished:
        why = "It was stopped before its end."
        raise SpinfoldError(f"{path} holds no finished run.", why, "Finish it with --resume.")
    with transformers_errors(f"The config of the run {path} can't be used.", "Make the run again."):
        return AutoConfig.from_pretrained(path / "model", **_LOCAL)


def load_run(path: Path, device: torch.device, room: float | None = None) -> Network:
    """The quantized network of a finished run: dequantized weights, online maps and quantizers in place.

    If the weights in fp32 take more than `room` bytes, layers stay in the file and are dequantized in their turns. The
    recipe is the one in run.json: recipe.yaml is the user's copy.
    """
    config, folder = run_config(path), path / "model"
    with reading(path / "run.json"):
        recipe = Recipe.parse(read_json(path / "run.json").get("recipe"), f"recipe in {path / 'run.json'}")
    tensors, _ = load_tensors(folder / "model.safetensors")
    with transformers_errors(f"The model of the run {path} can't be built.", "Make the run again."):
        with built_without_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, **_LOCAL)
    try:
        weights = _RunWeights(tensors, recipe)
        network = Network(model, tokenizer, path.name, store=weights, device=device)
        weights.belong_to(network)
        if room is None or 4 * sum(parameter.numel() for parameter in model.parameters()) <= room:
            network.settle()
    except (KeyError, RuntimeError) as error:
        why = f"A tensor is missing or does not fit: {' '.join(str(error).split())[:300]}"
        raise SpinfoldError(f"{folder} is not this run's model.", why, "Make the run again.") from None
    maps, clips = load_maps(path), load_clips(path)
    with reading(path):
        place_online(network, maps)
        quantize_wires(network, recipe, clips=clips)
    return network


class _RunWeights:
    """A run's tensors as a network's weights: rounded linears are dequantized when they are read."""

    def __init__(self, tensors: Mapping[str, Tensor], recipe: Recipe) -> None:
        self.tensors, self.recipe = tensors, recipe
        self.rounded: dict[str, list[str]] = {}
        self.shape_of: dict[str, torch.Size] = {}

    def belong_to(self, network: Network) -> None:
        """Take the names of the network's linears; KeyError if a tensor is missing, or one is left over."""
        if self.recipe.weight_format is not None:
            for linear in sorted(network.linears, key=lambda linear: linear.rows.start):
                self.rounded.setdefault(linear.parameter, []).append(f"layers.{linear.layer}.{linear.key}")
        state = network.model.state_dict()
        self.shape_of = {name: state[name].shape for name in self.rounded}
        parts = {key: key.rpartition(".")[0] for key in self.tensors}
        linears = {name for names in self.rounded.values() for name in names}
        plain = {key for key, name in parts.items() if name not in linears}
        if odd := [*(plain ^ (state.keys() - self.rounded.keys())), *(linears - set(parts.values()))]:
            raise KeyError(min(odd))

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self._dequantized(name) if name in self.rounded else self.tensors[name] for name in names}

    def _dequantized(self, parameter: str) -> Tensor:
        weights = []
        for name in self.rounded[parameter]:
            format = self.recipe.weight_format_of(name)
            assert format is not None
            own = {key: f"{name}.{key}" for key in ("q", "scale", format.second)}
            parts = {key: self.tensors[place] for key, place in own.items() if place in self.tensors}
            weights.append(QuantizedWeight.from_tensors(parts, format).dequantize())
        return torch.cat(weights).view(self.shape_of[parameter])
