"""The stages of `spinfold.quantize` in their order, each with its time and its memory; and if they fit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from spinfold.errors import Verdict
from spinfold.evaluation.outliers import OUTLIER_WINDOWS
from spinfold.evaluation.perplexity import TOKENS_PER_CHUNK
from spinfold.folding import WORDS_AT_ONCE
from spinfold.forecast.fits import fit_seconds
from spinfold.forecast.machine import Machine
from spinfold.forecast.memory import Bytes
from spinfold.forecast.reading import CHARACTERS, Reading
from spinfold.forecast.seconds import Seconds
from spinfold.forecast.sizes import Sizes
from spinfold.networks.sources import Checkpoint
from spinfold.recipe import Recipe

__all__ = ["HELD_SHARE", "Forecast", "StageForecast", "forecast", "stays_in_files"]

PROCESS_BYTES, TOKENIZER_BYTES = 0.53e9, 0.28e9
"""Python with torch, transformers and a model class; what a tokenizer holds once it has read something."""
BYTES_PER_TOKEN_READ = 500
"""What tokenizing leaves behind."""
CUDA_BYTES = 1.2e9
"""On the host, for the GPU's libraries."""
KEPT_GRAPH, KEPT_LOSS = 0.83, 0.38
"""The shares of a fit's memory that the C library does not give back on a CPU."""
HELD_SHARE = 0.6
"""Of what is free: two networks may take so much, or layers stay in files."""


@dataclass(frozen=True)
class StageForecast:
    """One stage; `device_bytes` is None where there is no GPU."""

    name: str
    seconds: float
    peak_bytes: int
    peak_device_bytes: int | None = None


@dataclass(frozen=True)
class Forecast:
    """All stages of a run in order, on a machine."""

    machine: Machine
    reading: Reading
    stages: tuple[StageForecast, ...]

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """The most host memory of any stage."""
        return max(stage.peak_bytes for stage in self.stages)

    @property
    def peak_device_bytes(self) -> int | None:
        """The most GPU memory of any stage; None without a GPU."""
        peaks = [stage.peak_device_bytes for stage in self.stages if stage.peak_device_bytes is not None]
        return max(peaks, default=None)

    def fits(self, slack: float = 1.0) -> Verdict:
        """Is there room for it, or for all but what a prediction that is off by the factor `slack` may be wrong by?"""
        machine = self.machine
        for what, need, free in (
            ("memory", self.peak_bytes, machine.free_bytes),
            ("GPU memory", self.peak_device_bytes, machine.free_device_bytes),
        ):
            if need is not None and free is not None and need > slack * free:
                return Verdict(
                    False,
                    f"It needs about {need / 1e9:.1f} GB of {what}, and {free / 1e9:.1f} GB are free.",
                    "Ask for fewer --samples or a shorter --seq-len, set fit.checkpointing, or use a larger machine.",
                )
        return Verdict(True)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        totals = {"seconds": self.seconds, "peak_bytes": self.peak_bytes, "peak_device_bytes": self.peak_device_bytes}
        return asdict(self) | totals | {"fits": self.fits().ok}


def forecast(
    checkpoint: Checkpoint,
    recipe: Recipe,
    machine: Machine,
    *,
    text_tokens: int,
    held_out_tokens: int,
    reading: Reading,
) -> Forecast:
    """The stages of `spinfold.quantize` for a checkpoint of which at most a little has been read.

    `text_tokens` of both texts are tokenized; on `held_out_tokens` the figures are measured. Not counted are baselines,
    searches of clip ratios, and the way of layers from files, where they stay there, in each of their turns.
    """
    in_files = stays_in_files(checkpoint, machine)
    run = _Run(Sizes.of(checkpoint), recipe, machine, reading, text_tokens, held_out_tokens, in_files)
    return Forecast(machine, reading, tuple(run.stages()))


def stays_in_files(checkpoint: Checkpoint, machine: Machine) -> bool:
    """Is the network too large to be held twice, as it is and rotated? Then a layer is read when it has its turn."""
    return 8.0 * Sizes.of(checkpoint).parameters > HELD_SHARE * machine.room and checkpoint.can_stay_in_files


@dataclass(frozen=True)
class _Run:
    """What the formulas need, and the stages that they give."""

    sizes: Sizes
    recipe: Recipe
    machine: Machine
    reading: Reading
    text_tokens: int
    held_out_tokens: int
    in_files: bool

    def stages(self) -> list[StageForecast]:
        n, window = self.sizes, self.recipe.calibration.seq_len
        more = Bytes(n, self.recipe, self.machine, self.in_files)
        seconds = Seconds(n, self.recipe, self.machine, more.again)
        held, seen = max(self.held_out_tokens, window), min(OUTLIER_WINDOWS * window, self.held_out_tokens)
        network, chunk = 4.0 * n.parameters, 4.0 * n.words * min(held, TOKENS_PER_CHUNK[self.machine.device])
        rotated = 2 * network + 4.0 * (n.words + held) * n.width
        if self.in_files:
            ends, layer = 8.0 * n.words * n.width, 4.0 * n.linears / n.layers
            network, rotated = ends + layer, 2 * ends + layer + 4.0 * (n.words + 2 * held) * n.width
        on_cpu = self.machine.device == "cpu"
        read = n.stored - n.linears * self.in_files
        fit = fit_seconds(seconds) + seconds.fold() + 2 * seconds.outliers(seen)
        stages = [
            self._stage("load model", self.reading.opening + read * self.reading.weight, network, 0.1e9),
            self._stage("read text", CHARACTERS * self.text_tokens * self.reading.character, network, 0),
            self._stage("evaluate original", seconds.forward(held) + seconds.head(held, 1), network, 2 * chunk),
            self._stage("fit and fold", fit, rotated, max(48.0 * WORDS_AT_ONCE * n.width, more.fit()), more.on_host()),
        ]
        rotated += (KEPT_GRAPH * more.graph() + KEPT_LOSS * more.loss()) * on_cpu
        if self.recipe.weight_format is not None:
            rotated += 0 if self.in_files else n.linears
            if self.recipe.budget is not None:
                stages.append(self._stage("measure sensitivity", seconds.sensitivity(), rotated, more.rounding()))
            name = f"round weights ({self.recipe.rounding.method})"
            stages.append(self._stage(name, seconds.rounding(), rotated, more.rounding()))
        quantized = 1.4 * seconds.forward(held) + seconds.head(held, 2)
        return [
            *stages,
            self._stage("evaluate quantized", quantized, rotated, 5.25 * chunk),
            self._stage("write checkpoint", 4.0 * n.parameters / 1e9, rotated, 0),
        ]

    def _stage(self, name: str, seconds: float, held: float, more: float, on_host: float = 0.0) -> StageForecast:
        """A stage that holds some bytes where the model is, and needs `more` there for a while, and beside a GPU some
        on the host."""
        host = PROCESS_BYTES + (TOKENIZER_BYTES + BYTES_PER_TOKEN_READ * self.text_tokens) * (name != "load model")
        if self.machine.device == "cpu":
            return StageForecast(name, seconds, round(host + held + more))
        return StageForecast(name, seconds, round(host + CUDA_BYTES + on_host), round(held + more))
