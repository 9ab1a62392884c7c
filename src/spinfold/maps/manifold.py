"""Steps on the orthogonal group O(N), for any number of matrices at once, and two small optimisers made of them.

With G = ∂f/∂R, the skew matrix A = ½ (RᵀG - GᵀR) is the Riemannian gradient seen from R: moving along
R (I + εΩ), Ω skew, changes f by ε tr(Gᵀ R Ω) = ε ⟨RᵀG, Ω⟩ = ε ⟨A, Ω⟩, so -A is the steepest descent. A step is

    R ← R cay(-α A),    cay(X) = (I - X/2)⁻¹ (I + X/2) = exp(X) + O(X³), orthogonal for skew X.

    rule        α                                   Cayley by                        source
    capped      min(lr, 1 / (‖A‖₁ + 1e-8))          five fixed-point iterations      SpinQuant's published optimiser
    spectral    lr / ‖A‖₂: rotates by lr radians    an exact solve                   scale-free

Sources: Li, Fuxin & Todorovic, arXiv 2002.01113 (Cayley SGD); Liu et al., arXiv 2405.16406 (SpinQuant).

Shapes: N size of the rotations, ... any leading axes, R_NN, G_NN and A_NN standing for (..., N, N).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from spinfold.compute import products
from spinfold.errors import SpinfoldError

__all__ = [
    "TF32_WIDTH",
    "CayleySGD",
    "RiemannianAdam",
    "StepRule",
    "cayley",
    "cayley_step",
    "orthogonality_gap",
    "procrustes",
    "project",
    "qr_orthogonal",
    "skew_gradient",
    "spectral_norm",
]

StepRule = Literal["capped", "spectral"]

_NEWTON_STEPS = 12
TF32_WIDTH = 2048
"""From here on a GPU moves rotations by products in TF32."""
_SOLVED = 256  # from here on a CPU solves faster than it multiplies the series of an inverse
_STACKED = 1 << 26  # numbers of a stack: a step holds about ten times as many
_DRIFT = 1e-5  # the optimisers keep max |RᵀR - I| at or below this


def orthogonality_gap(R_NN: Tensor) -> float:
    """max |RᵀR - I| over all entries and all matrices, in R's dtype."""
    return float((R_NN.mT @ R_NN - _eye_like(R_NN)).abs().max())


def project(R_NN: Tensor) -> Tensor:
    """The nearest orthogonal matrix: the polar factor U Vᵀ of R = U Σ Vᵀ, computed in fp64, in R's dtype.

    By Newton's iteration X ← (μX + (μX)⁻ᵀ) / 2, which takes each singular value σ to (μσ + 1/μσ) / 2 and so to 1, with
    Higham's scale μ (SIAM J. Sci. Stat. Comput. 7, 1986); at most nine inverses, where an SVD takes a GPU many times
    longer. A matrix without an inverse has its SVD. Near the group, as after a fit, by a few products (`_polished`).
    """
    X_NN = R_NN.double()
    near_NN = X_NN.mT @ X_NN - _eye_like(X_NN)
    if torch.linalg.matrix_norm(near_NN).max() < 0.1:
        return _polished(X_NN).to(R_NN.dtype)
    for _ in range(_NEWTON_STEPS):
        inverse_NN = torch.linalg.inv_ex(X_NN).inverse.mT
        lengths = [torch.linalg.matrix_norm(one, ord=order) for one in (inverse_NN, X_NN) for order in (1, torch.inf)]
        scale = (lengths[0] * lengths[1] / (lengths[2] * lengths[3])) ** 0.25
        scale = torch.where((scale - 1).abs() < 0.01, 1.0, scale)[..., None, None]  # near the end it would only disturb
        before_NN, X_NN = X_NN, (scale * X_NN + inverse_NN / scale) / 2
        change = float((X_NN - before_NN).abs().max())
        if change < 1e-8:  # the error is now the square of it
            return X_NN.to(R_NN.dtype)
        if change != change:
            break
    U_NN, _, Vh_NN = torch.linalg.svd(R_NN.double(), full_matrices=False)
    return torch.matmul(U_NN, Vh_NN).to(R_NN.dtype)


