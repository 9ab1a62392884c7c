"""Time and memory of fits and of rounding at the sizes of Llama-3-8B and Llama-3-70B, in one table.

    python benchmarks/large.py OUT [--parts fit,equal,...] [--seconds 900] [--text DIR] [--tiny]

The weights are random, of the right shapes, in bf16; all layers are the same one, which lies in host memory and goes to
the GPU for each of its turns (`networks.placement`), but in part `stream70b`, where a few layers are read from sharded
safetensors files. What a part extrapolates from a few steps or layers, its row says.

    fit       SpinQuant, 8 × 2048 tokens a step, value and residual rotations, W16A4KV4
    bases     ReSpinQuant, a basis per block boundary, the same step
    equal     SpinQuant on SmolLM2, 100 steps: as it is against fp32 products throughout, and beside another seed
    optrot, layerwise, kurtail   the fits without back-propagation, from the first weight read to the last map
    gptq      128 × 2048 tokens, W4, on a rotated network; seconds of a layer, the first one left out
    stream70b the same with a 70B's layers, from files

Each part runs in a process of its own, so that its peaks are its own: GPU memory as allocated, host memory as resident.
One JSON file per part goes to OUT.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from spinfold.evaluation import measure_quality
from spinfold.folding import fold, fold_norms
from spinfold.maps import low_rank_rotation, project
from spinfold.methods import METHODS, FitTask
from spinfold.methods.quarot import hadamard_maps
from spinfold.methods.respinquant import learnable_boundaries
from spinfold.methods.spinquant import fit_on_loss, learnable
from spinfold.networks import Network, Store
from spinfold.networks.placement import built_without_weights
from spinfold.networks.safetensors_reader import scan_folder
from spinfold.networks.sources import resolve
from spinfold.progress import Quiet
from spinfold.recipe import Recipe
from spinfold.rotation import rotate_network
from spinfold.rounding import round_network
from spinfold.runtime import quantize_wires
from spinfold.subject import prepare

SITES = ("residual", "value", "query_key", "down")
EVERY = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
EIGHT = {**EVERY, "num_key_value_heads": 8, "vocab_size": 128256}
SEVENTY = {**EIGHT, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
TINY = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 512}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Sizes:
    """How much a part does."""

    tiny: bool
    text: Path | None

    @property
    def seq_len(self) -> int:
        """T."""
        return 32 if self.tiny else 2048

    def shape(self, shape: Mapping[str, int], layers: int | None = None) -> dict[str, int]:
        """A model's shape, with fewer layers if told so."""
        chosen = dict(TINY if self.tiny else shape)
        return chosen | ({"num_hidden_layers": min(layers, chosen["num_hidden_layers"])} if layers else {})


# ---- models ------------------------------------------------------------------------------------------------------


class SameLayers:
    """A store of random weights, whose layers are all one."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.shapes, self.made = shapes, dict[str, Tensor]()

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors in host memory."""
        return {name: self._one(name) for name in names}

    def _one(self, name: str) -> Tensor:
        key = place_of(name)[1]
        if key not in self.made:
            self.made[key] = random_weight(self.shapes[name], seed=len(self.made))
        return self.made[key]


def place_of(name: str) -> tuple[int | None, str]:
    """The layer of a parameter, if it has one, and its name in there."""
    _, found, tail = name.rpartition(".layers.")
    if not found:
        return None, name
    index, _, rest = tail.partition(".")
    return int(index), rest


def random_weight(shape: Sequence[int], seed: int) -> Tensor:
    """Gains of 1; else a Gaussian with rows of length 1, and one input in 256 ten times louder."""
    if len(shape) == 1:
        return torch.ones(*shape, dtype=torch.bfloat16)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    w_OI = torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.bfloat16) * shape[-1] ** -0.5
    w_OI[:, ::256] *= 3
    return w_OI.cpu()


