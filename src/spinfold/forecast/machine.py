"""What a machine can do: its rates of products and of passes over numbers, measured in a second, and its room."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

import torch

from spinfold.compute import pick_precision
from spinfold.distributed import local_world

__all__ = ["Machine", "measure_machine", "unmeasured_machine"]


@dataclass(frozen=True)
class Machine:
    """How fast it multiplies and passes over numbers (per second, in the run's precision, fp32, fp64), and its room."""

    device: str
    products: float
    products_fp32: float
    products_fp64: float
    passes: float
    free_bytes: int
    free_device_bytes: int | None = None


_BURSTS, _BURST_SECONDS = 10, 0.05


def measure_machine(device: torch.device, compute: str = "auto") -> Machine:
    """Measure rates for about a second, and what memory is free.

    Others may use the machine too. So the work is short enough to get through between their turns, it is repeated in
    bursts that are spread over the second, on a CPU by all threads and by one that waits for no other, and the fastest
    repetition counts.
    """
    mode = pick_precision(compute, device)
    size = 384 if device.type == "cpu" else 3072
    a_NN = torch.randn(size, size, device=device)
    numbers = torch.randn(1 << 20 if device.type == "cpu" else 1 << 25, device=device)
    other = torch.empty_like(numbers)

    def product(dtype: torch.dtype, tf32: bool) -> Callable[[], float]:
        b_NN = a_NN.to(dtype)

        def rate() -> float:
            torch.backends.cuda.matmul.allow_tf32 = tf32
            return _rate(lambda: b_NN @ b_NN, 2 * size**3, device)

        return rate

    works = {
        "passes": lambda: _rate(lambda: torch.mul(numbers, 1.5, out=other), numbers.numel(), device),
        "products_fp32": product(torch.float32, False),
    }
    if device.type != "cpu":
        works["products_fp64"] = product(torch.float64, False)
    if mode != "fp32":
        works["products"] = product(torch.bfloat16 if mode == "bf16" else torch.float32, True)
    before, threads = torch.backends.cuda.matmul.allow_tf32, torch.get_num_threads()
    best = dict.fromkeys(works, 0.0)
    try:
        for number in range(_BURSTS):
            torch.set_num_threads(1 if number % 2 else threads)
            best = {name: max(best[name], rate()) for name, rate in works.items()}
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
        torch.set_num_threads(threads)
    fp32, passes = best["products_fp32"], best["passes"]
    fast, fp64 = best.get("products", fp32), best.get("products_fp64", fp32 / 2)
    room = unmeasured_machine(device)
    return replace(room, products=fast, products_fp32=fp32, products_fp64=fp64, passes=passes)


def unmeasured_machine(device: torch.device) -> Machine:
    """The machine's room alone, for a look at memory: its rates are infinite. Of several processes each has a share."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return Machine(device.type, inf, inf, inf, inf, _free_bytes() // local_world(), free)


def _rate(work: Callable[[], object], amount: int, device: torch.device) -> float:
    """How much of `amount` is done per second by the fastest repetition of a burst."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    end, fastest = time.perf_counter() + _BURST_SECONDS, once()
    while time.perf_counter() < end:
        fastest = min(fastest, once())
    return amount / fastest


def _free_bytes() -> int:
    """Host memory that a new process can have; where the system does not say, all of it."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024 + _resident_bytes()
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _resident_bytes() -> int:
    """What this process holds already, and needs not be free besides."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
