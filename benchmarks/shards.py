"""An end-to-end fit at 8B with whole weights on each of several GPUs, and with parts of them (FSDP2): time and memory.

    torchrun --standalone --nproc-per-node 2 benchmarks/shards.py OUT [--steps 6] [--tiny]

Steps of SpinQuant as in `large.py fit`: 8 × 2048 tokens, W16A4KV4, random weights; all processes share the windows.
OUT/shards.json has both; the table says the median step, the most memory of any GPU, and how equal the losses are.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import large
import torch

from spinfold.distributed import everyones, is_first, joined, local_rank, world
from spinfold.methods import spinquant
from spinfold.progress import launched


def main() -> int:
    """Both ways, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if launched()[1] == 1:
        parser.error("several processes are compared here: start it by torchrun")
    if large.DEVICE.type == "cuda":
        torch.cuda.set_device(local_rank())
    found: dict[str, Any] = {}
    with joined():
        for name, shared_out in (("whole weights", False), ("parts of them", True)):
            spinquant._too_large = lambda _, answer=shared_out: answer  # what it answers is measured here
            if large.DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            result = large.fit(large.Sizes(options.tiny, None), steps=options.steps) | large.peaks()
            found[name] = result | {"gpu_gb": max(everyones(result.get("gpu_gb", 0.0)))}
            gc.collect()
        if is_first():
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "shards.json").write_text(json.dumps(found, indent=1))
            print_table(found, world())
    return 0


def print_table(found: dict[str, Any], count: int) -> None:
    """Markdown."""
    whole = found["whole weights"]["losses"]
    print(f"| {count} processes hold | s a step | GPU memory of one, GB | first loss | largest difference of losses |")
    print("|---|---|---|---|---|")
    for name, one in found.items():
        gap = max(abs(a - b) / a for a, b in zip(whole, one["losses"], strict=True))
        cells = f"{one['seconds_per_step']:.2f} | {one['gpu_gb']:.1f} | {one['losses'][0]:.6f} | {gap:.1e}"
        print(f"| {name} | {cells} |")


if __name__ == "__main__":
    sys.exit(main())
