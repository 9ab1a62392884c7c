"""What runtimes make of exported checkpoints, in two tables: size, load time, perplexity and speed; and Q4_0 rotated.

    python benchmarks/runtimes.py --text wiki.test.raw [--calibration sotu] [--tokens 20480] [--threads 2] [--work DIR]

Runs are made by `spinfold quantize`, checkpoints by `spinfold export --check`, which stops where a proof does not hold.
Both stay under --work, and what is there is not made again. Every figure is measured in a process of its own, with
--threads threads on the CPU. Needs llama-cpp-python.

    perplexity   the text's first tokens in windows of 512, each by itself, in fp32
    tokens/s     greedy, one token after the other behind a prompt of 64, the best of three times 64
    load         until the model can be asked, the file in the page cache, the best of three
    bits         of a linear weight with its scales, in the file; with its header too if that holds no tokenizer
    in memory    the same of the loaded model; llama.cpp maps the file

SmolLM2-135M. Shapes: N windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import spinfold
from spinfold.checkpoint import load_run
from spinfold.export import quantizer
from spinfold.export.contents import Contents
from spinfold.export.llama_cpp import logits, tokens_per_second
from spinfold.export.packed import PackedWeight
from spinfold.fitting.text import load_text, tokenize, windows
from spinfold.networks.gguf_header import scan
from spinfold.networks.sources import resolve
from spinfold.progress import for_terminal
from spinfold.recipe import Recipe

SEQ_LEN, PROMPT, GENERATED, TIMES = 512, 64, 64, 3
FOLDED: dict[str, Any] = {"method": "quarot", "sites": ["residual", "value"]}
PLAIN: dict[str, Any] = {"method": "none", "sites": []}
Q4_0: dict[str, Any] = {"bits": "W4A16", "group_size": 32, "weights__scale_dtype": "float16"}
Q4_0 |= {"weights__clip_search": False}  # it takes minutes per run
RTN, GPTQ = ({"rounding__method": method} for method in ("rtn", "gptq"))

SERVED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unquantized": (PLAIN | {"bits": "W16A16"}, ("gguf", "transformers")),
    "W4A16, groups of 32": (FOLDED | Q4_0 | GPTQ, ("gguf", "transformers")),
    "W4A16, whole rows": (FOLDED | Q4_0 | GPTQ | {"group_size": None}, ("transformers",)),
    "W8A16, groups of 32": (FOLDED | Q4_0 | RTN | {"bits": "W8A16"}, ("gguf",)),
}
"""Recipe and targets of each row of the first table."""
RUNTIMES = {"gguf": "llama.cpp", "transformers": "the plugin"}


# ---- measuring, each in a process of its own -----------------------------------------------------------------------


def best(action: Callable[[], Any], of: int = TIMES) -> tuple[float, Any]:
    """The least seconds that an action took, and what it gave the last time."""
    seconds = []
    for _ in range(of):
        start = time.perf_counter()
        given = action()
        seconds.append(time.perf_counter() - start)
    return min(seconds), given


def perplexity(logits_of: Callable[[Tensor], Tensor], ids_NT: Tensor) -> float:
    """Of every token but each window's first."""
    nll = [F.cross_entropy(logits_of(ids_1T)[0, :-1].double(), ids_1T[0, 1:]).item() for ids_1T in ids_NT.split(1)]
    return math.exp(sum(nll) / len(nll))


def measure(where: str, folder: Path, ids_NT: Tensor, threads: int) -> dict[str, float]:
    """Load time, perplexity and speed of a checkpoint in a runtime, or the perplexity of a run in memory."""
    if where == "memory":
        network = load_run(folder, torch.device("cpu"))
        return {"perplexity": perplexity(network, ids_NT)}
    prompt = ids_NT[0, :PROMPT]
    if where == "gguf":
        from llama_cpp import Llama

        path = next(folder.glob("*.gguf"))
        load, _ = best(lambda: Llama(str(path), n_ctx=SEQ_LEN, n_threads=threads, verbose=False))
        speed = max(tokens_per_second(path, prompt.tolist(), GENERATED, threads) for _ in range(TIMES))
        return {
            "load": load,
            "speed": speed,
            "perplexity": perplexity(lambda ids_1T: logits(path, ids_1T, threads), ids_NT),
        }
    from transformers import AutoModelForCausalLM

    assert quantizer.FORMAT_VERSION  # its import registers the format
    load, model = best(lambda: AutoModelForCausalLM.from_pretrained(folder))
    seconds, _ = best(lambda: generate(model, prompt))
    first, _ = best(lambda: generate(model, prompt, 1))
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    num_bytes = sum(x.numel() * x.element_size() for module in packed for x in module.buffers())
    return {
        "load": load,
        "speed": (GENERATED - 1) / (seconds - first),
        "perplexity": perplexity(lambda ids_1T: model(ids_1T).logits, ids_NT),
        "bits": 8 * num_bytes / sum(module.shape.numel() for module in packed) if packed else 32.0,
    }


