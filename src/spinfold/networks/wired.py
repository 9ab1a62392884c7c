"""Attention and experts as Transformers has them, behind a layer's wires: it calls these in place of its own.

Shapes: B batch, T tokens, S keys, N head size, D residual width, F MLP width, O out features, I in features, K experts
of a token, E experts of a layer; of experts, S = T K rows sorted by expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.moe import ExpertsInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["WIRED", "Attended"]

WIRED = "spinfold"
"""The name by which a config asks for these."""


class Attended(NamedTuple):
    """What `num_queries` queries attend to: keys and values `(B, heads, S, head_dim)`, and a mask, None if causal."""

    key_BHSN: Tensor
    value_BHSN: Tensor
    mask: Tensor | None
    num_queries: int


def _wired_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention behind the layer's query, key, value and cache wires."""
    wires = cast(nn.ModuleDict, module.wires)
    query, key, value = wires["query"](query), wires["key"](key), wires["value"](value)
    key, value, attention_mask, _ = wires["cache"](Attended(key, value, attention_mask, query.shape[2]))
    softcap, groups = kwargs.get("softcap"), query.shape[1] // key.shape[1]
    if softcap is None:
        if attention_mask is None and groups > 1 and _in_tf32(query) and query.shape[2] == key.shape[2]:
            # No fused attention in fp32 knows grouped queries: all scores would stand in memory, gigabytes of them.
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            y = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=kwargs.get("scaling"))
            return y.transpose(1, 2).contiguous(), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.tanh(query @ key.transpose(2, 3) * (kwargs["scaling"] / softcap)) * softcap
    if attention_mask is None:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        attention_mask = attention_mask.tril(scores.shape[-1] - scores.shape[-2])  # a cache has more keys than queries
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def _in_tf32(x: Tensor) -> bool:
    """Is x to be multiplied in the precision "tf32" of `compute.py`, on a GPU?"""
    plain = x.is_cuda and x.dtype == torch.float32 and not torch.is_autocast_enabled("cuda")
    return plain and torch.backends.cuda.matmul.allow_tf32


def _wired_experts(module: nn.Module, x_TD: Tensor, experts_TK: Tensor, share_TK: Tensor) -> Tensor:
    """Each token through its K experts, behind the layer's wires, and their outputs added up by the router's shares.

    Like `_wired_attention` it gives what Transformers' own forward gives, from the same parameters.
    """
    wires, act = cast(nn.ModuleDict, module.wires), cast(nn.Module, module.act_fn)
    # Read once: with a parametrization on them, every access would compute them anew.
    gate_up_EOD, down_EDF = cast(Tensor, module.gate_up_proj), cast(Tensor, module.down_proj)
    num_tokens, per_token = experts_TK.shape
    by_expert_S = experts_TK.flatten().argsort(stable=True)
    by_token_S = by_expert_S.argsort()
    counts_E = experts_TK.flatten().bincount(minlength=len(down_EDF)).tolist()

    def linear(x_SI: Tensor, w_EOI: Tensor) -> Tensor:
        rows, products = iter(x_SI.split(counts_E)), []
        for w_OI in w_EOI:
            products.append(F.linear(next(rows), w_OI))
            del w_OI  # before the next one is unpacked; zip would hold it
        return torch.cat(products)

    x_TD = wires["mlp_input"](x_TD[None], experts_TK)[0]
    gate_SF, up_SF = linear(x_TD[by_expert_S // per_token], gate_up_EOD).chunk(2, dim=-1)
    h_TKF = (act(gate_SF) * up_SF)[by_token_S].unflatten(0, (num_tokens, per_token))
    h_TKF = wires["down"](h_TKF.transpose(0, 1)[None], experts_TK)[0].transpose(0, 1)
    y_SD = linear(h_TKF.flatten(0, 1)[by_expert_S], down_EDF)
    y_TKD = y_SD[by_token_S].unflatten(0, (num_tokens, per_token))
    return (y_TKD * share_TK[..., None]).sum(1).to(x_TD.dtype)


AttentionInterface.register(WIRED, _wired_attention)
AttentionMaskInterface.register(WIRED, sdpa_mask)
ExpertsInterface.register(WIRED, _wired_experts)
