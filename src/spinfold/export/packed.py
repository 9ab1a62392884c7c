"""Weights that stay packed: codes of 2 to 8 bits in memory as on disk, and the module that computes with them.

    P.packed    uint8 (…, O, ⌈I b / 8⌉)   the codes, integers moved up to start at 0, packed densely row by row
    P.scale     (…, O, G)                 in the dtype that rounding gave them, whatever dtype the model is cast to
    P.zero      uint8 (…, O, ⌈G b / 8⌉)   zero points, packed like the codes; asymmetric integers only
    P.negative  (…, O, G)                 the scales of negative numbers; AMXFP4 only
    P.outer     (…, O, 1)                 the scale of a row's scales; NVFP4 only

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
from spinfold.formats import Format, QuantizedWeight, layout

__all__ = ["PackedLinear", "PackedWeight", "pack_parameter", "packed_tensors"]


def packed_tensors(weight: QuantizedWeight, shape: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of a `PackedWeight` of that shape; `weight` has the rows of all experts one below the other."""
    bits, tensors = weight.format.bits, weight.tensors()
    tensors = {"packed": pack(as_unsigned(tensors.pop("q"), bits), bits), **tensors}
    if "zero" in tensors:
        tensors["zero"] = pack(tensors["zero"], bits)
    return {key: value.unflatten(0, tuple(shape[:-1])) for key, value in tensors.items()}


class PackedWeight(nn.Module):
    """A weight `(O, I)`, or `(E, O, I)`, held as codes and scales; in place of a parameter of `shape`.

    Like such a parameter it has a shape and a dtype, and iterating over the experts gives their weights one by one.
    Its tensors are empty until a checkpoint is loaded.
    """

    packed: Tensor
    scale: Tensor

    def __init__(self, shape: Sequence[int], format: Format, scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.format, self.dtype = torch.Size(shape), format, dtype
        for key, ((*rows, count), stored) in layout(shape, format, scale_dtype).items():
            count = -(-count * format.bits // 8) if key in ("q", "zero") else count
            empty = torch.empty(*rows, count, dtype=stored, device="meta")
            self.register_buffer("packed" if key == "q" else key, empty)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        """Each expert's weight `(O, I)`, in floating point only until the next one is asked for."""
        names, buffers = zip(*self.named_buffers(), strict=True)
        for tensors in zip(*buffers, strict=True):
            yield self._unpack(dict(zip(names, tensors, strict=True))).dequantize(self.dtype)

    def dequantize(self) -> Tensor:
        """The weight `(O, I)`."""
        return self._unpack(dict(self.named_buffers())).dequantize(self.dtype)

    def _unpack(self, tensors: dict[str, Tensor]) -> QuantizedWeight:
        """From the buffers `(O, …)` of one matrix."""
        bits = self.format.bits
        q_OI = as_codes(unpack(tensors.pop("packed"), bits, self.shape[-1]), bits, self.format.dtype)
        if "zero" in tensors:
            tensors["zero"] = unpack(tensors["zero"], bits, tensors["scale"].shape[-1])
        return QuantizedWeight.from_tensors({"q": q_OI, **tensors}, self.format)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for name, after in dict(self.named_buffers()).items():
            if after.dtype != before[name].dtype:  # a cast of the model must not round the grid
                setattr(self, name, before[name].to(after.device))
        return self

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.format.bits} bits"


class PackedLinear(nn.Module):
    """y = x W^T + b, with W made from its codes for the length of the product."""

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.dequantize(), self.bias)


def pack_parameter(model: nn.Module, name: str, format: Format, scale_dtype: torch.dtype) -> None:
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
