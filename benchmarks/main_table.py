"""Methods x bits x rounding x seeds in one harness, one JSON line a cell; resumable, and divisible among processes.

    python benchmarks/main_table.py run --text TEST --calibration TRAIN --out cells.jsonl [--jobs main] [--shard 0/2]
    python benchmarks/main_table.py table cells.jsonl...

A cell that is already in the output file is not computed again. Rotations that do not depend on the bits (none,
quarot) are made once per seed, and so are their rounded weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from spinfold import pipeline
from spinfold.compute import pick_device
from spinfold.evaluation import measure_quality
from spinfold.methods import METHODS
from spinfold.networks.sources import resolve
from spinfold.progress import Quiet
from spinfold.recipe import Recipe
from spinfold.rounding import round_network
from spinfold.runtime import quantize_wires

BITS = ("W4A4KV4", "W4A4KV16", "W4A16KV16", "W4A8KV16")
CLIP = {"activations__clip": 0.85, "kv__clip": 0.95}
FULL = 1 << 20
JOBS: dict[str, list[tuple[str, str, dict[str, Any], tuple[str, ...], tuple[str, ...]]]] = {
    # label, method, recipe fields, bits, roundings
    "main": [
        ("spinquant", "spinquant", {}, BITS, ("gptq", "rtn")),
        ("quarot", "quarot", {}, BITS, ("gptq", "rtn")),
        ("none", "none", {}, BITS, ("gptq", "rtn")),
    ],
    "ours": [
        ("spinfold bases clip", "spinfold", {"fit__steps": 150, "fit__rank": FULL, **CLIP}, BITS[:1], ("gptq",)),
        ("spinfold bases layer-wise", "spinfold", {"fit__steps": 0, "fit__rank": FULL}, BITS[:1], ("gptq",)),
    ],
    "more": [
        ("spinfold clip", "spinfold", {"fit__steps": 100, **CLIP}, BITS[:1], ("gptq",)),
        ("spinquant clip", "spinquant", CLIP, BITS[:1], ("gptq",)),
        ("spinfold bases", "spinfold", {"fit__steps": 150, "fit__rank": FULL}, BITS[:1], ("gptq",)),
        ("spinfold layer-wise", "spinfold", {"fit__steps": 0}, BITS[:1], ("gptq",)),
        ("quarot clip", "quarot", CLIP, BITS[:1], ("gptq",)),
    ],
}


def cells(args: argparse.Namespace) -> Iterator[tuple[str, str, dict[str, Any], tuple[str, ...], tuple[str, ...], int]]:
    """This process's share of the jobs, seed by seed."""
    index, count = map(int, args.shard.split("/"))
    every = [(*job, seed) for name in args.jobs.split(",") for seed in range(args.seeds) for job in JOBS[name]]
    return iter(every[index::count])


