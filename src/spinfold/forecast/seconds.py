"""How long the parts of a run take: products over the machine's rate of products, and passes over its rate of passes.

The numbers of passes were measured once, on SmolLM2 on a CPU; the two constants of a GPU likewise (docs/planning.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from spinfold.forecast.machine import Machine
from spinfold.forecast.sizes import Sizes
from spinfold.methods import METHODS
from spinfold.methods.spinfold import GLOBAL, HEAD_ROWS, LOCAL, ROWS, TOKENS, weights_are_coarsest
from spinfold.recipe import Recipe
from spinfold.rounding import MEASURED_WINDOWS, choices_of

__all__ = ["Seconds", "calibration_tokens", "end_to_end_steps", "learns_down"]

GPU_PASSES = 0.25
"""The share of a CPU's passes that a GPU makes: its kernels do several in one."""
GPU_LAYER = 0.035
"""Seconds that a layer takes on a GPU however small it is, each time that its linears are gone through one by one:
launches, and factors of matrices that don't fill the device."""


def calibration_tokens(recipe: Recipe) -> float:
    """Of all windows for the Hessians."""
    return float(recipe.calibration.samples * recipe.calibration.seq_len)


def end_to_end_steps(recipe: Recipe) -> int:
    """Steps that a fit goes back through the network; spinfold takes none by itself where weights are the coarsest."""
    if not METHODS[recipe.method].needs_backprop:
        return 0
    by_itself = 0 if recipe.method == "spinfold" and weights_are_coarsest(recipe) else 100
    return by_itself if recipe.fit.steps is None else recipe.fit.steps


def learns_down(recipe: Recipe) -> bool:
    """Does a fit learn the online map, which is then computed, and its numbers kept, at every step?"""
    sites = METHODS[recipe.method].sites if recipe.sites is None else recipe.sites
    return recipe.method == "spinfold" and end_to_end_steps(recipe) > 0 and "down" in sites