def _polished(X_NN: Tensor) -> Tensor:
    """X ← X (I - (XᵀX - I) / 2), which takes each singular value 1 + e to 1 - 3e²/2 + O(e³), to the last digit."""
    while True:
        excess_NN = X_NN.mT @ X_NN - _eye_like(X_NN)
        X_NN = X_NN - X_NN @ excess_NN / 2
        if excess_NN.abs().max() < 1e-8:
            return X_NN


def procrustes(a_TN: Tensor, b_TN: Tensor) -> Tensor:
    """The orthogonal R that minimises ‖a R - b‖_F.

    ‖a R - b‖² = ‖a‖² + ‖b‖² - 2 tr(Rᵀ aᵀb), and the polar factor of aᵀb maximises that trace (Schönemann 1966).
    """
    return project(a_TN.double().mT @ b_TN.double()).to(a_TN.dtype)


def qr_orthogonal(z_NN: Tensor) -> Tensor:
    """Q of z = Q U with diag(U) > 0, which makes Q unique, smooth in z, and Haar-distributed for a Gaussian z."""
    Q_NN, U_NN = torch.linalg.qr(z_NN)
    sign_N = torch.where(U_NN.detach().diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q_NN.dtype)
    return torch.mul(Q_NN, sign_N[..., None, :])


def skew_gradient(R_NN: Tensor, G_NN: Tensor) -> Tensor:
    """A = ½ (RᵀG - GᵀR), the Riemannian gradient in the frame of R: descend by `R @ cayley(-lr * A)`."""
    product_NN = R_NN.mT @ G_NN
    return (product_NN - product_NN.mT) / 2


def cayley(A_NN: Tensor, bound: float = 2.0) -> Tensor:
    """(I - A/2)⁻¹ (I + A/2): orthogonal for skew A (the two factors commute, and are each other's transpose).

    A small `bound` on ‖A‖₂ saves the solve: with X = A/2, (I - X)⁻¹ = (I + X)(I + X²)(I + X⁴)… to the last digit in a
    few products, which a GPU does many times faster.
    """
    eye_NN, X_NN = _eye_like(A_NN), A_NN / 2
    if bound > 1:
        rotation_NN: Tensor = torch.linalg.solve(eye_NN - X_NN, eye_NN + X_NN)
        return rotation_NN
    inverse_NN = _inverse(X_NN, bound)
    return inverse_NN + X_NN @ inverse_NN


def _inverse(X_NN: Tensor, bound: float) -> Tensor:
    """(I - X)⁻¹ for ‖X‖₂ ≤ bound/2 < 1."""
    inverse_NN, power_NN, remainder = _eye_like(X_NN) + X_NN, X_NN, (bound / 2) ** 2
    while remainder > torch.finfo(X_NN.dtype).eps / 8:
        power_NN, remainder = power_NN @ power_NN, remainder**2
        inverse_NN = inverse_NN + inverse_NN @ power_NN
    return inverse_NN


def _turned(R_NN: Tensor, A_NN: Tensor, bound: float) -> Tensor:
    """R cay(A), `bound` as in `cayley`: as R + R (cay(A) - I), whose products may be coarse, since their errors are
    relative to the step, not to R. cay(A) - I = A (I - A/2)⁻¹.
    """
    if bound > 1 or (R_NN.device.type == "cpu" and R_NN.shape[-1] >= _SOLVED):
        return R_NN + R_NN @ (cayley(A_NN) - _eye_like(A_NN))
    return R_NN + R_NN @ (A_NN @ _inverse(A_NN / 2, bound))


def spectral_norm(A_NN: Tensor) -> Tensor:
    """‖A‖₂ of each matrix, `(...)`: from below, by ten power iterations on AᵀA.

    The iterations start at the largest column, so the result is at least that column's length, and repeatable. An SVD
    would be exact, and takes a GPU longer than all the rest of a step.
    """
    length_1N = torch.linalg.vector_norm(A_NN, dim=-2, keepdim=True)
    v_N1 = A_NN.take_along_dim(length_1N.argmax(dim=-1, keepdim=True), dim=-1)
    for _ in range(10):
        v_N1 = A_NN.mT @ (A_NN @ torch.nn.functional.normalize(v_N1, dim=-2, eps=torch.finfo(A_NN.dtype).tiny))
    return torch.sqrt(torch.linalg.vector_norm(v_N1, dim=(-2, -1)))


