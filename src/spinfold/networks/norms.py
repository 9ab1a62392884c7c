"""RMSNorms in place of Transformers' own: as one kernel, and in fp64."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Fp64Norm", "FusedNorm"]


class FusedNorm:
    """An RMSNorm's forward as one kernel, for fp32; x / rms(x) * gain."""

    def __init__(self, norm: nn.Module, gain_offset: int) -> None:
        self.norm, self.plain, self.gain_offset = norm, norm.forward, gain_offset

    def __call__(self, x: Tensor) -> Tensor:
        weight = cast(Tensor, self.norm.weight)
        if x.dtype != weight.dtype:
            return cast(Tensor, self.plain(x))
        eps = getattr(self.norm, "variance_epsilon", None) or self.norm.eps
        return F.rms_norm(x, (x.shape[-1],), weight + self.gain_offset, cast(float, eps))


class Fp64Norm:
    """A forward hook that replaces an RMSNorm's fp32 arithmetic by fp64: x / rms(x) * gain."""

    def __init__(self, gain_offset: int) -> None:
        self.gain_offset = gain_offset

    def __call__(self, norm: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = args[0]
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        gain = cast(Tensor, norm.weight) + self.gain_offset
        return F.rms_norm(x, (x.shape[-1],), gain, cast(float, eps)) if x.dtype == torch.float64 else out
