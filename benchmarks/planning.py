"""What `quantize --plan` predicts beside what the run then takes: seconds, memory and GPU memory.

    python benchmarks/planning.py OUT --calibration train-paragraphs.txt [--device cuda] [--small] [--seconds 600]

Both are commands of their own: a process predicts, the next one runs. Memory is the largest resident set that the
system has seen of the run's process, GPU memory the most that was allocated, seconds the sum over stages. What is done
between the stages, outliers and folding, counts as `fit and fold`. `--small` takes few windows, and few and short steps
end to end, for a CPU.
Details, the machine's rates among them, are in OUT/planning.json; a run that fails leaves its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RUNS = (
    "quarot, rtn",
    "kurtail, rtn",
    "optrot, rtn",
    "quarot, gptq",
    "spinquant, gptq",
    "spinfold, gptq",
    "quarot, gptaq",
    "quarot, ldlq",
    "quarot, autoround",
    "spinfold layer by layer, gptq",
    "smoothquant, rtn",
    "dartquant, rtn",
    "dfrot, rtn",
    "optrot-plus, rtn",
    "respinquant, rtn",
    "spinout, rtn",
    "quarot, mxfp4, gptq",
)
"""Method, perhaps a format, and rounding."""
FULL = ["--samples", "64", "--seq-len", "2048"]
SMALL = ["--samples", "8", "--seq-len", "256"]
FEW_STEPS = {"fit": {"steps": 4, "batch": 4, "seq_len": 256}, "rounding": {"steps": 10}}
FEWER_STEPS = {"fit": {"steps": 2, "batch": 2, "seq_len": 256, "layers": "kurtosis"}}  # in each of SpinOut's trials
LONG = ("spinquant, gptq", "spinfold, gptq", "quarot, autoround", "respinquant, rtn", "spinout, rtn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--runs", nargs="*", default=RUNS, choices=RUNS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds
    records: dict[str, dict[str, Any]] = {}
    for name in options.runs:
        if time.monotonic() > end:
            records[name] = {"failed": "no time left"}
            continue
        try:
            records[name] = predicted_and_measured(options, name, end - time.monotonic())
        except (subprocess.SubprocessError, OSError, ValueError, KeyError, RuntimeError) as error:
            records[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        (options.out / "planning.json").write_text(json.dumps(records, indent=1), "utf-8")
    print_table(records)


def options_of(name: str) -> list[str]:
    """What `quantize` is told to make one of `RUNS`."""
    method, *format, rounding = name.split(", ")
    found = ["--method", method.split()[0], "--rounding", rounding]
    found += ["--format", *format] if format else []
    return [*found, "--steps", "0"] if method.endswith("layer by layer") else found


def predicted_and_measured(options: argparse.Namespace, name: str, seconds: float) -> dict[str, Any]:
    """Both: `seconds`, `memory`, `gpu` (None on a CPU), and `stages`, each name with its seconds and GPU bytes."""
    os.sync()  # what the last run wrote is on the disk before the machine's rates are measured
    output = options.out / name.replace(", ", "-")
    sizes = SMALL if options.small else FULL
    if options.small and name in LONG:
        steps = FEWER_STEPS if name.startswith("spinout") else FEW_STEPS
        (recipe := options.out / "few-steps.yaml").write_text(json.dumps({"schema_version": 1} | steps))
        sizes = [*sizes, "--recipe", str(recipe)]
    command = [sys.executable, "-m", "spinfold", "quantize", options.model, "-o", str(output), "--bits", "W4A4KV4"]
    command += [*options_of(name), *sizes, "--calibration", options.calibration, "--device", options.device, "--json"]
    plan = subprocess.run([*command, "--plan"], capture_output=True, text=True, timeout=seconds)
    if plan.returncode:
        raise RuntimeError(plan.stderr[-250:])
    said = json.loads(plan.stdout)
    status, usage = run(command, output.with_suffix(".log"))
    if status:
        raise RuntimeError(output.with_suffix(".log").read_text("utf-8", "replace")[-250:])
    data = json.loads((output / "run.json").read_text("utf-8"))
    on_gpu = said["peak_device_bytes"] is not None
    done = stages_of(data, [x["name"] for x in said["stages"]])
    return {
        "machine": said["machine"],
        "reading": said["reading"],
        "predicted": {
            "seconds": said["seconds"],
            "memory": said["peak_bytes"],
            "gpu": said["peak_device_bytes"],
            "stages": {x["name"]: [x["seconds"], x["peak_device_bytes"]] for x in said["stages"]},
        },
        "measured": {
            "seconds": sum(seconds for seconds, _ in done.values()),
            "memory": usage.ru_maxrss * 1024,
            "gpu": max(num_bytes for _, num_bytes in done.values()) if on_gpu else None,
            "stages": {name: [seconds, num_bytes if on_gpu else None] for name, (seconds, num_bytes) in done.items()},
        },
    }


def stages_of(data: dict[str, Any], predicted: list[str]) -> dict[str, tuple[float, int]]:
    """Seconds and peak bytes of a run by the names of the prediction's stages; all others are of `fit and fold`."""
    stages = {x["name"]: (x["seconds"], x["peak_bytes"]) for x in data["stages"]}
    fits = [num_bytes for name, (_, num_bytes) in stages.items() if name not in predicted]
    found = {name: stages[name] for name in predicted if name in stages}
    rounding = sum(seconds for name, (seconds, _) in found.items() if name.startswith(("round", "measure")))
    fit = data["metrics"]["rows"][-1]["seconds"] - rounding
    return found | {"fit and fold": (fit, max(fits, default=found["evaluate original"][1]))}


def run(command: list[str], log: Path) -> tuple[int, Any]:
    """The exit status of a command, and what the system says of its process; what it prints goes to a file."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    return status, usage


def print_table(records: dict[str, dict[str, Any]]) -> None:
    """Markdown: each run with what was predicted and what came."""
    print("| run | memory predicted, GB | measured | GPU predicted, GB | measured | time predicted, s | measured |")
    print("|---|---|---|---|---|---|---|")
    for name, record in records.items():
        if "failed" in record:
            print(f"| {name} | {record['failed']} |")
            continue
        cells = []
        for key, unit in (("memory", 1e9), ("gpu", 1e9), ("seconds", 1.0)):
            for source in ("predicted", "measured"):
                value = record[source][key]
                cells.append("–" if value is None else f"{value / unit:.1f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
