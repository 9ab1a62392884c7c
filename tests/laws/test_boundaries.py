"""Residual bases that differ per boundary: the folded network is the same function for any rank of the changes between
them, and what the fit saw is what the folded network computes.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import zoo
from torch import Tensor

from spinfold.errors import SpinfoldError
from spinfold.evaluation import Proof, prove_same_function, take_fingerprint
from spinfold.folding import fold, fold_norms
from spinfold.maps import (
    CayleySGD,
    Hadamard,
    Identity,
    LowRankCorrection,
    Map,
    Orthogonal,
    SiteMaps,
    cayley,
    chain_of_bases,
    from_parts,
    low_rank_rotation,
    orthogonality_gap,
    random_orthogonal,
    to_parts,
)
from spinfold.methods import METHODS, FitTask
from spinfold.methods.respinquant import joined, learnable_boundaries
from spinfold.networks import SKIP_WIRES, Network, family_of
from spinfold.recipe import Recipe
from spinfold.runtime import quantize_wires

POST_NORMS = ("gemma2", "gemma3", "olmo2")
FAMILIES = [name for name in zoo.FAMILIES if name not in ("gpt2", *POST_NORMS)]
WIDTH = 96
RANKS = (0, 8, 32, WIDTH)
IDS_BT = zoo.random_tokens(1, 2, 24)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turn(size: int, seed: int, angle: float = 0.1) -> Tensor:
    """A rotation near I: planes turned by angles of the order of `angle`."""
    A_NN = normal(size, size, seed=seed) * (angle / size**0.5)
    return cayley(A_NN - A_NN.T)


def bases(count: int, size: int = WIDTH, angle: float = 0.1) -> list[Tensor]:
    """Fitted bases stand-ins: one random Hadamard, and a turn of its own for each."""
    return [Hadamard(size, seed=3).matrix() @ turn(size, seed, angle) for seed in range(count)]


def tiny(family: str, dtype: torch.dtype = torch.float64) -> Network:
    return Network(zoo.FAMILIES[family](1, WIDTH, torch.float32)).to(dtype=dtype)


def per_boundary(network: Network) -> SiteMaps:
    head_dim, layers = network.layers[0].head_dim, range(len(network.layers))
    return SiteMaps(
        residual=tuple(Orthogonal(R_DD) for R_DD in bases(2 * len(layers) + 1)),
        value=tuple(random_orthogonal(head_dim, i) for i in layers),
    )


def folded(network: Network, maps: SiteMaps) -> Network:
    twin = network.copy()
    fold_norms(twin)
    fold(twin, maps)
    return twin


def proof_of(network: Network, maps: SiteMaps) -> Proof:
    original = take_fingerprint(network, IDS_BT)
    return prove_same_function(folded(network, maps), original)


# ---- the map -----------------------------------------------------------------------------------------------------

CORRECTIONS = {
    "general": lambda: LowRankCorrection(normal(10, 3, seed=1), normal(3, 3, seed=2)),
    "rotation": lambda: low_rank_rotation(turn(10, 0), 4),
    "full": lambda: LowRankCorrection(normal(4, 4, seed=1), normal(4, 4, seed=2)),
}


@pytest.fixture(params=CORRECTIONS)
def correction(request: pytest.FixtureRequest) -> LowRankCorrection:
    return CORRECTIONS[request.param]()


def test_a_correction_is_the_identity_and_a_low_rank(correction: LowRankCorrection) -> None:
    expected_NN = torch.eye(correction.size).double() + correction.U_NR @ correction.K_RR @ correction.U_NR.T
    x = normal(5, correction.size)
    torch.testing.assert_close(correction.matrix(), expected_NN)
    torch.testing.assert_close(correction.apply(x), x @ expected_NN)
    torch.testing.assert_close(correction.transpose().matrix(), expected_NN.T)
    torch.testing.assert_close(correction.inverse().matrix(), expected_NN.inverse())
    assert correction.orthogonal == (orthogonality_gap(expected_NN) < 1e-10)
    assert correction.explain() and correction.inverse().explain()


def test_a_correction_is_stored_exactly(correction: LowRankCorrection) -> None:
    again = from_parts(*to_parts(correction))
    x = normal(3, correction.size)
    assert again.apply(x).equal(correction.apply(x)) and again.inverse().apply(x).equal(correction.inverse().apply(x))


def test_a_correction_costs_its_rank() -> None:
    """The figures of the paper: 2 N r + r² products per token, and U read once though it is used twice."""
    cost = low_rank_rotation(turn(64, 0), 8).to(dtype=torch.float16).cost()
    assert cost.flops == 2 * (2 * 64 * 8 + 8 * 8) + 64
    assert cost.bytes == 2 * (64 * 8 + 8 * 8)


def test_a_correction_is_differentiable_and_not_lowered_by_autocast() -> None:
    U_NR, K_RR = normal(6, 2, seed=1).requires_grad_(), normal(2, 2, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda u, k: LowRankCorrection(u, k).apply(normal(3, 6)), (U_NR, K_RR))
    one, x = LowRankCorrection(U_NR.detach().float(), K_RR.detach().float()), normal(3, 6).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = one.apply(x)
    assert inside.equal(one.apply(x))


def test_broken_corrections_say_why() -> None:
    U_NR = torch.eye(4, 2).double()
    assert "no inverse" in LowRankCorrection(U_NR, -torch.eye(2).double()).explain().reason
    assert "finite" in LowRankCorrection(U_NR * torch.nan, torch.eye(2).double()).explain().reason
    with pytest.raises(ValueError):
        LowRankCorrection(U_NR, torch.eye(3))


# ---- the nearest one ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("rank", [2, 8, 32, 62, 64])
def test_no_correction_of_that_rank_is_nearer(rank: int, angle: float) -> None:
    """For even ranks ‖T - C‖ meets the Eckart-Young bound of T - I, and C is orthogonal."""
    T_NN = turn(64, seed=rank, angle=angle)
    C_NN = low_rank_rotation(T_NN, rank).matrix()
    left_out = torch.linalg.svdvals(T_NN - torch.eye(64))[rank:]
    torch.testing.assert_close((T_NN - C_NN).norm(), left_out.norm(), rtol=1e-9, atol=1e-12)
    assert orthogonality_gap(C_NN) < 1e-13
    assert int(torch.linalg.matrix_rank(C_NN - torch.eye(64), atol=1e-9)) <= rank


@pytest.mark.parametrize("rank", [1, 3, 31])
def test_an_odd_rank_is_orthogonal_and_no_worse_than_the_even_one_below(rank: int) -> None:
    T_NN = turn(64, seed=rank, angle=0.5)
    odd, even = (low_rank_rotation(T_NN, r).matrix() for r in (rank, rank - 1))
    assert orthogonality_gap(odd) < 1e-13
    assert (T_NN - odd).norm() <= (T_NN - even).norm() + 1e-12


def test_a_reflection_is_kept_first() -> None:
    """-1 is the largest angle there is, and has no partner."""
    mirror_NN = turn(12, 0) @ torch.diag(torch.tensor([-1.0] + [1.0] * 11).double())
    assert torch.linalg.det(low_rank_rotation(mirror_NN, 1).matrix()) < 0


def test_planes_at_rest_need_no_rank() -> None:
    T_NN = torch.block_diag(turn(4, 0, angle=1.0), torch.eye(12).double())
    moved = low_rank_rotation(T_NN, 10)
    assert isinstance(moved, LowRankCorrection) and moved.rank == 4
    torch.testing.assert_close(moved.matrix(), T_NN)
    assert isinstance(low_rank_rotation(torch.eye(8), 8), Identity)
    assert isinstance(low_rank_rotation(T_NN, 0), Identity)


@pytest.mark.parametrize("rank", RANKS)
def test_a_chain_links_its_bases_exactly_and_comes_nearer_with_rank(rank: int) -> None:
    targets = bases(7)
    linked, changes = chain_of_bases(targets, rank)
    for change, (B_DD, after_DD) in zip(changes, pairwise(linked), strict=True):
        torch.testing.assert_close(B_DD @ change.matrix(), after_DD, rtol=0, atol=1e-13)
        assert orthogonality_gap(after_DD) < 1e-12

    def misses(rank: int) -> Tensor:
        return torch.stack([(a - b).norm() for a, b in zip(chain_of_bases(targets, rank)[0], targets, strict=True)])

    if rank == 0:
        assert all(B_DD.equal(linked[0]) for B_DD in linked)
    elif rank == WIDTH:
        assert misses(rank).max() < 1e-12
    else:
        assert misses(rank)[1:].mean() < misses(rank // 2)[1:].mean()


# ---- the fold ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exact_chain_is_the_same_function_at_any_rank(family: str, rank: int) -> None:
    for dtype in (torch.float64, torch.float32):
        network = tiny(family, dtype)
        maps = joined(per_boundary(network), rank)
        assert maps.explain() and isinstance(maps.residual, tuple) == (rank > 0)
        assert (proof := proof_of(network, maps)).ok, proof


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_changes_need_not_be_given(family: str) -> None:
    """Without `skip` they are the products of neighbouring bases, however far apart."""
    network = tiny(family)
    far = tuple(random_orthogonal(WIDTH, seed) for seed in range(2 * len(network.layers) + 1))
    assert (proof := proof_of(network, SiteMaps(residual=far))).ok, proof


@pytest.mark.parametrize("rank", RANKS)
def test_the_published_changes_are_the_same_function_at_full_rank_only(rank: int) -> None:
    network = tiny("llama")
    proof = proof_of(network, joined(per_boundary(network), rank, "published"))
    assert proof.ok if rank == WIDTH else proof.measured > 1e-3, proof


def test_one_basis_at_all_boundaries_is_one_map() -> None:
    """The weights agree to the bit, and no op is left on a skip connection."""
    network = tiny("granite", torch.float32)
    one, num_boundaries = Hadamard(WIDTH, seed=5), 2 * len(network.layers) + 1
    skip = tuple(Identity(WIDTH) for _ in range(num_boundaries - 1))
    single = folded(network, SiteMaps(residual=one))
    many = folded(network, SiteMaps(residual=(one,) * num_boundaries, skip=skip))
    for name, weight in single.model.state_dict().items():
        assert weight.equal(many.model.state_dict()[name]), name
    assert not any(len(layer.wire(wire).ops) for layer in many.layers for wire in SKIP_WIRES)


def test_online_ops_stand_on_a_copy_too() -> None:
    network = tiny("llama_tied")
    original = take_fingerprint(network, IDS_BT)
    here = folded(network, joined(per_boundary(network), 8))
    twin = here.copy()
    for layer in here.layers:
        for wire in SKIP_WIRES:
            del layer.wire(wire).ops[:]
    assert prove_same_function(twin, original).ok
    assert not prove_same_function(here, original).ok
    assert prove_same_function(twin.to(dtype=torch.float32), original).ok


def test_the_maps_of_a_file_are_the_same_maps() -> None:
    network = tiny("qwen2")
    for maps in (per_boundary(network), joined(per_boundary(network), 8), SiteMaps(residual=Hadamard(WIDTH, seed=1))):
        configs, tensors = maps.to_parts()
        again = SiteMaps.from_parts(configs, tensors)
        assert again.sites == maps.sites and [name for name, _ in again.each()] == [name for name, _ in maps.each()]
        for (name, one), (_, other) in zip(maps.each(), again.each(), strict=True):
            assert one.matrix().equal(other.matrix()), name
        assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)


def test_boundaries_are_counted() -> None:
    network = tiny("llama")
    maps = per_boundary(network)
    assert isinstance(maps.residual, tuple)
    with pytest.raises(ValueError, match="boundaries"):
        folded(network, SiteMaps(residual=maps.residual[:-1]))
    with pytest.raises(ValueError, match="skip"):
        SiteMaps(residual=maps.residual, skip=(Identity(WIDTH),))
    with pytest.raises(ValueError, match="skip"):
        SiteMaps(residual=Hadamard(WIDTH), skip=())
    with pytest.raises(ValueError, match="boundaries"):
        maps.at("residual", 0)
    with pytest.raises(ValueError, match="already"):
        fold(folded(network, maps), SiteMaps(residual=Hadamard(WIDTH)))


@pytest.mark.parametrize("family", POST_NORMS)
def test_norms_on_the_writing_side_are_refused(family: str) -> None:
    network = tiny(family)
    with pytest.raises(SpinfoldError, match="gain"):
        fold(network, per_boundary(network))


# Negative controls: each of these mistakes must break the law.


def _breaks(family: str, maps: SiteMaps) -> bool:
    return proof_of(tiny(family), maps).measured > 1e-3


def test_a_change_of_basis_in_the_wrong_place_breaks_the_law() -> None:
    maps = joined(per_boundary(tiny("llama")), WIDTH)
    assert isinstance(maps.residual, tuple) and maps.skip is not None
    transposed: tuple[Map, ...] = tuple(one.transpose() for one in maps.skip)
    for skip in (transposed, maps.skip[::-1], (Identity(WIDTH), *maps.skip[1:])):
        assert _breaks("llama", SiteMaps(residual=maps.residual, skip=skip))


def test_ignoring_the_residual_multiplier_breaks_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = joined(per_boundary(tiny("granite")), 8)
    assert not _breaks("granite", maps)
    monkeypatch.setattr(
        "spinfold.networks.network.family_of", lambda name: replace(family_of(name), residual_factor=None)
    )
    assert _breaks("granite", maps)


# ---- the fit -----------------------------------------------------------------------------------------------------

RECIPE = Recipe().with_(
    method="respinquant",
    bits="W16A3KV4",
    calibration__seq_len=48,
    fit__steps=12,
    fit__batch=4,
    fit__learning_rate=0.1,
    compute="fp32",
)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama_biases", "granite", "qwen3"])
def test_what_the_fit_sees_is_what_the_fold_computes(family: str) -> None:
    """Quantizers through maps on the unfolded network, and plain quantizers on the folded one, are one function."""
    network = tiny(family)
    fold_norms(network)
    maps = joined(per_boundary(network), 8)
    twin = network.copy()
    fold(twin, maps)
    plain = network(IDS_BT)
    quantize_wires(network, RECIPE, maps)
    quantize_wires(twin, RECIPE)
    seen, computed = network(IDS_BT), twin(IDS_BT)
    torch.testing.assert_close(seen, computed, rtol=0, atol=1e-8)
    assert (seen - plain).norm() > 1e-2 * plain.norm()


def test_every_basis_that_a_quantizer_reads_in_gets_its_own_gradient() -> None:
    network = tiny("llama", torch.float32)
    fold_norms(network)
    start = SiteMaps(residual=Hadamard(WIDTH, seed=1), value=tuple(Hadamard(24, seed=i) for i in range(2)))
    maps, learned = learnable_boundaries(start, 2, network.device)
    take_off = quantize_wires(network, RECIPE, maps)
    network(IDS_BT).square().mean().backward()
    take_off()
    bases, values = [one for one in learned if len(one) == WIDTH], [one for one in learned if len(one) == 24]
    assert (len(bases), len(values)) == (4, 2)
    for gradient in (torch.stack([one.grad for one in ones if one.grad is not None]) for ones in (bases, values)):
        norms = gradient.flatten(1).norm(dim=1)
        assert (norms > 0).all() and len(set(norms.tolist())) == len(norms)


def _task(**changes: object) -> FitTask:
    network = tiny("llama", torch.float32)
    fold_norms(network)
    recipe = RECIPE.with_(**changes)
    sites = recipe.sites or METHODS["respinquant"].sites
    return FitTask(network, recipe, sites, lambda length, _: zoo.random_tokens(2, 4, length))


@pytest.mark.parametrize("chain", ["exact", "published"])
def test_a_fit_gives_maps_of_the_rank_asked_for(chain: str) -> None:
    task = _task(fit__rank=6, fit__chain=chain)
    before = [linear.weight_OI.clone() for linear in task.network.linears]
    maps, log = METHODS["respinquant"].fit(task)
    assert maps.explain() and maps.sites == ("residual", "value", "query_key", "down")
    assert sum(log.losses[-4:]) < sum(log.losses[:4])
    assert maps.skip is not None
    assert [one.rank for one in maps.skip[:-1] if isinstance(one, LowRankCorrection)] == [6, 6, 6]
    assert isinstance(maps.skip[-1], Identity)
    assert all(one.orthogonal for one in maps.skip)
    assert all(old.equal(new.weight_OI) for old, new in zip(before, task.network.linears, strict=True))
    original = take_fingerprint(task.network, IDS_BT)
    fold(task.network, maps)
    assert prove_same_function(task.network, original).ok == (chain == "exact")


def test_the_preset_drops_what_the_rank_leaves_out_and_the_default_keeps_the_function() -> None:
    assert (Recipe.load("respinquant").fit.rank, Recipe.load("respinquant").fit.chain) == (32, "published")
    maps, _ = METHODS["respinquant"].fit(_task(fit__rank=8, fit__steps=1))
    assert proof_of(tiny("llama"), maps).ok


def test_rank_zero_is_one_global_rotation() -> None:
    maps, _ = METHODS["respinquant"].fit(_task(fit__rank=0, fit__steps=1))
    assert isinstance(maps.residual, Orthogonal) and maps.skip is None


def test_without_the_residual_site_only_values_are_fitted() -> None:
    maps, _ = METHODS["respinquant"].fit(_task(sites=("value", "down"), fit__steps=1))
    assert maps.sites == ("value", "down")


def test_one_leaf_steps_like_one_leaf_each() -> None:
    """A batch of bases is stepped matrix by matrix: no basis feels another one's gradient."""
    stack_BNN, gradient_BNN = torch.stack(bases(3, 12)).requires_grad_(), normal(3, 12, 12, seed=8)
    singles = [stack_BNN[i].detach().clone().requires_grad_() for i in range(3)]
    stack_BNN.grad = gradient_BNN
    for single, gradient_NN in zip(singles, gradient_BNN, strict=True):
        single.grad = gradient_NN.clone()
    for rule in ("capped", "spectral"):
        CayleySGD([stack_BNN], 0.1, rule=rule).step()  # type: ignore[arg-type]
        CayleySGD(singles, 0.1, rule=rule).step()  # type: ignore[arg-type]
        torch.testing.assert_close(stack_BNN.detach(), torch.stack(singles).detach())
