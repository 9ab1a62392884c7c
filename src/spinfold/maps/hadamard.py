"""The Hadamard map: spreads every channel over all others at the cost of a few small matrix products.

    M = diag(s) H / √n,    M⁻¹ = Hᵀ diag(s) / √n,    H = H_{k_1} ⊗ … ⊗ H_{k_f}        2 N Σk flops per token

The random signs s matter: an unsigned Walsh–Hadamard matrix has a column of ones, on which any mean piles up.

Shapes: N size of the map, K order of a Kronecker factor, S = N / K, T everything on the leading axes.
"""

from __future__ import annotations

from functools import lru_cache, reduce
from math import prod, sqrt
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from spinfold.errors import Verdict
from spinfold.kernels import kernels_run_on
from spinfold.maps.base import Cost, Map
from spinfold.maps.composed import Kronecker
from spinfold.maps.hadamard_orders import factorise, hadamard_matrix
from spinfold.maps.linear import Orthogonal, check_width, compute_dtype, without_autocast

__all__ = ["SHORT", "Hadamard", "kronecker_hadamard", "random_hadamard"]

SHORT = (32, 64, 128)
"""Sizes for which a product with the whole matrix is cheapest."""


class Hadamard(Map):
    """M = diag(s) H / √n, applied one Kronecker factor at a time, never as an N x N matrix.

    `seed` draws the random signs s; `signs_N` gives them; with neither, s = 1. The signs are stored, so the
    map does not depend on how a later torch draws them. `transposed` is the inverse: Hᵀ diag(s) / √n.

    Where no Hadamard matrix of order `size` is known, M is block-diagonal over the largest order that divides
    it: `block_size < size`, and `describe` says so.
    """

    def __init__(
        self, size: int, seed: int | None = None, signs_N: Tensor | None = None, *, transposed: bool = False
    ) -> None:
        if signs_N is None and seed is not None:
            generator = torch.Generator().manual_seed(seed)
            signs_N = 1 - 2 * torch.randint(2, (size,), generator=generator, dtype=torch.int8)
        if signs_N is not None and signs_N.shape != (size,):
            raise ValueError(f"{size} signs are needed, not {tuple(signs_N.shape)}")
        self.size = size
        self.seed = seed
        self.signs_N = None if signs_N is None else signs_N.to(torch.int8)
        self.transposed = transposed
        self.block_size, self.orders = _largest_known_block(size)
        self._dense: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        if kernels_run_on(x) and self.has_kernel(x):
            return _ByKernel.apply(check_width(x, self.size), self)
        dtype = compute_dtype(x)
        y = check_width(x, self.size).to(dtype)
        y = y if self.transposed else self._flip(y)
        with without_autocast(x.device):
            y = self._multiply(y.reshape(-1, self.block_size)).reshape(x.shape) / sqrt(self.block_size)
        y = self._flip(y) if self.transposed else y
        return y.to(x.dtype)

    def _multiply(self, y_TN: Tensor) -> Tensor:
        """x (H_{k_1} ⊗ … ⊗ H_{k_f}), x seen as a (T, k_1, …, k_f) array.

        Each round multiplies the last axis and moves it to the front: after f rounds all are back in place.
        """
        num_rows, width = y_TN.shape
        for order in reversed(self.orders):
            H_KK = _factor(order, y_TN.device, y_TN.dtype)
            y_TSK = y_TN.reshape(num_rows, width // order, order)
            y_TN = (y_TSK @ (H_KK.mT if self.transposed else H_KK)).mT
        return y_TN

    def _flip(self, x: Tensor) -> Tensor:
        return x if self.signs_N is None else x * self.signs_N.to(device=x.device, dtype=x.dtype)

    def has_kernel(self, x: Tensor, width: int = 0) -> bool:
        """Can one kernel apply the map and put groups of `width` neighbours, or rows, on their grids?"""
        if self.size in SHORT:
            return width == 0 or (width & (width - 1) == 0 and self.size % width == 0)
        return _tiling(self.orders, x, width) is not None

    def by_kernel(self, x: Tensor, **options: Any) -> Any:
        """`kernels.hadamard.hadamard` of x, with its options; for short rows `kernels.heads.rotate_heads`."""
        if self.size in SHORT:
            return self._by_dense_kernel(x, **options)
        from spinfold.kernels.hadamard import hadamard
        from spinfold.kernels.tilings import kind_of

        grid = options.get("grid")
        kind = kind_of(grid, options.get("packed", False))
        tiling = options.pop("tiling", None) or _tiling(self.orders, x, grid.width if grid else 0, kind)
        assert tiling is not None
        dtype = torch.float16 if x.dtype == torch.float32 else x.dtype
        left, right = _two_factors(self.orders, tiling, x.device, dtype, self.transposed)
        signs = None if self.signs_N is None else self.signs_N.to(x.device)
        return hadamard(x, left, right, tiling, self.block_size, signs=signs, signs_after=self.transposed, **options)

    def _by_dense_kernel(self, x: Tensor, grid: Any = None, **options: Any) -> Any:
        from spinfold.kernels.heads import rotate_heads, split_matrix

        if self._dense is None or self._dense.device != x.device:
            eye_NN = torch.eye(self.size, dtype=torch.float64)
            self._dense = split_matrix((self.apply(eye_NN) * sqrt(self.size)).round()).to(x.device)
        grid = grid and grid._replace(width=grid.width or self.size)
        return rotate_heads(x, self._dense, self.size**-0.5, grid=grid, **options)

    @property
    def describe(self) -> str:
        """One sentence: the order, its Kronecker factors, and the blocks if there are several."""
        signs = "plain" if self.signs_N is None else "randomised"
        factors = " ⊗ ".join(f"H{order}" for order in self.orders)
        if self.block_size == self.size:
            return f"{signs} Hadamard of order {self.size} = {factors}"
        return (
            f"{signs} block-diagonal Hadamard: {self.size // self.block_size} blocks of {self.block_size} = {factors}, "
            f"because no Hadamard matrix of order {self.size} is known here"
        )

    def as_kronecker(self) -> Map:
        """The same map as two dense ones, of sizes as near as can be, one on each axis of x seen as a matrix; itself
        where it has signs or blocks.
        """
        if self.signs_N is not None or self.block_size < self.size:
            return self
        orders_F = [
            k
            for order in self.orders
            for k in ([2] * (order.bit_length() - 1) if order & (order - 1) == 0 else [order])
        ]
        cuts = range(len(orders_F) + 1)
        cut = min(cuts, key=lambda c: max(prod(orders_F[:c]), prod(orders_F[c:])))
        parts = []
        for orders in (orders_F[:cut], orders_F[cut:]):
            H_KK = reduce(torch.kron, (_factor(k, torch.device("cpu"), torch.float64) for k in orders), torch.eye(1))
            parts.append(Orthogonal((H_KK.mT if self.transposed else H_KK).float() / sqrt(len(H_KK))))
        return Kronecker(*parts)

    def inverse(self) -> Hadamard:
        return Hadamard(self.size, self.seed, self.signs_N, transposed=not self.transposed)

    def cost(self) -> Cost:
        signs = 0 if self.signs_N is None else self.size
        return Cost(
            flops=2 * self.size * sum(self.orders) + self.size + signs,
            bytes=4 * sum(order**2 for order in set(self.orders)) + signs,
        )

    def explain(self, atol: float = 1e-6) -> Verdict:
        """Positive for a block-diagonal Hadamard too, which is orthogonal: the reason then names the blocks."""
        if self.signs_N is not None and not (self.signs_N.abs() == 1).all():
            return Verdict(False, "Some signs are neither +1 nor -1.", "Give a seed and let the map draw them.")
        return Verdict(True, "" if self.block_size == self.size else f"{self.describe}.")

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.signs_N is None else {"signs": self.signs_N}

    def config(self) -> dict[str, Any]:
        return {
            "kind": "hadamard",
            "size": self.size,
            "seed": self.seed,
            "signed": self.signs_N is not None,
            "transposed": self.transposed,
        }

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        signs_N = None if self.signs_N is None else self.signs_N.to(device=device)
        return type(self)(self.size, self.seed, signs_N, transposed=self.transposed)


def random_hadamard(size: int, seed: int) -> Hadamard:
    """diag(s) H / √n with signs drawn from `seed`; block-diagonal where no order is known."""
    return Hadamard(size, seed)


def kronecker_hadamard(size: int) -> Map:
    """H_a ⊗ H_b / √size with a b = size and a + b least: a start for two factors that are to be learned.

    The whole Hadamard where no two orders other than 1 do it.
    """
    pairs = [(a, size // a) for a in range(2, size) if size % a == 0]
    known = [pair for pair in pairs if all(factorise(order) is not None for order in pair)]
    if not known:
        return Hadamard(size)
    left, right = min(known, key=sum)
    return Kronecker(Hadamard(left), Hadamard(right))


def _largest_known_block(size: int) -> tuple[int, tuple[int, ...]]:
    """The largest divisor of `size` that has a Hadamard matrix, and its Kronecker factors (1 always has one)."""
    for count in range(1, size + 1):
        if size % count == 0 and (orders := factorise(size // count)) is not None:
            return size // count, orders
    raise ValueError(f"a size is a positive integer, not {size}")


@lru_cache(maxsize=64)
def _factor(order: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # Cached across calls: made outside inference mode, or a first call there would make it useless for autograd.
    with torch.inference_mode(False):
        return torch.tensor(hadamard_matrix(order), dtype=dtype, device=device)


def _tiling(orders: tuple[int, ...], x: Tensor, width: int = 0, kind: Any = "map") -> Any:
    from spinfold.kernels.grids import shared_memory
    from spinfold.kernels.tilings import best_tiling

    num_rows = x.numel() // prod(orders)
    return best_tiling(orders, width, num_rows, x.element_size(), shared_memory(x.device), kind=kind)


@lru_cache(maxsize=64)
def _two_factors(
    orders: tuple[int, ...], tiling: Any, device: torch.device, dtype: torch.dtype, transposed: bool
) -> tuple[Tensor, Tensor]:
    """H_aᵀ and H_b with H_{k_1} ⊗ … = H_a ⊗ H_b as the kernel takes them; those of the transpose if `transposed`."""
    from spinfold.kernels.hadamard import stored_left, stored_right

    left, right = np.ones((1, 1), np.int8), np.ones((1, 1), np.int8)
    for order in reversed(orders):
        while order > 1:
            # Sylvester's matrices are made of H_2, so a cut may go through them.
            factor = 2 if order & (order - 1) == 0 else order
            if len(right) < tiling.columns:
                right = np.kron(hadamard_matrix(factor), right)
            else:
                left = np.kron(hadamard_matrix(factor), left)
            order //= factor
    left, right = (left, right.T) if transposed else (left.T, right)
    with torch.inference_mode(False):
        return (
            stored_left(torch.tensor(left, dtype=dtype), tiling).to(device),
            stored_right(torch.tensor(right, dtype=torch.float16)).to(device),
        )


class _ByKernel(torch.autograd.Function):
    """`Hadamard.apply` on a GPU; orthogonal, so its gradient goes through the inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, map: Hadamard) -> Tensor:
        ctx.map = map
        return map.by_kernel(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.map.inverse().apply(grads[0]), None
