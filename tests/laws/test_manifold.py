"""Laws of the orthogonal group: projections, gradients, steps that descend and stay, fits that find a known optimum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spinfold.errors import SpinfoldError
from spinfold.maps import (
    CayleySGD,
    RiemannianAdam,
    StepRule,
    cayley,
    cayley_step,
    manifold,
    orthogonality_gap,
    procrustes,
    project,
    qr_orthogonal,
    random_orthogonal,
    skew_gradient,
    spectral_norm,
)

RULES: list[StepRule] = ["capped", "spectral"]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rotations(*lead: int, size: int = 6, seed: int = 0) -> Tensor:
    return qr_orthogonal(normal(*lead, size, size, seed=seed))


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def fourth_power(R: Tensor) -> Tensor:
    """A smooth objective with a curved landscape: Σ (X R)⁴ for fixed, outlier-heavy X."""
    scale = torch.linspace(0, 2, R.shape[-1], dtype=R.dtype).exp()
    return (normal(20, R.shape[-1], seed=7, dtype=R.dtype) * scale @ R).pow(4).mean()


def euclidean_gradient(objective: Callable[[Tensor], Tensor], R: Tensor) -> Tensor:
    R = R.detach().requires_grad_()
    return torch.autograd.grad(objective(R), R)[0]


# ── projections ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_project_lands_on_the_group_and_leaves_it_alone(dtype: torch.dtype) -> None:
    R = project(normal(3, 8, 8, dtype=dtype))
    assert R.dtype == dtype
    assert orthogonality_gap(R.double()) < 16 * torch.finfo(dtype).eps
    assert torch.allclose(project(R), R, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_project_is_nearest() -> None:
    """Every nearby matrix of the group is farther away."""
    M = normal(5, 5)
    nearest = (M - project(M)).norm()
    for seed in range(20):
        skew = normal(5, 5, seed=seed)
        assert (M - project(M) @ cayley(0.1 * (skew - skew.T))).norm() > nearest


def test_procrustes_recovers_a_planted_rotation() -> None:
    a, planted = normal(4, 30, 6), rotations(4)
    assert torch.allclose(procrustes(a, a @ planted), planted, rtol=0, atol=1e-12)
    noisy = procrustes(a, a @ planted + 1e-3 * normal(4, 30, 6, seed=5))
    assert 1e-6 < (noisy - planted).abs().max() < 1e-2


def test_qr_is_orthogonal_unique_and_differentiable() -> None:
    z = normal(2, 4, 4)
    Q = qr_orthogonal(z)
    assert orthogonality_gap(Q) < 1e-14
    assert ((Q.mT @ z).diagonal(dim1=-2, dim2=-1) > 0).all()
    assert torch.allclose(qr_orthogonal(Q), Q, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(qr_orthogonal, (z.requires_grad_(),))


# ── gradients ────────────────────────────────────────────────────────────────────────────────────────────


def test_skew_gradient_is_the_directional_derivative() -> None:
    """d/dε f(R exp(εΩ)) = ⟨A, Ω⟩ for every skew Ω."""
    R = rotations()
    A = skew_gradient(R, euclidean_gradient(fourth_power, R))
    assert torch.equal(A, -A.mT)
    for seed in range(5):
        omega = normal(6, 6, seed=seed)
        omega = omega - omega.T
        up, down = (fourth_power(R @ torch.linalg.matrix_exp(eps * omega)) for eps in (1e-5, -1e-5))
        assert torch.isclose((up - down) / 2e-5, (A * omega).sum(), rtol=1e-6)


def test_cayley_is_orthogonal_and_close_to_exp() -> None:
    skew = normal(3, 7, 7)
    skew = skew - skew.mT
    assert orthogonality_gap(cayley(skew)) < 1e-13
    assert torch.allclose(cayley(-skew), cayley(skew).mT, rtol=0, atol=1e-13)
    assert torch.allclose(cayley(1e-3 * skew), torch.linalg.matrix_exp(1e-3 * skew), rtol=0, atol=1e-7)


@pytest.mark.parametrize("bound", [0.01, 0.3, 1.0])
def test_cayley_of_a_bounded_matrix_needs_no_solve(bound: float) -> None:
    skew = normal(3, 40, 40)
    skew = skew - skew.mT
    skew = skew * (bound / torch.linalg.matrix_norm(skew, ord=2)[:, None, None])
    assert torch.allclose(cayley(skew, bound), cayley(skew), rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [5, 300])
def test_spectral_norm_of_each_matrix(size: int) -> None:
    skew = normal(2, size, size)
    skew = skew - skew.mT
    skew[1] *= 3
    exact, found = torch.linalg.svdvals(skew)[:, 0], spectral_norm(skew)
    assert found.shape == (2,)
    assert (found <= exact * (1 + 1e-12)).all()
    assert torch.allclose(found, exact, rtol=0.1)
    assert (spectral_norm(torch.zeros(2, size, size)) == 0).all()


# ── steps ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_a_small_step_descends_as_the_gradient_predicts(rule: StepRule, seed: int) -> None:
    R = rotations(seed=seed)
    G = euclidean_gradient(fourth_power, R)
    A = skew_gradient(R, G)
    alpha = 1e-7
    lr = alpha if rule == "capped" else alpha * float(spectral_norm(A))
    drop = fourth_power(cayley_step(R, G, lr, rule)) - fourth_power(R)
    assert torch.isclose(drop, -alpha * A.square().sum(), rtol=1e-2)


@pytest.mark.parametrize("rule", RULES)
def test_batched_steps_are_single_steps(rule: StepRule) -> None:
    R, G = rotations(2, 3), normal(2, 3, 6, 6, seed=1) * torch.logspace(-3, 3, 6).double().reshape(2, 3, 1, 1)
    batched = cayley_step(R, G, 0.3, rule)
    single = torch.stack([cayley_step(r, g, 0.3, rule) for r, g in zip(R.flatten(0, 1), G.flatten(0, 1), strict=True)])
    assert torch.allclose(batched.flatten(0, 1), single, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lr", [1e-3, 1e5])
def test_capped_step_has_the_published_limit(lr: float) -> None:
    """In the paper's letters X = Rᵀ, W = ½ (V Xᵀ - X Vᵀ), V = -Gᵀ: the limit is (I - ½αW)⁻¹ (I + ½αW) X."""
    R, G = rotations(size=8), normal(8, 8, seed=3)
    X, V = R.T, -G.T
    W = (V @ X.T - X @ V.T) / 2
    alpha = min(lr, 1 / (W.abs().sum(dim=0).max().item() + 1e-8))
    assert (alpha == lr) == (lr == 1e-3)
    limit = torch.linalg.solve(eye(8) - alpha / 2 * W, (eye(8) + alpha / 2 * W) @ X).T
    contraction = alpha * torch.linalg.svdvals(W)[0] / 2
    start_error = (R - alpha * G - limit).norm()
    error = (cayley_step(R, G, lr, "capped") - limit).norm()
    assert error <= contraction**5 * start_error + 1e-14
    assert (error > 1e-14) == (lr == 1e5)  # five iterations are not the limit when the cap is active


