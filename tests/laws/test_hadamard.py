"""Laws of the Hadamard orders: ±1 entries, H Hᵀ = n I exactly, and every size that the known models need."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch

from spinfold.errors import SpinfoldError
from spinfold.maps import Hadamard, Orthogonal, factorise, hadamard_matrix, is_base_order

SYLVESTER = [1, 2, 4, 8, 64, 128, 512]
PALEY_ONE = [12, 20, 24, 28, 44, 48, 60, 68, 80, 104, 108, 140, 152, 244, 344]  # 27, 243 and 343 are prime powers
PALEY_TWO = [20, 36, 52, 76, 100, 124, 148, 164, 244, 252, 340, 924]  # 9, 25, 49, 81, 125, 169 are prime powers
STORED = [92, 116, 156, 172]
KRONECKER = [40, 80, 136, 144, 184, 576, 896, 1536]

# Hidden sizes, MLP sizes and head counts of the Llama, Qwen, Gemma, Phi, Mistral and SmolLM families.
MODEL_SIZES = [
    *(1, 2, 12, 20, 28, 36, 40, 44, 52, 60, 64, 68, 76, 80, 88, 96, 100, 108, 112, 128, 136, 140, 144, 148, 152, 172),
    *(576, 896, 924, 1536, 2048, 3072, 3584, 4096, 4864, 5120, 8192, 8960, 9728, 11008, 13824, 14336, 17408, 18944),
    *(25600, 27648, 28672, 29568),
]


@pytest.mark.parametrize("order", sorted({*SYLVESTER, *PALEY_ONE, *PALEY_TWO, *STORED, *KRONECKER}))
def test_rows_are_signs_and_orthogonal(order: int) -> None:
    matrix = hadamard_matrix(order).astype(np.float64)  # exact: the products are integers far below 2^53
    assert matrix.shape == (order, order)
    assert (np.abs(matrix) == 1).all()
    assert (matrix @ matrix.T == order * np.eye(order)).all()


@pytest.mark.parametrize("order", [*SYLVESTER, *PALEY_ONE, *PALEY_TWO, *STORED])
def test_a_construction_reaches_the_base_orders(order: int) -> None:
    assert is_base_order(order)


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_model_sizes_factorise_into_known_orders(size: int) -> None:
    orders = factorise(size)
    assert orders is not None
    assert prod(orders) == size
    assert all(is_base_order(order) for order in orders)
    assert all(order <= 128 for order in orders if order & (order - 1) == 0)


@pytest.mark.parametrize(
    ("size", "largest"), [(4864, 76), (11008, 172), (18944, 148), (29568, 44), (25600, 64), (576, 12), (924, 924)]
)
def test_largest_factor_is_as_small_as_it_gets(size: int, largest: int) -> None:
    assert max(factorise(size) or ()) == largest


@pytest.mark.parametrize("size", [3, 6, 9, 50, 188, 428, 13696])
def test_unreachable_orders_say_so(size: int) -> None:
    assert factorise(size) is None
    with pytest.raises(SpinfoldError, match=f"order {size}"):
        hadamard_matrix(size)


def test_matrices_are_shared_and_therefore_read_only() -> None:
    assert hadamard_matrix(12) is hadamard_matrix(12)
    with pytest.raises(ValueError, match="read-only"):
        hadamard_matrix(12)[0, 0] = 0


def test_not_every_matrix_is_symmetric() -> None:
    """Guards the other tests: with symmetric matrices alone a missing transpose would go unseen."""
    assert any((hadamard_matrix(order) != hadamard_matrix(order).T).any() for order in STORED)


def test_a_flipped_entry_is_noticed() -> None:
    matrix = torch.tensor(hadamard_matrix(28), dtype=torch.float64) / 28**0.5
    assert Orthogonal(matrix).explain()
    matrix[3, 5] *= -1
    verdict = Orthogonal(matrix).explain()
    assert not verdict
    assert "RᵀR differs from I" in verdict.reason


@pytest.mark.parametrize("size", [1, 2, 40, 172, 144, 576, 9, 107 * 4])
@pytest.mark.parametrize("seed", [None, 0])
def test_fast_apply_is_the_dense_product(size: int, seed: int | None) -> None:
    hadamard = Hadamard(size, seed)
    signs = torch.ones(size) if hadamard.signs_N is None else hadamard.signs_N
    block = torch.tensor(hadamard_matrix(hadamard.block_size), dtype=torch.float64)
    dense = torch.kron(torch.eye(size // hadamard.block_size).double(), block) / hadamard.block_size**0.5
    x = torch.randn(3, 2, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(hadamard.apply(x), (x * signs) @ dense, rtol=0, atol=1e-12)
    assert torch.allclose(hadamard.inverse().apply(x), x @ dense.T * signs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [11008, 29568])
def test_large_sizes_keep_length_and_invert(size: int) -> None:
    hadamard = Hadamard(size, seed=3)
    x = torch.randn(2, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = hadamard.apply(x)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-12)
    assert torch.allclose(hadamard.inverse().apply(y), x, rtol=0, atol=1e-12)


def test_a_single_spike_is_spread_evenly() -> None:
    spike = torch.zeros(1, 4864, dtype=torch.float64)
    spike[0, 1234] = 1
    assert torch.allclose(Hadamard(4864, seed=0).apply(spike).abs(), torch.tensor(4864.0).double() ** -0.5)


def test_unknown_orders_become_blocks_and_say_so() -> None:
    blocks = Hadamard(13696, seed=0)
    assert blocks.block_size == 128
    assert "107 blocks of 128" in blocks.describe
    assert blocks.explain()
    assert "block-diagonal" in blocks.explain().reason
    whole = Hadamard(4864, seed=0)
    assert whole.block_size == 4864
    assert whole.explain()
    assert whole.explain().reason == ""


def test_signs_are_repeatable_and_checked() -> None:
    first, again, other = Hadamard(64, 5).signs_N, Hadamard(64, 5).signs_N, Hadamard(64, 6).signs_N
    assert first is not None
    assert again is not None
    assert other is not None
    assert first.equal(again)
    assert not first.equal(other)
    assert not Hadamard(4, signs_N=torch.tensor([1, -1, 0, 1])).explain()
    with pytest.raises(ValueError, match="4 signs"):
        Hadamard(4, signs_N=torch.ones(3))


def test_a_first_call_in_inference_mode_does_not_break_training() -> None:
    hadamard = Hadamard(60, seed=0)
    with torch.inference_mode():
        hadamard.apply(torch.ones(60, dtype=torch.float64))
    x = torch.ones(60, dtype=torch.float64, requires_grad=True)
    hadamard.apply(x).square().sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert torch.allclose(x.grad, 2 * x.detach())
