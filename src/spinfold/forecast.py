"""What a run will take, said before any of it is done: seconds, memory and GPU memory of each stage.

    seconds = products / (rate of products × the stage's efficiency) + passes over numbers / rate of passes
    bytes   = what the pipeline holds while the stage works, counted from config, headers and recipe

Rates are measured for a second on the machine. Efficiencies and the few other constants were measured once, on
SmolLM2 on a CPU (docs/planning.md); what they predict there is compared with what is measured.

In bytes, with P parameters (head untied), D residual width, F MLP width, V words, held the tokens of the figures:

    network     4 P                                          the original; a second one from the fit on
                8 V D + 4 P / L                              or this much, where layers stay in the checkpoint's files
    fit         2 P                                          a copy in bf16, on a GPU, of a fit by back-propagation
    reference   4 (V + held) D                               what the original's head reads, and the head
    logits      4 V × tokens of a chunk                      2 such arrays for the original, 5 with a reference
    Hessian     8 × the largest width², several copies        all roundings but rtn and autoround
    stream      4 D × calibration tokens                      likewise; two of them for gptaq and autoround
    graph       4 × tokens of a pass × L (5.5 D + 3.5 F)       fits by back-propagation; of one layer if checkpointed

Shapes: L layers, T tokens of a window.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import inf, prod
from pathlib import Path
from typing import Any

import torch

from spinfold.compute import pick_precision
from spinfold.distributed import local_world
from spinfold.errors import Verdict
from spinfold.methods import METHODS
from spinfold.networks import family_of
from spinfold.networks.sources import Checkpoint
from spinfold.recipe import Recipe
from spinfold.rounding import WIDTHS

__all__ = [
    "Forecast",
    "Machine",
    "StageForecast",
    "forecast",
    "measure_machine",
    "stays_in_files",
    "unmeasured_machine",
]

PROCESS_BYTES, TOKENIZER_BYTES = 0.53e9, 0.28e9
"""Python with torch, transformers and a model class; what a tokenizer holds once it has read something."""
BYTES_PER_TOKEN_READ = 800
"""What tokenizing leaves behind."""
CUDA_BYTES = 2e9
"""On the host, for the GPU's libraries."""
KEPT_GRAPH, KEPT_LOSS = 0.83, 0.38
"""The shares of a fit's memory that the C library does not give back on a CPU."""
EVALUATION_CHUNK, LOSS_CHUNK, LOSS_BYTES, TOKENS_PER_PASS = 2048, 4096, 1 << 30, 16384
HELD_SHARE, GRAPH_SHARE = 0.6, 0.6
"""Of what is free: two networks may take so much, or layers stay in files; a graph, or activations are recomputed."""


@dataclass(frozen=True)
class Machine:
    """How fast it multiplies and passes over numbers (per second, in the run's precision, fp32, fp64), and its room."""

    device: str
    products: float
    products_fp32: float
    products_fp64: float
    passes: float
    free_bytes: int
    free_device_bytes: int | None = None


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


# ---- the machine -----------------------------------------------------------------------------------------------


def measure_machine(device: torch.device, compute: str = "auto") -> Machine:
    """Measure rates for about a second, and what memory is free."""
    mode = pick_precision(compute, device)
    size = 384 if device.type == "cpu" else 8192  # short enough to get through on a busy machine
    a_NN = torch.randn(size, size, device=device)
    before = torch.backends.cuda.matmul.allow_tf32

    def products(dtype: torch.dtype, tf32: bool) -> float:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        b_NN = a_NN.to(dtype)
        return _rate(lambda: b_NN @ b_NN, 2 * size**3, device)

    try:
        fp32 = products(torch.float32, False)
        fp64 = fp32 / 2 if device.type == "cpu" else products(torch.float64, False)
        fast = fp32 if mode == "fp32" else products(torch.bfloat16 if mode == "bf16" else torch.float32, True)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    numbers = torch.randn(1 << 20 if device.type == "cpu" else 1 << 26, device=device)
    other = torch.empty_like(numbers)
    passes = _rate(lambda: torch.mul(numbers, 1.5, out=other), numbers.numel(), device)
    return replace(unmeasured_machine(device), products=fast, products_fp32=fp32, products_fp64=fp64, passes=passes)


