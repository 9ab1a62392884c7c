"""How time and memory of fits and of rounding grow with layers, hidden size and tokens: one table.

    python benchmarks/growth.py OUT [--tiny]

Networks of random weights as in `large.py`, with Llama-3's proportions: heads of 128, a fourth as many for keys and
values, 3.5 times as wide in the MLP. The rows of a job change one thing of its first row each. One process does all, so
host memory is not in it; one JSON file goes to OUT.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from large import EIGHT, Sizes, fit, layerwise, peaks, random_network, rounded

MIDDLE = {"layers": 16, "hidden": 4096}
LAYERS: list[dict[str, int]] = [{}, {"layers": 8}, {"layers": 32}]
WIDER = [{"hidden": 2048}, {"hidden": 8192}]


@dataclass(frozen=True)
class Case:
    """One row."""

    job: str
    layers: int
    hidden: int
    tokens: int
    seconds: float
    gpu_gb: float


def shape_of(layers: int, hidden: int) -> dict[str, int]:
    """Llama-3's proportions."""
    heads = {"num_attention_heads": hidden // 128, "num_key_value_heads": hidden // 512}
    return {**EIGHT, **heads, "hidden_size": hidden, "intermediate_size": hidden * 7 // 2, "num_hidden_layers": layers}


def step(sizes: Sizes, shape: Mapping[str, int], batch: int) -> float:
    """Seconds of a step of SpinQuant's fit."""
    return float(fit(sizes, steps=4, shape=shape, batch=batch)["seconds_per_step"])


def gptq_layer(sizes: Sizes, shape: Mapping[str, int], samples: int) -> float:
    """Seconds of a layer of GPTQ."""
    network = random_network(sizes.shape(shape, 3))
    return float(rounded(network, sizes, 1, samples)["seconds_per_layer"])


def whole(name: str, **changes: Any) -> Callable[[Sizes, Mapping[str, int], int], float]:
    """Seconds of a whole fit without back-propagation, on the windows of its recipe."""

    def run(sizes: Sizes, shape: Mapping[str, int], _: int) -> float:
        return float(layerwise(sizes, name, shape, **changes)["seconds"])

    return run


JOBS: Mapping[str, tuple[Callable[[Sizes, Mapping[str, int], int], float], int, list[dict[str, int]]]] = {
    "SpinQuant, a step": (step, 8, [*LAYERS, *WIDER, {"windows": 4}, {"windows": 16}]),
    "GPTQ, a layer": (gptq_layer, 128, [{}, *WIDER, {"windows": 64}, {"windows": 256}]),
    "ours, layer by layer": (whole("spinfold", fit__steps=0), 16, [*LAYERS, *WIDER[:1]]),
    "OptRot": (whole("spinfold", method="optrot"), 0, [*LAYERS, *WIDER[:1]]),
}


def main() -> int:
    """Run all cases, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sizes, rows = Sizes(args.tiny, None), list[Case]()
    for job, (measure, windows, changes) in JOBS.items():
        for change in changes:
            case = MIDDLE | {"windows": windows} | change
            shape = shape_of(case["layers"], case["hidden"])
            seconds = measure(sizes, shape, case["windows"])
            tokens = case["windows"] * sizes.seq_len
            layers = 3 if measure is gptq_layer else case["layers"]
            rows.append(Case(job, layers, case["hidden"], tokens, seconds, peaks().get("gpu_gb", 0.0)))
            print(rows[-1], flush=True)
            (args.out / "growth.json").write_text(json.dumps([vars(row) for row in rows], indent=1))
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    print("| job | layers | hidden | tokens | seconds | of the first row | GPU, GB |\n|---|---|---|---|---|---|---|")
    for row in rows:
        first = next(one for one in rows if one.job == row.job)
        cells = [row.job, row.layers, row.hidden, f"{row.tokens:,}", f"{row.seconds:.3g}"]
        cells += [f"{row.seconds / first.seconds:.2f}", f"{row.gpu_gb:.1f}"]
        print("| " + " | ".join(map(str, cells)) + " |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
