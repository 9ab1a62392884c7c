"""Learned rounding (AutoRound, arXiv 2309.05516): which way each weight is rounded, for the output of the whole layer.

    Ŵ = s c (clamp(round(W / (s c) + V) + z) - z)        V in [-1/2, 1/2] per weight, c in [1/2, 3/2] per group

starts from V = 0, c = 1, which is rounding to nearest, and descends on |layer(x; Ŵ) - y|², straight through the
rounding, by the signs of the gradients: V, c ← V, c - r sign(∇), with r falling linearly from 1 / steps to zero. x are
inputs from the rounded layers before, y is what the unrounded network has behind this layer. The authors' range has two
factors, for its two ends; here c moves both, so that z stays.

The error over all windows is measured at the start and ten times more, and the least one wins.

Shapes: O out features, I in features, G groups of g, B windows, T tokens, D residual width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from spinfold.compute import precision
from spinfold.distributed import add_up, everyones, rank
from spinfold.formats import ClipSearch, Format, IntFormat, QuantizedWeight, fit_grid
from spinfold.networks import Layer, Linear
from spinfold.recipe import Rounding

__all__ = ["autoround"]

_CHECKS = 10


class _Learned:
    """One linear's V and c, and what they make of its weight."""

    def __init__(self, linear: Linear, fmt: Format, search: ClipSearch | None, scale_dtype: torch.dtype) -> None:
        self.linear, self.w_OI = linear, linear.weight_OI.float().clone()
        self.grid = fit_grid(self.w_OI, fmt, search=search, scale_dtype=scale_dtype)
        self.v_OI = torch.zeros_like(self.w_OI, requires_grad=True)
        self.c_OG = torch.ones_like(self.grid.scale_OG, dtype=torch.float32, requires_grad=True)

    def scale_OG(self) -> Tensor:
        """s c, rounded as it will be stored."""
        scale_OG = self.grid.scale_OG.float() * self.c_OG
        return _straight_through(scale_OG, scale_OG.to(self.grid.scale_OG.dtype).float())

    def parts(self) -> tuple[Tensor, Tensor, Tensor | int]:
        """Integers `(O, G, g)`, scales `(O, G, 1)` and zero points, with gradients."""
        fmt, zero_OG = self.grid.format, self.grid.zero_OG
        assert isinstance(fmt, IntFormat)
        scale_OG1, zero = self.scale_OG()[..., None], 0 if zero_OG is None else zero_OG.float()[..., None]
        ratio_OGg = fmt.split(self.w_OI) / scale_OG1 + fmt.split(self.v_OI)
        return (_straight_through(ratio_OGg, ratio_OGg.round()) + zero).clamp(fmt.low, fmt.high), scale_OG1, zero

    def weight_OI(self) -> Tensor:
        """Ŵ, with gradients."""
        q_OGg, scale_OG1, zero = self.parts()
        return ((q_OGg - zero) * scale_OG1).flatten(1)

    @torch.no_grad()
    def settled(self) -> QuantizedWeight:
        """Ŵ on its grid."""
        grid, (q_OGg, _, _) = self.grid, self.parts()
        scale_OG = self.scale_OG().to(grid.scale_OG.dtype)
        return QuantizedWeight(q_OGg.flatten(1).to(grid.format.dtype), scale_OG, grid.zero_OG, grid.format)

    def gradients(self) -> list[Tensor]:
        """Those of V and c; zeros if no window was seen."""
        for leaf in (self.v_OI, self.c_OG):
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        return [leaf.grad for leaf in (self.v_OI, self.c_OG) if leaf.grad is not None]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One signed step, and the gradients are forgotten."""
        for leaf, middle in ((self.v_OI, 0.0), (self.c_OG, 1.0)):
            assert leaf.grad is not None
            leaf.sub_(rate * leaf.grad.sign()).clamp_(middle - 0.5, middle + 0.5)
            leaf.grad = None


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `x`."""
    return x + (rounded - x).detach()


