"""The law that everything rests on: folded maps leave the function alone, for each family and each subset of sites.

The zoo's models are adversarial on purpose: gains far from 1, biases, embedding rows with a mean, outlier channels.
"""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import zoo

from spinfold.errors import SpinfoldError
from spinfold.evaluation import prove_same_function, take_fingerprint
from spinfold.folding import fold, fold_norms
from spinfold.maps import Chain, Diagonal, Hadamard, Orthogonal, SiteMaps, random_orthogonal
from spinfold.networks import SITES, Network
from spinfold.networks.sources import resolve

UNKNOWN = ("gpt2",)
FAMILIES = zoo.FAMILIES | zoo.EXPERTS
KNOWN = [name for name in FAMILIES if name not in UNKNOWN]
SUBSETS = [subset for n in range(1, len(SITES) + 1) for subset in combinations(SITES, n)]


def tiny(family: str, seed: int = 0, hidden: int = 96, dtype: torch.dtype = torch.float32) -> Network:
    return Network(FAMILIES[family](seed, hidden, torch.float32)).to(dtype=dtype)


def maps_for(network: Network, sites: tuple[str, ...], seed: int, kind: str = "hadamard") -> SiteMaps:
    """Random maps at `sites`; a different one in each layer, so that a layer mixed up with another shows."""
    first = network.layers[0]
    layers = range(len(network.layers))

    def one(size: int, seed: int) -> Hadamard | Orthogonal:
        return Hadamard(size, seed=seed) if kind == "hadamard" else Orthogonal(random_orthogonal(size, seed).R_NN)

    every = SiteMaps(
        residual=one(network.hidden_size, seed),
        value=tuple(one(first.head_dim, seed + 10 + i) for i in layers),
        query_key=tuple(one(first.head_dim, seed + 20 + i) for i in layers),
        down=tuple(one(x.mlp_width, seed + 30 + x.index) for x in network.layers),
    )
    return SiteMaps(**{site: getattr(every, site) for site in sites})


def rotate(network: Network, maps: SiteMaps) -> None:
    if maps.residual is not None:
        fold_norms(network)
    fold(network, maps)


@pytest.mark.parametrize("family", KNOWN)
def test_wires_alone_change_nothing(family: str) -> None:
    """Seen through its family, a model gives bit for bit what Hugging Face's own forward gives."""
    model = FAMILIES[family](0, 96, torch.float32)
    ids_BT = zoo.random_tokens(0, 2, 24)
    eager = model.config._attn_implementation == "eager"
    with torch.no_grad():
        expected = model(ids_BT).logits
        actual = Network(model)(ids_BT)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 if eager else 0)


@pytest.mark.parametrize("sites", SUBSETS, ids="+".join)
@pytest.mark.parametrize("family", KNOWN)
def test_rotation_leaves_logits_unchanged(family: str, sites: tuple[str, ...]) -> None:
    for dtype in (torch.float64, torch.float32):
        network = tiny(family, seed=1, dtype=dtype)
        ids_BT = zoo.random_tokens(1, 2, 24)
        original = take_fingerprint(network, ids_BT)
        before = [linear.weight_OI.clone() for linear in network.linears]
        maps = maps_for(network, sites, seed=7, kind="hadamard" if dtype == torch.float32 else "orthogonal")
        if refused := [site for site in sites if not network.family.supports(site)]:
            assert refused == ["residual"]
            with pytest.raises(SpinfoldError, match="gain"):
                rotate(network, maps)
            continue
        rotate(network, maps)
        proof = prove_same_function(network, original)
        assert proof.ok, proof
        changed = [not torch.equal(old, new.weight_OI) for old, new in zip(before, network.linears, strict=True)]
        expected = {"residual": {"q", "k", "v", "o", "gate", "up", "down"}, "value": {"v", "o"}, "down": {"down"}}
        touched = set().union(*(expected.get(site, set()) for site in sites))
        assert changed == [linear.role in touched for linear in network.linears]


@pytest.mark.parametrize("hidden", [80, 88, 96, 112, 136, 144, 152])
@pytest.mark.parametrize("family", ["llama_tied", "llama_biases", "qwen3", "phi3", "granite"])
def test_any_hidden_size(family: str, hidden: int) -> None:
    for dtype in (torch.float64, torch.float32):
        network = tiny(family, seed=2, hidden=hidden, dtype=dtype)
        original = take_fingerprint(network, zoo.random_tokens(2, 2, 16))
        rotate(network, maps_for(network, SITES, seed=3))
        assert (proof := prove_same_function(network, original)).ok, proof


@pytest.mark.slow
def test_the_default_model_in_both_precisions() -> None:
    checkpoint = resolve("smollm2")
    ids_BT = torch.randint(checkpoint.config.vocab_size, (1, 128), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float64):
        network = Network(checkpoint.load_model(torch.float32)).to(dtype=dtype)
        network.untie()
        original = take_fingerprint(network, ids_BT)
        before = network.layers[3].linears["q"].weight_OI.clone()
        rotate(network, maps_for(network, SITES, seed=8))
        assert (proof := prove_same_function(network, original)).ok, proof
        assert not torch.equal(before, network.layers[3].linears["q"].weight_OI)