def unmeasured_machine(device: torch.device) -> Machine:
    """The machine's room alone, for a look at memory: its rates are infinite. Of several processes each has a share."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return Machine(device.type, inf, inf, inf, inf, _free_bytes() // local_world(), free)


def _rate(work: Callable[[], object], amount: int, device: torch.device, seconds: float = 0.25) -> float:
    """How much of `amount` is done per second when nothing else disturbs: by the fastest of many repetitions."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    end, fastest = time.perf_counter() + seconds, once()
    while time.perf_counter() < end:
        fastest = min(fastest, once())
    return amount / fastest


def _free_bytes() -> int:
    """Host memory that a new process can have; where the system does not say, all of it."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024 + _resident_bytes()
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _resident_bytes() -> int:
    """What this process holds already, and needs not be free besides."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- the model -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """What of a model time and memory depend on."""

    layers: int
    width: int
    mlp_width: int
    words: int
    parameters: int
    linears: int
    active: int
    widest: int
    score_width: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Sizes:
        """From config and headers alone; of experts a token meets a few."""
        config, shapes = checkpoint.config, checkpoint.shapes
        embedding = config.vocab_size * config.hidden_size
        tied = not any(name.startswith("lm_head.") for name in shapes)
        in_layers = [(name, prod(shape)) for name, shape in shapes.items() if ".layers." in name and len(shape) > 1]
        experts = sum(size for name, size in in_layers if "experts" in name)
        linears = sum(size for _, size in in_layers)
        number = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        share = config.num_experts_per_tok / number if number else 1.0
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        mlp_width = max(family_of(config.model_type).mlp_widths(config))
        heads = config.num_attention_heads * head_dim
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            mlp_width=mlp_width,
            words=config.vocab_size,
            parameters=checkpoint.num_parameters + embedding * tied,
            linears=linears,
            active=linears - round(experts * (1 - share)),
            widest=max(mlp_width, heads, config.hidden_size),
            score_width=heads,
        )


# ---- the run ---------------------------------------------------------------------------------------------------


def forecast(
    checkpoint: Checkpoint, recipe: Recipe, machine: Machine, *, text_tokens: int, held_out_tokens: int
) -> Forecast:
    """The stages of `spinfold.quantize` for a checkpoint whose headers alone have been read.

    `text_tokens` is about the length of the calibration text; on `held_out_tokens` the figures are measured. Baselines
    and searches of clip ratios are not counted; where a method that is fitted layer by layer has its own number of
    steps, 300 are.
    """
    in_files = stays_in_files(checkpoint, machine)
    run = _Run(Sizes.of(checkpoint), recipe, machine, text_tokens, held_out_tokens, in_files)
    return Forecast(machine, tuple(run.stages()))


def stays_in_files(checkpoint: Checkpoint, machine: Machine) -> bool:
    """Is the network too large to be held twice, as it is and rotated? Then a layer is read when it has its turn."""
    free = machine.free_bytes if machine.free_device_bytes is None else machine.free_device_bytes
    return 8.0 * Sizes.of(checkpoint).parameters > HELD_SHARE * free and checkpoint.can_stay_in_files


@dataclass(frozen=True)
class _Run:
    """The formulas."""

    sizes: Sizes
    recipe: Recipe
    machine: Machine
    text_tokens: int
    held_out_tokens: int
    in_files: bool

    def stages(self) -> list[StageForecast]:
        n, window = self.sizes, self.recipe.calibration.seq_len
        held, seen = max(self.held_out_tokens, window), min(4 * window, self.held_out_tokens)
        network, chunk = 4.0 * n.parameters, 4.0 * n.words * min(held, EVALUATION_CHUNK)
        rotated = 2 * network + 4.0 * (n.words + held) * n.width
        if self.in_files:
            ends, layer = 8.0 * n.words * n.width, 4.0 * n.linears / n.layers
            network, rotated = ends + layer, 2 * ends + layer + 4.0 * (n.words + 2 * held) * n.width
        fit = self._fit() + self._fold() + 2 * self._outliers(seen)
        stages = [
            self._stage("load model", 14 + network / 1e9, network, 0.1e9),
            self._stage("read text", 4 + 1.2e-5 * self._tokens_read(), network, 0),
            self._stage("evaluate original", self._forward(held) + self._head(held, 1), network, 2 * chunk),
            self._stage("fit and fold", fit, rotated, max(40.0 * n.words * n.width, self._fit_bytes())),
        ]
        rotated += (KEPT_GRAPH * self._graph() + KEPT_LOSS * self._loss()) * (self.machine.device == "cpu")
        if self.recipe.weight_format is not None:
            rotated += 0 if self.in_files else n.linears
            if self.recipe.budget is not None:
                stages.append(self._stage("measure sensitivity", self._measure(), rotated, self._round_bytes()))
            name = f"round weights ({self.recipe.rounding.method})"
            stages.append(self._stage(name, self._round(), rotated, self._round_bytes()))
        quantized = 1.8 * self._forward(held) + self._head(held, 2)
        return [
            *stages,
            self._stage("evaluate quantized", quantized, rotated, 5.25 * chunk),
            self._stage("write checkpoint", 6 + network / 1e9, rotated, 0),
        ]

    def _stage(self, name: str, seconds: float, held: float, more: float) -> StageForecast:
        """A stage that holds some bytes where the model is, and needs `more` there for a while."""
        host = PROCESS_BYTES + (TOKENIZER_BYTES + BYTES_PER_TOKEN_READ * self._tokens_read()) * (name != "load model")
        if self.machine.device == "cpu":
            return StageForecast(name, seconds, round(host + held + more))
        return StageForecast(name, seconds, round(host + CUDA_BYTES), round(held + more))

    def _tokens_read(self) -> int:
        fit, calibration = self.recipe.fit, self.recipe.calibration
        steps = 100 if fit.steps is None else fit.steps
        fitted = steps * (fit.batch or 8) * (fit.seq_len or calibration.seq_len)
        return min(self.text_tokens, int(1.25 * max(fitted, calibration.samples * calibration.seq_len)) + 8192)

    # ---- seconds

    def _passes(self, numbers: float) -> float:
        return numbers / self.machine.passes

    def _forward(self, tokens: float, *, share: float = 1.0) -> float:
        """The decoder without its head, or a share of each layer."""
        n, window = self.sizes, self.recipe.calibration.seq_len
        products = tokens * (2 * n.active + 2 * n.layers * window * n.score_width)
        passes = 49 * tokens * n.layers * (n.width + n.mlp_width)
        return share * (products / self.machine.products + self._passes(passes))

    def _head(self, tokens: float, times: int) -> float:
        """Logits and what is made of them, once or twice."""
        n = self.sizes
        products = 2.0 * tokens * n.words * n.width * times
        return products / self.machine.products_fp32 + self._passes(tokens * n.words * (10 if times == 1 else 77))

    def _outliers(self, tokens: float) -> float:
        n = self.sizes
        return self._forward(tokens) + self._passes(144 * tokens * n.layers * (n.width + n.mlp_width))

    def _fold(self) -> float:
        """A copy, the products with the maps, and the proof."""
        n = self.sizes
        products = 2.0 * n.parameters * n.width / self.machine.products_fp64
        return self._passes(40.0 * n.parameters) + products + 2 * self._forward(256)

    def _fit(self) -> float:
        """End to end forward, backward and quantizers; layer by layer, products with the rotation."""
        n, fit, calibration, method = self.sizes, self.recipe.fit, self.recipe.calibration, METHODS[self.recipe.method]
        if method.needs_backprop:
            steps = 100 if fit.steps is None else fit.steps
            tokens = float((fit.batch or 8) * (fit.seq_len or calibration.seq_len))
            network = self._forward(tokens) * (7 + 2 * fit.checkpointing) + 1.5 * self._head(tokens, 2)
            return steps * (network + 60.0 * n.width**3 / self.machine.products_fp32)
        if method.name in ("none", "quarot"):
            return 0.0
        steps = 300 if fit.steps is None else fit.steps
        if method.needs_data:
            captured, rows = self._forward(float(calibration.samples * calibration.seq_len)), fit.batch or 4096
            products = 6.0 * rows * n.width**2 / self.machine.products_fp32
            return captured + steps * (products + self._passes(65 * rows * n.width))
        return steps * (6.0 * 3 * n.linears / n.layers * n.width / self.machine.products_fp32)

    def _round(self) -> float:
        """The search of ranges; with a Hessian also its products, its factor, and the columns one after the other; for
        a second stream its way through the network; learned, the steps through each layer."""
        method, tokens = self.recipe.rounding.method, self._calibration_tokens()
        if method == "autoround":
            return self._search() + self._forward(2 * tokens) + self._learn()
        if method == "rtn" and self.recipe.rounding.absorb is None:
            return self._search()
        again = 2 if method == "gptaq" else 1  # statistics, factors and nearest weights of two kinds
        seconds = self._forward(tokens, share=2.2 * again + (again - 1)) + again * (self._hessians() + self._search())
        if method != "rtn":
            seconds += again * self._factors() + self._columns() * (1 + self._passes_over_columns())
        if self.recipe.rounding.absorb is not None:
            seconds += self._absorb()
        return seconds

    def _measure(self) -> float:
        """The error of each linear at each width, by GPTQ or to nearest."""
        search, tokens = self._search(), self._calibration_tokens()
        columns = 0.0 if self.recipe.rounding.method == "rtn" else self._factors() + self._columns()
        return self._forward(tokens, share=3.2) + self._hessians() + len(WIDTHS) * (search + columns)

    def _calibration_tokens(self) -> float:
        return float(self.recipe.calibration.samples * self.recipe.calibration.seq_len)

    def _search(self) -> float:
        """The ranges of all weights; elements with an exponent take half as long again as integers."""
        slower = 1.0 if self.recipe.format == "int" else 1.5
        return slower * self._passes(self.sizes.linears * (604.0 if self.recipe.clip_search else 25.0))

    def _hessians(self) -> float:
        n = self.sizes
        widths = 3 * n.width**2 + n.mlp_width**2
        return 2.0 * self._calibration_tokens() * n.layers * widths / self.machine.products_fp32

    def _factors(self) -> float:
        n = self.sizes
        return n.layers * (3 * n.width**3 + n.mlp_width**3) * 1.5 / self.machine.products_fp64

    def _columns(self) -> float:
        """One after the other; and the errors' way to the columns behind a block, as long as in the widest."""
        n = self.sizes
        return self._passes(450.0 * n.linears) + 8.0 * n.linears * n.mlp_width / self.machine.products_fp32

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
        steps = settings.steps * (3 * self._forward(tokens) + self._passes(75.0 * self.sizes.linears))
        return steps + 12 * (self._forward(self._calibration_tokens()) + self._passes(25.0 * self.sizes.linears))

    # ---- bytes

    def _pass_tokens(self) -> int:
        """Tokens that are back-propagated through at once; 0 if the method does not."""
        fit, window = self.recipe.fit, self.recipe.fit.seq_len or self.recipe.calibration.seq_len
        backprop = METHODS[self.recipe.method].needs_backprop
        return max(1, min(fit.batch or 8, TOKENS_PER_PASS // window)) * window * backprop

    def _graph(self) -> float:
        """What back-propagation through the decoder holds."""
        n, tokens = self.sizes, self._pass_tokens()
        per_layer = 4.0 * tokens * (5.5 * n.width + 3.5 * n.mlp_width)
        again = n.layers * per_layer > GRAPH_SHARE * (self.machine.free_device_bytes or inf)
        if again or self.in_files or self.recipe.fit.checkpointing:
            return 4.0 * tokens * n.layers * n.width + per_layer
        return n.layers * per_layer

    def _fit_bytes(self) -> float:
        """The graph, the logits, and on a GPU the copy in bf16 that is computed with."""
        copy = 2.0 * self.sizes.parameters * (self._pass_tokens() > 0 and self.machine.device == "cuda")
        return copy + self._graph() + self._loss()

    def _loss(self) -> float:
        """The logits of a chunk of tokens, and what a loss makes of them."""
        words = self.sizes.words
        return 5.75 * 4.0 * words * min(self._pass_tokens(), LOSS_CHUNK, LOSS_BYTES // (4 * words))

    def _round_bytes(self) -> float:
        """The streams of all calibration windows, one or two, and the Hessian with its factors; nothing if none is
        needed. Learned, the graph of a layer and, of its weights, offsets, gradients and copies."""
        n, calibration, settings = self.sizes, self.recipe.calibration, self.recipe.rounding
        if settings.method == "rtn" and settings.absorb is None and self.recipe.budget is None:
            return 0.0
        stream, layer = 4.0 * self._calibration_tokens() * n.width, 4.0 * n.linears / n.layers
        if settings.method == "autoround":
            tokens = min(settings.batch, calibration.samples) * calibration.seq_len
            return 2 * stream + 4.0 * tokens * (11 * n.width + 7 * n.mlp_width) + 12 * layer
        second = stream + layer if settings.method == "gptaq" else 0.0
        return stream + second + 8 * 8.0 * n.widest**2
