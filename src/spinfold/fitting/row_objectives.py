"""How hard a row is to round: pure functions of what a quantizer will see, one number per row, less is better.

    objective                per row y of n numbers     flat ±1   uniform   Gaussian (each at unit RMS)   source
    fourth_power             Σ y⁴                       n         1.8 n     3 n       OptRot, arXiv 2512.24124
    normalised_fourth_power  Σ_g ‖y_g‖₄⁴ / ‖y_g‖₂²      1         1.8       3         per quantization unit g
    kurtosis                 n Σ y⁴ / (Σ y²)²           1         1.8       3         KurTail, arXiv 2503.01483
    gap_to_uniform           |kurtosis - 1.8|           0.8       0         1.2       KurTail
    whip                     Σ exp(-|y|)                0.368 n   0.476 n   0.524 n   DartQuant, arXiv 2511.04063
    rounding_error           mean (y - Q(y))²

A rotation keeps Σ y², so on whole rows the first three have the same minimiser if all rows have one length. Moments
are not centred: a rotation does not keep a mean.

Shapes: ... leading axes, N the row, G groups of g neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spinfold.formats import FloatFormat, Format, IntFormat, fake_quantize
from spinfold.formats.activation import through_extremes
from spinfold.formats.base import extent
from spinfold.kernels import kernels_run_on

__all__ = [
    "UNIFORM_KURTOSIS",
    "RowObjective",
    "fourth_power",
    "gap_to_uniform",
    "in_blocks",
    "kurtosis",
    "normalised_fourth_power",
    "rounding_error",
    "unit_rms",
    "whip",
]

UNIFORM_KURTOSIS = 1.8
"""E[y⁴] / E[y²]² of the uniform distribution: (1/5) / (1/3)²."""


RowObjective = Callable[[Tensor], Tensor]
"""`(..., N) -> (...)`: every row by itself."""


def in_blocks(objective: RowObjective, on_gpu: int | None = None) -> RowObjective:
    """The same objective; on a CPU the gradient is found along with the value, some rows at a time.

    They stay in the cache from one operation to the next. Left to autograd, dozens of passes over all rows take far
    longer than the matrix product that the rows come from. On a GPU all rows are taken at once, or with `on_gpu` so
    many numbers at a time: what autograd keeps of 2²⁶ is ten arrays of 268 MB.
    """

    def blocked(y: Tensor) -> Tensor:
        at_once = _NUMBERS_PER_BLOCK if y.device.type == "cpu" else on_gpu or y.numel()
        if not (y.requires_grad and torch.is_grad_enabled()) or (y.device.type != "cpu" and y.numel() <= at_once):
            return objective(y)
        values: Tensor = _InBlocks.apply(y.reshape(-1, y.shape[-1]), objective, max(1, at_once // y.shape[-1]))
        return values.view(y.shape[:-1])

    return blocked


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RN: Tensor, objective: RowObjective, rows: int) -> Tensor:
        values, d_RN = [], torch.empty_like(y_RN)
        for part, d_part in zip(y_RN.split(rows), d_RN.split(rows), strict=True):
            with torch.enable_grad():
                y = part.detach().requires_grad_()
                value = objective(y)
                d_part.copy_(*torch.autograd.grad(value.sum(), y))
            values.append(value.detach())
        ctx.save_for_backward(d_RN)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (d_RN,) = ctx.saved_tensors
        return d_RN * grads[0][:, None].to(d_RN.dtype), None, None


def fourth_power(y: Tensor) -> Tensor:
    """‖y‖₄⁴ of each row, `(..., N) -> (...)`."""
    return _fourth_over_second(y, 0)


def normalised_fourth_power(y: Tensor, group_size: int | None = None) -> Tensor:
    """Σ_g ‖y_g‖₄⁴ / ‖y_g‖₂² over the groups of a row (one, if `group_size` is None), `(..., N) -> (...)`.

    A unit's rounding error grows as its length², and ‖y‖₄⁴ as its length⁴: divided by ‖y‖₂², units count by length².
    """
    return _fourth_over_second(y.unflatten(-1, (-1, group_size or y.shape[-1])), 1).sum(-1)


def kurtosis(y: Tensor) -> Tensor:
    """n ‖y‖₄⁴ / ‖y‖₂⁴ of each row, `(..., N) -> (...)`: 1 at best, n for a single spike."""
    return y.shape[-1] * _fourth_over_second(y, 2)


def _fourth_over_second(y: Tensor, power: int) -> Tensor:
    """‖y‖₄⁴ / ‖y‖₂²ᵖ of each row, p = `power`, in fp32; 0 for a row of zeros."""
    value: Tensor = _FourthOverSecond.apply(y, power)
    return value


class _FourthOverSecond(torch.autograd.Function):
    """f = ‖y‖₄⁴ / ‖y‖₂²ᵖ has the gradient y (4 y² / ‖y‖₂²ᵖ - 2 p f / ‖y‖₂²): a third of autograd's passes over y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, power: int) -> Tensor:
        y32 = y.float()
        square = y32.square()
        second = square.sum(-1).clamp(min=_SHORT)
        value = torch.linalg.vector_norm(square, dim=-1).square()
        for _ in range(power):
            value /= second
        ctx.save_for_backward(y32, square, value, second)
        ctx.dtype, ctx.power = y.dtype, power
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        y32, square, value, second = ctx.saved_tensors
        steep = 4 * grads[0]
        for _ in range(ctx.power):
            steep = steep / second
        flat = 2 * ctx.power * grads[0] * value / second
        return (square * steep[..., None]).sub_(flat[..., None]).mul_(y32).to(ctx.dtype), None