def skeleton(shape: Mapping[str, int]) -> Any:
    """A Llama without weights."""
    settings = {"max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}
    config = AutoConfig.for_model("llama", **shape, **settings, tie_word_embeddings=False)
    with built_without_weights():
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def random_network(shape: Mapping[str, int]) -> Network:
    """A network of random weights, its layers in host memory."""
    model = skeleton(shape)
    store: Store = SameLayers({name: tuple(p.shape) for name, p in model.named_parameters()})
    store.read([name for name, _ in model.named_parameters()])
    return Network(model, name="random", store=store, device=DEVICE)


def task_of(network: Network, recipe: Recipe, progress: Quiet) -> FitTask:
    """A fit on random tokens."""
    words = network.config.vocab_size

    def windows(seq_len: int, count: int) -> Tensor:
        return torch.randint(words, (count, seq_len), generator=torch.Generator().manual_seed(0))

    return FitTask(network, recipe, SITES, windows, progress)


# ---- measuring ---------------------------------------------------------------------------------------------------


class Clock(Quiet):
    """Notes when each step of each stage is done; and what the GPU does from one tick of a stage to the next."""

    def __init__(self, watched: str = "", at: int = 0) -> None:
        super().__init__()
        self.ticks: dict[str, list[float]] = {}
        self.watched, self.at = watched, at
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.kernels: list[tuple[float, int, str]] = []

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Any]:
        """A stage whose steps are timed."""
        ticks = self.ticks.setdefault(name, [now()])

        clock = self

        class Tick:
            def advance(self, n: int = 1, note: str = "") -> None:
                ticks.append(now())
                if name == clock.watched and DEVICE.type == "cuda":
                    clock.look(len(ticks) - 1)

        with super().stage(name, total):
            yield Tick()
        ticks.append(now())

    def look(self, tick: int) -> None:
        """Start or stop watching."""
        if tick == self.at:
            self.profile.start()
        elif tick == self.at + 1:
            self.profile.stop()
            found = self.profile.key_averages()
            times = [(one.self_device_time_total / 1e3, one.count, one.key[:120]) for one in found]
            self.kernels = sorted(times, reverse=True)[:40]


