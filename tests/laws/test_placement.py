"""Laws of what makes large models fit: where weights are, when activations are computed, and how much stands in memory
at once, changes no result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import zoo
from torch import Tensor
from torch.nn import functional as F

from spinfold.compute import leading_bits
from spinfold.errors import SpinfoldError
from spinfold.fitting import end_to_end, objectives
from spinfold.fitting.capture import capture
from spinfold.folding import fold, fold_norms
from spinfold.maps import CayleySGD, Hadamard, Orthogonal, SiteMaps, manifold, orthogonality_gap, random_orthogonal
from spinfold.methods import optrot
from spinfold.networks import Network, hidden_in_batches
from spinfold.networks.sources import resolve
from spinfold.recipe import Recipe
from spinfold.rounding import round_network

IN_FILES = ["llama", "llama_tied", "llama_biases", "qwen2", "qwen3", "phi3", "granite", "gemma2", "gemma3", "olmo2"]
IDS = zoo.random_tokens(0, 5, 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return partial(_saved, tmp_path_factory.mktemp("models"))


def _saved(root: Path, family: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    path = root / f"{family}-{dtype}"
    return path if path.exists() else zoo.save((zoo.FAMILIES | zoo.EXPERTS)[family](0, 96, dtype), path, shards=2)


def both(path: Path) -> tuple[Network, Network]:
    """A checkpoint's network with its layers in the files, and the same in memory."""
    checkpoint = resolve(path)
    assert checkpoint.can_stay_in_files
    away = Network(checkpoint.open_model(), store=checkpoint.weights)
    here = Network(checkpoint.load_model(torch.float32))
    assert here.resident and not away.resident
    return away, here


def fold_all(network: Network) -> None:
    """Norms into their readers, and random maps at all sites that the family can take."""
    layers, head_dim = network.layers, network.layers[0].head_dim
    residual = network.family.supports("residual").ok
    if residual:
        fold_norms(network)
    maps = SiteMaps(
        residual=random_orthogonal(network.hidden_size, 1) if residual else None,
        value=tuple(Hadamard(head_dim, seed=2) for _ in layers),
        down=tuple(random_orthogonal(layer.mlp_width, 3) for layer in layers),
    )
    fold(network, maps)


# ---- layers in files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", IN_FILES)
def test_a_network_in_files_is_the_network(family: str, folder: Callable[..., Path]) -> None:
    away, here = both(folder(family))
    assert torch.equal(away(IDS), here(IDS))
    for network in (away, here):
        network.untie()
        fold_all(network)
    assert torch.equal(away(IDS), here(IDS))
    assert all(p.is_meta for layer in away.layers for p in layer.module.parameters())
    for name, value in here.model.state_dict().items():
        assert torch.equal(away.tensors([name])[name], value)


def test_a_copy_changes_on_its_own(folder: Callable[..., Path]) -> None:
    away, here = both(folder("llama"))
    fold_all(twin := away.copy())
    assert torch.equal(away(IDS), here(IDS))
    fold_all(here)
    assert torch.equal(twin(IDS), here(IDS))


def test_a_nested_turn_fetches_once_and_an_error_ends_it(folder: Callable[..., Path]) -> None:
    layer = both(folder("llama"))[0].layers[0]
    with pytest.raises(KeyError), layer.present():
        weight_OI = layer.linears["q"].weight_OI
        with layer.present():
            assert layer.linears["q"].weight_OI.data_ptr() == weight_OI.data_ptr()
        raise KeyError
    assert layer.linears["q"].weight_OI.is_meta


@pytest.mark.parametrize("settings", ["gptq", "gptaq", "rtn", "autoround"])
def test_rounding_in_files_gives_the_same_bits(settings: str, folder: Callable[..., Path]) -> None:
    away, here = both(folder("llama"))
    recipe = Recipe().with_(rounding__method=settings, rounding__steps=2, calibration__samples=5)
    for network in (away, here):
        fold_all(network)
    for one, other in zip(*(round_network(network, recipe, IDS) for network in (away, here)), strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a.name, a.error) == (b.name, b.error)
            assert all(torch.equal(x, y) for x, y in zip(*(w.weight.tensors().values() for w in (a, b)), strict=True))
    assert torch.equal(away(IDS), here(IDS))


def test_a_pass_over_many_windows_is_the_same_layer_by_layer(folder: Callable[..., Path]) -> None:
    away, here = both(folder("llama"))
    pair = [torch.cat(list(hidden_in_batches(network, IDS, "fp32", 80))) for network in (away, here)]
    assert torch.equal(*pair)
    rows = [capture(network, IDS, ("qkv_input", "value"), 20, seed=0) for network in (away, here)]
    assert all(torch.equal(rows[0][key], rows[1][key]) for key in rows[1])


def test_what_files_cannot_give_layer_by_layer_is_held(folder: Callable[..., Path], tmp_path: Path) -> None:
    assert not resolve(folder("mixtral")).can_stay_in_files
    assert not resolve(zoo.write_gguf(zoo.FAMILIES["llama"](), tmp_path / "tiny.gguf", "llama")).can_stay_in_files


def test_weights_that_are_not_finite_are_refused_in_their_turn(tmp_path: Path) -> None:
    model = zoo.FAMILIES["llama"](0, 96, torch.float32)
    model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    checkpoint = resolve(zoo.save(model, tmp_path / "broken"))
    with pytest.raises(SpinfoldError, match="not all finite"):
        Network(checkpoint.open_model(), store=checkpoint.weights).hidden(IDS)


