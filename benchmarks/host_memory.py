"""How the host's memory grows with the layers of a model that stays in its files: whole runs, each in its own process.

    python benchmarks/host_memory.py OUT --calibration FILE [--layers 8,24,48] [--hidden 512] [--device cpu]

Random weights in bf16, sharded layer by layer, with SmolLM2's tokenizer, Llama-3's proportions, and GPTQ after QuaRot's
rotations. Layers are read in their turns, as if the device were too small for the network.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from large import EIGHT, skeleton, write_shards

from spinfold.networks.sources import resolve

RUN = """
import sys
from spinfold import subject
from spinfold.cli import main
subject.stays_in_files = lambda *_: True
sys.exit(main(sys.argv[1:]))
"""


def main() -> int:
    """Make the models, run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--layers", default="8,24,48")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    rows = []
    for layers in map(int, options.layers.split(",")):
        folder = options.out / f"{layers}-layers"
        num_bytes = make_model(folder / "model", layers, options.hidden)
        command = [sys.executable, "-c", RUN, "quantize", str(folder / "model"), "-o", str(folder / "run"), "--quiet"]
        command += ["--method", "quarot", "--bits", "W4A4KV4", "--calibration", options.calibration]
        command += ["--samples", "4", "--seq-len", "128", "--device", options.device]
        process = subprocess.Popen(command)
        rows.append({"layers": layers, "gb_of_files": num_bytes / 1e9} | watched(process))
        if process.returncode:
            return 1
        (options.out / "host_memory.json").write_text(json.dumps(rows, indent=1))
    print("| layers | files, GB | its own, GB | pages of files, GB |\n|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join([str(row.pop("layers")), *(f"{value:.2f}" for value in row.values())]) + " |")
    return 0


def watched(process: subprocess.Popen[bytes]) -> dict[str, float]:
    """The most that a process has had until it ended, in GB: memory of its own, and pages of files, which the system
    takes back when it needs them.
    """
    most = {"RssAnon": 0.0, "RssFile": 0.0}
    while process.poll() is None:
        with suppress(OSError):
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                name, _, rest = line.partition(":")
                if name in most:
                    most[name] = max(most[name], int(rest.split()[0]) * 1024 / 1e9)
        time.sleep(0.05)
    return most


def make_model(folder: Path, layers: int, hidden: int) -> int:
    """A checkpoint of random weights; its bytes."""
    tokenizer = resolve("smollm2").load_tokenizer()
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 256, "vocab_size": len(tokenizer)}
    shape = {**EIGHT, **heads, "hidden_size": hidden, "intermediate_size": hidden * 7 // 2, "num_hidden_layers": layers}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    skeleton(shape).config.save_pretrained(folder)
    return write_shards(folder, shape)


if __name__ == "__main__":
    raise SystemExit(main())
