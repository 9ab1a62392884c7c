"""How good a network still is: perplexity, KL divergence to the original, and top-1 agreement with it.

    perplexity = exp(mean over predicted tokens of -log p(next token))
    KL         = mean over predicted tokens of sum_v p_original(v) log(p_original(v) / p(v)), in nats
    top-1      = share of predicted tokens for which both name the same most likely token

Windows do not overlap, no BOS is added, and the first token of each window is not predicted. Logits are computed in
fp32, some thousand tokens at a time, so that they never stand in memory whole.

Shapes: N windows, T tokens, B windows per batch, D residual width, V vocabulary, P predicted tokens of a chunk.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spinfold.compute import precision
from spinfold.distributed import add_up, share
from spinfold.networks import Network, hidden_in_batches
from spinfold.progress import Progress, Quiet

__all__ = ["TOKENS_PER_CHUNK", "Quality", "Reference", "measure_quality"]

_TOKENS_PER_BATCH = {"cuda": 16384, "cpu": 2048}
TOKENS_PER_CHUNK = {"cuda": 2048, "cpu": 128}
"""How many tokens' logits are compared at once."""


@dataclass(frozen=True)
class Quality:
    """The figures of one network on one text; `kl` and `top1` are None without a reference. Times in seconds."""

    perplexity: float
    tokens: int
    seconds: float
    kl: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class Reference:
    """What the original's head reads on a text, and the head: its logits can be had again from D numbers a token.

    The head is a copy, so that the network itself may change afterwards. Of several processes, each keeps the windows
    of its share.
    """

    head: nn.Linear
    hidden_NTD: Tensor


@torch.no_grad()
def measure_quality(
    network: Network,
    ids_NT: Tensor,
    *,
    reference: Reference | None = None,
    keep: bool = False,
    compute: str = "auto",
    progress: Progress | None = None,
    label: str = "evaluate",
) -> tuple[Quality, Reference | None]:
    """Perplexity of `network` on windows `ids_NT`, and its distance to a reference taken on the same windows.

    With `keep`, the second result is a `Reference` to this network as it is now.
    """
    device = network.device
    tokens_per_batch = _TOKENS_PER_BATCH.get(device.type, 2048)
    batch = max(1, tokens_per_batch // ids_NT.shape[1])
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    own_NT = ids_NT[share(len(ids_NT))]
    kept = [torch.empty(0, ids_NT.shape[1], network.hidden_size, device=device)] if keep and not len(own_NT) else []
    start = time.perf_counter()
    with (progress or Quiet()).stage(label, total=len(own_NT)) as bar:
        for i, hidden_BTD in zip(
            range(0, len(own_NT), batch), hidden_in_batches(network, own_NT, compute, tokens_per_batch), strict=True
        ):
            ids_BT, hidden_BTD = own_NT[i : i + batch].to(device), hidden_BTD.float()
            if keep:
                kept.append(hidden_BTD)
            original_BTD = None if reference is None else reference.hidden_NTD[i : i + batch]
            with precision("tf32", device):
                sums += _sums(network, hidden_BTD, ids_BT, reference.head if reference else None, original_BTD)
            bar.advance(len(ids_BT))
    add_up([sums])
    tokens = len(ids_NT) * (ids_NT.shape[1] - 1)
    nll, kl, same = (sums / tokens).tolist()
    seconds = time.perf_counter() - start
    distance = (None, None) if reference is None else (kl, same)
    quality = Quality(float(torch.tensor(nll, dtype=torch.float64).exp()), tokens, seconds, *distance)
    return quality, Reference(copy.deepcopy(network.head), torch.cat(kept)) if keep else None


def _sums(
    network: Network, hidden_BTD: Tensor, ids_BT: Tensor, original: nn.Linear | None, original_BTD: Tensor | None
) -> Tensor:
    """Sums of negative log-likelihood, KL and agreement over the predicted tokens of a batch, `(3,)` in fp64."""
    targets_P = ids_BT[:, 1:].flatten()
    hidden_PD = hidden_BTD[:, :-1].flatten(0, 1)
    original_PD = None if original_BTD is None else original_BTD[:, :-1].flatten(0, 1)
    sums = torch.zeros(3, dtype=torch.float64, device=hidden_BTD.device)
    chunk = TOKENS_PER_CHUNK.get(hidden_BTD.device.type, 128)
    for i in range(0, len(targets_P), chunk):
        part = slice(i, i + chunk)
        logp_PV = network.logits(hidden_PD[part]).float().log_softmax(-1)
        sums[0] += F.nll_loss(logp_PV, targets_P[part], reduction="sum").double()
        if original is not None and original_PD is not None:
            logq_PV = network.finish(original(original_PD[part])).float().log_softmax(-1)
            most_likely_P1 = logp_PV.max(-1, keepdim=True).indices
            sums[2] += (logq_PV.gather(1, most_likely_P1) == logq_PV.amax(-1, keepdim=True)).sum()
            gap_PV = torch.sub(logq_PV, logp_PV, out=logp_PV)
            sums[1] += logq_PV.exp_().mul_(gap_PV).sum(-1).sum(dtype=torch.float64)
    return sums
