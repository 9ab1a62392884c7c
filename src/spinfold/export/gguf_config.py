"""A model's config as GGUF metadata: what llama.cpp must know to compute the same network, and what it can't.

    sizes, heads, norms    {arch}.embedding_length, {arch}.attention.head_count, ...    config_metadata
    rope_parameters        {arch}.rope.*, and tensors of factors                        rope

Shapes: F RoPE frequencies (half of the rotated sizes of a head).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from spinfold.errors import SpinfoldError
from spinfold.export.gguf_tokenizer import Metadata
from spinfold.networks.gguf_reader import ARCHITECTURES, Architecture

__all__ = ["architecture_of", "config_metadata", "context_length", "rope"]

_NAME_OF = {architecture.model_type: name for name, architecture in ARCHITECTURES.items()} | {"mistral": "llama"}
_ROPE_FREQS, _ROPE_FACTORS = ("llama", "granite"), ("llama", "granite", "phi3")
"""Architectures whose network in llama.cpp reads `rope_freqs`, and `rope_factors_long` and `_short`."""


def architecture_of(config: PreTrainedConfig) -> tuple[str, Architecture]:
    """The `general.architecture` of a model, and the reader's table for it."""
    arch = _NAME_OF.get(config.model_type)
    if arch is None:
        raise _refusal(
            f"Nobody has written down how llama.cpp names the parts of a {config.model_type} model.",
            f"Use another target; known are {', '.join(sorted(_NAME_OF))}.",
        )
    if getattr(config, "hidden_act", "silu") != "silu":
        raise _refusal(f"llama.cpp computes {arch} with SiLU, not with {config.hidden_act}.", "Use another target.")
    return arch, ARCHITECTURES[arch]


def config_metadata(config: PreTrainedConfig, arch: str, architecture: Architecture) -> Metadata:
    """The sizes of the network."""
    num_heads = config.num_attention_heads
    head_dim = _head_dim(config)
    if not architecture.explicit_head_dim and head_dim * num_heads != config.hidden_size:
        raise _refusal(
            f"{num_heads} heads of {head_dim} do not make up the width {config.hidden_size}, as llama.cpp wants of "
            f"{arch} models.",
            "Use another target.",
        )
    values: Metadata = {
        "vocab_size": config.vocab_size,
        "context_length": context_length(config),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": num_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    values |= {key: float(getattr(config, attribute)) for key, attribute in architecture.required.items()}
    values |= {k: int(v) for k, a in architecture.optional.items() if (v := getattr(config, a, None)) is not None}
    return {f"{arch}.{key}": value for key, value in values.items()}


def context_length(config: PreTrainedConfig) -> int:
    """The longest context. llama.cpp knows no sliding window here: where one ends, it would compute something else."""
    window = _sliding_window(config)
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def rope(config: PreTrainedConfig, arch: str) -> tuple[dict[str, Tensor], Metadata]:
    """RoPE's tensors `(F,)`, by name, and metadata. Transformers' `rope_type` becomes

    default    nothing more
    linear     freq / factor
    llama3     rope_freqs: the divisor of each frequency
    longrope   rope_factors_long, _short: likewise, above and up to the original context; llama.cpp chooses by the size
               of its context, Transformers by the length of the text
    yarn       its own; llama.cpp multiplies cos and sin by 1 + ln(factor) / 10 itself, `attn_factor` is what is left

    Raises `SpinfoldError` for what llama.cpp computes otherwise.
    """
    given: dict[str, Any] = dict(config.rope_parameters)
    kind, theta = given.get("rope_type", "default"), float(given["rope_theta"])
    rotated = int(_head_dim(config) * given.get("partial_rotary_factor", 1.0))
    if rotated != _head_dim(config) and arch != "phi3":
        raise _refusal(
            f"llama.cpp rotates whole heads of {arch} models, this one parts of them.", "Use another target."
        )
    original = given.get("original_max_position_embeddings") or config.max_position_embeddings
    factor = given.get("factor") or config.max_position_embeddings / original
    factors: dict[str, Tensor] = {}
    values: Metadata = {"dimension_count": rotated, "freq_base": theta}
    match kind:
        case "default":
            pass
        case "linear":
            values |= {"scaling.type": "linear", "scaling.factor": float(factor)}
        case "llama3" if arch in _ROPE_FREQS:
            factors["rope_freqs.weight"] = _llama3_divisors(given, theta, rotated)
        case "longrope" if arch in _ROPE_FACTORS:
            default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            values |= {"scaling.type": "longrope", "scaling.original_context_length": int(original)}
            values["scaling.attn_factor"] = float(given.get("attention_factor") or default)
            for length in ("long", "short"):
                factors[f"rope_factors_{length}.weight"] = torch.tensor(given[f"{length}_factor"], dtype=torch.float32)
        case "yarn" if _yarn_is_plain(given):
            own = 1 + math.log(factor) / 10 if factor > 1 else 1.0
            values |= {"scaling.type": "yarn", "scaling.factor": float(factor)}
            values["scaling.original_context_length"] = int(original)
            values["scaling.attn_factor"] = float(given.get("attention_factor") or own) / own
        case _:
            raise _refusal(
                f"llama.cpp does not scale RoPE of {arch} models in this model's way ({kind}).", "Use another target."
            )
    return factors, {f"{arch}.rope.{key}": value for key, value in values.items()}


def _llama3_divisors(given: dict[str, Any], theta: float, rotated: int) -> Tensor:
    """Of each frequency `(F,)`. With wavelength w and s = (original / w - low) / (high - low), clamped to [0, 1],
    Transformers' frequency is f ((1 - s) / factor + s): divided by `factor` where w is long, kept where it is short.
    """
    original, low, high = (
        given[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    w_F = 2 * torch.pi * theta ** (torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    s_F = ((original / w_F - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - s_F) / given["factor"] + s_F)).float()


def _yarn_is_plain(given: dict[str, Any]) -> bool:
    """For these architectures llama.cpp reads none of YaRN's finer settings, so they must be its own."""
    own = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": None, "mscale_all_dim": None}
    return all(given.get(key) in (None, value) for key, value in own.items())


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _sliding_window(config: PreTrainedConfig) -> int | None:
    """How far attention reaches, if any layer's ends before the context does."""
    layers = getattr(config, "layer_types", None)
    return None if layers and "sliding_attention" not in layers else getattr(config, "sliding_window", None)


def _refusal(why: str, fix: str) -> SpinfoldError:
    return SpinfoldError("The run can't be written as GGUF.", why, fix)
