"""Which part of a group's range a weight's grid should cover: the factor of least Σ |w - ŵ|^p, of a list.

On a CPU a histogram rules most factors out before any is tried. For one factor the distance of a number to its grid is
1-Lipschitz. So with c the middle of w's bin, N(x) = (Σ dist(x, grid)^p)^(1/p) and Minkowski's inequality,

    |N(w) - N(c)| ≤ d,  d = (Σ |w - c|^p)^(1/p),      whatever the grid

and a factor with N(c) above the least one by more than 2 d is not the best. In units of the range of its group each
factor's grid is the same for all groups, where scales are neither rounded nor shifted by a zero point; then N(c)^p of
all factors is one product: counts of the bins by a table.

Shapes: R rows (groups) of g numbers, F factors, B bins, P pairs of a row and a factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from spinfold.formats.base import Format
from spinfold.formats.integer import IntFormat

__all__ = ["ClipSearch"]

_BINS = 4096
"""About as many as make the product as dear as trying the factors that it leaves."""
_WIDEST, _SMALLEST = 64, 1e-10
"""Groups of fewer numbers are searched sooner without a histogram; in smaller ranges |e|^p may vanish."""


@dataclass(frozen=True)
class ClipSearch:
    """Shrink each group's range to minimise Σ |w - ŵ|^exponent.

    Candidates are 1, 1 - shrink/steps, …, 1 - shrink (steps-1)/steps: 1.00 … 0.21 by default, with
    exponent 2.4 as in GPTQ's reference quantizer (arXiv 2210.17323). The widest of equal ones wins.
    """

    exponent: float = 2.4
    steps: int = 80
    shrink: float = 0.8

    def factors(self) -> list[float]:
        return [1 - self.shrink * step / self.steps for step in range(self.steps)]

    def best(
        self,
        w_Rg: Tensor,
        low_R1: Tensor,
        high_R1: Tensor,
        whole_R1: Tensor | None,
        fmt: Format,
        scale_dtype: torch.dtype,
        at_once: int = 1,
    ) -> Tensor:
        """The best shrink factor `(R, 1)` of each row of `w_Rg` whose `extent` and `whole_of` are given.

        `at_once` factors are tried in one go, which changes the speed only.
        """
        found_R1 = torch.ones_like(low_R1)
        open_R = torch.arange(len(w_Rg), device=w_Rg.device)  # the rows that may still find better
        best_R1, least_R1 = torch.ones_like(low_R1), torch.full_like(low_R1, torch.inf)
        factors = torch.tensor(self.factors(), dtype=torch.float64).to(low_R1.device, low_R1.dtype)
        if self._has_shortlist(w_Rg, fmt, scale_dtype):
            return self._best_of_few(w_Rg, low_R1, high_R1, factors, fmt)
        for step, factor_F in enumerate(factors.split(at_once)):
            factor_F11 = factor_F[:, None, None]
            grid = fmt.grid(low_R1 * factor_F11, high_R1 * factor_F11, whole=whole_R1, scale_dtype=scale_dtype)
            error_FRg = fmt.values(fmt.nearest(w_Rg, *grid), *grid).sub_(w_Rg)
            loss_FR1 = self._loss(error_FRg)
            loss_R1 = loss_FR1.amin(0)
            better_R1 = loss_R1 < least_R1
            widest_R1 = torch.where(loss_FR1 == loss_R1, factor_F11, 0).amax(0)
            least_R1 = torch.where(better_R1, loss_R1, least_R1)
            best_R1 = torch.where(better_R1, widest_R1, best_R1)
            if step % 4 == 3 and w_Rg.device.type == "cpu":  # elsewhere, asking costs more than going on
                last = low_R1 * factor_F[-1], high_R1 * factor_F[-1]
                least_grid = fmt.grid(*last, whole=whole_R1, scale_dtype=scale_dtype)
                stays_R = (self._loss(fmt.beyond(low_R1, high_R1, *least_grid)) <= least_R1).squeeze(1)
                found_R1[open_R] = best_R1
                kept = (t[stays_R] for t in (open_R, w_Rg, low_R1, high_R1, best_R1, least_R1))
                open_R, w_Rg, low_R1, high_R1, best_R1, least_R1 = kept
                whole_R1 = None if whole_R1 is None else whole_R1[stays_R]
                if not len(open_R):
                    break
        found_R1[open_R] = best_R1
        return found_R1

    def _loss(self, error_FRg: Tensor) -> Tensor:
        """Σ |e|^p as exp(p log|e|), 0 included: three passes, and four times faster than pow on a CPU. Overwrites."""
        return error_FRg.abs_().log_().mul_(self.exponent).exp_().sum(-1, keepdim=True)

    def _has_shortlist(self, w_Rg: Tensor, fmt: Format, scale_dtype: torch.dtype) -> bool:
        alike = isinstance(fmt, IntFormat) and fmt.symmetric and scale_dtype in (torch.float32, torch.float64)
        return alike and self.exponent >= 1 and w_Rg.device.type == "cpu" and w_Rg.shape[-1] >= _WIDEST

    def _best_of_few(self, w_Rg: Tensor, low_R1: Tensor, high_R1: Tensor, factor_F: Tensor, fmt: Format) -> Tensor:
        """`best`, by trying the factors of the shortlist."""
        pairs_P2 = self._shortlist(w_Rg, torch.maximum(high_R1, -low_R1), fmt).nonzero()
        losses = []
        for row_P, step_P in (part.T for part in pairs_P2.split(len(w_Rg))):
            factor_P1, w_Pg = factor_F[step_P, None], w_Rg[row_P]
            grid = fmt.grid(low_R1[row_P] * factor_P1, high_R1[row_P] * factor_P1)
            losses.append(self._loss(fmt.values(fmt.nearest(w_Pg, *grid), *grid).sub_(w_Pg)))
        loss_RF = w_Rg.new_full((len(w_Rg), len(factor_F)), torch.inf)
        loss_RF[pairs_P2[:, 0], pairs_P2[:, 1]] = torch.cat(losses).squeeze(1)
        return torch.where(loss_RF == loss_RF.amin(1, keepdim=True), factor_F, 0).amax(1, keepdim=True)

    def _shortlist(self, w_Rg: Tensor, most_R1: Tensor, fmt: Format) -> Tensor:
        """Which factors may be the best ones, `(R, F)`; `most_R1` is the largest |w|."""
        place_Rg = (w_Rg / most_R1.clamp(min=_SMALLEST)).float().add_(1).mul_(_BINS / 2).clamp_(0, _BINS)
        bin_Rg = place_Rg.long().clamp_(max=_BINS - 1)
        count_RB = torch.zeros(len(w_Rg), _BINS).scatter_add_(1, bin_Rg, torch.ones(()).expand(bin_Rg.shape))
        norm_RF = (count_RB @ _table(self, fmt)).pow_(1 / self.exponent)
        d_R1 = self._loss(place_Rg.sub_(bin_Rg).sub_(0.5).mul_(2 / _BINS)).pow_(1 / self.exponent)
        within_RF = norm_RF <= (norm_RF.amin(1, keepdim=True) + 2 * d_R1) * 1.0001  # the sums' own rounding
        return within_RF | (most_R1 < _SMALLEST)


@lru_cache(maxsize=16)
def _table(search: ClipSearch, fmt: Format) -> Tensor:
    """dist^p of each bin's middle to each factor's grid, `(B, F)`, in a range of [-1, 1]."""
    middle_1B = (torch.arange(_BINS, dtype=torch.float64)[None] + 0.5) * (2 / _BINS) - 1
    factor_F1 = torch.tensor(search.factors(), dtype=torch.float64)[:, None]
    grid = fmt.grid(-factor_F1, factor_F1)
    error_FB = fmt.values(fmt.nearest(middle_1B, *grid), *grid).sub_(middle_1B)
    return error_FB.abs_().pow_(search.exponent).T.float().contiguous()
