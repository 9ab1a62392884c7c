"""How long dynamic fake quantization takes on a GPU, beside reading and writing the tensor once.

    python benchmarks/formats.py [--tokens 16384] [--width 4096] [--dtype bfloat16]

The yardstick is a copy of the tensor. Each time is the median of 50 runs, on a tensor that no cache holds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from spinfold.errors import SpinfoldError
from spinfold.formats import FLOAT_FORMATS, Format, IntFormat, fake_quantize


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(str(SpinfoldError("There is no CUDA device.", "The kernels are for GPUs.", "Run it on one.")))
    x_TI = torch.randn(args.tokens, args.width, device="cuda").to(getattr(torch, args.dtype))
    out_TI = torch.empty_like(x_TI)
    yardstick = milliseconds(lambda: out_TI.copy_(x_TI))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.tokens} x {args.width} {args.dtype}")
    print(f"one read and write: {yardstick:.3f} ms, {2 * x_TI.nbytes / yardstick / 1e6:.0f} GB/s\n")
    print("| format | ms | of a read and write | with the gradient through scales, ms |\n|---|---|---|---|")
    for name, fmt in formats().items():
        forward = milliseconds(lambda fmt=fmt: fake_quantize(x_TI, fmt))
        both = milliseconds(lambda fmt=fmt: with_gradient(x_TI, fmt))
        print(f"| {name} | {forward:.3f} | {forward / yardstick:.2f} | {both:.3f} |")


def formats() -> dict[str, Format]:
    """As activations have them."""
    integers = {
        f"int{bits} {'symmetric' if symmetric else 'asymmetric'}, {size or 'row'}": IntFormat(bits, symmetric, size)
        for bits, symmetric, size in (
            (4, False, None),
            (4, True, None),
            (8, True, None),
            (4, True, 32),
            (4, False, 128),
        )
    }
    floats = {name: replace(fmt, outer=fmt.outer and "row") for name, fmt in FLOAT_FORMATS.items()}
    rules = {f"mxfp4 {rule}": replace(FLOAT_FORMATS["mxfp4"], scale=rule) for rule in ("even", "ceil", "real")}
    return integers | floats | rules


def with_gradient(x_TI: Tensor, fmt: Format) -> None:
    """Forward and backward."""
    leaf_TI = x_TI.detach().requires_grad_()
    fake_quantize(leaf_TI, fmt, scale_gradient=True).backward(x_TI)


def milliseconds(work: Callable[[], object], runs: int = 50) -> float:
    """The median time of `work` on the device; a large write before each run empties the cache."""
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


if __name__ == "__main__":
    main()