@dataclass(frozen=True)
class Seconds:
    """The formulas of time."""

    sizes: Sizes
    recipe: Recipe
    machine: Machine

    def passes(self, numbers: float) -> float:
        return numbers / self.machine.passes * (GPU_PASSES if self.on_gpu else 1)

    def one_by_one(self, times: float) -> float:
        return GPU_LAYER * times * self.sizes.layers * self.on_gpu

    @property
    def on_gpu(self) -> bool:
        return self.machine.device == "cuda"

    def forward(self, tokens: float, *, share: float = 1.0) -> float:
        """The decoder without its head, or a share of each layer."""
        n, window = self.sizes, self.recipe.calibration.seq_len
        products = tokens * (2 * n.active + 2 * n.layers * window * n.score_width)
        passes = 43 * tokens * n.layers * (n.width + n.mlp_width)
        return share * (products / self.machine.products + self.passes(passes))

    def head(self, tokens: float, times: int) -> float:
        """Logits and what is made of them, once or twice."""
        n = self.sizes
        products = 2.0 * tokens * n.words * n.width * times
        rate = self.machine.products if self.on_gpu else self.machine.products_fp32
        return products / rate + self.passes(tokens * n.words * (9 if times == 1 else 18))

    def outliers(self, tokens: float) -> float:
        n = self.sizes
        passes = 55 * tokens * n.layers * (n.width + n.mlp_width)
        return self.forward(tokens) + self.passes(passes) + self.one_by_one(0.25)

    def fold(self) -> float:
        """A copy, the products with the maps, and the proof."""
        n = self.sizes
        products = 2.0 * n.parameters * n.width / self.machine.products_fp64
        return self.passes(35.0 * n.parameters) + products + 2 * self.forward(256) + self.one_by_one(1)

    def fit(self) -> float:
        """Layer by layer, end to end, or, by spinfold, one after the other."""
        method = METHODS[self.recipe.method]
        end_to_end = end_to_end_steps(self.recipe) * self._step() if method.needs_backprop else 0.0
        if method.name in ("none", "quarot") or (method.needs_backprop and method.name != "spinfold"):
            return end_to_end
        return end_to_end + self._layer_by_layer()

    def _step(self) -> float:
        """Forward, backward and quantizers; spinfold's loss has the original's logits too."""
        n, fit = self.sizes, self.recipe.fit
        tokens = float((fit.batch or 8) * (fit.seq_len or self.recipe.calibration.seq_len))
        heads = 3 if self.recipe.method == "spinfold" else 2
        network = self.forward(tokens) * (7 + 2 * fit.checkpointing) + 1.5 * self.head(tokens, 2) * heads / 2
        network /= 2.2 if self.on_gpu else 1  # there it computes in 16 bits
        network += self.passes(90.0 * tokens * n.layers * n.mlp_width) * learns_down(self.recipe)
        return network + 60.0 * n.width**3 / self.machine.products_fp32

    def _layer_by_layer(self) -> float:
        """Products with the rotation, and the objective: of three layers a step in a fit to weights; spinfold turns
        more rows, in 16 bits, and heads as well."""
        n, fit = self.sizes, self.recipe.fit
        steps = 300 if fit.steps is None else fit.steps
        if not METHODS[self.recipe.method].needs_data:
            numbers = 3.0 * n.linears / n.layers
            return steps * (8.0 * numbers * n.width / self.machine.products + self.passes(80.0 * numbers))
        rows, rate, heads = fit.batch or 4096, self.machine.products_fp32, 0.0
        if self.recipe.method == "spinfold":  # its `fit` is of the end-to-end part
            tokens = fit.tokens or TOKENS
            steps, rows, rate = GLOBAL.steps, min(ROWS, 2 * n.layers * tokens), self.machine.products
            head_rows = min(HEAD_ROWS, n.kv_heads * tokens)
            heads = 2 * LOCAL.steps * self.passes(58.0 * head_rows * n.layers * n.head_dim)
        step = 6.0 * rows * n.width**2 / rate + self.passes(58.0 * rows * n.width)
        return self.forward(calibration_tokens(self.recipe)) + self.one_by_one(1) + steps * step + heads

    def rounding(self) -> float:
        """The search of ranges; with a Hessian also its products, its factor, and the columns one after the other; for
        a second stream its way through the network; learned, the steps through each layer."""
        method, tokens = self.recipe.rounding.method, calibration_tokens(self.recipe)
        if method == "autoround":
            return self._search() + self.forward(2 * tokens) + self._learn()
        if method == "rtn" and self.recipe.rounding.absorb is None:
            share = min(1.0, MEASURED_WINDOWS / self.recipe.calibration.samples)
            return self._search() + share * (self.forward(tokens, share=2.2) + self._hessians()) + self.one_by_one(1)
        again = 2 if method == "gptaq" else 1  # statistics, factors and columns of two kinds, and what W* takes
        statistics = (2 * again - 1) * (self._hessians() + self._search())
        seconds = self.forward(tokens, share=2.2 * again + (again - 1)) + statistics
        if method != "rtn":
            columns = self._columns() * (again + self._passes_over_columns())
            seconds += again * self._factors() + columns + self.one_by_one(1 + again)
        if self.recipe.rounding.absorb is not None:
            seconds += self._absorb()
        return seconds

    def sensitivity(self) -> float:
        """The error of each linear at each width, by GPTQ or to nearest."""
        search, tokens = self._search(), calibration_tokens(self.recipe)
        columns = 0.0 if self.recipe.rounding.method == "rtn" else self._factors() + self._columns()
        grids = len(choices_of("", self.recipe))
        return self.forward(tokens, share=3.2) + self._hessians() + grids * (search + columns)

    def _search(self) -> float:
        """The ranges of all weights; elements with an exponent take half as long again as integers."""
        slower = 1.0 if self.recipe.format == "int" else 1.5
        return slower * self.passes(self.sizes.linears * (300.0 if self.recipe.clip_search else 22.0))

    def _hessians(self) -> float:
        n = self.sizes
        widths = 3 * n.width**2 + n.mlp_width**2
        return 2.0 * calibration_tokens(self.recipe) * n.layers * widths / self.machine.products_fp32

    def _factors(self) -> float:
        n = self.sizes
        return n.layers * (3 * n.width**3 + n.mlp_width**3) * 1.5 / self.machine.products_fp64

    def _columns(self) -> float:
        """One after the other; and the errors' way to the columns behind a block, as long as in the widest."""
        n = self.sizes
        return self.passes(130.0 * n.linears) + 4.0 * n.linears * n.mlp_width / self.machine.products_fp32

    def _passes_over_columns(self) -> int:
        return self.recipe.rounding.passes if self.recipe.rounding.method == "ldlq" else 0

    def _absorb(self) -> float:
        """The eigenvectors of each Hessian, and three solves a row in as many directions as a quarter of the inputs."""
        n = self.sizes
        vectors = 25.0 * n.layers * (3 * n.width**3 + n.mlp_width**3)
        down = n.layers * n.width * n.mlp_width
        solves = 0.4 * ((n.linears - down) * n.width**2 + down * n.mlp_width**2)
        return (vectors + solves) / self.machine.products_fp64 + self._search()

    def _learn(self) -> float:
        """Each step forwards, backwards, and over the weights; the error on all windows, twelve times."""
        settings, calibration = self.recipe.rounding, self.recipe.calibration
        tokens = float(min(settings.batch, calibration.samples) * calibration.seq_len)
        steps = settings.steps * (
            3.5 * self.forward(tokens) + self.passes(75.0 * self.sizes.linears) + self.one_by_one(0.45)
        )
        return steps + 12 * (self.forward(calibration_tokens(self.recipe)) + self.passes(22.0 * self.sizes.linears))
