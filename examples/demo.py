"""The main job on two CPU cores: SmolLM2-135M to W4A4KV4 with a learned rotation, beside what it is measured against.

Fits spinfold's maps layer by layer, rounds with GPTQ, proves each step, and writes `demo/` with a checkpoint and
report.html. Small settings, so that it takes minutes: 4,096 calibration tokens where the papers take 262,144.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from shutil import rmtree

from rich.console import Console
from rich.markdown import Markdown

from spinfold import Recipe, SpinfoldError, quantize
from spinfold.progress import for_terminal
from spinfold.report import comparison_table

OUTPUT = Path("demo")
RECIPE = Recipe().with_(
    method="spinfold",
    bits="W4A4KV4",
    activations__clip="searched",
    kv__clip="searched",
    calibration__samples=8,
    calibration__seq_len=512,
    fit__steps=0,
    fit__tokens=64,
)


def main() -> int:
    """Run the demo; returns the exit code."""
    start, console = time.monotonic(), Console()
    if (OUTPUT / "run.json").is_file():
        rmtree(OUTPUT)  # only ever an earlier demo's run
    try:
        run = quantize("smollm2", OUTPUT, RECIPE, baselines=("none", "quarot"), progress=for_terminal())
    except SpinfoldError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    console.print(Markdown(comparison_table(run.data["metrics"]["rows"])))
    for proof in run.data["proofs"]:
        console.print(
            f"{'✓' if proof['ok'] else '✗'} {proof['statement']}: {proof['measured']:.1e} ≤ {proof['tolerance']:.0e}"
        )
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    console.print(f"\nDone in {minutes} min {seconds:02} s. Open {OUTPUT / 'report.html'} in a browser.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
