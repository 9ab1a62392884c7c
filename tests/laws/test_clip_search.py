"""The searched range is the one that trying every factor finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spinfold.formats import ClipSearch, IntFormat, fit_grid
from spinfold.formats.base import extent


def hard_rows(size: int) -> Tensor:
    """Normal numbers, and others: heavy-tailed, tiny, zero, huge, of one magnitude, with an outlier, on a grid."""
    w_RI = torch.randn(110, size, generator=torch.Generator().manual_seed(size))
    w_RI[30:40] **= 3
    w_RI[40:45] *= 1e-12
    w_RI[45:50] *= 1e-25
    w_RI[50:55] = 0
    w_RI[55:60] *= 1e36
    w_RI[60:70].sign_()
    w_RI[70:80, 0] = 1e4
    w_RI[80:90].mul_(2).round_()
    w_RI[90:100].abs_()
    return w_RI


def by_trying(w_RI: Tensor, fmt: IntFormat, search: ClipSearch) -> Tensor:
    """The scales of the widest factor of least loss."""
    low_R1, high_R1 = extent(w_RI)
    best_R1, least_R1 = torch.ones_like(low_R1), torch.full_like(low_R1, torch.inf)
    for factor in torch.tensor(search.factors(), dtype=torch.float64).float():
        grid = fmt.grid(low_R1 * factor, high_R1 * factor)
        error_RI = fmt.values(fmt.nearest(w_RI, *grid), *grid) - w_RI
        loss_R1 = error_RI.abs().log().mul(search.exponent).exp().sum(-1, keepdim=True)
        best_R1 = torch.where(loss_R1 < least_R1, factor, best_R1)
        least_R1 = torch.minimum(loss_R1, least_R1)
    return fmt.grid(low_R1 * best_R1, high_R1 * best_R1)[0]


@pytest.mark.parametrize("size", [48, 64, 200, 1024])
@pytest.mark.parametrize("exponent", [1.0, 2.0, 2.4])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_histogram_rules_out_only_what_is_worse(bits: int, exponent: float, size: int) -> None:
    """Rows of 48 numbers are searched without one."""
    fmt, search, w_RI = IntFormat(bits, True, clip=0.9), ClipSearch(exponent), hard_rows(size)
    assert torch.equal(fit_grid(w_RI, fmt, search=search).scale_OG, by_trying(w_RI, fmt, search))


def test_the_histogram_rules_out_most() -> None:
    """Or it would not be worth its time: of 80 factors it leaves fewer than 10 to normal rows."""
    w_RI = torch.randn(64, 576, generator=torch.Generator().manual_seed(0))
    left_RF = ClipSearch()._shortlist(w_RI, w_RI.abs().amax(1, keepdim=True), IntFormat(4, True))
    assert left_RF.any(1).all()
    assert left_RF.sum(1).float().mean() < 10
