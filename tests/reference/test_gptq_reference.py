"""GPTQ against the algorithm it is a fast form of: Optimal Brain Quantization in a fixed order.

The textbook step (Frantar & Alistarh 2022, arXiv 2208.11580, eq. 3) keeps the inverse Hessian explicit:

    w ← w - (w_i - Q(w_i)) / [H⁻¹]_ii · [H⁻¹]_i:        H⁻¹ ← H⁻¹ - [H⁻¹]_:i [H⁻¹]_i: / [H⁻¹]_ii
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spinfold.formats import ClipSearch, Grid, IntFormat, fit_grid
from spinfold.rounding import gptq


def to_grid(w: float, scale: float, zero: float, fmt: IntFormat) -> tuple[int, float]:
    q = min(max(round(w / scale) + zero, fmt.low), fmt.high)  # Python rounds half to even
    return int(q), scale * (q - zero)


def optimal_brain_quantization(
    w_OI: Tensor, h_II: Tensor, grid: Grid, damp: float, order: list[int], refit: bool = False
) -> Tensor:
    """The integers of `w_OI`, column by column in `order`."""
    w_OI, q_OI = w_OI.clone(), torch.zeros(w_OI.shape, dtype=torch.int64)
    inverse_II = torch.linalg.inv(h_II + damp * h_II.diagonal().mean() * torch.eye(len(h_II), dtype=h_II.dtype))
    fmt = grid.format
    size = fmt.group_size or w_OI.shape[1]
    scale_OG = grid.scale_OG.double().clone()
    zero_OG = torch.zeros_like(scale_OG) if grid.second_OG is None else grid.second_OG.double().clone()
    for i in order:
        if refit and i % size == 0:
            now = fit_grid(w_OI[:, i : i + size], IntFormat(fmt.bits, fmt.symmetric))
            scale_OG[:, i // size] = now.scale_OG[:, 0]
            zero_OG[:, i // size] = 0 if now.second_OG is None else now.second_OG[:, 0]
        for o in range(len(w_OI)):
            scale, zero = scale_OG[o, i // size].item(), zero_OG[o, i // size].item()
            q_OI[o, i], rounded = to_grid(w_OI[o, i].item(), scale, zero, fmt)
            w_OI[o] -= (w_OI[o, i] - rounded) / inverse_II[i, i] * inverse_II[i]
        inverse_II = inverse_II - torch.outer(inverse_II[:, i], inverse_II[i]) / inverse_II[i, i]
    return q_OI


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 6])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("mode", ["in order", "act-order", "refit groups"])
@pytest.mark.parametrize("seed", range(2))
def test_the_integers_are_those_of_optimal_brain_quantization(symmetric, group_size, bits, mode, seed):
    generator = torch.Generator().manual_seed(seed)
    w_OI = torch.randn(5, 24, generator=generator, dtype=torch.float64)
    x_TI = (
        torch.randn(60, 8, generator=generator, dtype=torch.float64) @ torch.randn(8, 24, generator=generator).double()
    )
    x_TI += 0.3 * torch.randn(60, 24, generator=generator, dtype=torch.float64)
    h_II = x_TI.T @ x_TI
    fmt = IntFormat(bits, symmetric, group_size)
    search = None if mode == "refit groups" else ClipSearch(steps=10)

    order = sorted(range(24), key=lambda i: -h_II[i, i].item()) if mode == "act-order" else list(range(24))
    expected_OI = optimal_brain_quantization(
        w_OI, h_II, fit_grid(w_OI, fmt, search=search), damp=0.01, order=order, refit=mode == "refit groups"
    )
    rounded, report = gptq(
        w_OI,
        h_II,
        fmt,
        search=search,
        act_order=mode == "act-order",
        static_groups=mode != "refit groups",
        block_size=5,
    )
    assert torch.equal(rounded.q_OI.long(), expected_OI)
    assert report.error < report.nearest_error


def test_the_errors_add_up_to_the_objective():
    """tr(E H Eᵀ) = Σ |e_i|² with the damped H: what the blocks return is the objective, column by column."""
    from spinfold.rounding.columns import round_block
    from spinfold.rounding.hessian import inverse_factor

    generator = torch.Generator().manual_seed(0)
    w_OI, x_TI = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (4, 40))
    h_II = x_TI.T @ x_TI
    u_II = inverse_factor(h_II, damp=0.0).u_II
    torch.testing.assert_close(u_II.T @ u_II, torch.linalg.inv(h_II))
    torch.testing.assert_close(u_II, torch.linalg.cholesky(torch.linalg.inv(h_II), upper=True))
    fmt = IntFormat(3, True)
    scale_IO = fit_grid(w_OI, fmt).scale_OG.double().T.expand(16, 4)
    q_IO = w_OI.T.contiguous()
    e_IO = round_block(q_IO, u_II, scale_IO, None, fmt)
    error_OI = w_OI - (q_IO * scale_IO).T
    torch.testing.assert_close(e_IO.square().sum(), (error_OI @ h_II * error_OI).sum())