def run(args: argparse.Namespace) -> None:
    """Compute the cells that are missing, until `--seconds` are over."""
    start, device, out = time.monotonic(), pick_device(args.device), Path(args.out)
    done = {key_of(json.loads(line)) for line in out.read_text().splitlines()} if out.exists() else set()
    base = Recipe().with_(calibration__source=args.calibration, compute=args.compute)
    subject = pipeline.prepare(resolve(args.model), base, device, Quiet(), held_out=args.text, held_out_tokens=FULL)
    report(out, done, {"label": "original", "bits": "W16A16KV16", "rounding": "", "seed": 0}, subject.quality)
    for label, method, fields, bits_list, roundings, seed in cells(args):
        rotated = None
        rounded_for: dict[str, pipeline.Network] = {}
        for bits in bits_list:
            missing = [r for r in roundings if (label, bits, r, seed) not in done]
            if not missing or time.monotonic() - start > args.seconds:
                continue
            recipe = base.with_(method=method, bits=bits, seed=seed, **fields)
            if rotated is None or METHODS[method].needs_data:
                torch.cuda.reset_peak_memory_stats()
                rotated, rounded_for = pipeline.rotate_network(subject, recipe, Quiet()), {}
            for rounding in missing:
                begin = time.perf_counter()
                if rounding not in rounded_for:
                    network = rotated.network.copy()
                    chosen = recipe.with_(rounding__method=rounding)
                    ids_NT = subject.windows(chosen.calibration.seq_len, chosen.calibration.samples, seed)
                    for _ in round_network(network, chosen, ids_NT):
                        pass
                    rounded_for[rounding] = network
                network = rounded_for[rounding]
                rounding_seconds = time.perf_counter() - begin
                take_off = quantize_wires(network, recipe)
                quality, _ = measure_quality(
                    network, subject.held_out_NT, reference=subject.reference, compute=args.compute
                )
                take_off()
                cell = {
                    "label": label,
                    "bits": bits,
                    "rounding": rounding,
                    "seed": seed,
                    "rotate_seconds": rotated.seconds,
                    "rounding_seconds": rounding_seconds,
                    "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
                    "invariance": rotated.proof.measured,
                    "losses": [round(x, 4) for x in rotated.log.losses[:: max(1, len(rotated.log.losses) // 10)]],
                }
                report(out, done, cell, quality)


def report(out: Path, done: set[Any], cell: dict[str, Any], quality: pipeline.Quality) -> None:
    """Append a cell to the output and say it."""
    if key_of(cell) in done:
        return
    done.add(key_of(cell))
    cell |= {"perplexity": quality.perplexity, "kl": quality.kl, "top1": quality.top1, "eval_seconds": quality.seconds}
    cell |= {"tokens": quality.tokens}
    with out.open("a") as file:
        file.write(json.dumps(cell) + "\n")
    shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in cell.items() if k not in ("losses", "tokens")}
    print(*shown.values(), flush=True)


def key_of(cell: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a cell the same one."""
    return cell["label"], cell["bits"], cell["rounding"], cell["seed"]


def table(args: argparse.Namespace) -> None:
    """Markdown: mean and spread (max - min) of perplexity over seeds, KL, seconds, memory."""
    grouped: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for path in args.cells:
        for line in Path(path).read_text().splitlines():
            cell = json.loads(line)
            grouped[cell["label"], cell["bits"], cell["rounding"]].append(cell)
    print("| bits | rounding | method | perplexity | spread | KL | top-1 | seeds | rotate s | round s | GiB |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for (label, bits, rounding), same in sorted(grouped.items(), key=lambda item: (item[0][1], item[0][2], item[0][0])):
        mean = {k: statistics.mean(c[k] for c in same) for k in same[0] if isinstance(same[0][k], float)}
        ppl = [c["perplexity"] for c in same]
        numbers = [f"{mean.get(k, 0):.{n}f}" for k, n in (("kl", 3), ("top1", 3))]
        costs = [f"{mean.get(k, 0):.1f}" for k in ("rotate_seconds", "rounding_seconds", "peak_gib")]
        row = [bits, rounding or "-", label, f"{mean['perplexity']:,.2f}", f"{max(ppl) - min(ppl):,.2f}"]
        print("|", " | ".join([*row, *numbers, str(len({c["seed"] for c in same})), *costs]), "|")


def main() -> None:
    """Parse and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    runner = verbs.add_parser("run")
    runner.add_argument("--model", default="smollm2")
    runner.add_argument("--text", required=True)
    runner.add_argument("--calibration", required=True)
    runner.add_argument("--out", required=True)
    runner.add_argument("--jobs", default="main")
    runner.add_argument("--seeds", type=int, default=3)
    runner.add_argument("--shard", default="0/1")
    runner.add_argument("--seconds", type=float, default=float("inf"), help="start no cell after this time")
    runner.add_argument("--device", default="auto")
    runner.add_argument("--compute", default="bf16")
    runner.set_defaults(go=run)
    tabler = verbs.add_parser("table")
    tabler.add_argument("cells", nargs="+")
    tabler.set_defaults(go=table)
    args = parser.parse_args()
    args.go(args)


if __name__ == "__main__":
    main()
