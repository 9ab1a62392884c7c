"""Maps made of maps.

    Kronecker(left, right)       x as (…, a, b):  left on the a axis, right on the b axis    M = L ⊗ R
    BlockDiagonal(block, count)  the same map on each of `count` consecutive blocks          M = I_count ⊗ block
    Chain(first, second, …)      one after the other                                         M = M_1 M_2 …

For blocks that differ, use `Orthogonal` with a stack `(B, N, N)`.

Shapes: A, B sizes of the left and the right factor, ... any leading axes.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import reduce
from operator import add
from typing import Any, Self

import torch
from torch import Tensor

from spinfold.errors import Verdict
from spinfold.maps.base import Cost, Map
from spinfold.maps.linear import Orthogonal, check_width, compute_dtype

__all__ = ["BlockDiagonal", "Chain", "Kronecker"]


class _Composed(Map):
    """What all three share: a map is as good, as orthogonal and as defined as its parts."""

    parts: dict[str, Map]

    @abstractmethod
    def _apply(self, x: Tensor) -> Tensor:
        """`apply` without the casts."""

    def apply(self, x: Tensor) -> Tensor:
        # One rounding at the end: a part would otherwise round its result to x's dtype before the next one. Under
        # autocast rotations round it in any case, and a cast would only cost a pass.
        rotations = all(isinstance(part, Orthogonal) for part in self.parts.values())
        plain = rotations and torch.is_autocast_enabled(x.device.type)
        return self._apply(check_width(x, self.size).to(x.dtype if plain else compute_dtype(x))).to(x.dtype)

    def explain(self, atol: float = 1e-6) -> Verdict:
        remarks = []
        for name, part in self.parts.items():
            verdict = part.explain(atol)
            remark = f"Part {name}: {verdict.reason}" if verdict.reason else ""
            if not verdict:
                return Verdict(False, remark, verdict.fix)
            remarks.append(remark)
        return Verdict(True, " ".join(filter(None, remarks)))

    def tensors(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": tensor for name, part in self.parts.items() for key, tensor in part.tensors().items()}

    @property
    def orthogonal(self) -> bool:
        return all(part.orthogonal for part in self.parts.values())


class Kronecker(_Composed):
    """M = L ⊗ R: with x read as the matrix X `(A, B)`, row by row, x M is Lᵀ X R."""

    def __init__(self, left: Map, right: Map) -> None:
        self.left, self.right = left, right
        self.parts = {"left": left, "right": right}
        self.size = left.size * right.size

    def _apply(self, x: Tensor) -> Tensor:
        x_AB = x.reshape(*x.shape[:-1], self.left.size, self.right.size)
        y_AB = self.right.apply(x_AB)
        if x.is_cuda and isinstance(self.left, Orthogonal) and not self.left.R_NN.requires_grad:
            # From the left, one product per token: from the right it would copy y twice to transpose it. One that is
            # learned would get a gradient per token from this.
            return (self.left.R_NN.mT.to(y_AB.dtype) @ y_AB).flatten(-2)
        return self.left.apply(y_AB.mT).mT.flatten(-2)

    def inverse(self) -> Kronecker:
        return Kronecker(self.left.inverse(), self.right.inverse())

    def transpose(self) -> Kronecker:
        return Kronecker(self.left.transpose(), self.right.transpose())

    def cost(self) -> Cost:
        left, right = self.left.cost(), self.right.cost()
        return Cost(left.flops * self.right.size + right.flops * self.left.size, left.bytes + right.bytes)

    def config(self) -> dict[str, Any]:
        return {"kind": "kronecker", "left": self.left.config(), "right": self.right.config()}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        return type(self)(self.left.to(device, dtype), self.right.to(device, dtype))


class BlockDiagonal(_Composed):
    """M = I_count ⊗ block: the value rotation of every head, say."""

    def __init__(self, block: Map, count: int) -> None:
        if count < 1:
            raise ValueError(f"a block-diagonal map has at least one block, not {count}")
        self.block, self.count = block, count
        self.parts = {"block": block}
        self.size = block.size * count

    def _apply(self, x: Tensor) -> Tensor:
        return self.block.apply(x.reshape(*x.shape[:-1], self.count, self.block.size)).flatten(-2)

    def inverse(self) -> BlockDiagonal:
        return BlockDiagonal(self.block.inverse(), self.count)

    def transpose(self) -> BlockDiagonal:
        return BlockDiagonal(self.block.transpose(), self.count)

    def cost(self) -> Cost:
        block = self.block.cost()
        return Cost(block.flops * self.count, block.bytes)

    def config(self) -> dict[str, Any]:
        return {"kind": "block_diagonal", "block": self.block.config(), "count": self.count}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        return type(self)(self.block.to(device, dtype), self.count)


class Chain(_Composed):
    """M = M_1 M_2 …: the first map meets x first."""

    def __init__(self, *maps: Map) -> None:
        sizes = {part.size for part in maps}
        if len(sizes) != 1:
            raise ValueError(f"the maps of a chain have one common size, not {sorted(sizes)}")
        self.maps = maps
        self.parts = {str(index): part for index, part in enumerate(maps)}
        self.size = sizes.pop()

    def _apply(self, x: Tensor) -> Tensor:
        return reduce(lambda y, part: part.apply(y), self.maps, x)

    def inverse(self) -> Chain:
        return Chain(*(part.inverse() for part in reversed(self.maps)))

    def transpose(self) -> Chain:
        return Chain(*(part.transpose() for part in reversed(self.maps)))

    def cost(self) -> Cost:
        return reduce(add, (part.cost() for part in self.maps))

    def config(self) -> dict[str, Any]:
        return {"kind": "chain", "maps": [part.config() for part in self.maps]}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        return type(self)(*(part.to(device, dtype) for part in self.maps))