# ---- fits --------------------------------------------------------------------------------------------------------


def fitted(network: Network, *, checkpointing: bool, mode: str = "fp32") -> tuple[Tensor, tuple[float, ...]]:
    """A rotation of what the norms give, after two steps, and the losses."""
    R_DD = random_orthogonal(network.hidden_size, 0).R_NN.float().requires_grad_()
    turn = Orthogonal(R_DD)
    handles = [
        layer.wire("qkv_input").register_forward_hook(lambda _, __, x: turn.apply(x)) for layer in network.layers
    ]
    schedule = end_to_end.Schedule(2, batch=2, checkpointing=checkpointing)
    loss = partial(objectives.next_token_loss, network)
    log = end_to_end.fit_end_to_end(network, loss, [IDS], [CayleySGD([R_DD], 0.1)], schedule, mode)
    for handle in handles:
        handle.remove()
    return R_DD.detach(), log.losses


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3", "mixtral"])
def test_computing_activations_again_changes_nothing(family: str) -> None:
    network = Network((zoo.FAMILIES | zoo.EXPERTS)[family](0, 96, torch.float32))
    held, again = (fitted(network, checkpointing=flag) for flag in (False, True))
    assert torch.equal(held[0], again[0]) and held[1] == again[1]
    assert not network.checkpointing


def test_a_graph_fits_if_it_takes_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(zoo.FAMILIES["llama"](0, 96, torch.float32))
    layer = end_to_end.numbers_of_token(network.hidden_size, network.layers[0].mlp_width)
    graph = 4 * 100 * len(network.layers) * layer
    for free, fits in ((graph / 0.59, True), (graph / 0.61, False)):
        monkeypatch.setattr(end_to_end, "free_bytes", lambda free=free: int(free))
        assert end_to_end.graph_fits(network, 100) is fits


def test_a_fit_with_layers_in_files_is_the_same(folder: Callable[..., Path]) -> None:
    (a_DD, a), (b_DD, b) = (fitted(network, checkpointing=False) for network in both(folder("llama")))
    assert torch.equal(a_DD, b_DD) and a == b


@pytest.mark.parametrize("family", [*IN_FILES, "mixtral", "qwen3_moe"])
def test_weights_held_in_bf16_compute_what_autocast_computes(family: str) -> None:
    network = Network((zoo.FAMILIES | zoo.EXPERTS)[family](0, 96, torch.float32))
    held = network.held(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(held(IDS), network(IDS))
    assert all(p.dtype == torch.float32 for p in network.model.parameters())
    assert {linear.weight_OI.dtype for linear in held.linears} == {torch.bfloat16}


@pytest.mark.parametrize("size", [1, 7, 64, 10**6])
def test_the_loss_of_chunks_is_the_loss(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(zoo.FAMILIES["gemma2"](0, 96, torch.float64)).to(dtype=torch.float64)
    monkeypatch.setattr(objectives, "_BYTES_PER_CHUNK", 4 * zoo.VOCAB * size)
    shift_D = torch.zeros(network.hidden_size, dtype=torch.float64, requires_grad=True)
    handle = network.layers[1].wire("mlp_input").register_forward_hook(lambda _, __, x: x + shift_D)
    chunked = objectives.next_token_loss(network, IDS)
    whole = F.cross_entropy(network(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    handle.remove()
    gradients = [torch.autograd.grad(loss, shift_D)[0] for loss in (chunked, whole)]
    torch.testing.assert_close(chunked.double(), whole, rtol=1e-6, atol=0)  # of chunks it is taken in fp32
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_large_stacks_move_in_parts_to_the_same_place(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    for most in (manifold._STACKED, 1):
        monkeypatch.setattr(manifold, "_STACKED", most)
        params = [random_orthogonal(8, seed, torch.float32).R_NN.requires_grad_() for seed in range(5)]
        optimizer = CayleySGD(params, 0.3)
        sum((R_NN[0] ** 4).sum() for R_NN in params).backward()  # type: ignore[union-attr]
        optimizer.step()
        moved.append(torch.stack([R_NN.detach() for R_NN in params]))
    torch.testing.assert_close(*moved)
    assert orthogonality_gap(moved[0]) < 1e-5


def test_optrot_on_large_layers_has_the_same_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    network, found = Network(zoo.FAMILIES["llama_tied"]()), []
    for large in (optrot.LARGE, 0):
        monkeypatch.setattr(optrot, "LARGE", large)
        R_DD = random_orthogonal(network.hidden_size, 0, torch.float32).R_NN.requires_grad_()
        term = optrot.residual_term(
            network, optrot.total_of(lambda y: y.square().square().sum(-1)), 2, torch.full((len(network.layers),), -1)
        )
        value = term(R_DD, torch.Generator().manual_seed(0))
        found.append((value.detach(), torch.autograd.grad(value, R_DD)[0]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("size", [12, 64, 160, 1536, 14336, 11008])
@pytest.mark.parametrize("inverse", [False, True])
def test_a_hadamard_as_two_dense_products(size: int, inverse: bool) -> None:
    one = Hadamard(size).inverse() if inverse else Hadamard(size)
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(one.as_kronecker().apply(x), one.apply(x), atol=1e-5, rtol=1e-5)


def test_two_numbers_of_eleven_bits_hold_what_a_hessian_needs() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 1e3
    high, low = leading_bits(x), x - leading_bits(x)
    assert torch.equal(high + low, x)
    assert torch.equal(leading_bits(high), high)
    assert ((low - leading_bits(low)).abs() <= x.abs() * 2.0**-21).all()
