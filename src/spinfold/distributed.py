"""Several processes as one: each does its share of the work, and all hold the same result.

    torchrun --nproc-per-node 4 -m spinfold quantize ...

Every process runs the same program on the same arguments, with a device of its own. What they do together:

    share(n)            which of n things are this process's, as a slice; all shares together are 0 ... n - 1
    add_up(tensors)     the sums over all processes, in place
    summed(by_key)      likewise by key; a process may lack some
    spread(x), total(x) x itself, and Σ x, in an objective of which each process computes its share of the terms
    alike(thing)        what the first process has
    everyones(thing)    what each process has, as a list
    mesh(device)        all processes, as FSDP2 asks for them
    dealt(jobs, work)   each job done by one process, and all results
    on_first(do)        done by the first process alone, such as whatever writes

All but `share` must be called by all processes in the same order. Sums have the same bits everywhere, so what is
decided by them is decided alike. One process alone pays nothing: its share is the whole.

Tensors on a GPU travel by NCCL, everything else by Gloo.
"""

from __future__ import annotations

import atexit
import io
import os
import pickle
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from spinfold.errors import SpinfoldError
from spinfold.progress import launched

__all__ = [
    "ProcessLost",
    "add_up",
    "alike",
    "dealt",
    "everyones",
    "held_by_first",
    "is_first",
    "joined",
    "local_rank",
    "local_world",
    "mesh",
    "on_first",
    "rank",
    "share",
    "spread",
    "summed",
    "total",
    "world",
]

_PATIENCE = timedelta(hours=2)
"""How long to wait for a process that is alive: the first one may be writing a large checkpoint."""
T = TypeVar("T")
R = TypeVar("R")
K = TypeVar("K", bound=Hashable)
_inside = False


class ProcessLost(SpinfoldError):
    """Another process has ended, for a reason of its own."""


def local_rank() -> int:
    """The number of this process among those of its machine, as torchrun has counted: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world() -> int:
    """How many processes this machine has, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if _inside else 1


def rank() -> int:
    """The number of this process, 0 outside of `joined`."""
    return dist.get_rank() if _inside else 0


def world() -> int:
    """How many processes there are, 1 outside of `joined`."""
    return dist.get_world_size() if _inside else 1


def is_first() -> bool:
    """Is this the process that writes?"""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Work together with the other processes that torchrun has started, if it has; also a decorator.

    After an error nobody waits for the others: they find out when they next need this process.
    """
    global _inside
    if _inside or launched()[1] == 1:
        yield
        return
    if not dist.is_initialized():  # once and for all: a second group could meet the addresses of the first
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
        atexit.register(dist.destroy_process_group)
    _inside = True
    try:
        yield
        everyones(None)
    except BaseException:
        atexit.unregister(dist.destroy_process_group)  # it would wait for the others
        raise
    finally:
        _inside = False


def share(count: int) -> slice:
    """Which of `count` things are this process's: neighbours, as many as the others have, or one more or less."""
    return slice(count * rank() // world(), count * (rank() + 1) // world())


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes."""
    if world() == 1:
        return
    pairs = [(tensor, tensor.contiguous()) for tensor in tensors]
    with _together():
        for work in [dist.all_reduce(dense, async_op=True) for _, dense in pairs]:
            assert work is not None
            work.wait()
    for tensor, dense in pairs:
        if dense is not tensor:
            tensor.copy_(dense)


def summed(by_key: Mapping[K, Tensor]) -> dict[K, Tensor]:
    """The sums over all processes, by key. Who lacks a key adds nothing; may overwrite the tensors."""
    if world() == 1:
        return dict(by_key)
    known = {key: spec for one in everyones({k: _Spec.of(t) for k, t in by_key.items()}) for key, spec in one.items()}
    sums = {key: by_key[key] if key in by_key else spec.empty().zero_() for key, spec in known.items()}
    add_up(sums.values())
    return sums


def spread(x: Tensor) -> Tensor:
    """x itself; its gradient is the sum of what all processes find."""
    return x if world() == 1 else _Spread.apply(x)


def total(x: Tensor) -> Tensor:
    """The sum over all processes; the gradient passes. With `spread` an objective shared out is one objective:

    total(Σ over this share of f_i(spread(x))) has the value Σ f_i(x) and the gradient Σ ∇f_i(x) everywhere.
    """
    return x if world() == 1 else _Total.apply(x)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        add_up([gradient])
        return gradient


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        add_up([x])
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def alike(thing: T, source: int = 0) -> T:
    """What the process `source` has, with whatever tensors are in it; those of its GPU come to this one's."""
    if world() == 1:
        return thing
    with _together():
        tensors: list[Tensor] = []
        message: list[Any] = [None]
        if rank() == source:
            packed = io.BytesIO()
            packer = _Packer(packed, tensors)
            packer.dump(thing)
            message = [(packed.getvalue(), [_Spec.of(tensor) for tensor in tensors])]
        dist.broadcast_object_list(message, source, device=torch.device("cpu"))
        packed_bytes, specs = message[0]
        if rank() != source:
            tensors = [spec.empty() for spec in specs]
        for tensor in tensors:
            flat = tensor.detach().contiguous().reshape(-1)
            dist.broadcast(flat.view(torch.uint8), source)  # bytes: a back-end may not know an unusual dtype
        return thing if rank() == source else _Unpacker(io.BytesIO(packed_bytes), tensors).load()


def everyones(thing: T) -> list[T]:
    """What each process has, in the order of the processes."""
    return [alike(thing, source) for source in range(world())]


@cache
def mesh(device: str) -> DeviceMesh:
    """All processes in a row, on this kind of device, in a group of their own.

    PyTorch's caches keep a mesh, and its group, to the end. With the common group a thread of Gloo could then still be
    about to let go of the last message's tensors when the interpreter is gone, which aborts the process.
    """
    return DeviceMesh.from_group(dist.new_group(timeout=_PATIENCE), device)


def dealt(jobs: Iterable[T], work: Callable[[T], R]) -> list[R]:
    """The results of `work` on all jobs, each of which one process does."""
    if world() == 1:
        return [work(job) for job in jobs]
    own = {i: work(job) for i, job in enumerate(jobs) if i % world() == rank()}
    found = {i: result for one in everyones(own) for i, result in one.items()}
    return [found[i] for i in sorted(found)]


def on_first(do: Callable[[], R]) -> R:
    """The result of `do`, which the first process does while the others wait."""
    return alike(do() if is_first() else None)  # type: ignore[return-value]


@contextmanager
def held_by_first(manager: AbstractContextManager[object]) -> Iterator[None]:
    """A context that only the first process enters; the others go on when it has."""
    with manager if is_first() else nullcontext():
        alike(None)
        yield


class _Spec:
    """A tensor's shape, dtype and kind of device."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device

    @classmethod
    def of(cls, tensor: Tensor) -> _Spec:
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device.type)

    def empty(self) -> Tensor:
        """Such a tensor here."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


class _Packer(pickle.Pickler):
    """Leaves the tensors of an object out, in a list."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_id(self, obj: object) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(obj)
        return len(self.tensors) - 1


class _Unpacker(pickle.Unpickler):
    """Puts them back."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self.tensors[pid]


@contextmanager
def _together() -> Iterator[None]:
    """Around what needs the other processes."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ProcessLost(
            "Another process of this run has ended.",
            " ".join(str(error).split())[:200],
            "Look at its own message. What is finished is kept: the same command with --resume goes on from there.",
        ) from error
