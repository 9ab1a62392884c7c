"""How long the fit of each method takes: products and passes, counted from what its steps do.

The numbers of passes were measured once, as those of `seconds`. Where a recipe names no number of steps, the method's
own counts. A search of clip ratios is not counted.

Shapes in names: D residual width, F MLP width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from spinfold.forecast.seconds import (
    Seconds,
    calibration_tokens,
    end_to_end_steps,
    fit_window,
    learns_down,
    step_tokens,
)
from spinfold.maps.manifold import TF32_WIDTH
from spinfold.methods.dfrot import TURNS
from spinfold.methods.kurtail import ROWS as KURTAIL_ROWS
from spinfold.methods.optrot import LAYERS, RESIDUAL, VALUE
from spinfold.methods.spinfold import GLOBAL, HEAD_ROWS, LOCAL, ROWS, TOKENS, WINDOWS, weights_are_coarsest
from spinfold.methods.spinout import SCORE_WINDOWS, TRIAL_STEPS, TRIALS, VALIDATION_WINDOWS, WATCHED_TOKENS

__all__ = ["FITS", "fit_seconds"]

SIXTEEN_BITS = 2.5
"""How many times as fast as the GPU's measured rate, which is of TF32, products in 16 bits are."""
SMALL_KERNELS = 1.8e-7
"""Seconds that a token of a step takes in each layer of a GPU's end-to-end fit beside products and passes."""
_STEPS = 300
"""Of a fit to activations."""


def fit_seconds(seconds: Seconds) -> float:
    """The fit of the recipe's method."""
    return FITS[seconds.recipe.method](seconds)


def _nothing(_: Seconds) -> float:
    return 0.0


def _end_to_end(s: Seconds, rotations: int = 1) -> float:
    return end_to_end_steps(s.recipe) * _step(s, rotations)


def _step(s: Seconds, rotations: int = 1) -> float:
    """Forward, backward and quantizers; spinfold's loss has the original's logits too."""
    n, tokens = s.sizes, float(step_tokens(s.recipe))
    heads = 3 if s.recipe.method == "spinfold" else 2
    head = 1.5 * s.head(tokens, 2) * heads / 2
    network = _on_gpu(s, tokens) + head / SIXTEEN_BITS if s.on_gpu else (7 + 2 * s.again) * s.forward(tokens) + head
    down = s.passes(90.0 * tokens * n.layers * n.mlp_width) * learns_down(s.recipe)
    rate = s.machine.products if s.on_gpu and n.width >= TF32_WIDTH else s.machine.products_fp32
    return network + down + 30.0 * rotations * n.width**3 / rate


def _on_gpu(s: Seconds, tokens: float) -> float:
    """In 16 bits: the layers forwards, perhaps again, and backwards to their inputs; eight products with a rotation at
    each of the norms; passes, of which fused kernels leave a third; and what small kernels don't fill.
    """
    n, times = s.sizes, 2 + s.again
    products = times * s.products(tokens) + 8 * 2 * n.layers * 2.0 * tokens * n.width**2
    passes = 0.3 * (5 + 2 * times) * s.passes(s.numbers(tokens))
    return products / (SIXTEEN_BITS * s.machine.products) + passes + SMALL_KERNELS * n.layers * tokens


def _boundaries(s: Seconds) -> float:
    """A basis per boundary, each with a step of its own; joined by as many eigenvectors, in fp64."""
    n = s.sizes
    bases = 2 * n.layers
    return _end_to_end(s, bases) + bases * 28.0 * n.width**3 / s.machine.products_fp64 + s.launches(2 * bases)


def _with_outliers(s: Seconds) -> float:
    """A fit, the two scores of each layer, and the trials: short fits, each with a look at other windows."""
    steps, window = end_to_end_steps(s.recipe), fit_window(s.recipe)
    if s.recipe.fit.layers == "all" or s.recipe.fit.injection == "none":
        return steps * _step(s)
    scored = {"kurtosis": 1, "performance": s.sizes.layers}.get(s.recipe.fit.layers or "", s.sizes.layers + 1)
    looks = SCORE_WINDOWS * scored + VALIDATION_WINDOWS * TRIALS
    look = 1.4 * s.forward(window) + s.head(window, 1)
    batches = looks * window / WATCHED_TOKENS
    trials = TRIALS * min(steps, TRIAL_STEPS) * _step(s) + s.one_by_one(TRIALS)
    return steps * _step(s) + trials + looks * look + s.one_by_one(0.13 * batches)


