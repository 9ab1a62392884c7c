"""The contract of every linear map: y = x M along the last axis, with a cheap way to compute it.

Shapes: N size of the map, ... any leading axes.   Activations are row vectors, as in the papers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from spinfold.errors import Verdict

__all__ = ["Cost", "Map"]


@dataclass(frozen=True)
class Cost:
    """What applying a map to one token costs: floating-point operations, and bytes of parameters read."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


class Map(ABC):
    """An invertible linear map on row vectors, `x_N -> x_N @ M_NN`. Immutable: methods return new maps."""

    size: int

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """`x (..., N)` times M, in x's dtype (computed in at least fp32). Differentiable."""

    @abstractmethod
    def inverse(self) -> Map:
        """The map with `map.inverse().apply(map.apply(x)) == x`."""

    def transpose(self) -> Map:
        """The map x -> x M^T; of an orthogonal map, its inverse."""
        assert self.orthogonal, f"{type(self).__name__} must define its transpose"
        return self.inverse()

    @abstractmethod
    def cost(self) -> Cost:
        """Operations and bytes to apply the map to one token."""

    @abstractmethod
    def explain(self, atol: float = 1e-6) -> Verdict:
        """Is the map what it claims to be (orthogonal, invertible, finite)? The reason if not."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that define the map, by name; empty if the size and seed-free config suffice."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The rest of the definition, JSON-serialisable, including `kind`."""

    @abstractmethod
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The same map with its tensors on `device` and in `dtype`."""

    @property
    def orthogonal(self) -> bool:
        """Does the map keep lengths? Then it may pass through an RMSNorm without a gain."""
        return True

    def matrix(self) -> Tensor:
        """M as a dense fp64 tensor `(N, N)` on the map's device."""
        tensors = list(self.tensors().values())
        device = tensors[0].device if tensors else torch.device("cpu")
        return self.to(dtype=torch.float64).apply(torch.eye(self.size, dtype=torch.float64, device=device))
