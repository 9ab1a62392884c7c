"""A finished run as a writer needs it: rounded linears by module, every other tensor, and the choices behind them.

    RUN/model layers.0.q.q .scale .zero   ->  modules()   model.layers.0.self_attn.q_proj, QuantizedWeight
              layers.0.k.…, layers.0.v.…              ->  a fused module is its parts, one below the other
              model.embed_tokens.weight, …  ->  others()

Tensors are read when they are asked for, so that a run may be larger than memory.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from spinfold.checkpoint import load_maps, run_config
from spinfold.errors import SpinfoldError, reading
from spinfold.files import read_json
from spinfold.formats import Format, QuantizedWeight, layout
from spinfold.maps import SiteMaps
from spinfold.networks import Family, Linear, Network
from spinfold.networks.sources import transformers_errors
from spinfold.recipe import Recipe

__all__ = ["Contents"]

_OURS = {"config.json", "model.safetensors"}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Contents:
    """A finished run, opened for reading. `network` has the shapes and names of the model, and no weights (meta)."""

    path: Path
    config: PreTrainedConfig
    recipe: Recipe
    maps: SiteMaps
    data: dict[str, Any]
    network: Network
    tokenizer_files: list[Path]
    _file: Any

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open RUN. Raises `SpinfoldError` for what is no finished run, or whose tensors are not its model's."""
        path = Path(path)
        config = run_config(path)
        data = read_json(path / "run.json")
        with reading(path / "run.json"):
            recipe = Recipe.parse(data.get("recipe"), f"recipe in {path / 'run.json'}")
            name = data.get("model", {}).get("name", path.name)
        with transformers_errors(f"The model of the run {path} can't be built.", "Make the run again."):
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            network = Network(model, name=name)
            network.untie()
        file = path / "model" / "model.safetensors"
        try:
            handle = safe_open(file, framework="pt").__enter__()
        except (OSError, SafetensorError) as error:
            raise SpinfoldError(f"{file} can't be read.", str(error), "Make the run again.") from None
        tokenizer_files = sorted(f for f in file.parent.iterdir() if f.is_file() and f.name not in _OURS)
        run = cls(path, config, recipe, load_maps(path), data, network, tokenizer_files, handle)
        run._check()
        return run

    @property
    def family(self) -> Family:
        """What is known of the architecture."""
        return self.network.family

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.network.name

    def linear(self, layer: int, key: str) -> QuantizedWeight | Tensor:
        """One linear, such as `down`: its codes and scales as rounding left them, or its fp32 weight `(O, I)`."""
        return self._read(self.network.layers[layer].linears[key])

    def modules(self) -> Iterator[tuple[str, QuantizedWeight | Tensor]]:
        """Every linear module of the decoder by its Hugging Face name, in order; fused linears stacked along O.

        Experts that share a parameter come under its name, stacked along O too.
        """
        for name, parts in self._parts().items():
            yield name.removesuffix(".weight"), _stack([self._read(part) for part in parts])

    @cached_property
    def tied(self) -> bool:
        """Is the head the embedding? A run has both; where no map came between them, one is enough for a checkpoint."""
        return torch.equal(self._tensor(_EMBEDDING), self._tensor(_HEAD))

    def others(self) -> Iterator[tuple[str, Tensor]]:
        """Every other tensor of the state dict by its Hugging Face name: embedding, norms, biases, untied head."""
        for name in self._other_names():
            if name != _HEAD or not self.tied:
                yield name, self._tensor(name)

    def model_config(self) -> dict[str, Any]:
        """The model's config.json, for a folder with the tensors of `modules` and `others`."""
        config: dict[str, Any] = read_json(self.path / "model" / "config.json")
        return config | {"tie_word_embeddings": self.tied}

    def _parts(self) -> dict[str, list[Linear]]:
        """The linears by the parameter that holds them, from its first row to its last."""
        parts: dict[str, list[Linear]] = {}
        for linear in self.network.linears:
            parts.setdefault(linear.parameter, []).append(linear)
        return {name: sorted(linears, key=lambda x: x.rows.start or 0) for name, linears in parts.items()}

    def _other_names(self) -> list[str]:
        weights = self._parts()
        return [name for name in self.network.model.state_dict() if name not in weights]

    def _read(self, linear: Linear) -> QuantizedWeight | Tensor:
        if self.recipe.weight_format is None:
            return self._tensor(linear.parameter).flatten(0, -2)[linear.rows]
        name, format = self._rounded(linear)
        tensors = {key: self._tensor(f"{name}.{key}") for key in layout(linear.weight_OI.shape, format)}
        return QuantizedWeight.from_tensors(tensors, format)

    def _rounded(self, linear: Linear) -> tuple[str, Format]:
        """How the names of a rounded linear's tensors begin, and its format."""
        name = f"layers.{linear.layer}.{linear.key}"
        format = self.recipe.weight_format_of(name)
        assert format is not None
        return name, format

    def _tensor(self, name: str) -> Tensor:
        value: Tensor = self._file.get_tensor(name)
        return value

    def _check(self) -> None:
        """Refuse a file whose tensors are not those that config and recipe call for, by names and shapes."""
        state = self.network.model.state_dict()
        grid = self.recipe.weight_format
        expected = {name: tuple(state[name].shape) for name in (state if grid is None else self._other_names())}
        for linear in self.network.linears if grid else ():
            name, format = self._rounded(linear)
            stored = layout(linear.weight_OI.shape, format)
            expected |= {f"{name}.{key}": shape for key, (shape, _) in stored.items()}
        found = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118
        if odd := sorted(set(expected.items()) ^ set(found.items())):
            name = odd[0][0]
            why = f"{name} should be {expected.get(name, 'absent')} and is {found.get(name, 'absent')}."
            raise SpinfoldError(f"{self.path / 'model'} is not this run's model.", why, "Make the run again.")


def _stack(parts: list[QuantizedWeight | Tensor]) -> QuantizedWeight | Tensor:
    """Parts of one module, one below the other."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if tensors:
        return torch.cat(tensors)
    rounded = [part for part in parts if isinstance(part, QuantizedWeight)]
    if len({part.format for part in rounded}) > 1:
        why = "They are one module of the model, which has one grid."
        fix = "Give the linears of a fused module the same overrides."
        raise SpinfoldError("Linears with different weight grids can't be exported together.", why, fix)
    keys = rounded[0].tensors()
    whole = {key: torch.cat([part.tensors()[key] for part in rounded]) for key in keys}
    return QuantizedWeight.from_tensors(whole, rounded[0].format)
