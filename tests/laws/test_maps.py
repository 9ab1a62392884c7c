"""Laws of every linear map: linear, equal to its dense matrix, undone by its inverse, differentiable, storable.

One list of cases, one set of laws: a new kind of map is one more line in `CASES`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spinfold.errors import SpinfoldError
from spinfold.maps import (
    BlockDiagonal,
    Chain,
    Diagonal,
    Hadamard,
    Identity,
    Kronecker,
    Map,
    Orthogonal,
    Permutation,
    from_parts,
    orthogonality_gap,
    random_hadamard,
    random_orthogonal,
    to_parts,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scales(size: int) -> Diagonal:
    return Diagonal(normal(size, seed=9).exp() * Hadamard(size, 1).signs_N)  # type: ignore[operator]


def permutation(size: int) -> Permutation:
    return Permutation(torch.randperm(size, generator=torch.Generator().manual_seed(4)))


CASES: dict[str, Callable[[], Map]] = {
    "identity": lambda: Identity(6),
    "orthogonal": lambda: random_orthogonal(10, seed=0),
    "orthogonal-inverse": lambda: random_orthogonal(10, seed=0).inverse(),
    "orthogonal-blocks": lambda: Orthogonal(torch.stack([random_orthogonal(3, seed).R_NN for seed in range(4)])),
    "diagonal": lambda: scales(7),
    "signs": lambda: Diagonal(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)),
    "permutation": lambda: permutation(9),
    "hadamard": lambda: Hadamard(24),
    "hadamard-signs": lambda: random_hadamard(40, seed=2),
    "hadamard-inverse": lambda: random_hadamard(12, seed=2).inverse(),
    "hadamard-blocks": lambda: random_hadamard(36 * 13, seed=2),
    "kronecker": lambda: Kronecker(random_orthogonal(3, 0), scales(4)),
    "block-diagonal": lambda: BlockDiagonal(random_orthogonal(4, 0), 3),
    "chain": lambda: Chain(random_orthogonal(8, 0), scales(8), permutation(8), random_hadamard(8, 0)),
    "nested": lambda: Chain(
        BlockDiagonal(Chain(random_orthogonal(4, 0), scales(4)), 3),
        Kronecker(random_hadamard(4, 1).inverse(), BlockDiagonal(Identity(1), 3)),
    ),
}


@pytest.fixture(params=CASES)
def linear_map(request: pytest.FixtureRequest) -> Map:
    return CASES[request.param]()


def test_apply_is_the_matrix_and_linear(linear_map: Map) -> None:
    x, y = normal(5, linear_map.size, seed=1), normal(5, linear_map.size, seed=2)
    assert torch.allclose(linear_map.apply(x), x @ linear_map.matrix(), rtol=0, atol=1e-12)
    assert torch.allclose(linear_map.apply(2 * x - y), 2 * linear_map.apply(x) - linear_map.apply(y), atol=1e-12)


def test_inverse_undoes_on_both_sides(linear_map: Map) -> None:
    x = normal(5, linear_map.size)
    inverse = linear_map.inverse()
    assert torch.allclose(inverse.apply(linear_map.apply(x)), x, rtol=0, atol=1e-11)
    assert torch.allclose(linear_map.apply(inverse.apply(x)), x, rtol=0, atol=1e-11)
    assert torch.allclose(inverse.inverse().matrix(), linear_map.matrix(), rtol=0, atol=1e-12)


def test_transpose_is_the_transposed_matrix(linear_map: Map) -> None:
    assert torch.allclose(linear_map.transpose().matrix(), linear_map.matrix().T, rtol=0, atol=1e-12)


def test_matrices_are_the_textbook_ones() -> None:
    """An oracle that does not go through `apply`, on matrices without any symmetry."""
    R, S, scale = random_orthogonal(3, 0), random_orthogonal(4, 1), scales(3)
    blocks = Orthogonal(torch.stack([R.R_NN, random_orthogonal(3, 2).R_NN]))
    order = torch.tensor([2, 0, 1])
    expected = {
        R: R.R_NN,
        scale: scale.scale_N.diag(),
        Permutation(order): torch.eye(3).double()[:, order],
        blocks: torch.kron(torch.tensor([[1, 0], [0, 0]]), blocks.R_NN[0])
        + torch.kron(torch.tensor([[0, 0], [0, 1]]), blocks.R_NN[1]),
        Kronecker(R, S): torch.kron(R.R_NN, S.R_NN),
        Kronecker(S, scale): torch.kron(S.R_NN, scale.scale_N.diag()),
        BlockDiagonal(S, 2): torch.kron(torch.eye(2).double(), S.R_NN),
        Chain(R, scale, Permutation(order)): R.R_NN @ scale.scale_N.diag() @ torch.eye(3).double()[:, order],
    }
    for linear_map, matrix in expected.items():
        assert torch.allclose(linear_map.matrix(), matrix, rtol=0, atol=1e-13), linear_map


def test_orthogonal_says_what_the_matrix_is(linear_map: Map) -> None:
    assert linear_map.orthogonal == (orthogonality_gap(linear_map.matrix()) < 1e-10)
    assert linear_map.inverse().orthogonal == linear_map.orthogonal


def test_batch_is_a_loop(linear_map: Map) -> None:
    x = normal(2, 3, linear_map.size)
    looped = torch.stack([torch.stack([linear_map.apply(row) for row in batch]) for batch in x])
    assert torch.allclose(linear_map.apply(x), looped, rtol=0, atol=1e-13)
    assert linear_map.apply(x[:0]).shape == (0, 3, linear_map.size)


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.02)], ids=str
)
def test_half_precision_is_rounded_once(linear_map: Map, dtype: torch.dtype, atol: float) -> None:
    x = normal(4, linear_map.size).to(dtype)
    y = linear_map.apply(x)
    exact = linear_map.apply(x.double())
    assert y.dtype == dtype
    # One rounding: within one unit in the last place of the exact result, whatever the number of parts.
    ulp = torch.finfo(dtype).eps * exact.abs()
    floor = 1e-5 * exact.abs().max()
    assert ((y.double() - exact).abs() <= ulp + floor).all()
    assert torch.allclose(y.double(), exact, rtol=atol, atol=atol)


def test_autocast_does_not_lower_a_hadamards_precision() -> None:
    x, hadamard = normal(4, 24).float(), Hadamard(24, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = hadamard.apply(x)
    assert inside.equal(hadamard.apply(x))


def test_a_wrong_width_is_refused(linear_map: Map) -> None:
    with pytest.raises(ValueError, match="channels"):
        linear_map.apply(torch.zeros(2, linear_map.size + 1))


def test_sound_maps_explain_nothing_wrong(linear_map: Map) -> None:
    assert linear_map.explain()
    assert linear_map.inverse().explain()


def test_round_trip_is_exact(linear_map: Map) -> None:
    config, tensors = to_parts(linear_map)
    again = from_parts(json.loads(json.dumps(config)), {name: tensor.clone() for name, tensor in tensors.items()})
    x = normal(3, linear_map.size)
    assert type(again) is type(linear_map)
    assert again.config() == config
    assert again.tensors().keys() == tensors.keys()
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert again.apply(x).equal(linear_map.apply(x))
    assert again.inverse().apply(x).equal(linear_map.inverse().apply(x))


def test_apply_is_differentiable_in_x(linear_map: Map) -> None:
    if linear_map.size > 100:
        pytest.skip("finite differences of a large map are slow; the same code runs at the small sizes")
    x = normal(2, linear_map.size).requires_grad_()
    assert torch.autograd.gradcheck(linear_map.apply, (x,))


DEFINED_BY: dict[str, tuple[Callable[[Tensor], Map], Tensor]] = {
    "orthogonal": (Orthogonal, random_orthogonal(4, 0).R_NN),
    "orthogonal-blocks": (Orthogonal, torch.stack([random_orthogonal(2, 0).R_NN, random_orthogonal(2, 1).R_NN])),
    "diagonal": (Diagonal, normal(4).exp()),
    "kronecker": (lambda R: Kronecker(Orthogonal(R), Hadamard(2)), random_orthogonal(2, 0).R_NN),
    "block-diagonal": (lambda R: BlockDiagonal(Orthogonal(R), 2), random_orthogonal(2, 0).R_NN),
    "chain": (lambda R: Chain(Orthogonal(R), Hadamard(4, 0), Orthogonal(R).inverse()), random_orthogonal(4, 0).R_NN),
}


@pytest.mark.parametrize("kind", DEFINED_BY)
def test_apply_is_differentiable_in_its_tensors(kind: str) -> None:
    build, tensor = DEFINED_BY[kind]
    x = normal(3, 4)
    parameter = tensor.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: build(p).apply(x), (parameter,))
    assert torch.autograd.gradcheck(lambda p: build(p).inverse().apply(x), (parameter,))


def test_an_optimiser_that_holds_the_tensor_moves_the_map() -> None:
    held = random_orthogonal(4, 0).R_NN.clone().mT.requires_grad_()  # not contiguous: the usual reason for a copy
    rotation = Orthogonal(held)
    with torch.no_grad():
        held.copy_(torch.eye(4))
    assert rotation.apply(normal(4)).equal(normal(4))


def test_costs_count_what_is_computed() -> None:
    dense = random_orthogonal(16, 0)
    assert (dense.cost().flops, dense.cost().bytes) == (2 * 16 * 16, 8 * 16 * 16)
    heads = BlockDiagonal(dense, 4).cost()
    assert (heads.flops, heads.bytes) == (4 * dense.cost().flops, dense.cost().bytes)
    assert Chain(dense, dense).cost() == dense.cost() + dense.cost()
    assert Hadamard(4096).cost().flops < random_orthogonal(1, 0).cost().flops * 4096**2 / 20
    assert Kronecker(dense, Identity(3)).cost().flops == 3 * dense.cost().flops


def test_device_and_dtype_travel_through_nested_maps() -> None:
    single = CASES["nested"]().to(dtype=torch.float32)
    assert {tensor.dtype for tensor in single.tensors().values()} == {torch.float32, torch.int8}


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (Orthogonal(2 * torch.eye(3)), "RᵀR differs"),
        (Orthogonal(torch.full((3, 3), torch.nan)), "not finite"),
        (Diagonal(torch.tensor([1.0, 0.0])), "Channel 1"),
        (Diagonal(torch.tensor([torch.inf, 1.0])), "Channel 0"),
        (Permutation(torch.tensor([0, 0, 1])), "exactly once"),
        (Chain(Identity(2), Kronecker(Identity(1), Diagonal(torch.tensor([1.0, 0.0])))), "Part 1: Part right"),
    ],
)
def test_broken_maps_name_the_reason(broken: Map, reason: str) -> None:
    verdict = broken.explain()
    assert not verdict
    assert reason in verdict.reason
    assert verdict.fix


@pytest.mark.parametrize(
    "config",
    [{}, {"kind": "wormhole"}, {"kind": "orthogonal", "size": 3}, {"kind": "chain", "maps": [{"kind": "nothing"}]}],
    ids=str,
)
def test_unreadable_descriptions_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(SpinfoldError):
        from_parts(config, {})


def test_a_size_that_contradicts_the_tensors_is_refused() -> None:
    config, tensors = to_parts(scales(4))
    with pytest.raises(SpinfoldError, match="size 5"):
        from_parts({**config, "size": 5}, tensors)


def test_random_rotations_are_repeatable_and_have_both_determinants() -> None:
    assert random_orthogonal(5, 3).R_NN.equal(random_orthogonal(5, 3).R_NN)
    determinants = {round(float(torch.linalg.det(random_orthogonal(3, seed).R_NN))) for seed in range(12)}
    assert determinants == {-1, 1}
