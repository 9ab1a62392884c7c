"""How long number formats take on a GPU: dynamic fake quantization, and rounding the weights of a layer.

    python benchmarks/formats.py OUT [--seconds 240] [--tokens 4096 16384] [--width 4096] [--outputs 4096]

Fake quantization beside one copy of the tensor, which reads and writes it once, in CUDA graphs on tensors that no cache
holds (`clocks.py`); with its gradient, launched one by one, the median of ten. Rounding, by every back-end that goes
column by column: a decoder layer of SmolLM2's shape, and one square linear; the second time counts, so that kernels are
compiled. OUT/formats.json has all figures; what fails is printed, and the rest goes on. Without a GPU everything runs
all the same, on small sizes: a rehearsal.

Shapes: T tokens, O out features, I in features.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from clocks import DEVICE, ON_GPU, clock, copies_of
from torch import Tensor

from spinfold.formats import FLOAT_FORMATS, ClipSearch, Format, IntFormat, fake_quantize
from spinfold.rounding import gptaq, gptq, ldlq, round_nearest

LAYER = ((960, 576), (576, 576), (3072, 576), (576, 1536))
"""(O, I) of q k v, o, gate up, down in SmolLM2-135M; it has 30 such layers."""
Record = dict[str, Any]


def main() -> None:
    """Parse, measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=240.0, help="start nothing new after so many")
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 16384] if ON_GPU else [64])
    parser.add_argument("--width", type=int, default=4096 if ON_GPU else 256)
    parser.add_argument("--outputs", type=int, default=4096 if ON_GPU else 64, help="rows of the square linear")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    layer = LAYER if ON_GPU else ((48, 64), (64, 96))
    parts: list[tuple[str, Callable[[], Record]]] = [
        (f"{tokens} x {args.width} {dtype}", partial(speed, tokens, args.width, dtype))
        for tokens in args.tokens
        for dtype in ("bfloat16", "float32")
    ]
    parts += [("layer", partial(rounding, layer)), ("linear", partial(rounding, ((args.outputs, args.width),)))]
    found: Record = {"device": torch.cuda.get_device_name() if ON_GPU else "CPU", "torch": torch.__version__}
    for name, part in parts:
        if time.monotonic() < end:
            found[name] = attempt(name, part)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "formats.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print("\n".join(tables(found)))


def attempt(name: str, part: Callable[[], Record]) -> Record:
    """What a part has found, or why it has not."""
    try:
        return part()
    except Exception as error:
        traceback.print_exc()
        print(f"{name} failed: {error}", flush=True)
        return {"failed": f"{type(error).__name__}: {error}"}


# ---- fake quantization ---------------------------------------------------------------------------------------------


def formats() -> dict[str, Format]:
    """As activations have them."""
    integers = {
        f"int{bits} {'symmetric' if symmetric else 'asymmetric'}, {size or 'row'}": IntFormat(bits, symmetric, size)
        for bits, symmetric, size in (
            *((4, False, None), (4, True, None), (8, True, None)),
            *((4, True, 32), (4, False, 32), (4, False, 128)),
        )
    }
    floats = {name: replace(fmt, outer=fmt.outer and "row") for name, fmt in FLOAT_FORMATS.items()}
    rules = {f"mxfp4 {rule}": replace(FLOAT_FORMATS["mxfp4"], scale=rule) for rule in ("even", "ceil", "real")}
    return integers | floats | rules


def speed(tokens: int, width: int, dtype: str) -> Record:
    """Milliseconds of a copy, and of each format forwards, and forwards and backwards through its scales."""
    x_TI = torch.randn(tokens, width, device=DEVICE).to(getattr(torch, dtype))
    inputs = [x_TI.clone() for _ in range(copies_of(x_TI.nbytes))]
    copy = clock(torch.clone, inputs) / 1e3
    found: Record = {"copy": copy, "gigabytes_per_second": 2 * x_TI.nbytes / copy / 1e6, "formats": {}}
    for name, fmt in formats().items():

        def timed(fmt: Format = fmt) -> Record:
            forward = clock(lambda x: fake_quantize(x, fmt), inputs) / 1e3
            return {
                "forward": forward,
                "of_copy": forward / copy,
                "both": milliseconds(lambda: with_gradient(x_TI, fmt)),
            }

        found["formats"][name] = attempt(name, timed)
    return found


def with_gradient(x_TI: Tensor, fmt: Format) -> None:
    """Forward and backward."""
    leaf_TI = x_TI.detach().requires_grad_()
    fake_quantize(leaf_TI, fmt, scale_gradient=True).backward(x_TI)