def _square(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


@dataclass(frozen=True)
class _Block:
    """A layer with the inputs and wanted outputs of this process's windows, batches of `(B, T, D)`."""

    layer: Layer
    inputs: Sequence[Tensor]
    wanted: Sequence[Tensor]
    kwargs: Mapping[str, Any]
    mode: str

    def run(self, x_BTD: Tensor, learned: Sequence[_Learned]) -> Tensor:
        """The layer's output with the weights as they are now."""
        parts_of: dict[str, list[_Learned]] = {}
        for one in learned:
            parts_of.setdefault(one.linear.parameter.removeprefix(f"{self.layer.prefix}."), []).append(one)
        weights = {}
        for name, parts in parts_of.items():
            rows = sorted(parts, key=lambda one: one.linear.rows.start or 0)
            whole = self.layer.module.get_parameter(name)
            weights[name] = torch.cat([one.weight_OI() for one in rows]).view_as(whole)
        with precision(self.mode, x_BTD.device):
            out = functional_call(self.layer.module, weights, (x_BTD,), dict(self.kwargs))
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def error(self, learned: Sequence[_Learned]) -> float:
        """|layer(x; Ŵ) - y|² / |y|² over all windows."""
        error = sum(_square(self.run(x, learned) - y) for x, y in zip(self.inputs, self.wanted, strict=True))
        sums = torch.tensor([error, sum(map(_square, self.wanted))], dtype=torch.float64)
        add_up([sums])
        return float(sums[0] / sums[1])

    def drawn(self, windows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and wanted outputs of these windows; all batches but the last are of one size."""
        size = len(self.inputs[0])
        x_BTD, y_BTD = (
            torch.stack([batches[i // size][i % size] for i in windows]) for batches in (self.inputs, self.wanted)
        )
        return x_BTD, y_BTD


def autoround(
    layer: Layer,
    formats: Mapping[str, Format],
    inputs: Sequence[Tensor],
    wanted: Sequence[Tensor],
    kwargs: Mapping[str, Any],
    settings: Rounding,
    *,
    seed: int,
    search: ClipSearch | None = None,
    scale_dtype: torch.dtype = torch.float32,
    mode: str = "fp32",
) -> tuple[dict[str, QuantizedWeight], float, float]:
    """The layer's linears on the grids `formats`, by key, and the layer's relative squared error with them and with
    rounding to nearest.

    `inputs` are batches `(B, T, D)`, `wanted` what should come out, `kwargs` the layer's other arguments. `settings`
    has steps, windows a step, and the rate if it is not 1 / steps; `seed` draws the windows. The layer stays as it is.
    """
    learned = [_Learned(linear, formats[key], search, scale_dtype) for key, linear in layer.linears.items()]
    block = _Block(layer, inputs, wanted, kwargs, mode)
    steps, rate = settings.steps, settings.learning_rate or 1 / max(1, settings.steps)
    counts = everyones(sum(map(len, inputs)))
    first = sum(counts[: rank()])
    own = range(first, first + counts[rank()])
    generator = torch.Generator().manual_seed(seed)
    best, nearest_error = [one.settled() for one in learned], block.error(learned)
    least = nearest_error
    for step in range(steps):
        drawn = torch.randperm(sum(counts), generator=generator)[: settings.batch].tolist()
        if windows := [i - first for i in drawn if i in own]:
            x_BTD, y_BTD = block.drawn(windows)
            with torch.enable_grad():
                error = torch.nn.functional.mse_loss(block.run(x_BTD, learned).float(), y_BTD.float())
                (error * (len(windows) / len(drawn))).backward()
        add_up(gradient for one in learned for gradient in one.gradients())
        for one in learned:
            one.step(rate * (1 - step / steps))
        if (step + 1) % max(1, steps // _CHECKS) == 0 or step + 1 == steps:
            now = block.error(learned)
            if now < least:
                best, least = [one.settled() for one in learned], now
    return {one.linear.key: weight for one, weight in zip(learned, best, strict=True)}, least, nearest_error
