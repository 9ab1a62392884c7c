"""How many bytes the parts of a run hold beside the networks: counted, not measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spinfold.compute import pick_precision
from spinfold.fitting.end_to_end import GRAPH_SHARE, Schedule, numbers_of_token
from spinfold.fitting.layerwise import NUMBERS as PROCRUSTES_NUMBERS
from spinfold.fitting.objectives import tokens_per_chunk
from spinfold.forecast.machine import Machine
from spinfold.forecast.seconds import (
    calibration_tokens,
    end_to_end_bases,
    end_to_end_steps,
    fit_tokens,
    fit_window,
    learns_down,
    step_tokens,
)
from spinfold.forecast.sizes import Sizes
from spinfold.methods.kurtail import TOKENS as CAPTURED
from spinfold.methods.optrot import LARGE, LAYERS, PART
from spinfold.methods.spinfold import TOKENS, WINDOWS, weights_are_coarsest
from spinfold.methods.spinquant import shared_out
from spinfold.recipe import Recipe
from spinfold.rounding import MEASURED_WINDOWS

__all__ = ["Bytes"]


LEARNED_DOWN = 2.7
"""Numbers that a learned online map keeps of each of its inputs for the way back; measured on an H100."""


@dataclass(frozen=True)
class Bytes:
    """The formulas of memory."""

    sizes: Sizes
    recipe: Recipe
    machine: Machine
    in_files: bool

    @property
    def again(self) -> bool:
        """Will a layer's activations be computed again on the way back, since all of them would not fit?"""
        n, room = self.sizes, self.machine.room
        graph = 4.0 * self._pass_tokens() * n.layers * numbers_of_token(n.width, n.mlp_width)
        return self.in_files or self.recipe.fit.checkpointing or graph > GRAPH_SHARE * (room - 10.0 * n.parameters)

    def fit(self) -> float:
        """End to end, or layer by layer, whichever holds more."""
        return max(self._end_to_end(), self._layer_by_layer())

    def graph(self) -> float:
        """What back-propagation through the decoder holds: all of it, or a layer and the input of each."""
        return self._inputs() + self._layer() if self.again else self.sizes.layers * self._layer()

    def loss(self) -> float:
        """The logits of a chunk of tokens, and what a loss makes of them."""
        words = self.sizes.words
        return 5.75 * 4.0 * words * min(self._pass_tokens(), tokens_per_chunk(words))

    def _end_to_end(self) -> float:
        """The graph, the logits, on a GPU the copy in bf16 that is computed with, and the bases with their gradients.

        What a layer computes again is not there together with the logits.
        """
        if not self._pass_tokens():
            return 0.0
        n = self.sizes
        copy = self._copy() if self.machine.device == "cuda" else 0.0
        together = self._inputs() + max(self._layer(), self.loss()) if self.again else self.graph() + self.loss()
        return copy + together + 8.0 * end_to_end_bases(self.recipe, n.layers) * n.width**2

    def _copy(self) -> float:
        """All of it in bf16; or, of layers that several processes share, a part, and two layers whole."""
        n, machine = self.sizes, self.machine
        if not self.in_files or not shared_out(n.parameters, machine.room, machine.processes):
            return 2.0 * n.parameters
        layers = min(n.layers, n.layers / machine.processes + 2)
        return 2.0 * (n.parameters - n.linears + n.linears * layers / n.layers)

    def _pass_tokens(self) -> int:
        """Tokens that are back-propagated through at once; 0 if the method does not."""
        if not end_to_end_steps(self.recipe):
            return 0
        window, tokens = fit_window(self.recipe), step_tokens(self.recipe)
        return max(window, min(tokens, Schedule.tokens_per_pass // window * window))

    def _inputs(self) -> float:
        return 4.0 * self._pass_tokens() * self.sizes.layers * self.sizes.width

    def _layer(self) -> float:
        n = self.sizes
        down = LEARNED_DOWN * n.mlp_width * learns_down(self.recipe)
        return 4.0 * self._pass_tokens() * (numbers_of_token(n.width, n.mlp_width) + down)

    def _layer_by_layer(self) -> float:
        """What a fit without back-propagation through the network holds: a number for each that it keeps of the text,
        and in files the stream of the text; or what a fit to weights does."""
        n, fit, name = self.sizes, self.recipe.fit, self.recipe.method
        if name == "optrot" or self._weighs():
            return self._to_weights()
        if name == "dfrot":
            window = (fit.batch or 1) * fit_window(self.recipe)
            numbers = 2.0 * n.layers * min(fit.tokens or window, window) * n.width
            return 4.0 * numbers + max(4.0 * numbers, 24.0 * min(numbers, PROCRUSTES_NUMBERS))
        if name not in ("spinfold", "kurtail", "dartquant"):
            return 0.0
        rows, itemsize = (TOKENS, 4.0) if name == "spinfold" else (CAPTURED, 2.0)
        tokens = WINDOWS * self.recipe.calibration.seq_len if name == "spinfold" else fit_tokens(self.recipe)
        kept = itemsize * (fit.tokens or rows) * n.layers * (2 * n.width + 2 * n.kv_heads * n.head_dim)
        return kept + 4.0 * tokens * n.width * self.in_files

    def on_host(self) -> float:
        """What a fit on a GPU leaves there: second moments of what heads give, until their rotations are fitted."""
        n = self.sizes
        return 4.0 * n.layers * n.score_width**2 * self._weighs()

    def _weighs(self) -> bool:
        """Is the fit to weights, and are their errors weighed by second moments of activations?"""
        name = self.recipe.method
        return name == "optrot-plus" or (name == "spinfold" and weights_are_coarsest(self.recipe))

    def _to_weights(self) -> float:
        """The linears with all other maps folded in, in files in 16 bits, and unless a step's are large once more in
        the precision that they are turned in; and what a step makes of those that it turns at once.

        If errors are weighed by activations, also the second moments that the residual rotation turns, two in the
        memory of one, those of heads on a CPU, and the factors of those that are turned at once. Or, if that is more,
        what the capture pass has: the tokens at the input of a layer, its sums, and what is made of the widest.
        """
        n = self.sizes
        large = LAYERS * n.linears / n.layers > LARGE
        if self.in_files:
            linears = 2.0
        elif large:
            linears = 4.0
        else:
            turned_in_bf16 = pick_precision(self.recipe.compute, torch.device(self.machine.device)) == "bf16"
            linears = 4.0 + (2.0 if turned_in_bf16 else 4.0)
        weights = linears * n.linears + 24.0 * PART * large + 40.0 * n.width**2
        if not self._weighs():
            return weights
        stream = 4.0 * fit_tokens(self.recipe) * n.width
        moments = 4.0 * n.layers * n.width**2 + self.on_host() * (self.machine.device == "cpu")
        sums = 8.0 * (2 * n.width**2 + n.score_width**2 + n.mlp_width**2) + 24.0 * n.widest**2
        factors = 20.0 * min(n.layers * n.score_width**2, PART)
        return moments + max(stream + sums, weights + factors)

    def rounding(self) -> float:
        """The streams of all calibration windows, one or two, and the Hessian with its factors; less to nearest, which
        only measures. Learned, the graph of a layer and, of its weights, offsets, gradients and copies."""
        n, calibration, settings = self.sizes, self.recipe.calibration, self.recipe.rounding
        if settings.method == "rtn" and settings.absorb is None and self.recipe.budget is None:
            tokens = min(calibration.samples, MEASURED_WINDOWS) * calibration.seq_len
            return 4.0 * tokens * n.width + 3 * 8.0 * n.widest**2
        stream, layer = 4.0 * calibration_tokens(self.recipe) * n.width, 4.0 * n.linears / n.layers
        if settings.method == "autoround":
            tokens = min(settings.batch, calibration.samples) * calibration.seq_len
            return 2 * stream + 4.0 * tokens * (11 * n.width + 7 * n.mlp_width) + 12 * layer
        second = stream + layer if settings.method == "gptaq" else 0.0
        return stream + second + 5 * 8.0 * n.widest**2
