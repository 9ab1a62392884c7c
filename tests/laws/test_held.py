"""An online rotation that a 16-bit runtime has rounded is undone exactly by weights that were folded with it."""

from __future__ import annotations

import pytest
import torch

from spinfold.errors import SpinfoldError
from spinfold.maps import BlockDiagonal, Dense, Hadamard, Map, from_parts, random_orthogonal, to_parts
from spinfold.maps.held import as_held, held_matrix, repeated_block, stored_matrix

DTYPES = [torch.float16, torch.bfloat16]
MAPS: dict[str, Map] = {
    "learned": random_orthogonal(20, 0),
    "learned blocks": BlockDiagonal(random_orthogonal(16, 1), 4),
    "Hadamard": Hadamard(64, 2),
    "Hadamard of an odd power": Hadamard(32, 3),
    "Hadamard blocks": BlockDiagonal(Hadamard(12, 4), 5),
}
each_map = pytest.mark.parametrize("name", MAPS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_map
@each_dtype
def test_folding_with_the_held_map_leaves_no_error(name: str, dtype: torch.dtype) -> None:
    held = as_held(MAPS[name], dtype)
    generator = torch.Generator().manual_seed(0)
    x_TN, w_ON = (torch.randn(n, held.size, generator=generator, dtype=torch.float64) for n in (7, 5))
    folded_ON = held.inverse().transpose().apply(w_ON)
    assert (held.apply(x_TN) @ folded_ON.T - x_TN @ w_ON.T).abs().max() < 1e-11


@each_map
@each_dtype
def test_a_held_map_is_near_and_held_again_the_same(name: str, dtype: torch.dtype) -> None:
    exact, held = MAPS[name], as_held(MAPS[name], dtype)
    assert (held.matrix() - exact.matrix()).abs().max() <= 2 * torch.finfo(dtype).eps
    assert torch.equal(as_held(held, dtype).matrix(), held.matrix())
    block_nn = repeated_block(held.matrix())
    assert torch.equal(held_matrix(stored_matrix(block_nn, dtype)).double(), block_nn)


@pytest.mark.parametrize(("size", "count"), [(6, 1), (6, 4), (5, 3)])
def test_the_smallest_block_is_found(size: int, count: int) -> None:
    rotation = random_orthogonal(size, 0)
    matrix_NN = BlockDiagonal(rotation, count).matrix()
    assert torch.equal(repeated_block(matrix_NN), rotation.matrix())
    matrix_NN[-1, -1] += 1e-3
    assert len(repeated_block(matrix_NN)) == size * count


def test_a_dense_map_is_stored_and_checked() -> None:
    held = as_held(MAPS["learned blocks"], torch.bfloat16)
    assert held.explain() and not held.orthogonal
    assert torch.equal(from_parts(*to_parts(held)).matrix(), held.matrix())
    assert not Dense(torch.zeros(3, 3)).explain()
    assert not Dense(torch.full((3, 3), torch.nan)).explain()
    with pytest.raises(ValueError, match="is \\(N, N\\)"):
        Dense(torch.zeros(2, 3))
    with pytest.raises(SpinfoldError, match="incomplete"):
        from_parts({"kind": "dense", "size": 3}, {})