def now() -> float:
    """The time once all work is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peaks() -> dict[str, float]:
    """The most memory that this process has had, in GB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    found = {"host_gb": int(status["VmHWM"].split()[0]) * 1024 / 1e9}
    if DEVICE.type == "cuda":
        found["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
        found["gpu_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return found


def per_step(ticks: Sequence[float], skip: int = 2) -> float:
    """The median time between ticks, without the first ones, which compile, and without the last, the stage's end."""
    return median(gaps(ticks)[skip:-1])


def gaps(ticks: Sequence[float]) -> list[float]:
    """The time between each two ticks."""
    return [b - a for a, b in pairwise(ticks)]


def timed(work: Callable[[], object]) -> float:
    """Seconds, the second time."""
    work()
    start = now()
    work()
    return now() - start


def step_flops(shape: Mapping[str, int], tokens: int) -> float:
    """Products of a step that no exact implementation with recomputation can leave out: the network forward, again, and
    backward to its inputs; x R and its way back at every norm, forward, again, and backward to x and R.
    """
    D, F, L = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    kv = shape["num_key_value_heads"] / shape["num_attention_heads"]
    weights = L * (D * D * (2 + 2 * kv) + 3 * D * F)
    return 2.0 * tokens * (3 * weights + 3 * shape["vocab_size"] * D + 2 * L * 8 * D * D)


# ---- parts -------------------------------------------------------------------------------------------------------


def fit(
    sizes: Sizes, steps: int = 8, *, bases: bool = False, shape: Mapping[str, int] = EIGHT, batch: int = 8
) -> dict[str, Any]:
    """Steps of an end-to-end fit, 8B if nothing is said; with a basis per boundary, and what it takes to join them."""
    method, shape = "respinquant" if bases else "spinquant", sizes.shape(shape)
    network = random_network(shape)
    fold_norms(network)
    recipe = Recipe.load("spinfold").with_(method=method, bits="W16A4KV4", activations={"clip": 1.0}, kv={"clip": 1.0})
    recipe = recipe.with_(fit__steps=steps, fit__batch=batch, calibration__seq_len=sizes.seq_len)
    clock, start = Clock("fit rotations", at=steps - 1), now()
    reset_peak()
    task = task_of(network, recipe, clock)
    chosen = hadamard_maps(task, random_value=True)
    if bases:
        maps, learned = learnable_boundaries(chosen, len(network.layers), DEVICE)
    else:
        maps, learned = learnable(chosen, DEVICE)
    losses = fit_on_loss(task, maps, learned).losses
    seconds = per_step(clock.ticks["fit rotations"])
    first, second = (R_DD.detach().double() for R_DD in (learned[0], learned[1 if bases else 0]))
    settle = timed(lambda: project(first)) * (2 * len(network.layers) if bases else 1)
    join = timed(lambda: low_rank_rotation(first.T @ second, 32)) * (2 * len(network.layers) - 1) if bases else 0.0
    flops = step_flops(shape, batch * sizes.seq_len)
    return {
        "what": f"{method}, {batch} × {sizes.seq_len} tokens a step, {steps} steps measured",
        "seconds_per_step": seconds,
        "minutes_per_100_steps": seconds * 100 / 60,
        "tflops": flops / seconds / 1e12,
        "seconds_to_settle": settle,
        "seconds_to_join": join,
        "kernels": clock.kernels,
        "losses": losses,
        "gaps": gaps(clock.ticks["fit rotations"]),
        "seconds_in_all": now() - start,
        "seconds": seconds * 100 + settle + join,
    }


def layerwise(sizes: Sizes, name: str, shape: Mapping[str, int] = EIGHT, **changes: Any) -> dict[str, Any]:
    """A whole fit without back-propagation, at 8B unless told so."""
    network = random_network(sizes.shape(shape))
    fold_norms(network)
    recipe = Recipe.load(name).with_(**changes)
    if sizes.tiny:
        recipe = recipe.with_(calibration__seq_len=32, calibration__samples=8, fit__tokens=64)
    clock, start = Clock(), now()
    reset_peak()
    METHODS[recipe.method].fit(task_of(network, recipe, clock))
    stages = {stage: round(ticks[-1] - ticks[0], 2) for stage, ticks in clock.ticks.items()}
    return {"what": f"{recipe.method} {recipe.bits}, whole fit", "seconds": now() - start, "stages": stages}


def equal(sizes: Sizes) -> dict[str, Any]:
    """SmolLM2: what the fast way does to the loss, beside what another seed does."""
    text = {"calibration__source": str(sizes.text / "train-paragraphs.txt")} if sizes.text else {}
    steps = 2 if sizes.tiny else 100
    recipe = Recipe(method="spinquant", bits="W16A4KV4").with_(**text, fit__steps=steps)
    if sizes.tiny:
        recipe = recipe.with_(calibration__seq_len=32, fit__batch=2)
    held = str(sizes.text / "wiki.test.raw") if sizes.text else None
    tokens = {"held_out_tokens": 64 if sizes.tiny else 1 << 17, "max_tokens": 2_200_000}
    subject = prepare(resolve("smollm2"), recipe, DEVICE, Quiet(), held_out=held, **tokens)
    found: dict[str, Any] = {}
    for label, one in {
        "bf16": recipe,
        "fp32": recipe.with_(compute="fp32"),
        "bf16, seed 1": recipe.with_(seed=1),
    }.items():
        start = now()
        rotated = rotate_network(subject, one, Quiet())
        seconds = now() - start
        quantize_wires(rotated.network, one)
        quality, _ = measure_quality(rotated.network, subject.held_out_NT, reference=subject.reference)
        losses = rotated.log.losses
        last = losses[-10:]
        found[label] = {
            "loss": sum(last) / len(last),
            "losses": losses,
            "perplexity": quality.perplexity,
            "seconds": seconds,
        }
    gap = found["bf16"]["loss"] - found["fp32"]["loss"]
    noise = found["bf16, seed 1"]["loss"] - found["bf16"]["loss"]
    rows = ", ".join(
        f"{k}: loss {v['loss']:.4f}, ppl {v['perplexity']:.3f}, {v['seconds']:.0f} s" for k, v in found.items()
    )
    return {"what": f"SmolLM2, {steps} steps. {rows}", "gap": gap, "seed_gap": noise, "runs": found, "seconds": 0.0}


def gptq(sizes: Sizes, layers: int = 4) -> dict[str, Any]:
    """GPTQ of a few layers at 8B."""
    return rounded(random_network(sizes.shape(EIGHT, layers)), sizes, 32)


def stream70b(sizes: Sizes, layers: int = 3) -> dict[str, Any]:
    """GPTQ of a few layers of a 70B, read from files."""
    with tempfile.TemporaryDirectory() as folder:
        written = write_shards(Path(folder), sizes.shape(SEVENTY, layers))
        network = Network(skeleton(sizes.shape(SEVENTY, layers)), store=scan_folder(Path(folder)), device=DEVICE)
        return rounded(network, sizes, 80) | {"gb_of_files": written / 1e9}


def rounded(network: Network, sizes: Sizes, all_layers: int, samples: int = 128) -> dict[str, Any]:
    """Round a rotated network's layers."""
    recipe = Recipe(method="quarot", calibration={"samples": samples, "seq_len": sizes.seq_len})
    task = task_of(network, recipe, Quiet())
    reset_peak()
    start = now()
    fold_norms(network)
    fold(network, hadamard_maps(task))
    clock = Clock("round weights (gptq)", at=2)
    for _ in round_network(network, recipe, task.windows(sizes.seq_len, samples), progress=clock):
        pass
    ticks = clock.ticks["round weights (gptq)"]
    seconds = per_step(ticks, skip=1)
    return {
        "what": f"GPTQ of {len(network.layers)} layers measured, {samples} × {sizes.seq_len} tokens",
        "seconds_per_layer": seconds,
        "gaps": gaps(ticks),
        "kernels": clock.kernels,
        "seconds_in_all": now() - start,
        "seconds": seconds * all_layers,
    }


def write_shards(folder: Path, shape: Mapping[str, int]) -> int:
    """A checkpoint of random weights, a file for each layer; its bytes."""
    model, weight_map, total = skeleton(shape), dict[str, str](), 0
    shards: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        layer = place_of(name)[0]
        file = f"model-{0 if layer is None else layer + 1:05}.safetensors"
        shards.setdefault(file, {})[name] = parameter
        weight_map[name] = file
    for file, parameters in shards.items():
        tensors = {name: random_weight(p.shape, seed=i) for i, (name, p) in enumerate(parameters.items())}
        save_file(tensors, folder / file, {"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def reset_peak() -> None:
    """Count GPU memory from here on."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


PARTS: Mapping[str, tuple[Callable[[Sizes], dict[str, Any]], str]] = {
    "gptq": (gptq, "≤ 5 min"),
    "kurtail": (lambda s: layerwise(s, "kurtail"), "≤ 120 s, ≤ 24 GB"),
    "optrot": (lambda s: layerwise(s, "spinfold", method="optrot"), "≤ 60 s, ≤ 24 GB"),
    "equal": (equal, "within noise"),
    "stream70b": (stream70b, "≤ 64 GB of RAM"),
    "bases": (lambda s: fit(s, steps=4, bases=True), "≤ 25 min"),
    "fit": (fit, "≤ 6.5 min, ≤ 48 GB"),
    "layerwise": (lambda s: layerwise(s, "spinfold", fit__steps=0), "≤ 120 s, ≤ 24 GB"),
    "weights": (lambda s: layerwise(s, "spinfold", bits="W4A16KV16"), "≤ 120 s, ≤ 24 GB"),
}


def main() -> int:
    """Run the parts, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.here:
        return run_here(args.parts, Sizes(args.tiny, args.text), args.out)
    end = time.monotonic() + args.seconds
    for part in args.parts.split(","):
        command = [sys.executable, __file__, str(args.out), "--parts", part, "--here"]
        command += ["--tiny"] * args.tiny + (["--text", str(args.text)] if args.text else [])
        left = end - time.monotonic()
        file = args.out / f"{part}.json"
        try:
            if left < 10:
                raise TimeoutError("no time was left for it")
            file.unlink(missing_ok=True)
            subprocess.run(command, timeout=left, check=False)
        except (subprocess.TimeoutExpired, TimeoutError) as error:
            file.write_text(json.dumps({"error": str(error)[-300:]}))
        print(part, "done" if file.is_file() else "left nothing behind", flush=True)
    print_table(args.out, args.parts.split(","))
    return 0


def run_here(part: str, sizes: Sizes, out: Path) -> int:
    """One part, its result or its error to a file."""
    try:
        torch.manual_seed(0)
        result = PARTS[part][0](sizes) | peaks()
    except Exception:  # whatever it is, the other parts go on
        traceback.print_exc()
        result = {"error": traceback.format_exc()[-2000:]} | peaks()
    (out / f"{part}.json").write_text(json.dumps(result, indent=1))
    return 0


def print_table(out: Path, parts: Sequence[str]) -> None:
    """One line a part."""
    device = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else "CPU"
    print(f"\n{device}, torch {torch.__version__}\n")
    print("| part | asked | takes | GPU, GB (reserved) | host, GB | what |\n|---|---|---|---|---|---|")
    for part in parts:
        file = out / f"{part}.json"
        data = json.loads(file.read_text()) if file.is_file() else {"error": "ended without a word"}
        gpu = f"{data.get('gpu_gb', 0):.1f} ({data.get('gpu_reserved_gb', 0):.1f})"
        host = f"{data.get('host_gb', 0):.1f}"
        if "error" in data:
            last = data["error"].strip().splitlines()[-1][:150]
            print(f"| {part} | {PARTS[part][1]} | failed | {gpu} | {host} | {last} |")
            continue
        seconds = data["seconds"]
        takes = f"{seconds / 60:.1f} min" if seconds > 120 else f"{seconds:.1f} s"
        more = f"; {data['seconds_per_step']:.2f} s a step, {data['tflops']:.0f} TFLOP/s" if "tflops" in data else ""
        more += f"; {data['seconds_per_layer']:.2f} s a layer" if "seconds_per_layer" in data else ""
        more += f"; {data['stages']}" if "stages" in data else ""
        more += f"; gap {data['gap']:+.4f}, of seeds {data['seed_gap']:+.4f}" if "gap" in data else ""
        print(f"| {part} | {PARTS[part][1]} | {takes} | {gpu} | {host} | {data['what']}{more} |")


if __name__ == "__main__":
    sys.exit(main())
