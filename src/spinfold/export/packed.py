"""Weights that stay packed: integers of 2 to 8 bits in memory as on disk, and the module that computes with them.

    P.packed  uint8 (…, O, ⌈I b / 8⌉)   the integers, moved up to start at 0, packed densely row by row
    P.scale   (…, O, G)                 in the dtype that rounding gave them, whatever dtype the model is cast to
    P.zero    uint8 (…, O, ⌈G b / 8⌉)   zero points, packed like the integers; asymmetric grids only

P is the parameter's own name, such as `model.layers.0.self_attn.q_proj.weight`. Only the weight that is being
multiplied with exists in floating point, and only as long as that takes.

Shapes: O out features, I in features, G groups of a row, E experts, … nothing or E.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spinfold.export.packing import as_codes, as_unsigned, pack, unpack
from spinfold.formats import IntFormat, QuantizedWeight

__all__ = ["PackedLinear", "PackedWeight", "pack_parameter", "packed_tensors"]


def packed_tensors(weight: QuantizedWeight, shape: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of a `PackedWeight` of that shape; `weight` has the rows of all experts one below the other."""
    bits = weight.format.bits
    tensors = {"packed": pack(as_unsigned(weight.q_OI, bits), bits), "scale": weight.scale_OG}
    if weight.second_OG is not None:
        tensors["zero"] = pack(weight.second_OG, bits)
    return {key: value.unflatten(0, tuple(shape[:-1])) for key, value in tensors.items()}


class PackedWeight(nn.Module):
    """A weight `(O, I)`, or `(E, O, I)`, held as integers and scales; in place of a parameter of `shape`.

    Like such a parameter it has a shape and a dtype, and iterating over the experts gives their weights one by one.
    Its tensors are empty until a checkpoint is loaded.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, shape: Sequence[int], format: IntFormat, scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
        super().__init__()
        *rows, in_features = shape
        groups = in_features // format.group_of(in_features)

        def empty(*row: int, dtype: torch.dtype = torch.uint8) -> Tensor:
            return torch.empty(*rows, *row, dtype=dtype, device="meta")

        self.shape, self.format, self.dtype = torch.Size(shape), format, dtype
        self.register_buffer("packed", empty(-(-in_features * format.bits // 8)))
        self.register_buffer("scale", empty(groups, dtype=scale_dtype))
        self.register_buffer("zero", None if format.symmetric else empty(-(-groups * format.bits // 8)))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        """Each expert's weight `(O, I)`, in floating point only until the next one is asked for."""
        zeros = [None] * len(self) if self.zero is None else self.zero
        for packed_OP, scale_OG, zero_OZ in zip(self.packed, self.scale, zeros, strict=True):
            yield self._unpack(packed_OP, scale_OG, zero_OZ).dequantize(self.dtype)

    def dequantize(self) -> Tensor:
        """The weight `(O, I)`."""
        return self._unpack(self.packed, self.scale, self.zero).dequantize(self.dtype)

    def _unpack(self, packed_OP: Tensor, scale_OG: Tensor, zero_OZ: Tensor | None) -> QuantizedWeight:
        bits = self.format.bits
        q_OI = as_codes(unpack(packed_OP, bits, self.shape[-1]), bits, self.format.dtype)
        zero_OG = None if zero_OZ is None else unpack(zero_OZ, bits, scale_OG.shape[-1])
        return QuantizedWeight(q_OI, scale_OG, zero_OG, self.format)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scale = self.scale
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if self.scale.dtype != scale.dtype:  # a cast of the model must not round the grid
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.format.bits} bits"


class PackedLinear(nn.Module):
    """y = x W^T + b, with W made from its integers for the length of the product."""

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.dequantize(), self.bias)


def pack_parameter(model: nn.Module, name: str, format: IntFormat, scale_dtype: torch.dtype) -> None:
    """Put a `PackedWeight`, still empty, where `model` has the parameter `name`: of a linear, or of all experts."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    parameter = cast(nn.Parameter, getattr(module, attribute))
    weight = PackedWeight(parameter.shape, format, scale_dtype, parameter.dtype)
    if isinstance(module, nn.Linear):
        model.set_submodule(path, PackedLinear(weight, module.bias))
    else:
        delattr(module, attribute)
        module.add_module(attribute, weight)
