"""How the benchmarks of kernels take time on a GPU.

A CUDA graph of many launches is replayed five times, and the median counts, divided by the launches. What Python and
the driver take for a launch, which a busy host stretches, is not in it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["CACHE_BYTES", "DEVICE", "ON_GPU", "Work", "clock", "clock_copy", "copies_of"]

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
CACHE_BYTES = 50 * 2**20
"""Of an H100's L2 cache."""

Work = Callable[[Tensor], Any]


def copies_of(num_bytes: int) -> int:
    """How many tensors of so many bytes fill the L2 cache three times, so that each is read from memory."""
    return max(2, -(-3 * CACHE_BYTES // num_bytes)) if ON_GPU else 2


def clock(work: Work, inputs: list[Tensor], quick: bool = False) -> float:
    """Microseconds of one launch, on each input in turn; without a GPU, of one call."""
    kept: list[Any] = [None] * len(inputs)
    if not ON_GPU:
        begin = time.perf_counter()
        work(inputs[0])
        return 1e6 * (time.perf_counter() - begin)
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work(inputs[0])
        begin_event.record()
        for _ in range(2):
            kept[0] = work(inputs[0])
        end_event.record()
        stream.synchronize()
        roughly = begin_event.elapsed_time(end_event) / 2
        launches = max(2 * len(inputs) if not quick else len(inputs), min(200, int((2 if quick else 8) / roughly)))
        launches = min(launches, 400)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for index in range(launches):
                # Outputs are kept as long as their inputs rotate, so they leave the cache as well.
                kept[index % len(inputs)] = work(inputs[index % len(inputs)])
        times = []
        graph.replay()
        for _ in range(3 if quick else 5):
            begin_event.record()
            graph.replay()
            end_event.record()
            stream.synchronize()
            times.append(1e3 * begin_event.elapsed_time(end_event) / launches)
    torch.cuda.current_stream().wait_stream(stream)
    return statistics.median(times)


_copies: dict[int, float] = {}


def clock_copy(num_bytes: int) -> float:
    """Microseconds of a device copy that reads and writes `num_bytes` in total: the faster of the driver's, which takes
    a fourth longer for some sizes, and an elementwise kernel.
    """
    if num_bytes not in _copies:
        half = num_bytes // 2
        count = copies_of(half) if half > 2**21 else 2
        buffers = [torch.empty(-(-half // 16) * 2, dtype=torch.int64, device=DEVICE) for _ in range(count)]
        driver = clock(torch.clone, [buffer.view(torch.uint8)[:half] for buffer in buffers])
        _copies[num_bytes] = min(driver, clock(torch.bitwise_not, buffers))
    return _copies[num_bytes]