def test_spectral_step_turns_by_the_learning_rate() -> None:
    """The largest rotation angle is 2 atan(lr / 2), whatever the size of the gradient."""
    R, lr = rotations(), 0.05
    for scale in (1e-8, 1.0, 1e8):
        turn = R.mT @ cayley_step(R, scale * normal(6, 6, seed=1), lr, "spectral")
        angle = torch.linalg.eigvals(turn).angle().abs().max()
        assert torch.isclose(angle, 2 * torch.atan(torch.tensor(lr / 2).double()), rtol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_no_gradient_no_step(rule: StepRule) -> None:
    R = rotations()
    assert torch.allclose(cayley_step(R, torch.zeros_like(R), 1.0, rule), R, rtol=0, atol=1e-15)


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="capped"):
        cayley_step(eye(2), eye(2), 0.1, "steepest")  # type: ignore[arg-type]


# ── fits ─────────────────────────────────────────────────────────────────────────────────────────────────

Optimiser = CayleySGD | RiemannianAdam
OPTIMISERS: dict[str, Callable[[list[Tensor]], Optimiser]] = {
    "capped": lambda params: CayleySGD(params, lr=0.5, rule="capped"),
    "capped-clipped": lambda params: CayleySGD(params, lr=1.5, rule="capped", clip_grad_norm=1.0),
    "spectral": lambda params: CayleySGD(params, lr=0.3, rule="spectral"),
    "adam": lambda params: RiemannianAdam(params, lr=0.2),
}


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fit_reaches_a_known_optimum(name: str, dtype: torch.dtype) -> None:
    """-tr(RᵀQ) is smallest at R = Q, within the component of the group in which R starts."""
    target = torch.stack([random_orthogonal(5, seed).R_NN for seed in range(3)]).to(dtype)
    turn = torch.linalg.matrix_exp(0.5 * (normal(3, 5, 5) - normal(3, 5, 5).mT)).to(dtype)
    R = (target @ turn).requires_grad_()
    optimiser = OPTIMISERS[name]([R])
    assert (R - target).abs().max() > 0.3
    num_steps = 200
    for step in range(num_steps):
        optimiser.zero_grad()
        (-(R * target).sum()).backward()
        optimiser.step(lr_scale=1 - step / num_steps)
        assert orthogonality_gap(R.detach()) <= 1.1e-5
    assert (R - target).abs().max() < 5e-3


