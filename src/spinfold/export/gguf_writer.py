"""The target `gguf`: a finished run as one file that llama.cpp loads, with the integers that rounding produced.

    config     -> sizes, heads, RoPE                                        gguf_config
    tokenizer  -> tokenizer.*                                               gguf_tokenizer
    tensors    -> blk.L.attn_q.weight, ...: names and Q/K row order of the  permute
                  reader's tables, read backwards; blocks packed in         gguf_blocks

Norms, biases and RoPE's factors are F32; embedding and head F16 or Q8_0. Tensors are written one at a time.

Shapes: O out features, I in features, H head size, F RoPE frequencies.
"""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from spinfold import __version__
from spinfold.errors import SpinfoldError
from spinfold.export.contents import Contents
from spinfold.export.gguf_blocks import BLOCK, block_kind, fits_blocks, pack, unpack
from spinfold.export.gguf_config import architecture_of, config_metadata, rope
from spinfold.export.gguf_tokenizer import Metadata, tokenizer_metadata
from spinfold.formats import IntFormat, QuantizedWeight
from spinfold.networks.gguf_header import scan
from spinfold.networks.gguf_reader import ARCHITECTURES, OUTER, Architecture, unpermute

__all__ = ["gguf_name", "permute", "read_integers", "write"]

Kind = GGMLQuantizationType

