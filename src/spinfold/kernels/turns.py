"""Rows that programs take when they are ready for another one, instead of a share that is dealt out before.

Programs do not get on equally fast: with equal shares the first ones of a launch were done after three quarters of the
time that the last ones took, and an SM that fewer programs share stands idle. So after its first row each program takes
the next one that is left, by a counter in memory. It asks for a number one row ahead, so it neither waits for it nor,
since the row can be brought to the cache, for the row. The last program of a launch sets the counter to zero again.

A counter belongs to one launch at a time: to those of a stream, which follow each other, or for good to one launch in a
CUDA graph, since a graph may run beside the stream on which it was captured.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinfold.kernels.grids import in_hardware

__all__ = ["answer", "ask", "counter_for", "put_back"]

_AT_ONCE = 4096
"""Counters that are made together: 64 KiB."""
_free: dict[torch.device, list[Tensor]] = {}
_of_stream: dict[tuple[torch.device, int], Tensor] = {}


# By one thread, which goes on, and waits where the number is used. (Of `add` the compiler would make one for the warp,
# and wait for it at once.)
_ASK = tl.constexpr("""{
    .reg .pred %p;
    setp.eq.u32 %p, $1, 0;
    mov.u32 $0, 0;
    @%p atom.global.inc.u32 $0, [$2], 0x7FFFFFFF; }""")


@triton.jit
def ask(counter_ptr, WARPS: tl.constexpr):
    """Ask how many programs asked before: 0, 1, …, each number for one of them. `answer` has it, when it has come."""
    if in_hardware(8, 0):
        number_T = tl.inline_asm_elementwise(
            _ASK, "=r,r,l", [tl.arange(0, 32 * WARPS), counter_ptr.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        number_T = tl.full((1,), 0, tl.int32) + tl.atomic_add(counter_ptr, 1)
    return number_T


@triton.jit
def answer(number_T):
    """What the one thread that asked was told."""
    return tl.max(number_T, axis=0)


@triton.jit
def put_back(counter_ptr):
    """Behind a program's last turn: when all have come here, the counter is as it was."""
    if tl.atomic_add(counter_ptr + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(counter_ptr, 0)
        tl.store(counter_ptr + 1, 0)


def counter_for(device: torch.device) -> Tensor:
    """The counter of the next launch on the current stream: two int32 zeros."""
    if device.type != "cuda":
        return torch.zeros(2, dtype=torch.int32, device=device)
    free = _free.setdefault(device, [])
    if torch.cuda.is_current_stream_capturing():
        # Without one at hand, memory of the graph, which each replay sets to zero.
        return free.pop() if free else torch.zeros(2, dtype=torch.int32, device=device)
    if len(free) < _AT_ONCE:  # enough for what may be captured before the next launch that is not
        # Copied from the CPU, which waits for it: zero for every stream. Each begins at a multiple of 16 bytes, as the
        # memory of a graph does, or Triton would compile the kernel twice.
        free += torch.zeros((_AT_ONCE, 4), dtype=torch.int32).to(device).unbind()
    stream = device, torch.cuda.current_stream(device).cuda_stream
    if stream not in _of_stream:
        _of_stream[stream] = free.pop()
    return _of_stream[stream]
