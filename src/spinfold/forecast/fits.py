"""How long the fit of each method takes: products and passes, counted from what its steps do.

The numbers of passes were measured on SmolLM2 on two CPUs, what is of a GPU on H100s, there also at the width of 8B. A
search of clip ratios is not counted.

Shapes in names: D residual width, F MLP width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from spinfold.forecast.seconds import (
    Seconds,
    end_to_end_bases,
    end_to_end_steps,
    fit_tokens,
    fit_window,
    learns_down,
    step_tokens,
)
from spinfold.maps.manifold import TF32_WIDTH
from spinfold.methods import dfrot, kurtail, optrot, spinout
from spinfold.methods import spinfold as ours
from spinfold.recipe import Bits

__all__ = ["FITS", "fit_seconds"]

SIXTEEN_BITS = 2.5
"""How many times as fast as the GPU's measured rate, which is of TF32, products in 16 bits are."""
SMALL_KERNELS = 1.6e-7
"""Seconds that a token of a step takes in each layer of a GPU's end-to-end fit beside products and passes."""
SUBSETS = 13
"""About how many subsets of layers SpinOut's search tries: six nested ones, and those beside the cut."""


def fit_seconds(seconds: Seconds) -> float:
    """The fit of the recipe's method."""
    return FITS[seconds.recipe.method](seconds)


def _nothing(_: Seconds) -> float:
    return 0.0


def _end_to_end(s: Seconds) -> float:
    return end_to_end_steps(s.recipe) * _step(s)


def _step(s: Seconds) -> float:
    """Forward, backward and quantizers; spinfold's loss has the original's logits too."""
    n, tokens = s.sizes, float(step_tokens(s.recipe))
    heads = 3 if s.recipe.method == "spinfold" else 2
    head = 1.5 * s.head(tokens, 2) * heads / 2
    network = _on_gpu(s, tokens) + head / _faster(s) if s.on_gpu else (9.5 + 2 * s.again) * s.forward(tokens) + head
    down = s.passes(90.0 * tokens * n.layers * n.mlp_width) * learns_down(s.recipe)
    return network + down + end_to_end_bases(s.recipe, n.layers) * _move(s)


def _on_gpu(s: Seconds, tokens: float) -> float:
    """The layers forwards, perhaps again, and backwards to their inputs; eight products with a rotation at each of the
    norms; passes, of which fused kernels leave a third; and what small kernels don't fill.
    """
    n, times = s.sizes, 2 + s.again
    products = times * s.products(tokens) + 8 * 2 * n.layers * 2.0 * tokens * n.width**2
    passes = 0.3 * (5 + 2 * times) * s.passes(s.numbers(tokens))
    return products / (_faster(s) * s.machine.products) + passes + SMALL_KERNELS * n.layers * tokens


def _faster(s: Seconds) -> float:
    """Fits end to end multiply in 16 bits, unless a recipe names a precision, and then that one was measured."""
    return SIXTEEN_BITS if s.recipe.compute == "auto" else 1.0


def _move(s: Seconds) -> float:
    """A residual rotation's step on the group."""
    rate = s.machine.products if s.on_gpu and s.sizes.width >= TF32_WIDTH else s.machine.products_fp32
    return 30.0 * s.sizes.width**3 / rate


def _boundaries(s: Seconds) -> float:
    """A basis per boundary, each with a step of its own."""
    return _end_to_end(s) + _joins(s)


def _joins(s: Seconds) -> float:
    """As many eigenvectors as boundaries, in fp64."""
    bases = 2 * s.sizes.layers
    return bases * 28.0 * s.sizes.width**3 / s.machine.products_fp64 + s.launches(2 * bases)


def _with_outliers(s: Seconds) -> float:
    """A fit, the scores of each layer, and the trials: short fits, each with a look at other windows."""
    steps, window, fit = end_to_end_steps(s.recipe), fit_window(s.recipe), s.recipe.fit
    if fit.layers == "all" or fit.injection == "none":
        return steps * _step(s)
    scored = {"kurtosis": 1, "performance": s.sizes.layers + 1}.get(fit.layers or "", s.sizes.layers + 2)
    looks = spinout.SCORE_WINDOWS * scored + spinout.VALIDATION_WINDOWS * SUBSETS
    look = 1.4 * s.forward(window) + s.head(window, 1)
    batches = looks * window / spinout.TOKENS_PER_BATCH
    trials = SUBSETS * min(steps, spinout.TRIAL_STEPS) * _step(s) + s.one_by_one(0.5 * SUBSETS)
    return steps * _step(s) + trials + looks * look + s.one_by_one(0.06 * batches)