def milliseconds(work: Callable[[], object], runs: int = 10) -> float:
    """The median time of `work`; on a GPU a large write before each run empties the cache, and hides the launch."""
    if not ON_GPU:
        return 1000 * median(clocked(work) for _ in range(3))
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    for _ in range(5):
        work()
    times = []
    for _ in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


# ---- rounding ------------------------------------------------------------------------------------------------------


def weight_formats() -> dict[str, Format]:
    """As weights have them."""
    return {"int4": IntFormat(4, True), "int4, 32": IntFormat(4, True, 32)} | FLOAT_FORMATS


def roundings(w_OI: Tensor, h_II: Tensor, d_II: Tensor, fmt: Format) -> Iterator[tuple[str, Callable[[], object]]]:
    """The back-ends, ready to run."""
    search = ClipSearch()
    yield "rtn", partial(round_nearest, w_OI, fmt)
    yield "rtn, clip search", partial(round_nearest, w_OI, fmt, search)
    yield "gptq", partial(gptq, w_OI, h_II, fmt, search=search)
    yield "gptq, refitted", partial(gptq, w_OI, h_II, fmt, static_groups=False)
    yield "gptaq", partial(gptaq, w_OI, h_II, d_II, fmt, search=search)
    yield "ldlq, 2 passes", partial(ldlq, w_OI, h_II, fmt, passes=2, search=search)


def rounding(shapes: tuple[tuple[int, int], ...]) -> Record:
    """Seconds and most bytes beyond weights and statistics, for all linears of these shapes."""
    found: Record = {}
    for name, fmt in weight_formats().items():
        found[name] = attempt(name, partial(of_format, shapes, fmt))
    return found


def of_format(shapes: tuple[tuple[int, int], ...], fmt: Format) -> Record:
    """The same by back-end."""
    found: Record = {}
    generator = torch.Generator(DEVICE).manual_seed(0)
    for num_outputs, num_inputs in shapes:
        w_OI = torch.randn(num_outputs, num_inputs, device=DEVICE, generator=generator)
        x_TI = torch.randn(2 * num_inputs, num_inputs, device=DEVICE, generator=generator)
        h_II = (x_TI.T @ x_TI).double() / len(x_TI)
        d_II = 0.01 * torch.randn(num_inputs, num_inputs, device=DEVICE, dtype=torch.float64, generator=generator)
        for method, work in roundings(w_OI, h_II, d_II, fmt):
            total = found.setdefault(method, {"seconds": 0.0, "bytes": 0})
            work()
            before = torch.cuda.memory_allocated() if ON_GPU else 0
            if ON_GPU:
                torch.cuda.reset_peak_memory_stats()
            total["seconds"] += clocked(work)
            if ON_GPU:
                total["bytes"] = max(total["bytes"], torch.cuda.max_memory_allocated() - before)
    return found


def clocked(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    if ON_GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


# ---- what it says --------------------------------------------------------------------------------------------------


def tables(found: Record) -> Iterator[str]:
    """Times of a copy by format and tensor; milliseconds, and MB at most, by format and back-end."""
    yield f"\n{found['device']}, torch {found['torch']}\n"
    sizes = {name: part for name, part in found.items() if isinstance(part, dict) and "formats" in part}
    if sizes:
        yield from table("fake quantization, in copies (with gradient)", sizes, formats(), of_size)
        copies = (f"{x['copy']:.3f} ms, {x['gigabytes_per_second']:.0f} GB/s" for x in sizes.values())
        yield f"A copy: {'; '.join(copies)}.\n"
    for name in ("layer", "linear"):
        part = found.get(name, {})
        methods = {method: None for one in part.values() if isinstance(one, dict) for method in one}
        columns = {method: part for method in methods if method != "failed"}
        yield from table(f"{name}: ms (most MB)", columns, weight_formats(), of_method)


def table(title: str, columns: Record, rows: dict[str, Format], text: Callable[[str, Any, str], str]) -> Iterator[str]:
    """In Markdown."""
    yield f"| {title} | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns)
    for row in rows:
        yield f"| {row} | " + " | ".join(text(name, part, row) for name, part in columns.items()) + " |"
    yield ""


def of_size(_: str, part: Any, row: str) -> str:
    """`1.20 (5.1)`."""
    one = part["formats"].get(row, {})
    return f"{one['of_copy']:.2f} ({one['both'] / part['copy']:.1f})" if "of_copy" in one else "failed"


def of_method(method: str, part: Any, row: str) -> str:
    """`12.3 (45)`."""
    one = part.get(row, {}).get(method, {})
    return f"{1000 * one.get('seconds', math.nan):.1f} ({one.get('bytes', 0) / 1e6:.0f})"


if __name__ == "__main__":
    main()
