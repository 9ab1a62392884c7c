"""An online rotation as a runtime holds it, which has one 16-bit dtype for everything.

    the file holds    S = √n B        rounded to the dtype, B the repeated (n, n) block of the map
    the runtime has   R~ = S / √n     rounded to the dtype once more

R~ is orthogonal to about 1e-2 only. A weight that undoes the exact R is wrong by as much; one that undoes R~, folded by
its inverse, is not:  x R~ (W R~⁻ᵀ)ᵀ = x Wᵀ.  So a run may be made with the maps that its target will have.

Shapes: n size of a block, N size of the map, ... any leading axes.
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor

from spinfold.errors import Verdict
from spinfold.maps.base import Cost, Map
from spinfold.maps.composed import BlockDiagonal
from spinfold.maps.linear import check_width, compute_dtype

__all__ = ["Dense", "as_held", "held_matrix", "repeated_block", "stored_matrix"]


class Dense(Map):
    """M: any invertible matrix `(N, N)`."""

    def __init__(self, matrix_NN: Tensor) -> None:
        if matrix_NN.ndim != 2 or matrix_NN.shape[0] != matrix_NN.shape[1]:
            raise ValueError(f"a dense map is (N, N), not {tuple(matrix_NN.shape)}")
        self.matrix_NN, self.size = matrix_NN, len(matrix_NN)

    def apply(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        return (check_width(x, self.size).to(dtype) @ self.matrix_NN.to(dtype)).to(x.dtype)

    def inverse(self) -> Dense:
        return Dense(torch.linalg.inv(self.matrix_NN.double()))

    def transpose(self) -> Dense:
        return Dense(self.matrix_NN.T)

    def cost(self) -> Cost:
        return Cost(2 * self.matrix_NN.numel(), self.matrix_NN.numel() * self.matrix_NN.element_size())

    def explain(self, atol: float = 1e-6) -> Verdict:
        """Is its inverse one, to `atol`?"""
        finite = bool(self.matrix_NN.isfinite().all())
        condition = float(torch.linalg.cond(self.matrix_NN.double())) if finite else math.inf
        if condition * torch.finfo(torch.float64).eps <= atol:
            return Verdict(True)
        return Verdict(False, f"The matrix has the condition number {condition:.1e}.", "Fit the map again.")

    def tensors(self) -> dict[str, Tensor]:
        return {"M": self.matrix_NN}

    def config(self) -> dict[str, Any]:
        return {"kind": "dense", "size": self.size}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        return type(self)(self.matrix_NN.to(device=device, dtype=dtype))

    @property
    def orthogonal(self) -> bool:
        return False


def as_held(map: Map, dtype: torch.dtype) -> Map:
    """The map that a runtime will have in the place of `map`. Of a map that is one already, the same."""
    block_nn = repeated_block(map.matrix())
    held_nn = held_matrix(stored_matrix(block_nn, dtype)).float()
    return BlockDiagonal(Dense(held_nn), map.size // len(held_nn))


def repeated_block(matrix_NN: Tensor) -> Tensor:
    """The smallest `(n, n)` block B with M = diag(B, …, B), up to 1e-9."""
    width = len(matrix_NN)
    for size in (n for n in range(1, width) if width % n == 0):
        if float(matrix_NN[:size, size:].abs().max()) > 1e-9:
            continue
        block_nn, rest_NN = matrix_NN[:size, :size], matrix_NN.clone()
        rest_NN.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2).sub_(block_nn[..., None])
        if float(rest_NN.abs().max()) <= 1e-9:
            return block_nn
    return matrix_NN


def stored_matrix(block_nn: Tensor, dtype: torch.dtype) -> Tensor:
    """√n B in `dtype`, such that what the runtime makes of it comes nearest to B.

    If B is what a runtime holds, then it is held again, bit for bit: its S is one of the three candidates.
    """
    nearest_nn = (block_nn * math.sqrt(len(block_nn))).to(dtype)
    ends = (torch.nextafter(nearest_nn, torch.full_like(nearest_nn, end)) for end in (-math.inf, math.inf))
    candidates_3nn = torch.stack([nearest_nn, *ends])
    error_3nn = (held_matrix(candidates_3nn).double() - block_nn).abs()
    return candidates_3nn.gather(0, error_3nn.argmin(0, keepdim=True))[0].contiguous()


def held_matrix(stored_nn: Tensor) -> Tensor:
    """S / √n in the dtype of S: what a runtime multiplies by."""
    return stored_nn / math.sqrt(stored_nn.shape[-1])