def _to_activations(s: Seconds) -> float:
    """What flows is taken down, and its rows are turned at every step."""
    n, fit = s.sizes, s.recipe.fit
    rows = fit.batch or KURTAIL_ROWS
    step = 6.0 * rows * n.width**2 / s.machine.products_fp32 + s.passes(58.0 * rows * n.width)
    steps = _STEPS if fit.steps is None else fit.steps
    return s.forward(calibration_tokens(s.recipe)) + steps * step + s.launches(1.4 * steps)


def _in_turns(s: Seconds) -> float:
    """All rows of a window by the rotation, their rounding, a product of both, and about ten inverses."""
    n, fit = s.sizes, s.recipe.fit
    tokens = float((fit.batch or 1) * fit_window(s.recipe))
    rows = 2.0 * n.layers * (fit.tokens or tokens)
    products = 4.0 * rows * n.width**2 / s.machine.products_fp32 + 40.0 * n.width**3 / s.machine.products_fp64
    turns = TURNS if fit.steps is None else fit.steps
    return s.forward(tokens) + turns * (products + s.passes(20.0 * rows * n.width)) + s.launches(6 * turns)


def _scales(s: Seconds) -> float:
    """What flows is looked at."""
    return s.forward(calibration_tokens(s.recipe))


def _to_weights(s: Seconds) -> float:
    """A few layers by the residual rotation at every step, then the values' linears of all layers by theirs."""
    n, (residual_steps, value_steps) = s.sizes, _weight_steps(s)
    residual = residual_steps * LAYERS * n.linears / n.layers
    value = value_steps * n.layers * n.width * (n.score_width + n.kv_heads * n.head_dim)
    work = 8.0 * residual * n.width / s.machine.products + s.passes(60.0 * (residual + value))
    return work + s.launches(1.3 * residual_steps + value_steps)


def _to_feedback(s: Seconds) -> float:
    """To weights, and the second moments that weigh them: turned and factored at every step, forwards and back."""
    n, (residual_steps, value_steps) = s.sizes, _weight_steps(s)
    residual = residual_steps * LAYERS * 2 * 18.0 * n.width**3
    value = value_steps * n.layers * 6.0 * n.score_width**3
    once = n.layers * n.mlp_width**3
    moments = s.forward(calibration_tokens(s.recipe)) + s.hessians() + s.one_by_one(1)
    work = moments + (residual + value + once) / s.machine.products_fp32
    return _to_weights(s) + work + s.launches(1.7 * residual_steps + value_steps)


def _weight_steps(s: Seconds) -> tuple[float, float]:
    """Of the residual and of the value rotations; the recipe's number is of spinfold's end-to-end part."""
    steps = None if s.recipe.method == "spinfold" else s.recipe.fit.steps
    return (RESIDUAL.steps, VALUE.steps) if steps is None else (steps, steps)


def _spinfold(s: Seconds) -> float:
    """Layer by layer, to what is coarsest, then end to end."""
    n, fit = s.sizes, s.recipe.fit
    if weights_are_coarsest(s.recipe):
        return _to_feedback(s) + _end_to_end(s)
    tokens = fit.tokens or TOKENS
    rows, head_rows = min(ROWS, 2 * n.layers * tokens), min(HEAD_ROWS, n.kv_heads * tokens)
    step = 6.0 * rows * n.width**2 / s.machine.products + s.passes(58.0 * rows * n.width)
    heads = 2 * LOCAL.steps * s.passes(58.0 * head_rows * n.layers * n.head_dim)
    captured = s.forward(float(WINDOWS * s.recipe.calibration.seq_len))
    return captured + GLOBAL.steps * step + heads + s.launches(GLOBAL.steps + 2 * LOCAL.steps) + _end_to_end(s)


FITS: Mapping[str, Callable[[Seconds], float]] = MappingProxyType(
    {
        "none": _nothing,
        "quarot": _nothing,
        "block-hadamard": _nothing,
        "smoothquant": _scales,
        "kurtail": _to_activations,
        "dartquant": _to_activations,
        "dfrot": _in_turns,
        "optrot": _to_weights,
        "optrot-plus": _to_feedback,
        "spinquant": _end_to_end,
        "respinquant": _boundaries,
        "spinout": _with_outliers,
        "spinfold": _spinfold,
    }
)
"""By the name of the method."""
