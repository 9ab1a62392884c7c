"""Learned rounding (AutoRound, arXiv 2309.05516): which way each weight is rounded, for the output of the whole layer.

    integers    Ŵ = s c (clamp(round(W / (s c) + V) + z) - z)     V in [-1/2, 1/2] per weight, c in [1/2, 3/2] per group
    floats      Ŵ = s c sat(d round(W / (s c d) + V))             d how far apart the elements around W / (s c) are

so a weight goes to one of the two elements beside it, and s c is rounded as its format stores scales. It starts from
V = 0, c = 1, which is rounding to nearest, and descends on |layer(x; Ŵ) - y|², straight through the
rounding, by the signs of the gradients: V, c ← V, c - r sign(∇), with r falling linearly from 1 / steps to zero. x are
inputs from the rounded layers before, y is what the unrounded network has behind this layer. The authors' range has two
factors, for its two ends; here c moves both, so that z stays, and moves AMXFP4's scales of both signs. NVFP4's scale of
the scales stays, too.

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
from spinfold.formats import ClipSearch, FloatFormat, Format, IntFormat, QuantizedWeight, fit_grid
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

    def moved(self) -> tuple[Tensor, Tensor | None]:
        """Scales s c, rounded as they will be stored, and second numbers, `(O, G, 1)`."""
        grid, second_OG = self.grid, self.grid.second_OG

        def times_c(scale_OG: Tensor) -> Tensor:
            moved_OG = scale_OG.float() * self.c_OG
            return _straight_through(moved_OG, grid.format.nearest_scale(moved_OG.detach(), scale_OG.dtype))

        if second_OG is not None:
            by_sign = isinstance(grid.format, FloatFormat) and grid.format.by_sign
            second_OG = times_c(second_OG) if by_sign else second_OG.float()
        return times_c(grid.scale_OG)[..., None], None if second_OG is None else second_OG[..., None]

    def elements(self, scale_OG1: Tensor, second_OG1: Tensor | None) -> tuple[Tensor, Tensor]:
        """Elements `(O, G, g)` and what each is a multiple of, with gradients: Ŵ is their product."""
        fmt = self.grid.format
        w_OGg, v_OGg = fmt.split(self.w_OI), fmt.split(self.v_OI)
        if isinstance(fmt, IntFormat):
            zero = 0 if second_OG1 is None else second_OG1
            ratio_OGg = w_OGg / scale_OG1 + v_OGg
            q_OGg = (_straight_through(ratio_OGg, ratio_OGg.round()) + zero).clamp(fmt.low, fmt.high) - zero
            return q_OGg, scale_OG1
        assert isinstance(fmt, FloatFormat)
        largest, step_OGg = fmt.elements.largest, fmt.step_of(w_OGg, scale_OG1, second_OG1)
        ratio_OGg = w_OGg / step_OGg.masked_fill(step_OGg == 0, torch.inf)
        gap_OGg = fmt.elements.step_at(ratio_OGg.detach().clamp(-largest, largest))
        place_OGg = ratio_OGg / gap_OGg + v_OGg
        return (_straight_through(place_OGg, place_OGg.round()) * gap_OGg).clamp(-largest, largest), step_OGg

    def weight_OI(self) -> Tensor:
        """Ŵ, with gradients."""
        q_OGg, step_OGg = self.elements(*self.moved())
        return (q_OGg * step_OGg).flatten(1)

    @torch.no_grad()
    def settled(self) -> QuantizedWeight:
        """Ŵ on its grid."""
        fmt, (scale_OG1, second_OG1) = self.grid.format, self.moved()
        q_OGg, _ = self.elements(scale_OG1, second_OG1)
        if not isinstance(fmt, IntFormat):
            q_OGg = q_OGg.copysign(fmt.split(self.w_OI))  # a zero, too, has the sign of its weight
        elif second_OG1 is not None:
            q_OGg = q_OGg + second_OG1
        second_OG = None if second_OG1 is None else second_OG1.squeeze(-1)
        stored = fmt.stored(scale_OG1.squeeze(-1), second_OG, self.grid.scale_OG.dtype)
        return QuantizedWeight(fmt.encode(q_OGg.flatten(1)), *stored, fmt)

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