@pytest.mark.parametrize("name", OPTIMISERS)
def test_fit_lowers_a_curved_objective_and_stays_on_the_group(name: str) -> None:
    R = rotations(size=16).float().requires_grad_()
    optimiser = OPTIMISERS[name]([R])
    before = fourth_power(R).item()
    for step in range(60):
        optimiser.zero_grad()
        fourth_power(R).backward()  # type: ignore[no-untyped-call]
        optimiser.step(lr_scale=1 - step / 60)
        assert orthogonality_gap(R.detach()) <= 1.1e-5
    assert fourth_power(R).item() < 0.8 * before


@pytest.mark.parametrize("name", OPTIMISERS)
def test_parameters_without_a_gradient_stay(name: str) -> None:
    moving, resting = rotations(seed=1).requires_grad_(), rotations(seed=2).requires_grad_()
    before = resting.detach().clone()
    optimiser = OPTIMISERS[name]([resting, moving])
    fourth_power(moving).backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    assert resting.detach().equal(before)
    assert not moving.detach().equal(rotations(seed=1))
    optimiser.zero_grad()
    assert moving.grad is not None and not moving.grad.any()


def test_clipping_is_joint_over_all_parameters() -> None:
    params = [rotations(seed=1).requires_grad_(), rotations(seed=2).requires_grad_()]
    optimiser = CayleySGD(params, lr=1e-3, rule="capped", clip_grad_norm=1.0)
    (30 * params[0].sum() + 40 * params[1].sum()).backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    norms = [param.grad.norm() for param in params if param.grad is not None]
    assert torch.allclose(torch.stack(norms), torch.tensor([0.6, 0.8]).double(), atol=1e-6)


@pytest.mark.parametrize("damage", [1e-4, 0.5])
def test_a_start_off_the_group_is_brought_back(damage: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if damage < 1e-2:  # small drifts are the normal case and must not cost an SVD
        monkeypatch.setattr(manifold, "project", None)
    damaged = rotations() + damage * normal(6, 6, seed=4)
    R = damaged.clone().requires_grad_()
    R.grad = torch.zeros_like(R)
    CayleySGD([R], lr=1.0).step()
    assert orthogonality_gap(R.detach()) <= 1.1e-5
    assert torch.allclose(R.detach(), project(damaged), rtol=0, atol=1e-5)


def test_a_gradient_that_is_not_finite_is_reported() -> None:
    R = rotations().requires_grad_()
    R.grad = torch.full_like(R, torch.nan)
    with pytest.raises(SpinfoldError, match="not a number"):
        CayleySGD([R], lr=0.1, rule="capped").step()


def test_only_square_full_precision_parameters_are_accepted() -> None:
    for wrong in (torch.eye(3, dtype=torch.bfloat16), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="square"):
            CayleySGD([wrong], lr=0.1)
