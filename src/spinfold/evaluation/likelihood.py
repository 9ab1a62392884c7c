"""How likely a network finds some text after some other, for many pairs at once.

    log p(continuation | context) = sum of log p(token | all before it) over the tokens of the continuation, in nats

The pair is tokenized as one text, with the special tokens that the tokenizer itself adds; the context's own tokens
say where the continuation begins. So does lm-evaluation-harness 0.4.13.

Shapes: S sequences, B sequences of a batch, T tokens, D residual width, P scored tokens of a batch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spinfold.compute import pick_precision, precision
from spinfold.distributed import add_up, rank, world
from spinfold.errors import CheckFailed, SpinfoldError
from spinfold.networks import Network
from spinfold.progress import Bar

__all__ = ["log_likelihoods"]

_TOKENS_PER_BATCH = {"cuda": 65536, "cpu": 2048}
_TOKENS_PER_CHUNK = 4096
"""Scored tokens whose logits stand in memory at once."""


@torch.no_grad()
def log_likelihoods(
    network: Network, pairs: Sequence[tuple[str, str]], *, compute: str = "auto", bar: Bar | None = None
) -> list[float]:
    """The log-likelihood of each continuation given its context, in nats, for `(context, continuation)` in `pairs`.

    A sequence that the network can't see whole loses tokens at its beginning. Padding stands on the right, where no
    token before it can attend to it. Raises `SpinfoldError` if the network has no tokenizer, and `CheckFailed` if it
    gives something that is not a number.
    """
    device, mode = network.device, pick_precision(compute, network.device)
    sequences = _encode(network, pairs)
    scores_S = torch.zeros(len(pairs), dtype=torch.float64)
    batches = list(_batches([len(ids_T) for ids_T, _ in sequences], _TOKENS_PER_BATCH.get(device.type, 2048)))
    for batch in batches[rank() :: world()]:
        ids_BT = pad_sequence([sequences[i][0] for i in batch], batch_first=True)
        starts_B1, ends_B1 = torch.tensor([(sequences[i][1], len(sequences[i][0])) for i in batch]).T[..., None]
        place_T = torch.arange(1, ids_BT.shape[1])
        scored_BT = (starts_B1 <= place_T) & (place_T < ends_B1)  # of the targets, which are one token ahead
        with precision(mode, device):
            hidden_PD = network.hidden(ids_BT[:, :-1].to(device))[scored_BT.to(device)]
        with precision("tf32", device):
            logp_P = _log_probabilities(network, hidden_PD, ids_BT[:, 1:][scored_BT].to(device))
        rows_P = torch.tensor(batch)[scored_BT.nonzero()[:, 0]]
        scores_S.index_add_(0, rows_P, logp_P.double().cpu())
        if bar is not None:
            bar.advance(len(batch))
    add_up([scores_S])
    if scores_S.isnan().any():
        raise CheckFailed(
            "The network's output is not a number.",
            f"It is for {int(scores_S.isnan().sum())} of {len(pairs)} sequences.",
            "Look at the run's report: weights or scales have probably overflowed.",
        )
    return scores_S.tolist()


def _log_probabilities(network: Network, hidden_PD: Tensor, targets_P: Tensor) -> Tensor:
    """log p(target) at each position, `(P,)`, the head computed for some positions at a time."""
    chunks = zip(hidden_PD.split(_TOKENS_PER_CHUNK), targets_P.split(_TOKENS_PER_CHUNK), strict=True)
    return torch.cat(
        [network.logits(h_PD).float().log_softmax(-1).gather(1, t_P[:, None])[:, 0] for h_PD, t_P in chunks]
    )


def _encode(network: Network, pairs: Sequence[tuple[str, str]]) -> list[tuple[Tensor, int]]:
    """Of each pair its tokens, `(T,)`, and the index of the first one to be scored.

    Blanks at the end of a context count as the continuation's: most vocabularies have them in front of words.
    """
    if (tokenizer := network.tokenizer) is None:
        raise SpinfoldError(
            f"{network.name} can't be measured on tasks.",
            "It has no tokenizer.",
            "Put its tokenizer files beside the weights.",
        )

    def tokens(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]

    contexts = [context.rstrip() for context, _ in pairs]
    different = list(dict.fromkeys(contexts))
    length_of = dict(zip(different, map(len, tokens(different)), strict=True))
    longest = 1 + (getattr(network.config, "max_position_embeddings", None) or sys.maxsize - 1)  # the last is not read
    sequences = []
    for context, ids in zip(contexts, tokens(["".join(pair) for pair in pairs]), strict=True):
        start = min(length_of[context], len(ids) - 1) - max(0, len(ids) - longest)
        sequences.append((torch.tensor(ids[-longest:]), max(1, start)))
    return sequences


def _batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices, the longest first, in batches that hold at most `tokens` with their padding, or a single sequence."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, tokens // lengths[order[0]])
        yield order[:size]
        order = order[size:]
