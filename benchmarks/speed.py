"""How long the three costly parts take on this device, in one table: GPTQ, a SpinQuant fit, perplexity.

    python benchmarks/speed.py [--text TEST] [--calibration TRAIN] [--samples 64] [--steps 100]

Without texts: the embedded default, its last fifth for perplexity. Each part runs twice; the second time counts, so
that kernels are compiled. SmolLM2-135M, W4A4KV4.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from spinfold.compute import pick_device, pick_precision
from spinfold.evaluation import measure_quality
from spinfold.networks.sources import resolve
from spinfold.progress import Quiet
from spinfold.recipe import Recipe
from spinfold.rotation import rotate_network
from spinfold.rounding import round_network
from spinfold.subject import prepare


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text")
    parser.add_argument("--calibration", default="sotu")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compute", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    recipe = Recipe().with_(
        calibration__source=args.calibration,
        calibration__samples=args.samples,
        fit__steps=args.steps,
        compute=args.compute,
    )
    subject = prepare(resolve("smollm2"), recipe, device, Quiet(), held_out=args.text, held_out_tokens=301056)
    fixed = recipe.with_(method="quarot")
    warm = recipe.with_(fit__steps=3)
    ids_NT = subject.windows(2048, args.samples, 0)

    def rounded() -> None:
        network = rotate_network(subject, fixed, Quiet()).network
        begin = now(device)
        for _ in round_network(network, fixed, ids_NT):
            pass
        spent.append(now(device) - begin)

    spent: list[float] = []
    rounded()
    rounded()
    rotate_network(subject, warm, Quiet())
    fit = clocked(device, lambda: rotate_network(subject, recipe, Quiet()))
    evaluation = clocked(device, lambda: measure_quality(subject.network, subject.held_out_NT, compute=args.compute))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    tokens = subject.held_out_NT.numel()
    print(f"{name}, torch {torch.__version__}, {pick_precision(args.compute, device)} (fits: bf16)\n")
    print("| part | size | seconds |\n|---|---|---|")
    print(f"| GPTQ of all linears | {args.samples} x 2048 tokens | {spent[-1]:.1f} |")
    print(f"| SpinQuant, fold and proof included | {args.steps} steps of 8 x 2048 tokens | {fit:.1f} |")
    print(f"| perplexity | {tokens:,} tokens | {evaluation:.1f} |")


def now(device: torch.device) -> float:
    """The time once all work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def clocked(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    begin = now(device)
    work()
    return now(device) - begin


if __name__ == "__main__":
    main()
