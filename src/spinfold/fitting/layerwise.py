"""Fit rotations to rows, without back-propagation through the network.

    minimise  f(R) over the orthogonal group,  f a `Term`: a scalar of R, drawn anew at each step

One rotation `(N, N)`, or a stack `(L, N, N)` of independent ones that are fitted side by side. A step is a draw of
rows, one product with R, and a move on the group:

    adam       Riemannian Adam                                       maps/manifold.py
    spectral   Cayley SGD, a rotation by lr radians                  maps/manifold.py
    capped     Cayley SGD with the published capped step             maps/manifold.py
    qr         SGD with momentum on Z, R = Q of Z = Q U              DartQuant, arXiv 2511.04063

`alternate_procrustes` needs no gradient at all (DFRot, arXiv 2412.00648).

Shapes: S rows, N size of a rotation, L layers, P rows of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from spinfold.compute import pick_precision, precision
from spinfold.distributed import everyones, share, spread, total, world
from spinfold.errors import SpinfoldError
from spinfold.fitting.capture import Captured, pooled, stacked
from spinfold.fitting.end_to_end import FitLog, Optimizer, Schedule
from spinfold.fitting.journal import Journal
from spinfold.fitting.row_objectives import RowObjective, in_blocks
from spinfold.maps import CayleySGD, Map, Orthogonal, RiemannianAdam, SiteMaps, project, qr_orthogonal
from spinfold.progress import Progress, Quiet
from spinfold.recipe import Fit

__all__ = [
    "NUMBERS",
    "WIRES_OF",
    "LayerwiseSettings",
    "Term",
    "alternate_procrustes",
    "at_once",
    "choose",
    "dense",
    "fit_layerwise",
    "fit_to_activations",
    "fit_to_rows",
    "rows_term",
    "weighted",
]

Term = Callable[[Tensor, torch.Generator], Tensor]
"""`term(R, draws)`: a differentiable scalar of the rotation; all randomness comes from the CPU generator `draws`."""

WIRES_OF = {"residual": ("qkv_input", "mlp_input"), "value": ("value",)}
"""The wires that carry what a site's map rotates."""

NUMBERS = 1 << 26  # of the rows that Procrustes looks at together
T = TypeVar("T")


@dataclass(frozen=True)
class LayerwiseSettings:
    """How to descend. `learning_rate` is in radians for adam and spectral; `compute` as in `compute.py`."""

    steps: int
    learning_rate: float
    optimiser: Literal["adam", "spectral", "capped", "qr"] = "adam"
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    compute: str = "fp32"

    @classmethod
    def of(cls, fit: Fit, default: LayerwiseSettings, compute: str) -> LayerwiseSettings:
        """The recipe's wishes, and a method's defaults where it says nothing."""
        return replace(
            default,
            steps=default.steps if fit.steps is None else fit.steps,
            learning_rate=fit.learning_rate or default.learning_rate,
            optimiser=fit.step_rule or default.optimiser,
            schedule=fit.schedule or default.schedule,
            compute=compute,
        )

    def rate_at(self, step: int) -> float:
        """The learning rate's factor at a step."""
        return Schedule(self.steps, batch=1, decay=self.schedule).rate_at(step)


def rows_term(x_SN: Tensor, objective: RowObjective, rows: int) -> Term:
    """The mean objective of `rows` rows of x R, drawn with replacement from `x_SN`.

    For a stack x `(L, S, N)` with R `(L, N, N)`: the sum over the stack of each one's mean, with the same draw for
    all, so that no rotation depends on another. Processes share out the rows of a single rotation, not of a stack.
    """
    alone, objective = x_SN.ndim == 2, in_blocks(objective)

    def term(R_NN: Tensor, draws: torch.Generator) -> Tensor:
        index_P = torch.randint(x_SN.shape[-2], (rows,), generator=draws).to(x_SN.device)
        own_P = index_P[share(rows)] if alone else index_P
        y_PN = x_SN.index_select(-2, own_P).to(R_NN.dtype) @ (spread(R_NN) if alone else R_NN)
        mean = objective(y_PN).sum(-1) / rows
        return total(mean) if alone else mean.sum()

    return term


def weighted(*terms: tuple[float, Term]) -> Term:
    """Σ weight · term."""

    def total(R_NN: Tensor, draws: torch.Generator) -> Tensor:
        return torch.stack([weight * term(R_NN, draws) for weight, term in terms]).sum()

    return total