_FILE_TYPE = {
    Kind.F16: LlamaFileType.MOSTLY_F16,
    Kind.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    Kind.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    Kind.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def write(contents: Contents, folder: Path, *, embeddings: Literal["F16", "Q8_0"] = "F16") -> None:
    """Write `folder/NAME-TYPE.gguf`.

    Scales become the nearest fp16 (see `gguf_blocks`); `embeddings` is the type of embedding and head, which our
    rounding leaves alone. Raises `SpinfoldError` for what llama.cpp can't have, before a byte is written.
    """
    config = contents.config
    arch, architecture = architecture_of(config)
    factors, rope_metadata = rope(config, arch)
    linear_kind, embedding_kind = _linear_kind(contents), GGMLQuantizationType[embeddings]
    shapes = {name: tuple(value.shape) for name, value in contents.network.model.state_dict().items()}
    if contents.tied:  # llama.cpp takes the embedding for a head that is not there
        del shapes["lm_head.weight"]
    kinds = {linear.parameter: linear_kind for linear in contents.network.linears}
    kinds |= {name: embedding_kind if name in _EMBEDDINGS else Kind.F32 for name in shapes if name not in kinds}
    if embedding_kind == Kind.Q8_0 and config.hidden_size % BLOCK:
        raise _refusal(f"Rows of {config.hidden_size} do not fit into blocks of {BLOCK}.", "Keep embeddings in F16.")
    config_ids = {name: getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    metadata: Metadata = {
        "general.type": "model",
        "general.name": contents.name,
        "general.quantized_by": f"spinfold {__version__}",
        "general.file_type": int(_FILE_TYPE[linear_kind]),
        "general.quantization_version": 2,
    }
    metadata |= config_metadata(config, arch, architecture) | rope_metadata
    metadata |= tokenizer_metadata(contents.tokenizer_files, config.vocab_size, config_ids)

    rows = [(name, Kind.F32, tuple(factor_F.shape)) for name, factor_F in factors.items()]
    rows += [(gguf_name(name, architecture), kind, shapes[name]) for name, kind in kinds.items()]
    blocks = (pack(value, kinds[name]) for name, value in _tensors(contents, architecture))
    stem = re.sub(r"[^\w.-]+", "-", Path(contents.name).name)
    path = folder / f"{stem}-{linear_kind.name}.gguf"
    _write_file(path, arch, metadata, rows, chain((pack(x, Kind.F32) for x in factors.values()), blocks))


def read_integers(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The integers `(O, I)` of every linear module of a written file by its Hugging Face name, as the run has them."""
    (path,) = folder.glob("*.gguf")
    file, data = scan(path), np.memmap(path, mode="r", dtype=np.uint8)
    architecture = ARCHITECTURES[file.architecture]
    heads = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
    for name, tensor in file.tensors.items():
        if not name.startswith("blk.") or tensor.kind not in (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0):
            continue
        _, layer, module, _ = name.split(".")
        raw_P = torch.from_numpy(data[tensor.offset : tensor.offset + tensor.num_bytes].copy())
        q_OI = unpack(raw_P.view(tensor.shape[0], -1), tensor.kind)
        if architecture.interleaved_rope and module in heads:
            q_OI = unpermute(q_OI, int(file.metadata[f"{file.architecture}.{heads[module]}"]))
        yield f"model.layers.{layer}.{architecture.names[module]}", q_OI


def _linear_kind(contents: Contents) -> GGMLQuantizationType:
    """The type of every linear of a run; `SpinfoldError` if one does not fit."""
    fmt = contents.recipe.weight_format
    assert fmt is None or isinstance(fmt, IntFormat)
    for linear in contents.network.linears:
        fits_blocks(fmt, linear.weight_OI.shape[1]).require(f"{linear.name} can't be written as GGUF.")
    return block_kind(fmt)


def _tensors(contents: Contents, architecture: Architecture) -> Iterator[tuple[str, QuantizedWeight | Tensor]]:
    """Every tensor of a run by its Hugging Face name, in the order of the file, rows where llama.cpp wants them."""
    heads = {"attn_q": contents.config.num_attention_heads, "attn_k": contents.config.num_key_value_heads}
    modules = ((f"{name}.weight", weight) for name, weight in contents.modules())
    for name, value in chain(modules, contents.others()):
        num_heads = heads.get(gguf_name(name, architecture).split(".")[-2]) if architecture.interleaved_rope else None
        yield name, value if num_heads is None else permute(value, num_heads)


def permute(weight: QuantizedWeight | Tensor, num_heads: int) -> QuantizedWeight | Tensor:
    """Rows of Q or K (weight or bias) from Transformers' order into llama.cpp's: the inverse of `unpermute`.

    Row s H/2 + j of a head (s in {0, 1}) goes to row 2j + s; the reader's `unpermute` says why.
    """
    if isinstance(weight, QuantizedWeight):
        return QuantizedWeight.from_tensors(
            {key: _permuted(value, num_heads) for key, value in weight.tensors().items()}, weight.format
        )
    return _permuted(weight, num_heads)


def _permuted(rows: Tensor, num_heads: int) -> Tensor:
    return rows.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def gguf_name(hf_name: str, architecture: Architecture) -> str:
    """The name in a GGUF file of a parameter of Transformers."""
    if hf_name in (outer := {hf: name for name, hf in OUTER.items()}):
        return outer[hf_name]
    _, _, layer, rest = hf_name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    names = {hf: name for name, hf in architecture.names.items()}
    return f"blk.{layer}.{names[module]}.{kind}"


def _write_file(
    path: Path,
    arch: str,
    metadata: Metadata,
    rows: Sequence[tuple[str, GGMLQuantizationType, tuple[int, ...]]],
    data: Iterable[np.ndarray],
) -> None:
    """Header, then the data of each row in turn; only one of them is held at a time."""
    writer = GGUFWriter(path, arch)
    for key, value in metadata.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
    for name, kind, shape in rows:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        num_bytes = math.prod(shape) // block * block_bytes
        # The package takes the type from raw_dtype; the other one only tells it that `shape` counts elements.
        writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in data:
            writer.write_tensor_data(array)
    except OSError as error:
        if error.errno is None and " requested and " in str(error):  # NumPy's words for a short write
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise
    finally:
        writer.close()


def _refusal(why: str, fix: str) -> SpinfoldError:
    return SpinfoldError("The run can't be written as GGUF.", why, fix)
