"""How hard a row is to round: pure functions of what a quantizer will see, one number per row, less is better.

    objective                per row y of n numbers     flat ±1   uniform   Gaussian (each at unit RMS)   source
    fourth_power             Σ y⁴                       n         1.8 n     3 n       OptRot, arXiv 2512.24124
    normalised_fourth_power  Σ_g ‖y_g‖₄⁴ / ‖y_g‖₂²      1         1.8       3         per quantization unit g
    kurtosis                 n Σ y⁴ / (Σ y²)²           1         1.8       3         KurTail, arXiv 2503.01483
    gap_to_uniform           |kurtosis - 1.8|           0.8       0         1.2       KurTail
    whip                     Σ exp(-|y|)                0.368 n   0.476 n   0.524 n   DartQuant, arXiv 2511.04063
    rounding_error           mean (y - Q(y))²

A rotation keeps Σ y², so on whole rows the first three have the same minimiser if all rows have one length. Moments
are not centred: a rotation does not keep a mean. `feedback` is of a second moment, not of rows.

Shapes: ... leading axes, N the row, G groups of g neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spinfold.formats import Format, fake_quantize

__all__ = [
    "UNIFORM_KURTOSIS",
    "feedback",
    "fourth_power",
    "gap_to_uniform",
    "kurtosis",
    "normalised_fourth_power",
    "rounding_error",
    "unit_rms",
    "whip",
]

UNIFORM_KURTOSIS = 1.8
"""E[y⁴] / E[y²]² of the uniform distribution: (1/5) / (1/3)²."""


def fourth_power(y: Tensor) -> Tensor:
    """‖y‖₄⁴ of each row, `(..., N) -> (...)`."""
    return y.float().square().square().sum(-1)


def normalised_fourth_power(y: Tensor, group_size: int | None = None) -> Tensor:
    """Σ_g ‖y_g‖₄⁴ / ‖y_g‖₂² over the groups of a row (one, if `group_size` is None), `(..., N) -> (...)`.

    A unit's rounding error grows as its length², and ‖y‖₄⁴ as its length⁴: divided by ‖y‖₂², units count by length².
    """
    square = y.float().square().unflatten(-1, (-1, group_size or y.shape[-1]))
    return (square.square().sum(-1) / square.sum(-1).clamp(min=_TINY)).sum(-1)


def kurtosis(y: Tensor) -> Tensor:
    """n ‖y‖₄⁴ / ‖y‖₂⁴ of each row, `(..., N) -> (...)`: 1 at best, n for a single spike."""
    square = y.float().square()
    return square.square().mean(-1) / square.mean(-1).square().clamp(min=_TINY)


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
    """
    y = y.float()
    rounded = fake_quantize(y, format, scale_gradient=True) if scale_gradient else fake_quantize(y.detach(), format)
    return (y - rounded).square().mean(-1)


def feedback(moment_NN: Tensor, damp: float = 0.01) -> Tensor:
    """The diagonal of D in H = (I + U) D (I + U)ᵀ, U strictly upper triangular, `(..., N, N) -> (..., N)`.

    D_i is the variance of x_i that the later channels don't explain: the weight that is left to GPTQ's error at channel
    i when channels are rounded first to last. With J reversing the order, J H J = L Lᵀ gives D_i = L_jj² at the
    mirrored j. det H = Π D_i does not change under a rotation, hence n det(H)^(1/n) ≤ tr(D) ≤ tr(H): least where all
    D_i are equal, greatest in the eigenbasis. `damp` times the mean of H's diagonal is added to it, as in GPTQ.
    Differentiable; computed in H's dtype with IEEE products.
    """
    size = moment_NN.shape[-1]
    damping_11 = damp * moment_NN.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    damped_NN = moment_NN + damping_11 * torch.eye(size, dtype=moment_NN.dtype, device=moment_NN.device)
    L_NN = torch.linalg.cholesky(damped_NN.flip(-2, -1))
    return torch.flip(L_NN.diagonal(dim1=-2, dim2=-1).square(), (-1,))


_TINY = torch.finfo(torch.float32).tiny
