"""One process against several of torchrun, each with a GPU: time, speed-up, and how equal the results are.

    python benchmarks/parallel.py OUT [--counts 1,2,4] [--parts fit,gptq] [--calibration FILE] [--seconds 600]

Two runs of `spinfold quantize` for each number of processes: SpinQuant, for its fit, and QuaRot with GPTQ, whose maps
are the same in all, for the integers. A short run before warms the caches of compiled kernels. OUT gets the runs, what
they printed, and parallel.json; the table comes last. A run that fails leaves its reason, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

STAGES = {"fit": "fit rotations", "round": "round weights", "evaluate": "evaluate quantized"}
PARTS = {"fit": ["--method", "spinquant", "--rounding", "rtn"], "gptq": ["--method", "quarot", "--rounding", "gptq"]}


def command(options: argparse.Namespace, part: str, count: int, output: Path) -> list[str]:
    """One run, by torchrun if there are several processes."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"] if count > 1 else []
    sizes = ["--samples", str(options.samples), "--seq-len", str(options.seq_len), "--steps", str(options.steps)]
    text = ["--calibration", options.calibration] if options.calibration else []
    quantize = ["quantize", options.model, "-o", str(output), *PARTS[part], *sizes, *text, "--device", options.device]
    return [sys.executable, "-m", *torchrun, "spinfold", *quantize]


def run(options: argparse.Namespace, part: str, count: int, output: Path, seconds: float) -> dict[str, Any]:
    """What a run took and gave, or why there is none."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command(options, part, count, output), capture_output=True, text=True, timeout=max(1.0, seconds)
        )
    except subprocess.TimeoutExpired:
        return {"failed": "no time left"}
    output.with_suffix(".log").write_text(done.stdout + done.stderr, "utf-8")
    if done.returncode:
        return {"failed": (done.stderr.strip() or "no message").splitlines()[-1][:200]}
    data = json.loads((output / "run.json").read_text("utf-8"))
    took = {key: sum(x["seconds"] for x in data["stages"] if x["name"].startswith(STAGES[key])) for key in STAGES}
    peak = max(x["peak_bytes"] for x in data["stages"])
    figures = data["metrics"]["rows"][-1]
    whole = time.perf_counter() - start
    return {"seconds": whole, "peak_bytes": peak, "losses": data["fit"]["losses"], **took, "figures": figures}


def compare(part: str, alone: Path, other: Path, losses: tuple[list[float], list[float]]) -> str:
    """How equal two runs are: losses of a fit, integers of GPTQ."""
    if part == "fit":
        gaps = [abs(a - b) / a for a, b in zip(*losses, strict=True)]
        if not gaps:
            return "-"
        return f"loss differs by {gaps[0]:.0e} at first, {max(gaps[:10]):.0e} in 10 steps, {gaps[-1]:.0e} at last"
    one, two = (load_file(path / "model" / "model.safetensors") for path in (alone, other))
    names = [name for name in one if name.endswith(".q")]
    same = sum(int((one[name] == two[name]).sum()) for name in names) / sum(one[name].numel() for name in names)
    return f"{100 * same:.3f} % of integers the same"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--counts", default="1,2,4", help="numbers of processes; those beyond the GPUs are left out")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--calibration", default="")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=600)
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    counts = [int(word) for word in options.counts.split(",")]
    if options.device == "cuda":
        counts = [count for count in counts if count <= torch.cuda.device_count()]

    short = argparse.Namespace(**vars(options) | {"steps": 3, "samples": 8})
    results: dict[str, Any] = {"warm-up": run(short, "fit", 1, options.out / "warm-up", end - time.monotonic())}
    rows = [("part", "processes", "seconds", "speed-up", "whole run", "speed-up", "peak GB", "perplexity", "equality")]
    for part in options.parts.split(","):
        stage = "fit" if part == "fit" else "round"
        for count in counts:
            name = f"{part}-{count}"
            found = results[name] = run(options, part, count, options.out / name, end - time.monotonic())
            first = results[f"{part}-{counts[0]}"]
            if "failed" in found or "failed" in first:
                rows.append((part, str(count), *"------", found.get("failed", "nothing to compare with")))
                continue
            folders = options.out / f"{part}-{counts[0]}", options.out / name
            equal = compare(part, *folders, (first["losses"], found["losses"]))
            rows.append(
                (
                    *(part, str(count), f"{found[stage]:.1f}", f"{first[stage] / found[stage]:.2f}"),
                    *(f"{found['seconds']:.1f}", f"{first['seconds'] / found['seconds']:.2f}"),
                    *(f"{found['peak_bytes'] / 1e9:.1f}", f"{found['figures']['perplexity']:.4f}", equal),
                )
            )
            (options.out / "parallel.json").write_text(json.dumps(results, indent=1), "utf-8")
    device = torch.cuda.get_device_name() if options.device == "cuda" and torch.cuda.is_available() else "CPU"
    print(f"{options.model}, {options.steps} steps, {options.samples} x {options.seq_len} tokens, {device}\n")
    print("\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ("---",) * len(rows[0]), *rows[1:]]))


if __name__ == "__main__":
    main()
