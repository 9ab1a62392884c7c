"""What spinfold knows about an architecture, as data: one `Family` per group of Hugging Face model types.

A family answers, per decoder layer: which module is which linear, what each linear reads and writes, where the
norms stand, and which site can't be folded and why. Nothing else in spinfold knows a Hugging Face module name.

    role             q  k  v  o               gate  up  down        embedding  head
    reads the site   residual   value (heads)  residual  down        -          residual
    writes the site  -  -  value residual      -     -   residual    residual   -

A layer of experts has gate, up and down once per expert, and a router, which reads the residual site too.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spinfold.errors import SpinfoldError, Verdict

__all__ = ["FAMILIES", "INPUT_WIRE", "ONLINE_SITES", "SITES", "Family", "Part", "family_of"]

SITES = ("residual", "value", "query_key", "down")
ONLINE_SITES = ("query_key", "down")
"""The sites with a map that can't be merged into a weight on one side: after RoPE, after the activation."""

INPUT_WIRE = {
    "q": "qkv_input",
    "k": "qkv_input",
    "v": "qkv_input",
    "o": "attention_out",
    "gate": "mlp_input",
    "up": "mlp_input",
    "down": "down",
    "router": "mlp_input",
}
"""The wire on which each linear's input arrives; linears on one wire share their input. The router reads what the wire
is given, before the ops on it."""


@dataclass(frozen=True)
class Part:
    """A linear: the parameter that holds it, and its place among the linears fused into that parameter.

    A parameter of three axes holds it once per expert, along the first.
    """

    module: str
    index: int = 0
    fused: tuple[str, ...] = ()
    attribute: str = "weight"


_SPLIT = {
    "q": Part("self_attn.q_proj"),
    "k": Part("self_attn.k_proj"),
    "v": Part("self_attn.v_proj"),
    "o": Part("self_attn.o_proj"),
    "gate": Part("mlp.gate_proj"),
    "up": Part("mlp.up_proj"),
    "down": Part("mlp.down_proj"),
}
_QKV, _GATE_UP = ("q", "k", "v"), ("gate", "up")
_FUSED = {
    **{role: Part("self_attn.qkv_proj", i, _QKV) for i, role in enumerate(_QKV)},
    "o": Part("self_attn.o_proj"),
    **{role: Part("mlp.gate_up_proj", i, _GATE_UP) for i, role in enumerate(_GATE_UP)},
    "down": Part("mlp.down_proj"),
}
_EXPERTS = {
    "router": Part("mlp.gate"),
    **{role: Part("mlp.experts", i, _GATE_UP, "gate_up_proj") for i, role in enumerate(_GATE_UP)},
    "down": Part("mlp.experts", attribute="down_proj"),
}
_QK_NORM = {
    "self_attn.q_norm.weight": "acts on queries after the projection, before RoPE",
    "self_attn.k_norm.weight": "acts on keys after the projection, before RoPE",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """The facts of one group of architectures.

    `gain_offset` is 1 where the stored norm weight w means a gain of 1 + w. `post_norms` are norms with a gain on
    the writing side of the residual stream. `untouched` lists the per-layer parameters that no map passes, with the
    reason. `experts` stand in place of the MLP's linears in the layers that have a router. The last four name config
    fields: the width of an expert, a factor on what a branch adds to the stream, a divisor and a soft cap of the
    logits.
    """

    name: str
    model_types: tuple[str, ...]
    linears: Mapping[str, Part] = field(default_factory=lambda: _SPLIT)
    experts: Mapping[str, Part] = field(default_factory=dict)
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    gain_offset: int = 0
    post_norms: tuple[str, ...] = ()
    untouched: Mapping[str, str] = field(default_factory=dict)
    expert_width: str | None = None
    residual_factor: str | None = None
    logits_divisor: str | None = None
    logits_softcap: str | None = None

    def supports(self, site: str) -> Verdict:
        """May a map stand at `site`? A folded residual map may not pass a gain on the writing side."""
        if site == "residual" and self.post_norms:
            names = " and ".join(self.post_norms)
            return Verdict(
                False,
                f"{names} multiply each branch by a gain before it joins the residual stream, and a gain "
                "does not commute with a rotation; so the residual map can't be folded into the weights.",
                "Leave the residual site out: --sites value,query_key,down.",
            )
        norms = {"qkv_input": self.attention_norm, "mlp_input": self.mlp_norm}
        if site in norms and norms[site] is None:
            return Verdict(False, "No norm stands before it whose gain could take the scales.", "Use another method.")
        return Verdict(True)

    def mlp_widths(self, config: Any) -> set[int]:
        """The inputs of the down projections of all layers: of the MLP's, and of the experts'."""
        if self.expert_width is None:
            return {config.intermediate_size}
        dense, every = getattr(config, "mlp_only_layers", ()), getattr(config, "decoder_sparse_step", 1)
        sparse = {i not in dense and (i + 1) % every == 0 for i in range(config.num_hidden_layers)}
        return {getattr(config, self.expert_width) if experts else config.intermediate_size for experts in sparse}


FAMILIES = (
    Family(name="llama", model_types=("llama", "mistral")),
    Family(name="qwen2", model_types=("qwen2",)),
    Family(name="qwen3", model_types=("qwen3",), untouched=_QK_NORM),
    Family(name="mixtral", model_types=("mixtral",), experts=_EXPERTS, expert_width="intermediate_size"),
    Family(
        name="qwen3_moe",
        model_types=("qwen3_moe",),
        experts=_EXPERTS,
        expert_width="moe_intermediate_size",
        untouched=_QK_NORM,
    ),
    Family(name="phi3", model_types=("phi3",), linears=_FUSED),
    Family(
        name="granite",
        model_types=("granite",),
        residual_factor="residual_multiplier",
        logits_divisor="logits_scaling",
    ),
    Family(
        name="gemma2",
        model_types=("gemma2",),
        mlp_norm="pre_feedforward_layernorm",
        gain_offset=1,
        post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        logits_softcap="final_logit_softcapping",
    ),
    Family(
        name="gemma3",
        model_types=("gemma3_text",),
        mlp_norm="pre_feedforward_layernorm",
        gain_offset=1,
        post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        untouched=_QK_NORM,
        logits_softcap="final_logit_softcapping",
    ),
    Family(
        name="olmo2",
        model_types=("olmo2",),
        attention_norm=None,
        mlp_norm=None,
        post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        untouched=_QK_NORM,
    ),
)


def family_of(model_type: str) -> Family:
    """The family of a Hugging Face `model_type`; raises `SpinfoldError` naming what is not known."""
    known = {model_type: family for family in FAMILIES for model_type in family.model_types}
    if model_type in known:
        return known[model_type]
    near = difflib.get_close_matches(model_type, known, n=1)
    raise SpinfoldError(
        f"Model type {model_type!r} is not known.",
        "Nobody has written down where its norms stand, which linears read and write its residual stream, and "
        "what else touches it; folding a map without these facts breaks the model silently."
        + (f" The nearest known type is {near[0]!r}." if near else ""),
        f"Use a model of type {', '.join(sorted(known))}, or describe the type in networks/family.py.",
    )
