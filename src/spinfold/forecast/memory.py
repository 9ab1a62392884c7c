"""How many bytes the parts of a run hold beside the networks: counted, not measured."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from spinfold.fitting.end_to_end import GRAPH_SHARE, Schedule
from spinfold.fitting.layerwise import NUMBERS as PROCRUSTES_NUMBERS
from spinfold.fitting.objectives import tokens_per_chunk
from spinfold.forecast.machine import Machine
from spinfold.forecast.seconds import calibration_tokens, end_to_end_steps, fit_window, learns_down, step_tokens
from spinfold.forecast.sizes import Sizes
from spinfold.methods.kurtail import TOKENS as CAPTURED
from spinfold.methods.optrot_plus import NUMBERS as FEEDBACK_NUMBERS
from spinfold.methods.spinfold import TOKENS, WINDOWS, weights_are_coarsest
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
        too_many = self.sizes.layers * self._layer() > GRAPH_SHARE * (self.machine.free_device_bytes or inf)
        return too_many or self.in_files or self.recipe.fit.checkpointing

    def graph(self) -> float:
        """What back-propagation through the decoder holds: all of it, or a layer and the input of each."""
        return self._inputs() + self._layer() if self.again else self.sizes.layers * self._layer()

    def fit(self) -> float:
        """The graph, the logits, and on a GPU the copy in bf16 that is computed with; or what a fit in turns holds.

        What a layer computes again is not there together with the logits.
        """
        copy = 2.0 * self.sizes.parameters * (self._pass_tokens() > 0 and self.machine.device == "cuda")
        both = self._inputs() + max(self._layer(), self.loss()) if self.again else self.graph() + self.loss()
        return max(copy + both, self.layer_by_layer())

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
        mlp = (3.5 + LEARNED_DOWN * learns_down(self.recipe)) * n.mlp_width
        return 4.0 * self._pass_tokens() * (5.5 * n.width + mlp)

    def layer_by_layer(self) -> float:
        """What a fit without back-propagation through the network holds."""
        name = self.recipe.method
        if name in ("optrot", "optrot-plus") or (name == "spinfold" and weights_are_coarsest(self.recipe)):
            return self._to_weights(weighed=name != "optrot")
        n, fit = self.sizes, self.recipe.fit
        if name == "dfrot":
            rows = 2.0 * n.layers * (fit.tokens or (fit.batch or 1) * fit_window(self.recipe)) * n.width
            return 4.0 * rows + 24.0 * min(rows, PROCRUSTES_NUMBERS)
        if name not in ("spinfold", "kurtail", "dartquant"):
            return 0.0
        rows, itemsize = (TOKENS, 4.0) if name == "spinfold" else (CAPTURED, 2.0)
        windows = WINDOWS if name == "spinfold" else self.recipe.calibration.samples
        kept = itemsize * (fit.tokens or rows) * n.layers * (2 * n.width + 2 * n.kv_heads * n.head_dim)
        return kept + 4.0 * windows * self.recipe.calibration.seq_len * n.width * self.in_files

    def _to_weights(self, *, weighed: bool) -> float:
        """The linears with all other maps folded in, and once more in the precision that they are turned in; in files,
        that alone, in 16 bits. If errors are weighed by activations, the tokens at the input of a layer, the second
        moments that a rotation turns, and those of one layer's widest wire, summed, turned and factored."""
        n = self.sizes
        held = 2.0 if self.in_files else (6.0 if self.machine.device == "cpu" else 8.0)
        if not weighed:
            return held * n.linears
        moments = 4.0 * n.layers * (2 * n.width**2 + n.score_width**2)
        factors = 40.0 * min(n.layers * n.score_width**2, FEEDBACK_NUMBERS)  # with what the way back needs
        return (
            held * n.linears
            + 4.0 * calibration_tokens(self.recipe) * n.width
            + moments
            + max(factors, 40.0 * n.widest**2)
        )

    def loss(self) -> float:
        """The logits of a chunk of tokens, and what a loss makes of them."""
        words = self.sizes.words
        return 5.75 * 4.0 * words * min(self._pass_tokens(), tokens_per_chunk(words))

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
