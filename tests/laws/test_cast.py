"""The bound on what rounding all weights to 16 bits may do: rounding keeps it by far, and no mistake comes near it.

The mistake is the smallest one that a fold can make and that has been made: one norm's gain is lost.
"""

from __future__ import annotations

import math

import pytest
import torch
import zoo
from torch import nn

from spinfold.checkpoint import round_weights
from spinfold.evaluation import Quality, cast_tolerance, prove_perplexity_kept, prove_same_function, take_fingerprint
from spinfold.folding import fold, fold_norms
from spinfold.maps import Hadamard, SiteMaps
from spinfold.networks import Network

KNOWN = [name for name in zoo.FAMILIES if name != "gpt2"]
FOLDED = [name for name in KNOWN if name not in ("gemma2", "gemma3", "olmo2")]


def rotated(network: Network, seed: int, lost: int | None = None) -> Network:
    """A copy with Hadamards at the value site and, where it can be, the residual; the gain of one norm lost."""
    twin = network.copy()
    twin.untie()
    residual = None
    if twin.family.supports("residual"):
        norms = [norm for x in twin.layers for norm in (x.attention_norm, x.mlp_norm)] + [twin.final_norm]
        if lost is not None:
            norm = norms[lost]
            assert isinstance(norm, nn.Module)
            norm.weight.data.fill_(1 - twin.family.gain_offset)
        fold_norms(twin)
        residual = Hadamard(twin.hidden_size, seed=seed)
    value = tuple(Hadamard(x.head_dim, seed=seed + 1 + x.index) for x in twin.layers)
    fold(twin, SiteMaps(residual=residual, value=value))
    return twin


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", KNOWN)
def test_rounding_takes_two_thirds_of_the_bound_at_most(family: str, dtype: torch.dtype) -> None:
    network = Network(zoo.FAMILIES[family](0))
    original = take_fingerprint(network, zoo.random_tokens(0, 2, 64))
    bound = cast_tolerance(dtype, len(network.layers))
    assert bound is not None
    for seed in range(2):
        twin = rotated(network, seed)
        round_weights(twin, dtype)
        error = prove_same_function(twin, original, tolerance=bound).measured
        assert 1e-5 < error < bound * 2 / 3


@pytest.mark.parametrize("family", FOLDED)
def test_a_lost_gain_takes_more_than_twice_the_bound(family: str) -> None:
    network = Network(zoo.FAMILIES[family](0))
    original = take_fingerprint(network, zoo.random_tokens(0, 2, 64))
    bound = cast_tolerance(torch.bfloat16, len(network.layers))
    assert bound is not None
    for lost in range(2 * len(network.layers) + 1):
        proof = prove_same_function(rotated(network, 0, lost), original, tolerance=bound)
        assert proof.measured > 2 * bound
        assert not proof.ok


def test_only_types_of_16_bits_have_a_bound() -> None:
    assert [cast_tolerance(dtype, 30) for dtype in (None, torch.float32, torch.float64)] == [None] * 3


@pytest.mark.parametrize(
    ("before", "after", "ok"),
    [
        (20.0, 20.09, True),
        (20.0, 19.91, True),
        (20.0, 20.11, False),
        (20.0, 19.89, False),
        (20.0, math.nan, False),
        (200.0, 300.0, True),  # no better than guessing among 128 tokens before
        (200.0, math.nan, False),
    ],
)
def test_perplexity_may_move_by_half_a_percent(before: float, after: float, ok: bool) -> None:
    qualities = (Quality(perplexity, 2040, 0.0) for perplexity in (before, after))
    assert prove_perplexity_kept(*qualities, 128).ok is ok