def at_once(functions: Sequence[Callable[..., Tensor]], *inputs: Tensor | None) -> Tensor:
    """The sum of scalars `function(*inputs)`, one after the other, the gradients by the inputs along with each.

    Their sums are all that is kept for the way back: not what lies between, and nothing is made again.
    """
    value: Tensor = _AtOnce.apply(functions, *inputs)
    return value


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, functions: Sequence[Callable[..., Tensor]], *inputs: Any) -> Tensor:
        needed = [i for i, need in enumerate(ctx.needs_input_grad[1:]) if need]
        values, sums = list[Tensor](), {i: torch.zeros_like(inputs[i]) for i in needed}
        for function in functions:
            own: list[Any] = [x if x is None else x.detach().requires_grad_(i in needed) for i, x in enumerate(inputs)]
            with torch.set_grad_enabled(bool(needed)):
                value = function(*own)
            values.append(value.detach())
            found = torch.autograd.grad(value, [own[i] for i in needed], allow_unused=True) if needed else ()
            for i, grad in zip(needed, found, strict=True):
                if grad is not None:
                    sums[i].add_(grad)
        ctx.save_for_backward(*(sums.get(i) for i in range(len(inputs))))
        return torch.stack(values).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(x if x is None else x * grads[0] for x in ctx.saved_tensors)


def fit_layerwise(
    start_NN: Tensor,
    term: Term,
    settings: LayerwiseSettings,
    *,
    seed: int,
    progress: Progress | None = None,
    journal: Journal | None = None,
    moved: Mapping[str, Tensor] = MappingProxyType({}),
    label: str = "fit rotations",
) -> tuple[Tensor, tuple[float, ...]]:
    """The rotation(s) that `term` leads to from `start_NN`, orthogonal in fp64, and the objective at every step.

    Repeatable: the same arguments give the same bits on the same device. `start_NN` is not changed. `moved` is what the
    term itself moves in place from step to step.
    """
    device, draws = start_NN.device, torch.Generator().manual_seed(seed)
    mode = pick_precision(settings.compute, device)
    free_NN = start_NN.detach().float().clone().requires_grad_()  # R itself, or Z with R = Q(Z)
    rotation = qr_orthogonal if settings.optimiser == "qr" else torch.clone
    optimizer = _optimizer(free_NN, settings)
    loss_S = torch.zeros(settings.steps, device=device)
    moved, journal = {"loss": loss_S, **optimizer.state, **moved}, journal or Journal()
    with (progress or Quiet()).stage(label, total=settings.steps) as bar:
        for step in journal.steps(settings.steps, moved, draws, bar):
            with precision(mode, device):
                loss = term(rotation(free_NN), draws)
                loss.backward()
            optimizer.step(settings.rate_at(step))
            optimizer.zero_grad()
            loss_S[step] = loss.detach()
            shown = step % 25 == 0  # reading a number waits for the GPU
            bar.advance(note=f"objective {float(loss_S[step]):.4g}" if shown else "")
    return project(rotation(free_NN.detach().double())), tuple(loss_S.tolist())


def fit_to_rows(
    start_NN: Tensor,
    x_SN: Tensor,
    objective: RowObjective,
    rows: int,
    settings: LayerwiseSettings,
    *,
    seed: int,
    progress: Progress | None = None,
    journal: Journal | None = None,
    label: str = "fit rotations",
) -> tuple[Tensor, tuple[float, ...]]:
    """`fit_layerwise` on `rows_term`; of a stack `(L, N, N)` each process fits its share, which is not kept."""
    own = share(len(start_NN)) if start_NN.ndim == 3 else slice(None)
    if journal and world() > 1 and start_NN.ndim == 3:
        journal.skip()
        journal = None
    fitted: tuple[Tensor, tuple[float, ...]] = start_NN[:0].double(), ()
    if len(start_NN[own]):
        term = rows_term(x_SN[own], objective, rows)
        fitted = fit_layerwise(
            start_NN[own], term, settings, seed=seed, progress=progress, journal=journal, label=label
        )
    if start_NN.ndim == 2:
        return fitted
    stacks, losses = zip(*everyones(fitted), strict=True)
    return torch.cat(stacks), tuple(map(sum, zip(*filter(None, losses), strict=True)))


def _optimizer(free_NN: Tensor, settings: LayerwiseSettings) -> Optimizer:
    if settings.optimiser == "qr":
        return _MomentumSGD(free_NN, settings.learning_rate)
    if settings.optimiser == "adam":
        return RiemannianAdam([free_NN], settings.learning_rate)
    return CayleySGD([free_NN], settings.learning_rate, settings.optimiser)


class _MomentumSGD:
    """v ← 0.9 v + gradient, z ← z - lr v, with the optimisers' interface of `maps/manifold.py`."""

    def __init__(self, z_NN: Tensor, lr: float) -> None:
        self.params, self.lr = [z_NN], lr
        self.state = {"param": z_NN, "momentum": torch.zeros_like(z_NN, requires_grad=False)}

    @torch.no_grad()
    def step(self, lr_scale: float) -> None:
        z_NN, v_NN = self.state.values()
        assert z_NN.grad is not None
        z_NN.sub_(v_NN.mul_(0.9).add_(z_NN.grad), alpha=self.lr * lr_scale)

    def zero_grad(self) -> None:
        self.params[0].grad = None


