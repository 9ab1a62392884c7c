"""What of a model its time and its memory depend on, from config and headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from spinfold.networks import family_of
from spinfold.networks.sources import Checkpoint

__all__ = ["Sizes"]


@dataclass(frozen=True)
class Sizes:
    """What of a model time and memory depend on."""

    layers: int
    width: int
    mlp_width: int
    words: int
    stored: int
    parameters: int
    linears: int
    active: int
    widest: int
    score_width: int
    head_dim: int
    kv_heads: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Sizes:
        """From config and headers alone; of experts a token meets a few."""
        config, shapes = checkpoint.config, checkpoint.shapes
        embedding = config.vocab_size * config.hidden_size
        tied = not any(name.startswith("lm_head.") for name in shapes)
        in_layers = [(name, prod(shape)) for name, shape in checkpoint.layer_matrices.items()]
        experts = sum(size for name, size in in_layers if "experts" in name)
        linears = sum(size for _, size in in_layers)
        number = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        share = config.num_experts_per_tok / number if number else 1.0
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        mlp_width = max(family_of(config.model_type).mlp_widths(config))
        heads = config.num_attention_heads * head_dim
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            mlp_width=mlp_width,
            words=config.vocab_size,
            stored=checkpoint.num_parameters,
            parameters=checkpoint.num_parameters + embedding * tied,
            linears=linears,
            active=linears - round(experts * (1 - share)),
            widest=max(mlp_width, heads, config.hidden_size),
            score_width=heads,
            head_dim=head_dim,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        )
