"""The Transformers plugin: what makes `AutoModelForCausalLM.from_pretrained` read a folder of `export/transformers.py`.

    config.json is read     SpinfoldConfig: is it ours, and not newer than we are?
    before the weights      files hashed and compared with the config; parameters give way to packed ones
    Transformers loads      tensor by tensor, as it does for any model
    after the weights       wires, ops on them, quantized cache

`import spinfold` has this module imported as soon as Transformers has loaded its own quantizers. Transformers is half
imported then, so what needs more of it than quantizers is imported when a model is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spinfold.errors import SpinfoldError
from spinfold.files import read_json
from spinfold.recipe import SCHEMA_VERSION, Recipe

__all__ = ["FORMAT_VERSION", "SpinfoldConfig", "SpinfoldQuantizer", "digest"]

FORMAT_VERSION: Final = 3
"""1 has every map at each of its places; 1 and 2 leave the rest of config.json out of the checksum."""
_NOT_THE_FUNCTION: Final = {"quantization_config", "architectures", "dtype", "transformers_version", "_name_or_path"}
"""What config.json says besides the function, and Transformers writes anew."""
_AGAIN = "Copy the folder again, or export the run again."


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    sha = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


@register_quantization_config("spinfold")
class SpinfoldConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a folder: the run's recipe, what stands on its wires, and a checksum.

    The checksum binds recipe, wires and the model's own config to the tensors: a file of another run is as wrong as one
    with a flipped bit, and so is another base of RoPE.
    """

    def __init__(
        self,
        recipe: Mapping[str, Any] | None = None,
        wires: Mapping[str, Any] | None = None,
        checksum: str = "",
        version: int = FORMAT_VERSION,
        quant_method: str = "spinfold",
        **unknown: Any,
    ) -> None:
        if unknown or not (isinstance(recipe, Mapping) and isinstance(wires, Mapping)):
            why = f"It has an unknown entry {min(unknown)!r}." if unknown else "It has no recipe, or no wires."
            raise SpinfoldError("The quantization_config is not spinfold's.", why, _AGAIN)
        schema = recipe.get("schema_version")
        for what, found, known in (("format", version, FORMAT_VERSION), ("recipe", schema, SCHEMA_VERSION)):
            if isinstance(found, int) and found > known:
                why = f"Its {what} has version {found}, and this spinfold knows versions up to {known}."
                raise SpinfoldError("The checkpoint can't be read.", why, "Install a newer spinfold.")
        Recipe.parse(recipe, "recipe in config.json")
        # The recipe as it was written: a field that a later spinfold adds is no part of the checksum.
        self.recipe, self.wires = dict(recipe), dict(wires)
        self.version, self.checksum, self.quant_method = version, checksum, quant_method

    def checksum_over(self, digests: Mapping[str, str], config: Mapping[str, Any]) -> str:
        """SHA-256 of this config, of the tensors, whose `digest` is given by name, and of what config.json says of the
        function.
        """
        function = {key: value for key, value in config.items() if key not in _NOT_THE_FUNCTION}
        parts = [self.version, self.recipe, self.wires, dict(digests)] + [function] * (self.version > 2)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@register_quantizer("spinfold")
class SpinfoldQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads and saves spinfold's folders; it does not quantize, which is what `spinfold quantize` is for."""

    quantization_config: SpinfoldConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            why = "A rotation is fitted on text, and its proofs need the original."
            raise SpinfoldError("spinfold does not quantize while loading.", why, "Use `spinfold quantize`.")

    def update_attn_implementation(self, config: Any) -> Any:
        asked = config._attn_implementation
        if asked not in (None, "sdpa", "spinfold"):
            why = "Keys, values and queries pass spinfold's wires, which stand before scaled dot-product attention."
            raise SpinfoldError(f"attn_implementation={asked!r} can't be used.", why, "Leave it out.")
        return config

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> list[Any]:
        return []  # the tensors have the names of the parameters

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        from spinfold.export.packed import pack_parameter
        from spinfold.export.wires import PREFIX
        from spinfold.networks import Network

        if model.get_output_embeddings() is None:
            why = "The wires are those of a whole network, its head included."
            raise SpinfoldError(f"{type(model).__name__} can't be loaded.", why, "Use AutoModelForCausalLM.")
        files = [Path(file) for file in checkpoint_files or ()]
        with torch.device("cpu"):  # models are built on another one, where tensors have no values
            found = self._verify(files, PREFIX)
        recipe = Recipe.parse(self.quantization_config.recipe)
        linears = {linear.parameter: linear for linear in Network(model).linears}  # those of a parameter are alike
        for name, linear in linears.items():
            format = recipe.weight_format_of(f"layers.{linear.layer}.{linear.key}")
            if f"{name}.packed" in found and format is not None:
                pack_parameter(model, name, format, recipe.scale_dtype)
        expected = {name: tuple(tensor.shape) for name, tensor in _stored(model).items()}
        if odd := sorted(set(expected.items()) ^ set(found.items())):
            name = odd[0][0]
            why = f"{name} should be {expected.get(name, 'absent')} and is {found.get(name, 'absent')}."
            raise SpinfoldError("The weights are not those of the model in config.json.", why, _AGAIN)
        model._keys_to_ignore_on_load_unexpected.add(f"^{PREFIX}")

    def _verify(self, files: Sequence[Path], prefix: str) -> dict[str, tuple[int, ...]]:
        """Hash every tensor, keep those of maps, whose names begin with `prefix`, and return the others' shapes."""
        digests: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        self._maps: dict[str, Tensor] = {}
        for name, tensor in _read(files):
            digests[name] = digest(tensor)
            if name.startswith(prefix):
                self._maps[name] = tensor.clone()
            else:
                shapes[name] = tuple(tensor.shape)
        config = read_json(files[0].parent / "config.json") if files else {}
        if self.quantization_config.checksum_over(digests, config) != self.quantization_config.checksum:
            why = "The SHA-256 of both is not the one in config.json: one was changed, or they are of two runs."
            raise SpinfoldError("The weights are not those that the config describes.", why, _AGAIN)
        return shapes

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from spinfold.export.cache import quantize_cache
        from spinfold.export.wires import place_wires
        from spinfold.networks import Network

        Network(model)
        place_wires(model, self.quantization_config.wires, self._maps)
        quantize_cache(model.base_model)
        del self._maps
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        from spinfold.export.wires import describe_wires

        config = self.quantization_config
        config.wires, maps = describe_wires(model)
        tensors = _stored(model) | maps
        digests = {name: digest(tensor) for name, tensor in tensors.items()}
        config.checksum = config.checksum_over(digests, json.loads(model.config.to_json_string()))
        return tensors, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _stored(model: Any) -> dict[str, Tensor]:
    """The state dict as a checkpoint has it: a head that is tied to the embedding is in there once."""
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}


def _read(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the shards by name, one in memory at a time."""
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise SpinfoldError(f"{path} can't be read.", str(error), _AGAIN) from None