def fit_to_activations(
    start: SiteMaps,
    captured: Captured,
    objectives: Mapping[str, RowObjective],
    settings: Mapping[str, LayerwiseSettings],
    rows: int,
    *,
    seed: int,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> tuple[SiteMaps, FitLog]:
    """`start` with its residual and value maps fitted to what was captured on their wires (`WIRES_OF`).

    One residual rotation for the pooled rows of all layers; one value rotation per layer, all fitted at once. Each
    step sees `rows` rows (of each layer, at the value site). The log is the residual fit's where there is one.
    """
    log, maps, residual = FitLog(), start, start.residual
    if start.value is not None:
        values_LSH = stacked(captured, "value")
        R_LHH = torch.stack([dense(one, values_LSH.device) for one in start.value])
        R_LHH, losses = fit_to_rows(
            R_LHH,
            values_LSH,
            objectives["value"],
            rows,
            settings["value"],
            seed=seed,
            progress=progress,
            journal=journal,
            label="fit value rotations",
        )
        maps = replace(maps, value=tuple(Orthogonal(R_HH) for R_HH in R_LHH))
        log = FitLog(losses)
    if isinstance(residual, Map):
        x_SD = pooled(captured, *WIRES_OF["residual"])
        R_DD, losses = fit_to_rows(
            dense(residual, x_SD.device),
            x_SD,
            objectives["residual"],
            rows,
            settings["residual"],
            seed=seed,
            progress=progress,
            journal=journal,
            label="fit residual rotation",
        )
        maps = replace(maps, residual=Orthogonal(R_DD))
        log = FitLog(losses)
    return maps, log


@torch.no_grad()
def alternate_procrustes(
    x_SN: Tensor,
    start_NN: Tensor,
    quantize: Callable[[Tensor], Tensor],
    steps: int,
    *,
    progress: Progress | None = None,
    journal: Journal | None = None,
    label: str = "fit residual rotation",
) -> tuple[Tensor, tuple[float, ...]]:
    """min over R of ‖x R - Q(x R)‖², by turns: B = Q(x R), then the R that brings x nearest to B. Both closed form.

    That R is R U Vᵀ with (x R)ᵀ B = U Σ Vᵀ (Procrustes). Rows count by their squared length, so a row that matters
    more is a longer one, if Q's grid follows the row. The error may rise between turns, because a dynamic Q is
    not the nearest point of a fixed set: the best R of all turns is returned, in fp64, with the mean squared error at
    every turn.
    """
    R_NN = project(start_NN.double())
    best_NN, error_S = R_NN.clone(), torch.full((steps + 1,), torch.inf, dtype=torch.float64)
    moved, journal = {"rotation": R_NN, "best": best_NN, "error": error_S}, journal or Journal()
    parts = x_SN.split(max(1, NUMBERS // x_SN.shape[1]))  # what a turn makes of all rows takes many times their memory
    with (progress or Quiet()).stage(label, total=steps) as bar:
        for turn in journal.steps(steps + 1, moved, bar=bar):
            error = torch.zeros((), dtype=torch.float64, device=x_SN.device)
            product_NN = torch.zeros_like(R_NN, dtype=torch.float32)
            for part_PN in parts:
                y_PN = part_PN.float() @ R_NN.float()
                target_PN = quantize(y_PN)
                error += (y_PN - target_PN).square().sum()
                product_NN += y_PN.mT @ target_PN
            error_S[turn] = float(error) / x_SN.numel()
            if error_S[turn] == error_S.min():
                best_NN.copy_(R_NN)
            if turn < steps:
                R_NN.copy_(R_NN @ project(product_NN.double()))  # a product of two orthogonal ones stays one
                bar.advance(note=f"error {float(error_S[turn]):.4g}")
    return best_NN, tuple(error_S.tolist())


def dense(one: Map, device: torch.device) -> Tensor:
    """The map's matrix, fp32 on `device`: where a fit starts."""
    return one.matrix().to(device, torch.float32)


def choose(name: str | None, choices: Mapping[str, T], method: str) -> T:
    """The choice that a recipe's `fit.objective` names; the first one if it names none."""
    if name is None:
        return next(iter(choices.values()))
    if name not in choices:
        raise SpinfoldError(
            f"The method {method!r} has no objective {name!r}.",
            f"It has: {', '.join(choices)}." if choices else "It has one objective only.",
            "Change fit.objective in the recipe, or leave it out.",
        )
    return choices[name]
