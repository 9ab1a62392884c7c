"""RoPE of one layer as a function of positions, so that keys can be held as they are before it.

    turn(x)       x cos + half(x) sin,   half((a, b)) = (-b, a)     what Transformers does
    turn_back(y)  (y cos - half(y) sin) / (cos² + sin²)             its inverse; a scaling of RoPE is undone, too

Shapes: B batch (1 for any), H heads, T tokens, N head size, of which RoPE may turn the first R only.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Rope"]


class Rope:
    """The RoPE that a layer's keys have passed. `positions_BT` are those of the tokens that pass the layer now.

    An object rather than closures, so that a deep copy of the model refers to the copied module.
    """

    def __init__(self, rotary: nn.Module, layer_type: str | None) -> None:
        self.rotary, self.positions_BT = rotary, torch.empty(0)
        takes_type = "layer_type" in inspect.signature(rotary.forward).parameters
        self.kwargs = {"layer_type": layer_type} if takes_type else {}

    def note(self, attention: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward pre-hook of the attention."""
        self.positions_BT = kwargs["position_ids"]

    def turn(self, x_BHTN: Tensor, positions_BT: Tensor) -> Tensor:
        """Keys before RoPE as they are behind it."""
        cos, sin = self._angles(x_BHTN, positions_BT)
        x, rest = x_BHTN.tensor_split([cos.shape[-1]], -1)
        return torch.cat([x * cos + _half(x) * sin, rest], -1)

    def turn_back(self, y_BHTN: Tensor, positions_BT: Tensor) -> Tensor:
        """The inverse."""
        cos, sin = self._angles(y_BHTN, positions_BT)
        y, rest = y_BHTN.tensor_split([cos.shape[-1]], -1)
        return torch.cat([(y * cos - _half(y) * sin) / (cos.square() + sin.square()), rest], -1)

    def _angles(self, x: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(x, positions_BT, **self.kwargs)
        return cos.unsqueeze(1), sin.unsqueeze(1)


def _half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)
