"""How many bytes the parts of a run hold beside the networks: counted, not measured."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from spinfold.fitting.end_to_end import GRAPH_SHARE, Schedule
from spinfold.fitting.objectives import tokens_per_chunk
from spinfold.forecast.machine import Machine
from spinfold.forecast.seconds import calibration_tokens, end_to_end_steps, learns_down
from spinfold.forecast.sizes import Sizes
from spinfold.methods.kurtail import TOKENS as CAPTURED
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

    def _pass_tokens(self) -> int:
        """Tokens that are back-propagated through at once; 0 if the method does not."""
        fit, window = self.recipe.fit, self.recipe.fit.seq_len or self.recipe.calibration.seq_len
        backprop = end_to_end_steps(self.recipe) > 0
        return max(1, min(fit.batch or 8, Schedule.tokens_per_pass // window)) * window * backprop

    def graph(self) -> float:
        """What back-propagation through the decoder holds."""
        n, tokens = self.sizes, self._pass_tokens()
        per_layer = 4.0 * tokens * (5.5 * n.width + (3.5 + LEARNED_DOWN * learns_down(self.recipe)) * n.mlp_width)
        again = n.layers * per_layer > GRAPH_SHARE * (self.machine.free_device_bytes or inf)
        if again or self.in_files or self.recipe.fit.checkpointing:
            return 4.0 * tokens * n.layers * n.width + per_layer
        return n.layers * per_layer

    def fit(self) -> float:
        """The graph, the logits, and on a GPU the copy in bf16 that is computed with; or what a fit in turns holds."""
        copy = 2.0 * self.sizes.parameters * (self._pass_tokens() > 0 and self.machine.device == "cuda")
        return max(copy + self.graph() + self.loss(), self.in_turns() if self.in_files else 0.0)

    def in_turns(self) -> float:
        """What a fit layer by layer holds of a network in files: one to weights its linears in 16 bits and, if it
        weighs errors by activations, their second moments in fp64 and fp32; else the stream of the text, and the rows
        that are kept of both norms, keys and values."""
        n, name, fit = self.sizes, self.recipe.method, self.recipe.fit
        weighed = name == "optrot-plus" or (name == "spinfold" and weights_are_coarsest(self.recipe))
        if weighed or name == "optrot":
            moments = 12.0 * n.layers * (2 * n.width**2 + n.score_width**2 + n.mlp_width**2)
            return 2.0 * n.linears + moments * weighed
        if name not in ("spinfold", "kurtail", "dartquant"):
            return 0.0
        rows, itemsize = (TOKENS, 4.0) if name == "spinfold" else (CAPTURED, 2.0)
        windows = WINDOWS if name == "spinfold" else self.recipe.calibration.samples
        kept = itemsize * (fit.tokens or rows) * n.layers * (2 * n.width + 2 * n.kv_heads * n.head_dim)
        return 4.0 * windows * self.recipe.calibration.seq_len * n.width + kept

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
