"""Read a GGUF file as a Hugging Face model: its config and its weights, dequantized exactly.

    general.architecture -> Architecture: tensor names `blk.L.attn_q.weight` -> `model.layers.L.self_attn.q_proj.weight`
                                          metadata keys -> attributes of the Transformers config

What the tables do not name is refused: a tensor without a place means another network than the one we would build.

Shapes: O out features, I in features, N heads, H head size.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, dequantize

from spinfold.errors import SpinfoldError
from spinfold.networks.gguf_header import GgufFile, GgufTensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["ARCHITECTURES", "Architecture", "config_of", "hf_names", "state_dict", "unpermute"]

OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {"attn_norm": "input_layernorm", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm"}
SEPARATE = LAYER | {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FUSED = LAYER | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What one `general.architecture` means: names inside `blk.L.` -> names inside `model.layers.L.`, and config."""

    model_type: str
    names: Mapping[str, str]
    interleaved_rope: bool = False
    """Rows of Q and K are stored for RoPE on neighbouring pairs; see `unpermute`."""
    explicit_head_dim: bool = True
    """Its Transformers config has a `head_dim`; the others derive it."""
    attention_bias_key: bool = False
    """Its Transformers config says by flags whether attention and MLP have biases."""
    required: Mapping[str, str] = field(default_factory=dict)
    """Metadata key inside the architecture -> config attribute, for what only this architecture has."""
    optional: Mapping[str, str] = field(default_factory=dict)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(model_type="llama", names=SEPARATE, interleaved_rope=True, attention_bias_key=True),
    "qwen2": Architecture(model_type="qwen2", names=SEPARATE, explicit_head_dim=False),
    "qwen3": Architecture(model_type="qwen3", names=SEPARATE | QK_NORM),
    "phi3": Architecture(
        model_type="phi3",
        names=FUSED,
        explicit_head_dim=False,
        optional={"attention.sliding_window": "sliding_window"},
    ),
    "granite": Architecture(
        model_type="granite",
        names=SEPARATE,
        interleaved_rope=True,
        explicit_head_dim=False,
        attention_bias_key=True,
        required={
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
}


def hf_names(file: GgufFile) -> dict[str, str]:
    """GGUF tensor name -> Transformers parameter name, one to one, for every weight in the file.

    Raises `SpinfoldError` for an unknown architecture or a tensor that its table does not name.
    """
    names = _architecture(file).names
    result: dict[str, str] = {}
    for name in file.tensors:
        if name in OUTER:
            result[name] = OUTER[name]
        elif name != "rope_freqs.weight":  # read by the config: it is no parameter in Transformers
            prefix, _, rest = name.partition(".")
            layer, _, rest = rest.partition(".")
            module, _, kind = rest.rpartition(".")
            if prefix != "blk" or not layer.isdecimal() or module not in names or kind not in ("weight", "bias"):
                raise SpinfoldError(
                    f"{file.path.name} holds a tensor that spinfold cannot place: {name!r}.",
                    f"A plain {file.architecture} model has no such tensor, so the network must be another one "
                    "(long-context factors, experts and adapters are stored this way).",
                    "Pass the original Hugging Face folder instead.",
                )
            result[name] = f"model.layers.{layer}.{names[module]}.{kind}"
    return result


def config_of(file: GgufFile) -> PreTrainedConfig:
    """The Transformers config of the network in `file`, from its metadata and the shapes of its tensors.

    Raises `SpinfoldError` where a value is missing or absurd, or means something Transformers cannot express.
    """
    from transformers import AutoConfig

    architecture = _architecture(file)
    read = _Metadata(file)
    num_layers = read.integer("block_count", high=len(file.tensors))
    hidden = read.integer("embedding_length")
    num_heads = read.integer("attention.head_count")
    num_kv_heads = read.integer("attention.head_count_kv", default=num_heads)
    head_dim = read.integer("attention.key_length", default=hidden // num_heads)
    if read.integer("attention.value_length", default=head_dim) != head_dim:
        raise read.refusal("attention.value_length", "differs from the key length")
    if not architecture.explicit_head_dim and head_dim * num_heads != hidden:
        raise read.refusal(
            "attention.key_length", f"is {head_dim}, but {file.architecture} derives it as {hidden} / {num_heads}"
        )
    if num_heads % num_kv_heads:
        raise read.refusal("attention.head_count_kv", f"is {num_kv_heads}, which does not divide {num_heads} heads")
    if read.integer("expert_count", default=0, low=0):
        raise read.refusal("expert_count", "is set: mixtures of experts are not read from GGUF")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise SpinfoldError(
            f"{file.path.name} holds no token embedding.",
            "The tensor token_embd.weight is missing.",
            "Pass a complete language model.",
        )

    values: dict[str, object] = {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": read.integer("feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": read.integer("context_length"),
        "rms_norm_eps": read.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(file, read, head_dim, partial=architecture.model_type == "phi3"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
        "use_cache": True,
    }
    if architecture.explicit_head_dim:
        values["head_dim"] = head_dim
    if architecture.attention_bias_key:
        values["attention_bias"] = "blk.0.attn_output.bias" in file.tensors
        values["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors
    if architecture.model_type == "phi3":
        values["original_max_position_embeddings"] = values["max_position_embeddings"]
    values |= {attribute: read.number(key) for key, attribute in architecture.required.items()}
    values |= {a: read.integer(key) for key, a in architecture.optional.items() if read.has(key)}
    for key, attribute in {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}.items():
        token = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        values[attribute] = token if isinstance(token, int) and token < embedding.shape[0] else None
    return AutoConfig.for_model(architecture.model_type, **values)


def state_dict(
    file: GgufFile, config: PreTrainedConfig, dtype: torch.dtype = torch.float32, names: Container[str] | None = None
) -> dict[str, torch.Tensor]:
    """Every weight of `file`, or those of `names`, under their Transformers names, dequantized to fp32 by the `gguf`
    package, then cast.

    Raises `SpinfoldError` for a quantization type that the package cannot undo.
    """
    architecture = _architecture(file)
    data = np.memmap(file.path, mode="r", dtype=np.uint8)
    weights: dict[str, torch.Tensor] = {}
    for gguf_name, hf_name in hf_names(file).items():
        if names is not None and hf_name not in names:
            continue
        weight = _dequantized(file, data, file.tensors[gguf_name])
        if architecture.interleaved_rope and ".attn_q." in gguf_name:
            weight = unpermute(weight, config.num_attention_heads)
        if architecture.interleaved_rope and ".attn_k." in gguf_name:
            weight = unpermute(weight, config.num_key_value_heads)
        weights[hf_name] = weight.to(dtype)
    return weights


def unpermute(w_OI: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of Q or K (weight [O, I] or bias [O]) from llama.cpp's order into Transformers' order.

    RoPE turns the plane of coordinates (j, j + H/2) of each head in Transformers, and that of (2j, 2j + 1) in
    llama.cpp's "normal" RoPE. Row i = s H/2 + j of a head (s in {0, 1}) is therefore stored at 2j + s: stored rows
    have index (j, s), ours (s, j), so the last two of (N, H/2, 2) are swapped.
    """
    rest = w_OI.shape[1:]
    return w_OI.reshape(num_heads, -1, 2, *rest).transpose(1, 2).reshape(w_OI.shape)


def _dequantized(file: GgufFile, data: np.ndarray, tensor: GgufTensor) -> torch.Tensor:
    block_size, block_bytes = GGML_QUANT_SIZES[tensor.kind]
    *outer, columns = tensor.shape
    raw = data[tensor.offset : tensor.offset + tensor.num_bytes].reshape(*outer, columns // block_size * block_bytes)
    try:
        values = dequantize(np.asarray(raw), tensor.kind)
    except NotImplementedError:
        raise SpinfoldError(
            f"Tensor {tensor.name!r} of {file.path.name} is stored as {tensor.kind.name}.",
            "The gguf package cannot turn this type back into floating-point numbers.",
            "Use a file in another type, best F16 or BF16.",
        ) from None
    # An F32 tensor would else stay a read-only window on the file.
    return torch.from_numpy(np.require(values, np.float32, ["C", "A", "W"])).reshape(tensor.shape)


def _architecture(file: GgufFile) -> Architecture:
    if file.architecture not in ARCHITECTURES:
        raise SpinfoldError(
            f"{file.path.name} holds a {file.architecture or 'nameless'} model, which spinfold cannot read from GGUF.",
            f"Known architectures are {', '.join(sorted(ARCHITECTURES))}.",
            "Pass the original Hugging Face folder instead.",
        )
    return ARCHITECTURES[file.architecture]


@dataclass(frozen=True)
class _Metadata:
    """Typed look-ups of `<architecture>.<key>`, each with bounds."""

    file: GgufFile

    def has(self, key: str) -> bool:
        return f"{self.file.architecture}.{key}" in self.file.metadata

    def integer(self, key: str, *, low: int = 1, high: int = 2**31 - 1, default: int | None = None) -> int:
        return int(self._bounded(key, low, high, default, int))

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._bounded(key, 1e-30, 1e30, default, (int, float)))

    def text(self, key: str, default: str) -> str:
        return str(self.file.metadata.get(f"{self.file.architecture}.{key}", default))

    def refusal(self, key: str, why: str) -> SpinfoldError:
        return SpinfoldError(
            f"The network in {self.file.path.name} cannot be rebuilt.",
            f"Its metadata {self.file.architecture}.{key} {why}.",
            "Pass the original Hugging Face folder instead.",
        )

    def _bounded(
        self, key: str, low: float, high: float, default: float | None, kind: type | tuple[type, ...]
    ) -> int | float:
        full = f"{self.file.architecture}.{key}"
        if full in self.file.array_lengths:
            raise self.refusal(key, "differs from layer to layer")
        value = self.file.metadata.get(full, default)
        if value is None:
            raise self.refusal(key, "is missing")
        if not isinstance(value, kind) or isinstance(value, (bool, str)) or not low <= value <= high:
            raise self.refusal(key, f"is {value!r}")
        return value


def _rope(file: GgufFile, read: _Metadata, head_dim: int, partial: bool) -> dict[str, object]:
    """Transformers' `rope_parameters`: plain, linearly scaled, or Llama 3's, recognised by its stored factors."""
    theta = read.number("rope.freq_base", default=10000.0)
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": theta}
    rotated = read.integer("rope.dimension_count", default=head_dim)
    if rotated != head_dim:
        if not partial or rotated > head_dim:
            raise read.refusal("rope.dimension_count", f"is {rotated}, the head size is {head_dim}")
        rope["partial_rotary_factor"] = rotated / head_dim
    scaling = read.text("rope.scaling.type", "none")
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": read.number("rope.scaling.factor")}
    elif scaling != "none":
        raise read.refusal("rope.scaling.type", f"is {scaling!r}, which spinfold does not read from GGUF")
    if (stored := file.tensors.get("rope_freqs.weight")) is not None:
        data = np.memmap(file.path, mode="r", dtype=np.uint8)
        factors = _dequantized(file, data, stored).double()
        rope |= _llama3_rope(factors, theta, rotated, read)
    return rope


def _llama3_rope(factors: torch.Tensor, theta: float, rotated: int, read: _Metadata) -> dict[str, object]:
    """The Llama 3.1 scaling whose divisors per frequency are `factors` [H/2].

    With wavelengths w_j = 2 pi theta^(2j/H) and the published constants (context 8192, low 1, high 4), the divisor
    is 1 for w < 8192/4, `factor` for w > 8192/1, and between them 1 / ((1 - s)/factor + s), s = (8192/w - 1) / 3.
    """
    original, low, high = 8192, 1.0, 4.0
    factor = float(factors.max())
    wavelengths = 2 * torch.pi * theta ** (torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    if (
        factors.shape != wavelengths.shape
        or not factor < 1e6
        or not torch.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4)
    ):
        raise read.refusal("rope.scaling", "comes with frequency factors (rope_freqs.weight) other than Llama 3's")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
