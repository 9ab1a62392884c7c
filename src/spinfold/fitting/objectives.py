"""What a fit minimises.

Shapes: B windows, T tokens, D residual width, V vocabulary, P predicted tokens of a chunk.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spinfold.networks import Network

__all__ = ["next_token_loss"]

_TOKENS_PER_CHUNK = 2048


def next_token_loss(network: Network, ids_BT: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats, a scalar.

    The logits exist for one chunk of tokens at a time, in the backward pass too.
    """
    hidden_PD = network.hidden(ids_BT)[:, :-1].flatten(0, 1)
    targets_P = ids_BT[:, 1:].flatten()

    def chunk_loss(h_PD: Tensor, t_P: Tensor) -> Tensor:
        return F.cross_entropy(network.logits(h_PD).float(), t_P, reduction="sum")

    total = torch.zeros((), device=hidden_PD.device)
    for h_PD, t_P in zip(hidden_PD.split(_TOKENS_PER_CHUNK), targets_P.split(_TOKENS_PER_CHUNK), strict=True):
        total = total + cast(Tensor, checkpoint(chunk_loss, h_PD, t_P, use_reentrant=False))
    return total / len(targets_P)
