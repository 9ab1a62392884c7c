"""The compressed-tensors format, for vLLM, SGLang and Transformers: integers and scales as rounding left them.

    W4A16 W8A16   pack-quantized   weight_packed int32 (O, ⌈I b / 32⌉), weight_scale (O, G), weight_shape (2,)
                                   asymmetric: weight_zero_point int32 (⌈O b / 32⌉, G), packed along O
    W8A8 W4A8     int-quantized    weight int8 (O, I), weight_scale (O, G); activations dynamic per token

Packed integers are unsigned; the format's own signed ones are smaller by 2^(b-1), zero points too. Scales, norms,
embedding and head have the model's dtype: the recipe's scale dtype if it has 16 bits, else bfloat16.

An online map M before `down` becomes a transform of the type "random-hadamard", the one that vLLM multiplies by
whatever matrix the file holds: x ← x S / √n on each block of n. A run with `online_dtype` has folded the very matrix
that vLLM makes of S in the model's dtype (`maps.held`); for any other run the nearest is written.

Shapes: O out features, I in features, G groups, n size of a block.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from spinfold.errors import SpinfoldError
from spinfold.export.contents import Contents
from spinfold.export.packing import as_codes, as_unsigned, pack_words, unpack
from spinfold.export.shards import save_shards
from spinfold.files import read_json, write_json
from spinfold.formats import IntFormat, QuantizedWeight
from spinfold.maps.held import repeated_block, stored_matrix

__all__ = ["has_packed_zeros", "model_dtype", "read_integers", "write"]

_VERSION = "0.20.0"
"""The version of compressed-tensors whose format this is."""


def write(contents: Contents, folder: Path) -> None:
    """Write a run that `targets.choose` has accepted into an existing folder."""
    dtype = model_dtype(contents)
    transforms, matrices = _online_maps(contents, dtype)
    save_shards(folder, _tensors(contents, dtype, matrices))
    config = contents.model_config() | {
        "dtype": str(dtype).removeprefix("torch."),
        "quantization_config": _quantization_config(contents, transforms),
    }
    for file in contents.tokenizer_files:
        shutil.copyfile(file, folder / file.name)
    write_json(folder / "config.json", config)


def model_dtype(contents: Contents) -> torch.dtype:
    """The dtype of all that stays in floating point: runtimes have one for scales, norms, embedding and head."""
    dtype = contents.recipe.scale_dtype
    return torch.bfloat16 if dtype == torch.float32 else dtype


def read_integers(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The integers `(O, I)` of every quantized module of a written folder, as the run's grids have them.

    Behind them the zero points `(O, G)` of asymmetric grids, as `name.zero`.
    """
    args = read_json(folder / "config.json")["quantization_config"]["config_groups"]["group_0"]["weights"]
    bits, signed = args["num_bits"], args["symmetric"]
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in sorted(folder.glob("*.safetensors"))]
        file_of = {key: file for file in files for key in file.keys()}  # noqa: SIM118
        for key, file in file_of.items():
            name, _, kind = key.rpartition(".")
            if kind == "weight_packed":  # what belongs to it may be in the next shard
                shape, zero = f"{name}.weight_shape", f"{name}.weight_zero_point"
                rows, count = file_of[shape].get_tensor(shape).tolist()
                u_OI = unpack(file.get_tensor(key).contiguous().view(torch.uint8), bits, count)
                yield name, as_codes(u_OI, bits, torch.int8 if signed else torch.uint8)
                if not signed:
                    words_GW = file_of[zero].get_tensor(zero).T.contiguous()
                    yield f"{name}.zero", unpack(words_GW.view(torch.uint8), bits, rows).T
            elif kind == "weight" and file.get_slice(key).get_dtype() == "I8":
                yield name, file.get_tensor(key)


def has_packed_zeros(config: dict[str, Any]) -> bool:
    """Has a quantization config packed zero points? Transformers 5.23 then loads it only with `dequantize=True`."""
    groups = config.get("config_groups", {})
    return config.get("format") == "pack-quantized" and not groups["group_0"]["weights"]["symmetric"]


def _tensors(contents: Contents, dtype: torch.dtype, matrices: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    packed = contents.recipe.activation_format is None
    for name, weight in contents.modules():
        assert isinstance(weight, QuantizedWeight)
        tensors = _packed(weight) if packed else {"weight": weight.q_OI}
        for key, value in (tensors | {"weight_scale": _cast(name, weight.scale_OG, dtype)}).items():
            yield f"{name}.{key}", value
    for name, value in contents.others():
        yield name, _cast(name, value, dtype)
    yield from matrices.items()


def _packed(weight: QuantizedWeight) -> dict[str, Tensor]:
    bits = weight.format.bits
    tensors = {
        "weight_packed": pack_words(as_unsigned(weight.q_OI, bits), bits),
        "weight_shape": torch.tensor(weight.q_OI.shape),
    }
    if weight.second_OG is not None:
        tensors["weight_zero_point"] = pack_words(weight.second_OG.T, bits).T
    return tensors


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if not bool(cast.isfinite().all()):
        kind = str(dtype).removeprefix("torch.")
        raise SpinfoldError(
            f"The run can't be written in {kind}.",
            f"{name} holds {float(tensor.abs().max()):.3g}, which is too large for it.",
            "Make the run with weights.scale_dtype: bfloat16.",
        )
    return cast


# ---- the config --------------------------------------------------------------------------------------------------


def _quantization_config(contents: Contents, transforms: dict[str, Any]) -> dict[str, Any]:
    recipe = contents.recipe
    grid, activations = recipe.weight_format, recipe.activation_format
    assert isinstance(grid, IntFormat) and (activations is None or isinstance(activations, IntFormat))
    format = "pack-quantized" if activations is None else "int-quantized"
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "group" if grid.group_size else "channel",
        "group_size": grid.group_size,
        "dynamic": False,
    }
    inputs = activations and {
        "num_bits": activations.bits,
        "type": "int",
        "symmetric": activations.symmetric,
        "strategy": "token",
        "dynamic": True,
    }
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "version": _VERSION,
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme | {"format": format}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {"config_groups": transforms} if transforms else {},
    }


# ---- online maps -------------------------------------------------------------------------------------------------


def _online_maps(contents: Contents, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The transform groups and the tensors of the down maps: one group, or one per layer if the maps differ.

    vLLM keeps one matrix per group and size, so layers with maps of their own need groups of their own.
    """
    blocks = [repeated_block(one.matrix()) for one in contents.maps.down or ()]
    if all(len(block_nn) == 1 for block_nn in blocks):  # no map, or identities
        return {}, {}
    modules = [layer.linears["down"].name for layer in contents.network.layers]
    shared = all(block.shape == blocks[0].shape and bool((block == blocks[0]).all()) for block in blocks)
    groups: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for i, (block_nn, module) in enumerate(zip(blocks, modules, strict=True)):
        if shared and i:
            break
        name = "R4" if shared else f"R4_L{i}"
        targets = modules if shared else [module]
        groups[name] = {
            "type": "random-hadamard",
            "apply": [{"targets": targets, "location": "input", "inverse": False, "ignore": []}],
            "head_dim": len(block_nn),
            "precision": "torch.float32",
            "randomize": False,
            "requires_grad": False,
        }
        tensors[f"{module}.{name}_input.weight"] = stored_matrix(block_nn, dtype)
    return groups, tensors