def gap_to_uniform(y: Tensor) -> Tensor:
    """|kurtosis - 1.8| of each row, `(..., N) -> (...)`: least where a row fills its range evenly."""
    return (kurtosis(y) - UNIFORM_KURTOSIS).abs()


def whip(y: Tensor) -> Tensor:
    """Σ exp(-|y|) of each row, `(..., N) -> (...)`. Not scale-free: rows must have unit RMS (`unit_rms`)."""
    return torch.exp(-y.float().abs()).sum(-1)


def unit_rms(x: Tensor) -> Tensor:
    """Each row divided by its root mean square, `(..., N)`; a row of zeros stays one."""
    return x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(x.dtype).tiny)


def rounding_error(y: Tensor, format: Format, *, scale_gradient: bool = True) -> Tensor:
    """mean (y - Q(y))² of each row, `(..., N) -> (...)`, Q being dynamic fake quantization to `format`.

    The value is the same either way; its gradient is that of one of two pictures of the error e = y - Q(y):

        scale_gradient  2 e² ds / s   e is noise in units of the step s: rows are drawn to a smaller range
        otherwise       2 e dy        Q(y) is held: rows are drawn to the grid points that are nearest now

    (With round straight-through, Q = s round(y/s) has dQ = dy + (Q - y) ds/s, so d(y - Q) = e ds/s.) The second is what
    DFRot's alternation follows with all rows at hand; over mini-batches of them it leads nowhere good, because no two
    rows agree on where the grid points are.

    A floating-point element's step follows its scale X only below the normal numbers; among them it grows with y
    itself, whatever X is: 2 e² dy / y. What saturates at L X has e = y - L X. With ds = dX everywhere a fit to NVFP4
    ended worse than it began.
    """
    y = y.float()
    if scale_gradient and isinstance(format, FloatFormat):
        return _float_noise(y, format)
    if scale_gradient and isinstance(format, IntFormat) and not kernels_run_on(y):
        value: Tensor = _IntNoise.apply(y, format)
        return value
    rounded = fake_quantize(y, format, scale_gradient=True) if scale_gradient else fake_quantize(y.detach(), format)
    return (y - rounded).square().mean(-1)


