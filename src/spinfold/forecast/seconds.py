"""How long the parts of a run take: products over the machine's rate of products, and passes over its rate of passes.

The numbers of passes were measured on SmolLM2 on two CPUs, and what is of a GPU on H100s (docs/planning.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from spinfold.forecast.machine import Machine
from spinfold.forecast.sizes import Sizes
from spinfold.methods import METHODS, spinout, spinquant
from spinfold.methods.spinfold import weights_are_coarsest
from spinfold.recipe import Bits, Recipe
from spinfold.rounding import MEASURED_WINDOWS, choices_of

__all__ = [
    "Seconds",
    "calibration_tokens",
    "end_to_end_bases",
    "end_to_end_steps",
    "fit_tokens",
    "fit_window",
    "learns_down",
    "step_tokens",
]

GPU_PASSES = 0.25
"""The share of a CPU's passes that a GPU makes: its kernels do several in one."""
GPU_LAYER = 0.042
"""Seconds that a layer takes on a GPU however small it is, each time that its linears are gone through one by one:
launches, and factors of matrices that don't fill the device."""
GPU_STEP = 0.0045
"""Seconds that a step of a fit to rows takes there, likewise."""


def calibration_tokens(recipe: Recipe) -> float:
    """Of all windows for the Hessians."""
    return float(recipe.calibration.samples * recipe.calibration.seq_len)


def fit_window(recipe: Recipe) -> int:
    """Tokens of a window that a fit looks at."""
    return recipe.fit.seq_len or recipe.calibration.seq_len


def fit_tokens(recipe: Recipe) -> int:
    """Of all windows that a fit without back-propagation looks at."""
    return recipe.calibration.samples * fit_window(recipe)


def end_to_end_steps(recipe: Recipe) -> int:
    """Steps that a fit goes back through the network; spinfold takes none by itself where weights are the coarsest."""
    if not METHODS[recipe.method].needs_backprop:
        return 0
    by_itself = spinout.STEPS if recipe.method == "spinout" else spinquant.STEPS
    if recipe.method == "spinfold":
        if min(Bits.parse(recipe.bits)) == 16:
            return 0
        by_itself *= not weights_are_coarsest(recipe)
    return by_itself if recipe.fit.steps is None else recipe.fit.steps


def step_tokens(recipe: Recipe) -> int:
    """Tokens of an end-to-end step."""
    by_itself = spinout.BATCH if recipe.method == "spinout" else spinquant.BATCH
    return (recipe.fit.batch or by_itself) * fit_window(recipe)


def end_to_end_bases(recipe: Recipe, layers: int) -> int:
    """Residual rotations that an end-to-end fit moves: one, or one for each block boundary."""
    ours = recipe.method == "spinfold" and bool(recipe.fit.rank) and not weights_are_coarsest(recipe)
    return 2 * layers if ours or recipe.method == "respinquant" else 1


def learns_down(recipe: Recipe) -> bool:
    """Does a fit learn the online map, which is then computed, and its numbers kept, at every step?"""
    sites = METHODS[recipe.method].sites if recipe.sites is None else recipe.sites
    return recipe.method == "spinfold" and end_to_end_steps(recipe) > 0 and "down" in sites


@dataclass(frozen=True)
class Seconds:
    """The formulas of time, but for those of fits (`fits`)."""

    sizes: Sizes
    recipe: Recipe
    machine: Machine
    again: bool
    """Are a layer's activations computed again on the way back?"""

    def passes(self, numbers: float) -> float:
        return numbers / self.machine.passes * (GPU_PASSES if self.on_gpu else 1)

    def one_by_one(self, times: float) -> float:
        return GPU_LAYER * times * self.sizes.layers * self.on_gpu

    def launches(self, steps: float) -> float:
        return GPU_STEP * steps * self.on_gpu

    @property
    def on_gpu(self) -> bool:
        return self.machine.device == "cuda"

    def forward(self, tokens: float, *, share: float = 1.0) -> float:
        """The decoder without its head, or a share of each layer."""
        return share * (self.products(tokens) / self.machine.products + self.passes(self.numbers(tokens)))

    def products(self, tokens: float) -> float:
        """Operations of the decoder's linears and its attention."""
        n, window = self.sizes, self.recipe.calibration.seq_len
        return tokens * (2 * n.active + 2 * n.layers * window * n.score_width)

    def numbers(self, tokens: float) -> float:
        """That the decoder passes over, as often as it does on a CPU."""
        return 43.0 * tokens * self.sizes.layers * (self.sizes.width + self.sizes.mlp_width)

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

    def rounding(self) -> float:
        """The search of ranges; with a Hessian also its products, its factor, and the columns one after the other; for
        a second stream its way through the network; learned, the steps through each layer."""
        method, tokens = self.recipe.rounding.method, calibration_tokens(self.recipe)
        if method == "autoround":
            return self._search() + self.forward(2 * tokens) + self._learn()
        if method == "rtn" and self.recipe.rounding.absorb is None:
            share = min(1.0, MEASURED_WINDOWS / self.recipe.calibration.samples)
            measured = self.forward(tokens, share=2.2) + self.hessians(tokens)
            return self._search() + share * measured + self.one_by_one(1)
        again = 2 if method == "gptaq" else 1  # streams, statistics, factors, searches and columns
        each = self.forward(tokens, share=2.2) + self.hessians(tokens) + self._search()
        seconds = again * each + self.forward(tokens, share=again - 1)
        if method != "rtn":
            columns = self._columns() * (again + self._passes_over_columns())
            solved = 1 if method == "ldlq" else 0  # the factor's inverse
            seconds += (again + solved) * self._factors() + columns + self.one_by_one(1.3 * (1 + again) + 0.6 * solved)
        if self.recipe.rounding.absorb is not None:
            seconds += self._absorb()
        return seconds

    def sensitivity(self) -> float:
        """The error of each linear at each width, by GPTQ or to nearest."""
        search, tokens = self._search(), calibration_tokens(self.recipe)
        columns = 0.0 if self.recipe.rounding.method == "rtn" else self._factors() + self._columns()
        grids = len(choices_of("", self.recipe))
        return self.forward(tokens, share=3.2) + self.hessians(tokens) + grids * (search + columns)

    def _search(self) -> float:
        """The ranges of all weights."""
        return self._elements() * self.passes(self.sizes.linears * (300.0 if self.recipe.clip_search else 22.0))

    def _elements(self) -> float:
        """How much longer a search lasts than over integers; on a CPU their grids are the ones that are made fast."""
        if self.recipe.format == "int":
            return 1.0
        if self.on_gpu:
            return 1.5
        grid = self.recipe.weight_format
        return 6.0 if grid and grid.group_size else 2.5

    def hessians(self, tokens: float) -> float:
        """Second moments of what all linears read."""
        n = self.sizes
        return 2.0 * tokens * n.layers * (3 * n.width**2 + n.mlp_width**2) / self.machine.products_fp32

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
            3.5 * self.forward(tokens) + self.passes(75.0 * self.sizes.linears) + self.one_by_one(0.3)
        )
        return steps + 12 * (self.forward(calibration_tokens(self.recipe)) + self.passes(22.0 * self.sizes.linears))