def generate(model: Any, prompt_T: Tensor, count: int = GENERATED) -> Tensor:
    """Exactly `count` tokens, greedily."""
    generated: Tensor = model.generate(
        prompt_T.unsqueeze(0), min_new_tokens=count, max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return generated


def measured(work: Path, where: str, folder: Path, threads: int) -> dict[str, float]:
    """`measure` in a fresh process; once per folder, since the answer is kept beside it."""
    kept = folder.with_name(f"{folder.name}-{where}.json")
    if not kept.exists():
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "measure", where, str(folder), str(work / "ids.pt"), str(threads)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        kept.write_text(done.stdout.splitlines()[-1])
    answer: dict[str, float] = json.loads(kept.read_text())
    return answer


# ---- making --------------------------------------------------------------------------------------------------------


def made_run(work: Path, recipe: Recipe, text: str) -> Path:
    """A run of SmolLM2."""
    folder = work / recipe.fingerprint()
    if not (folder / "run.json").is_file():
        print(f"making {folder}: {recipe.method} {recipe.bits} {recipe.rounding.method}", file=sys.stderr)
        spinfold.quantize(
            "smollm2", folder, recipe, device="cpu", resume=True, evaluate_on=text, progress=for_terminal()
        )
    return folder


def made_export(run: Path, target: str, text: str) -> Path:
    """What `spinfold export` makes of a run, loaded and compared there."""
    folder = run.with_name(f"{run.name}-{target}")
    if not folder.exists():
        spinfold.export(run, target, folder, text=text, device="cpu", progress=for_terminal())
    return folder


def sizes(run: Path, folder: Path, target: str) -> tuple[float, float]:
    """Megabytes of the weights' files, and bits of a linear weight."""
    contents = Contents.open(run)
    linear_weights = sum(x.weight_OI.numel() for x in contents.network.linears)
    if target == "gguf":
        path = next(folder.glob("*.gguf"))
        total, tensors = path.stat().st_size, scan(path).tensors.values()
        linear_bytes = sum(t.num_bytes for t in tensors if t.name.startswith("blk.") and len(t.shape) == 2)
    else:
        total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        linear_bytes = total - sum(4 * tensor.numel() for _, tensor in contents.others())
    return total / 1e6, 8 * linear_bytes / linear_weights


# ---- the tables ----------------------------------------------------------------------------------------------------


def served_table(work: Path, base: Recipe, text: str, threads: int) -> list[str]:
    """Every checkpoint in every runtime it is for."""
    lines = [
        "| checkpoint | runtime | MB | bits | in memory | load s | tokens/s | perplexity in memory | there |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (changes, targets) in SERVED.items():
        run = made_run(work, base.with_(**changes), text)
        memory = measured(work, "memory", run, threads)
        for target in targets:
            folder = made_export(run, target, text)
            there, (size, bits) = measured(work, target, folder, threads), sizes(run, folder, target)
            lines.append(
                f"| {name} | {RUNTIMES[target]} | {size:.1f} | {bits:.2f} | {there.get('bits', bits):.2f} "
                f"| {there['load']:.2f} | {there['speed']:.1f} "
                f"| {memory['perplexity']:.3f} | {there['perplexity']:.3f} |"
            )
    return lines


def rotation_table(work: Path, base: Recipe, text: str, seeds: int, threads: int) -> list[str]:
    """Q4_0 with and without folded rotations, rounded to nearest and by GPTQ."""
    lines = ["| rounding | rotations | seed | perplexity in memory | in llama.cpp |", "|---|---|---|---|---|"]
    for rounding, how in (("RTN", RTN), ("GPTQ", GPTQ)):
        for maps, which in (("none", PLAIN), ("folded", FOLDED)):
            for seed in range(seeds if maps == "folded" or rounding == "GPTQ" else 1):
                recipe = base.with_(**Q4_0, **how, **which, seed=seed)
                run = made_run(work, recipe, text)
                memory = measured(work, "memory", run, threads)["perplexity"]
                there = measured(work, "gguf", made_export(run, "gguf", text), threads)["perplexity"]
                lines.append(f"| {rounding} | {maps} | {seed} | {memory:.3f} | {there:.3f} |")
    return lines


def main() -> None:
    """Parse, make, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", default="sotu")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/runtimes"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    tokens_T = tokenize(load_text(args.text), resolve("smollm2").load_tokenizer(), args.tokens)
    torch.save(windows(tokens_T, SEQ_LEN), args.work / "ids.pt")
    base = Recipe().with_(
        calibration__source=args.calibration, calibration__samples=args.samples, calibration__seq_len=SEQ_LEN
    )
    print("\n".join(rotation_table(args.work, base, args.text, args.seeds, args.threads)), end="\n\n", flush=True)
    print("\n".join(served_table(args.work, base, args.text, args.threads)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        where, folder, ids, threads = sys.argv[2:]
        torch.set_num_threads(int(threads))
        with torch.no_grad():
            print(json.dumps(measure(where, Path(folder), torch.load(ids), int(threads))))
    else:
        main()