def cayley_step(R_NN: Tensor, G_NN: Tensor, lr: float, rule: StepRule = "spectral") -> Tensor:
    """One descent step from R along the Euclidean gradient G; R itself is not changed.

    "capped" is SpinQuant's step at momentum 0. Its limit is R cay(-αA), the solution P of
    P = R - (α/2) (R + P) A; the published code starts at P = R - αG and iterates five times, which leaves
    an error of the order (α‖A‖₂/2)⁵. The cap makes α‖A‖₂ at most 1.
    """
    A_NN = skew_gradient(R_NN, G_NN)
    if rule == "capped":
        column_sum = A_NN.abs().sum(dim=-2).amax(dim=-1)[..., None, None]
        alpha = (1 / (column_sum + 1e-8)).clamp(max=lr)
        P_NN = R_NN - alpha * G_NN
        for _ in range(5):
            P_NN = R_NN - alpha / 2 * ((R_NN + P_NN) @ A_NN)
        return P_NN
    if rule == "spectral":
        norm = spectral_norm(A_NN)[..., None, None].clamp(min=torch.finfo(A_NN.dtype).tiny)
        return _turned(R_NN, -lr * (A_NN / norm), bound=1.5 * lr)  # the norm is a lower estimate
    raise ValueError(f"the rules are 'capped' and 'spectral', not {rule!r}")


class _OrthogonalOptimiser(ABC):
    """The loop of both optimisers: clip the joint gradient norm, step every matrix, stay on the manifold.

    Parameters of one shape move together, as one stack, or as a few if they are large: a network has one value rotation
    per layer, and thirty small solves cost thirty times one.
    """

    def __init__(self, params: Sequence[Tensor], lr: float, clip_grad_norm: float | None = None) -> None:
        for R_NN in params:
            if R_NN.dtype not in (torch.float32, torch.float64) or R_NN.ndim < 2 or R_NN.shape[-1] != R_NN.shape[-2]:
                raise ValueError(f"rotations are square and fp32 or fp64, not {tuple(R_NN.shape)} {R_NN.dtype}")
        self.params = list(params)
        shapes = dict.fromkeys(R_NN.shape for R_NN in self.params)
        self.stacks: list[list[Tensor]] = []
        for shape in shapes:
            alike, most = [R_NN for R_NN in self.params if R_NN.shape == shape], max(1, _STACKED // shape.numel())
            self.stacks += [alike[i : i + most] for i in range(0, len(alike), most)]
        self.lr = lr
        self.clip_grad_norm = clip_grad_norm

    @property
    def state(self) -> dict[str, Tensor]:
        """All that a step reads and moves in place."""
        return {f"param{i}": R_NN for i, R_NN in enumerate(self.params)}

    @torch.no_grad()
    def step(self, lr_scale: float = 1.0) -> None:
        """Move every parameter, in place, by the learning rate `lr * lr_scale`; one without a gradient stays."""
        if self.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.params, self.clip_grad_norm)
        for index, stack in enumerate(self.stacks):
            G_SNN = torch.stack([torch.zeros_like(R_NN) if R_NN.grad is None else R_NN.grad for R_NN in stack])
            large = stack[0].is_cuda and stack[0].shape[-1] >= TF32_WIDTH  # a step is coarse, and `_restore` is not
            with products("tf32" if large else "fp32"):
                moved_SNN = self._move(index, torch.stack(stack), G_SNN, self.lr * lr_scale)
            moved_SNN = _restore(moved_SNN)
            for R_NN, moved_NN in zip(stack, moved_SNN, strict=True):
                if R_NN.grad is not None:
                    R_NN.copy_(moved_NN)

    def zero_grad(self) -> None:
        """Forget the gradients; their memory stays where it is, as a captured CUDA graph needs it."""
        for R_NN in self.params:
            if R_NN.grad is not None:
                R_NN.grad.zero_()

    @abstractmethod
    def _move(self, index: int, R_SNN: Tensor, G_SNN: Tensor, lr: float) -> Tensor:
        """The next values of stack number `index`, on the manifold up to a small drift."""