@pytest.mark.parametrize("family", KNOWN)
def test_invertible_maps_that_are_not_orthogonal(family: str) -> None:
    """Scales at value and down, and a general invertible basis at query_key, fold exactly too."""
    network = tiny(family, seed=3, dtype=torch.float64)
    original = take_fingerprint(network, zoo.random_tokens(3, 2, 16))
    first, layers = network.layers[0], range(len(network.layers))

    def scale(size: int, seed: int) -> Diagonal:
        generator = torch.Generator().manual_seed(seed)
        return Diagonal(torch.rand(size, generator=generator, dtype=torch.float64) + 0.5)

    maps = SiteMaps(
        value=tuple(Chain(scale(first.head_dim, i), random_orthogonal(first.head_dim, i)) for i in layers),
        query_key=tuple(Chain(random_orthogonal(first.head_dim, i), scale(first.head_dim, i)) for i in layers),
        down=tuple(Chain(scale(x.mlp_width, x.index), Hadamard(x.mlp_width, seed=x.index)) for x in network.layers),
    )
    fold(network, maps)
    assert (proof := prove_same_function(network, original, orthogonal=False)).ok, proof


@pytest.mark.parametrize("family", [name for name in KNOWN if name not in ("gemma2", "gemma3", "olmo2")])
def test_folding_the_inverse_undoes_the_fold(family: str) -> None:
    network = tiny(family, seed=4, dtype=torch.float64)
    fold_norms(network)
    before = [linear.weight_OI.clone() for linear in network.linears]
    maps = maps_for(network, ("residual", "value"), seed=5, kind="orthogonal")
    fold(network, maps)
    fold(network, maps.each_replaced(lambda one: one.inverse()))
    for old, linear in zip(before, network.linears, strict=True):
        torch.testing.assert_close(linear.weight_OI, old, rtol=1e-12, atol=1e-12)


def test_a_copy_is_independent() -> None:
    network = tiny("qwen2", seed=5, dtype=torch.float64)
    ids_BT = zoo.random_tokens(5, 1, 16)
    expected = network(ids_BT)
    twin = network.copy()
    rotate(twin, maps_for(twin, ("down", "query_key"), seed=1))
    for linear in twin.linears:
        linear.weight_OI.zero_()
    assert torch.equal(network(ids_BT), expected)
    assert not torch.equal(twin(ids_BT), expected)


# Negative controls: each mistake that public code has made must break the law.


def _broken(break_it) -> float:  # type: ignore[no-untyped-def]
    network = tiny("llama_biases", seed=6, dtype=torch.float64)
    original = take_fingerprint(network, zoo.random_tokens(6, 2, 16))
    break_it(network)
    proof = prove_same_function(network, original)
    assert not proof.ok
    return proof.measured


def test_a_gain_left_behind_breaks_the_law() -> None:
    def skip_one_gain(network: Network) -> None:
        gain = network.layers[1].mlp_norm.weight.detach().clone()
        fold_norms(network)
        network.layers[1].mlp_norm.weight.data.copy_(gain)
        fold(network, maps_for(network, ("residual",), 0))

    assert _broken(skip_one_gain) > 1e-2


def test_centring_the_embedding_breaks_the_law() -> None:
    def centre(network: Network) -> None:
        network.untie()
        weight = network.embedding.weight.data
        weight.sub_(weight.mean(-1, keepdim=True))

    assert _broken(centre) > 1e-2


def test_a_value_bias_left_behind_breaks_the_law() -> None:
    def forget_bias(network: Network) -> None:
        bias = network.layers[0].linears["v"].bias_O.clone()
        fold(network, maps_for(network, ("value",), 0))
        network.layers[0].linears["v"].bias_O.copy_(bias)

    assert _broken(forget_bias) > 1e-3


def test_the_wrong_transpose_breaks_the_law() -> None:
    def transpose(network: Network) -> None:
        fold(network, maps_for(network, ("value",), 0, kind="orthogonal"))
        for layer in network.layers:
            layer.linears["o"].weight_OI.copy_(layer.linears["o"].weight_OI.flip(1))

    assert _broken(transpose) > 1e-2


def test_a_failed_proof_names_the_first_deviating_block() -> None:
    network = tiny("mistral", seed=7, dtype=torch.float64)
    original = take_fingerprint(network, zoo.random_tokens(7, 2, 16))
    network.layers[1].linears["gate"].weight_OI.mul_(1.01)
    proof = prove_same_function(network, original)
    assert not proof.ok and "block 1" in proof.detail


def test_an_unknown_model_is_refused() -> None:
    for name in UNKNOWN:
        with pytest.raises(SpinfoldError, match="not known"):
            Network(zoo.FAMILIES[name](0, 96, torch.float32))


def test_a_parameter_nobody_described_is_refused() -> None:
    model = zoo.FAMILIES["llama"](0, 96, torch.float32)
    model.base_model.layers[0].mlp.extra = torch.nn.Linear(96, 96)
    with pytest.raises(SpinfoldError, match=r"mlp\.extra"):
        Network(model)
