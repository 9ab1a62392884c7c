"""What GPTQ can't repair, channel by channel: D of a second moment, as it is or in the basis of a rotation.

    H = E[xᵀx] = (I + U) D (I + U)ᵀ,  U strictly upper triangular        D_i: the variance of x_i that the later
                                                                         channels don't explain

It is the weight that is left to GPTQ's error at channel i when channels are rounded first to last. With J reversing the
order, J H J = L Lᵀ gives D_i = L_jj² at the mirrored j. det H = Π D_i does not change under a rotation, hence
n det(H)^(1/n) ≤ tr(D) ≤ tr(H): least where all D_i are equal, greatest in the eigenbasis. `damp` times the mean of H's
diagonal is added to it, as in GPTQ.

Shapes: L layers, N the channels of H, H size of a head, h heads; ... leading axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spinfold.compute import precision

__all__ = ["feedback", "lower_one", "pair", "turned_feedback", "upper_one"]

_ALONE = 1024
"""From this size on a GPU factors matrices one by one: its batched routines are made for small ones."""


def feedback(moment_NN: Tensor, damp: float = 0.01) -> Tensor:
    """The diagonal of D, `(..., N, N) -> (..., N)`. Differentiable; computed in H's dtype with IEEE products."""
    return _diagonal(torch.linalg.cholesky(_reversed(moment_NN, damp)))


def turned_feedback(moment_LNN: Tensor, R: Tensor, damp: float = 0.01) -> Tensor:
    """Feedback `(L, N)` of Mᵀ H M, with an orthogonal M: R `(N, N)`, or I ⊗ R_l for a stack `(L, H, H)` of rotations of
    heads. Its gradient is the one along the orthogonal group, and takes a fraction of what autograd's does.

    Let J Mᵀ H M J = L Lᵀ. From dL = L Φ(L⁻¹ dH L⁻ᵀ), Φ being the lower triangle with half of the diagonal,

        Σ g_j d(L_jj²) = tr(L⁻ᵀ S L⁻¹ dH),  S = diag(g_j L_jj²)

    and as M turns by Ω, dM = M Ω, it is dH = L Lᵀ Ω - Ω L Lᵀ (what damps H does not turn), both in J's order:

        Σ g_j d(L_jj²) = 2 tr(L⁻ᵀ S Lᵀ Ω) = ⟨K - Kᵀ, Ω⟩,  K = L S L⁻¹

    so that M (K - Kᵀ) is the gradient, without a product with H. K is lower triangular, and its blocks on the diagonal
    are made of those of L alone; a head's rotation needs no others.
    """
    found: Tensor = _TurnedFeedback.apply(R, moment_LNN, damp)
    return found


class _TurnedFeedback(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, R: Tensor, moment_LNN: Tensor, damp: float) -> Tensor:
        with precision("fp32", R.device):  # coarser products lose the small eigenvalues that the factor is about
            L_LNN = _each(torch.linalg.cholesky, _reversed(_turned(moment_LNN, R), damp))
        ctx.save_for_backward(R, L_LNN)
        return _diagonal(L_LNN)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        R, L_LNN = ctx.saved_tensors
        S_LN = (grads[0] * _diagonal(L_LNN)).flip(-1)
        with precision("fp32", R.device):
            if R.ndim == 2:
                K_NN = _each(_conjugated, L_LNN, S_LN).sum(0)
            else:
                size = R.shape[-1]
                L_LhHH = L_LNN.unflatten(2, (-1, size)).unflatten(1, (-1, size)).diagonal(dim1=1, dim2=3)
                K_NN = _conjugated(L_LhHH.movedim(-1, 1), S_LN.unflatten(1, (-1, size))).sum(1)
        K_NN = K_NN.flip(-2, -1)
        return R @ (K_NN - K_NN.mT), None, None


def _conjugated(L_NN: Tensor, S_N: Tensor) -> Tensor:
    """L S L⁻¹."""
    found: Tensor = torch.linalg.solve_triangular(L_NN, L_NN * S_N[..., None, :], upper=False, left=False)
    return found


def _reversed(moment_NN: Tensor, damp: float) -> Tensor:
    """The damped moment, last channel first: a copy, and no other array of its size."""
    reversed_NN = moment_NN.flip(-2, -1)
    diagonal_N = reversed_NN.diagonal(dim1=-2, dim2=-1)
    diagonal_N.add_(damp * diagonal_N.mean(-1, keepdim=True))
    return reversed_NN


def _diagonal(L_NN: Tensor) -> Tensor:
    return L_NN.diagonal(dim1=-2, dim2=-1).square().flip(-1)


def _turned(moment_LNN: Tensor, R: Tensor) -> Tensor:
    """Mᵀ H M."""
    if R.ndim == 2:
        return R.mT @ moment_LNN @ R
    for _ in range(2):  # (H M)ᵀ, and that once more
        rows = moment_LNN.reshape(len(R), moment_LNN[0].numel() // R.shape[-1] if len(R) else 0, R.shape[-1])
        moment_LNN = (rows @ R).view_as(moment_LNN).mT
    return moment_LNN


def _each(function: Callable[..., Tensor], *stacks: Tensor) -> Tensor:
    """`function` of stacks, or of their members one by one."""
    if stacks[0].is_cuda and len(stacks[0]) > 1 and stacks[0].shape[-1] >= _ALONE:
        return torch.stack([function(*one) for one in zip(*stacks, strict=True)])
    return function(*stacks)


# ---- two moments in the memory of one ----------------------------------------------------------------------------


def pair(lower_NN: Tensor, upper_NN: Tensor) -> Tensor:
    """Two symmetric matrices in one `(N, N + 1)`: the lower triangle of one, and right of it the upper of the other."""
    pair_NM = torch.nn.functional.pad(lower_NN.tril(), (0, 1))
    pair_NM[..., 1:] += upper_NN.triu()
    return pair_NM


def lower_one(pair_NM: Tensor) -> Tensor:
    """The first matrix of a pair, `(..., N, N + 1) -> (..., N, N)`."""
    lower_NN = pair_NM[..., :-1]
    return lower_NN.tril() + lower_NN.tril(-1).mT


def upper_one(pair_NM: Tensor) -> Tensor:
    """The second matrix of a pair, `(..., N, N + 1) -> (..., N, N)`."""
    upper_NN = pair_NM[..., 1:]
    return upper_NN.triu() + upper_NN.triu(1).mT