class CayleySGD(_OrthogonalOptimiser):
    """`cayley_step` on every parameter.

    `rule="capped", clip_grad_norm=1.0` is SpinQuant's setting; its row normalisation and occasional QR are
    replaced by `_restore`. With "spectral", lr is an angle in radians and needs a schedule that goes to zero.
    """

    def __init__(
        self, params: Sequence[Tensor], lr: float, rule: StepRule = "spectral", clip_grad_norm: float | None = None
    ) -> None:
        super().__init__(params, lr, clip_grad_norm)
        self.rule = rule

    def _move(self, index: int, R_SNN: Tensor, G_SNN: Tensor, lr: float) -> Tensor:
        return cayley_step(R_SNN, G_SNN, lr, self.rule)


class RiemannianAdam(_OrthogonalOptimiser):
    """Adam whose first moment is a skew matrix and whose second moment is one number per rotation.

    Both live in the frame of R (A = ½ (RᵀG - GᵀR)), where a tangent vector keeps its coordinates as R moves:
    the moments need no transport. The second moment is ‖A‖_F² / N, the mean squared length of a row, so lr is
    the root-mean-square angle, in radians, by which the first step turns the basis vectors.
    After Bécigneul & Ganea, arXiv 1810.00760.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-12,
        clip_grad_norm: float | None = None,
    ) -> None:
        super().__init__(params, lr, clip_grad_norm)
        self.betas, self.eps = betas, eps
        self.first = [torch.zeros_like(torch.stack(stack), requires_grad=False) for stack in self.stacks]
        self.second = [first_SNN.new_zeros((*first_SNN.shape[:-2], 1, 1)) for first_SNN in self.first]
        self.num_steps = [torch.tensor(0) for _ in self.stacks]

    @property
    def state(self) -> dict[str, Tensor]:
        moments = {"first": self.first, "second": self.second, "num_steps": self.num_steps}
        return super().state | {f"{name}{i}": one for name, some in moments.items() for i, one in enumerate(some)}

    def _move(self, index: int, R_SNN: Tensor, G_SNN: Tensor, lr: float) -> Tensor:
        beta1, beta2 = self.betas
        num_steps = int(self.num_steps[index].add_(1))
        A_SNN = skew_gradient(R_SNN, G_SNN)
        length = A_SNN.square().sum(dim=(-2, -1), keepdim=True) / A_SNN.shape[-1]
        first_SNN, second = self.first[index].lerp_(A_SNN, 1 - beta1), self.second[index].lerp_(length, 1 - beta2)
        mean_SNN = first_SNN / (1 - beta1**num_steps)
        scale = (second / (1 - beta2**num_steps)).sqrt() + self.eps
        # Adam's mean is at most about its scale, ‖A‖_F ≤ √N; a skew matrix has each singular value twice.
        return _turned(R_SNN, -lr * mean_SNN / scale, bound=lr * (A_SNN.shape[-1] / 2) ** 0.5)


def _restore(R_NN: Tensor) -> Tensor:
    """Back to max |RᵀR - I| ≤ 1e-5, by Newton's iteration for the polar factor.

    R ← R (I - (RᵀR - I) / 2) takes each singular value 1 + e to 1 - 3e²/2 + O(e³): one round is enough after any
    sane step, at the price of two products instead of an SVD.
    """
    for _ in range(3):
        excess_NN = R_NN.mT @ R_NN - _eye_like(R_NN)
        if excess_NN.abs().max() <= _DRIFT:
            return R_NN
        if not torch.linalg.matrix_norm(excess_NN).max() < 0.5:
            break  # Frobenius bounds spectral: below 0.5 every singular value is well inside Newton's (0, √3)
        R_NN = R_NN - R_NN @ excess_NN / 2
    if not R_NN.isfinite().all():
        raise SpinfoldError(
            "A rotation has become infinite or not a number.",
            "Its gradient was not finite in this step.",
            "Lower the learning rate, or fit in fp32 if the model runs in a 16-bit type.",
        )
    return project(R_NN)


def _eye_like(R_NN: Tensor) -> Tensor:
    return torch.eye(R_NN.shape[-1], dtype=R_NN.dtype, device=R_NN.device)
