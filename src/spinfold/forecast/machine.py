"""What a machine can do: its rates of products and of passes over numbers, measured in five seconds, and its room."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf
from statistics import median

import torch

from spinfold.allocator import free_bytes, resident_bytes
from spinfold.compute import pick_precision
from spinfold.distributed import local_world, world

__all__ = ["Machine", "measure_machine", "unmeasured_machine"]


@dataclass(frozen=True)
class Machine:
    """How fast it multiplies (in the run's precision, fp32, fp64) and passes over numbers, each per second; its room;
    and how many processes work together, each with as much.
    """

    device: str
    products: float
    products_fp32: float
    products_fp64: float
    passes: float
    free_bytes: int
    free_device_bytes: int | None = None
    processes: int = 1

    @property
    def room(self) -> int:
        """What is free where a run computes: on the GPU, or else here."""
        return self.free_bytes if self.free_device_bytes is None else self.free_device_bytes


_BURSTS, _BURST_SECONDS, _PAUSE = 10, 0.05, 0.3
_Work = tuple[Callable[[], object], int]
"""What to do, and how many operations or numbers that is."""


def measure_machine(device: torch.device, compute: str = "auto") -> Machine:
    """Measure rates for about five seconds, and what memory is free.

    A rate is that of the median repetition, in bursts with pauses between them. The fastest would tell what the
    machine can do, and the run will take what it does: two hardware threads that share a core's tiles, one of them
    another's, multiply at full rate in one moment and at less than half in the next, for seconds at a time.
    """
    mode, on_cpu = pick_precision(compute, device), device.type == "cpu"
    numbers = torch.randn(1 << 22 if on_cpu else 1 << 25, device=device)
    other = torch.empty_like(numbers)

    def product(dtype: torch.dtype, tf32: bool, size: int = 3072) -> _Work:
        a_NN = torch.randn(size, size, device=device).to(dtype)

        def multiply() -> None:
            torch.backends.cuda.matmul.allow_tf32 = tf32
            a_NN @ a_NN

        return multiply, 2 * size**3

    works: dict[str, _Work] = {
        "passes": (lambda: torch.mul(numbers, 1.5, out=other), numbers.numel()),
        "products_fp32": product(torch.float32, False, 1024 if on_cpu else 3072),
    }
    if not on_cpu:
        works["products_fp64"] = product(torch.float64, False)
    if mode != "fp32":
        works["products"] = product(torch.bfloat16 if mode == "bf16" else torch.float32, True, 2048 if on_cpu else 3072)
    before = torch.backends.cuda.matmul.allow_tf32
    taken: dict[str, list[float]] = {name: [] for name in works}
    try:
        for _ in range(_BURSTS):
            for name, (work, _) in works.items():
                taken[name] += _burst(work, device)
            time.sleep(_PAUSE)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    rates = {name: amount / median(taken[name]) for name, (_, amount) in works.items()}
    fp32, passes = rates["products_fp32"], rates["passes"]
    fast, fp64 = rates.get("products", fp32), rates.get("products_fp64", fp32 / 2)
    room = unmeasured_machine(device)
    return replace(room, products=fast, products_fp32=fp32, products_fp64=fp64, passes=passes)


def unmeasured_machine(device: torch.device) -> Machine:
    """The machine's room alone, for a look at memory: its rates are infinite. Of several processes each has a share."""
    on_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    free = free_bytes()
    with suppress(OSError):
        free += resident_bytes()  # what this process holds already, it needs not find free
    return Machine(device.type, inf, inf, inf, inf, free // local_world(), on_device, world())


def _burst(work: Callable[[], object], device: torch.device) -> list[float]:
    """The seconds of each repetition in a short time; the first one, which makes ready, does not count."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    end, taken = time.perf_counter() + _BURST_SECONDS, [once()]
    while time.perf_counter() < end:
        taken.append(once())
    return taken