class _IntNoise(torch.autograd.Function):
    """`rounding_error` of integers with both gradients at once, in less than half the time of autograd.

    In steps, the error is s t with t = y/s - Q(y)/s, and E = s² Σ t² / n. Inside the grid t ds is all that moves:
    dE = 2/n s t² ds. Beyond an end q of the grid, where Q(y) = s q + low up to the rounding of the zero point, it is
    dE = 2/n s t (dy - q ds - dlow).
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, format: IntFormat) -> Tensor:
        y_Gg = format.split(y)
        low_G1, high_G1 = extent(y_Gg)
        scale_G1, zero_G1 = format.grid(low_G1, high_G1)
        zero = 0 if zero_G1 is None else zero_G1
        ratio_Gg = y_Gg / scale_G1
        near_Gg = ratio_Gg.round()
        q_Gg = near_Gg.add(zero).clamp_(format.low, format.high).sub_(zero)
        t_Gg = ratio_Gg.sub_(q_Gg)
        square_G1 = t_Gg.square().sum(-1, keepdim=True)
        value = (scale_G1.square() * square_G1).sum((-2, -1)) / y.shape[-1]
        if not ctx.needs_input_grad[0]:
            return value
        d_Gg = t_Gg.mul_(torch.ne(q_Gg, near_Gg, out=near_Gg))  # beyond the ends alone
        steep_G1 = scale_G1 * (2 / y.shape[-1])
        beyond_G1 = d_Gg.sum(-1, keepdim=True)
        offset_G1 = 0 if zero_G1 is None else format.clip * low_G1 / scale_G1
        inside_G1 = square_G1 - d_Gg.square().sum(-1, keepdim=True)
        ends_G1 = (d_Gg * q_Gg).sum(-1, keepdim=True) - offset_G1 * beyond_G1
        by_scale_G1 = steep_G1 * (inside_G1 - ends_G1) / format.high
        if zero_G1 is None:
            upper_G1 = high_G1 >= -low_G1
            by_high_G1, by_low_G1 = by_scale_G1 * upper_G1, -by_scale_G1 * ~upper_G1
        else:
            by_high_G1, by_low_G1 = by_scale_G1, -by_scale_G1 - steep_G1 * beyond_G1
        clip, ends = y.new_full((), format.clip), ((high_G1, by_high_G1), (low_G1, by_low_G1))
        ctx.save_for_backward(through_extremes(y, y_Gg, d_Gg.mul_(steep_G1), clip, *ends)[0])
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (d_y,) = ctx.saved_tensors
        return d_y * grads[0][..., None], None


def _float_noise(y: Tensor, format: FloatFormat) -> Tensor:
    """`rounding_error` of floating-point elements as noise: e² s² / s₀², s₀ being the step s as it is."""
    y_Gg = format.split(y)
    low_G1, high_G1 = extent(y_Gg)
    with torch.no_grad():
        grid = format.grid(low_G1, high_G1, whole=format.whole_of(low_G1, high_G1))
        scale_Gg = format.step_of(y_Gg, *grid)
        ratio_Gg = y_Gg / scale_Gg.masked_fill(scale_Gg == 0, torch.inf)
        error_Gg = y_Gg - format.elements.nearest(ratio_Gg) * scale_Gg
    most_Gg = torch.where(y_Gg.signbit(), -low_G1, high_G1) if format.by_sign else torch.maximum(high_G1, -low_G1)
    moving_Gg = scale_Gg * _over_itself(most_Gg)  # X, and its gradient
    step_Gg = torch.where(ratio_Gg.abs() >= format.elements.smallest_normal, y_Gg, moving_Gg)
    beyond_Gg = (y_Gg.abs() - format.elements.largest * moving_Gg).square()
    inside_Gg = (error_Gg * _over_itself(step_Gg)).square()
    return torch.where(ratio_Gg.abs() > format.elements.largest, beyond_Gg, inside_Gg).flatten(-2).mean(-1)


def _over_itself(x: Tensor) -> Tensor:
    """x / x: 1, with the gradient of log x; where x is 0, 0."""
    held = x.detach()
    return x / held.masked_fill(held == 0, 1)


_NUMBERS_PER_BLOCK = 2**17
_SHORT = 1e-18  # ‖y‖₂² of a row that is as good as zero: even 1 / ‖y‖₂⁴ is a number
