"""What an end-to-end fit minimises; the logits exist for one chunk of tokens at a time, in the backward pass too.

Shapes: B windows, T tokens, D residual width, V vocabulary, P predicted tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spinfold.networks import Network

__all__ = ["distillation_loss", "next_token_loss", "tokens_per_chunk"]

_TOKENS_PER_CHUNK, _BYTES_PER_CHUNK = 4096, 1 << 30
_NO_TARGET = -100


def tokens_per_chunk(words: int) -> int:
    """How many tokens' logits over a vocabulary of `words` a loss makes at once."""
    return max(1, min(_TOKENS_PER_CHUNK, _BYTES_PER_CHUNK // (4 * words)))


def next_token_loss(network: Network, ids_BT: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats, a scalar."""
    hidden_PD = network.hidden(ids_BT)[:, :-1].flatten(0, 1)

    def of_chunk(h_PD: Tensor, t_P: Tensor) -> Tensor:
        return F.cross_entropy(network.logits(h_PD).float(), t_P, reduction="sum")

    return _mean_over_chunks(network, of_chunk, hidden_PD, ids_BT[:, 1:].flatten())


def distillation_loss(
    network: Network, head: nn.Linear, ids_BT: Tensor, original_BTD: Tensor, *, next_token: float = 0.0
) -> Tensor:
    """Mean KL divergence in nats from the original, given by its head and what its head reads, to the network; and
    `next_token` times the cross-entropy of the text.

    Every position counts for the divergence, the last one too: unlike the next token, the original's answer is there.
    """
    hidden_PD = network.hidden(ids_BT).flatten(0, 1)
    targets_P = F.pad(ids_BT[:, 1:], (0, 1), value=_NO_TARGET).flatten()

    def of_chunk(h_PD: Tensor, o_PD: Tensor, t_P: Tensor) -> Tensor:
        with torch.no_grad():
            logq_PV = network.finish(head(o_PD.to(h_PD.dtype))).float().log_softmax(-1)
        logp_PV = network.logits(h_PD).float().log_softmax(-1)
        loss = F.kl_div(logp_PV, logq_PV, reduction="sum", log_target=True)
        return loss + next_token * F.nll_loss(logp_PV, t_P, ignore_index=_NO_TARGET, reduction="sum")

    return _mean_over_chunks(network, of_chunk, hidden_PD, original_BTD.flatten(0, 1), targets_P)


def _mean_over_chunks(network: Network, of_chunk: Callable[..., Tensor], *of_tokens: Tensor) -> Tensor:
    total = torch.zeros((), device=of_tokens[0].device)
    size = tokens_per_chunk(network.head.out_features)
    for chunk in zip(*(x.split(size) for x in of_tokens), strict=True):
        # Nothing here is random, and a generator's state can't be read inside a CUDA graph.
        total = total + cast(Tensor, checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False))
    return total / len(of_tokens[0])