def _to_activations(s: Seconds) -> float:
    """What flows is taken down; its rows are turned at every step, and those of each layer's values."""
    n, fit = s.sizes, s.recipe.fit
    steps, rows = kurtail.STEPS if fit.steps is None else fit.steps, fit.batch or kurtail.ROWS
    residual = steps * (_rows(s, rows, 35.0) + _move(s))
    value_steps = min(steps, kurtail.VALUE_STEPS)
    value = value_steps * s.passes(35.0 * rows * n.layers * n.head_dim)
    return s.forward(fit_tokens(s.recipe)) + residual + value + s.launches(steps + value_steps)


def _rows(s: Seconds, rows: float, passes: float) -> float:
    """A step's rows by the residual rotation, their objective, and the way back."""
    return 6.0 * rows * s.sizes.width**2 / s.machine.products + s.passes(passes * rows * s.sizes.width)


def _in_turns(s: Seconds) -> float:
    """All rows of a window by the rotation, their rounding, a product of both, and about ten inverses."""
    n, fit = s.sizes, s.recipe.fit
    tokens = float((fit.batch or 1) * fit_window(s.recipe))
    rows = 2.0 * n.layers * min(fit.tokens or tokens, tokens)
    products = 4.0 * rows * n.width**2 / s.machine.products_fp32 + 40.0 * n.width**3 / s.machine.products_fp64
    turns = dfrot.TURNS if fit.steps is None else fit.steps
    return s.forward(tokens) + turns * (products + s.passes(20.0 * rows * n.width)) + s.launches(6 * turns)


def _scales(s: Seconds) -> float:
    """What flows is looked at."""
    return s.forward(fit_tokens(s.recipe))


def _to_weights(s: Seconds) -> float:
    """A few layers by the residual rotation at every step, then the values' linears of all layers by theirs."""
    n, (residual_steps, value_steps) = s.sizes, _weight_steps(s)
    numbers = _layers_of_step(s) * n.linears / n.layers
    residual = residual_steps * (6.0 * numbers * n.width / s.machine.products + s.passes(36.0 * numbers) + _move(s))
    value = value_steps * s.passes(36.0 * n.layers * n.width * (n.score_width + n.kv_heads * n.head_dim))
    return residual + value + s.launches(1.3 * residual_steps + value_steps)


def _to_feedback(s: Seconds) -> float:
    """To weights, and the second moments that weigh them: turned and factored at every step, forwards and back; those
    of heads hardly more than factored."""
    n, (residual_steps, value_steps) = s.sizes, _weight_steps(s)
    residual = residual_steps * _layers_of_step(s) * 2 * 12.0 * n.width**3
    value = value_steps * n.layers * 2.0 * n.score_width**3
    once = n.layers * n.mlp_width**3
    tokens = float(fit_tokens(s.recipe))
    moments = s.forward(tokens) + s.hessians(tokens) + s.one_by_one(1)
    work = moments + (residual + value + once) / s.machine.products_fp32
    return _to_weights(s) + work + s.launches(1.7 * residual_steps + value_steps)


def _weight_steps(s: Seconds) -> tuple[float, float]:
    """Of the residual and of the value rotations; the recipe's number is of spinfold's end-to-end part."""
    steps = None if s.recipe.method == "spinfold" else s.recipe.fit.steps
    return (optrot.RESIDUAL.steps, optrot.VALUE.steps) if steps is None else (steps, steps)


def _layers_of_step(s: Seconds) -> int:
    batch = None if s.recipe.method == "spinfold" else s.recipe.fit.batch
    return min(batch or optrot.LAYERS, s.sizes.layers)


def _spinfold(s: Seconds) -> float:
    """Layer by layer, to what is coarsest, then end to end."""
    n, fit, bits = s.sizes, s.recipe.fit, Bits.parse(s.recipe.bits)
    if min(bits) == 16:
        return 0.0
    by_weights = ours.weights_are_coarsest(s.recipe)
    seconds = _to_feedback(s) if by_weights else 0.0
    if not by_weights or bits.kv <= bits.weights:
        seconds += s.forward(float(ours.WINDOWS * s.recipe.calibration.seq_len)) + _heads(s)
    if not by_weights:
        rows = min(ours.ROWS, 2 * n.layers * (fit.tokens or ours.TOKENS))
        seconds += ours.GLOBAL.steps * (_rows(s, rows, 50.0) + _move(s)) + s.launches(ours.GLOBAL.steps)
    if fit.rank and not by_weights:
        bases = 2 * n.layers
        rows = bases * min(ours.HEAD_ROWS, fit.tokens or ours.TOKENS)
        seconds += ours.LOCAL.steps * (_rows(s, rows, 50.0) + bases * _move(s)) + _joins(s)
    return seconds + _end_to_end(s)


def _heads(s: Seconds) -> float:
    """The bases of values and keys, of all layers side by side."""
    n, tokens = s.sizes, s.recipe.fit.tokens or ours.TOKENS
    rows = min(ours.HEAD_ROWS, n.kv_heads * tokens)
    return 2 * (ours.LOCAL.steps * s.passes(50.0 * rows * n.layers * n.head_dim) + s.launches(ours.LOCAL.steps))


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
