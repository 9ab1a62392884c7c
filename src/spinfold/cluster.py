"""Jobs done by the machines of a Ray cluster; a job whose machine is lost is done again on another one.

    for index, result in on_cluster(work, jobs, "auto", gpus=1): ...

`work(job)` is a generator that runs elsewhere, in a process that takes one job after the other; its results come back
as soon as they are there. All machines need spinfold, and whatever files the jobs name, under the same paths.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from spinfold.errors import SpinfoldError

__all__ = ["Lost", "connected", "on_cluster"]

_RETRIES = 3
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Lost:
    """Stands for the results of a job whose process was lost again and again."""

    reason: str


@contextmanager
def connected(address: str) -> Iterator[float]:
    """Work with the cluster at `address`: `host:port` of its head; `auto`, the one that this machine belongs to; or
    `local`, one made of this machine alone. Gives the number of its GPUs. `SpinfoldError` if there is none.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise SpinfoldError("Ray is not installed.", "--ray needs it.", "Run: pip install 'spinfold[ray]'") from None
    ours, (host, _, port) = not ray.is_initialized(), address.rpartition(":")
    try:
        if port.isdecimal():
            socket.create_connection((host, int(port)), timeout=10).close()  # Ray itself would try for minutes
        if ours:
            ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:300]
        raise SpinfoldError(
            f"There is no Ray cluster at {address!r}.", why, "Start one with `ray start --head`, or use --ray local."
        ) from None
    try:
        yield float(ray.cluster_resources().get("GPU", 0))
    finally:
        if ours:
            ray.shutdown()


def on_cluster(
    work: Callable[[T], Iterator[R]], jobs: Sequence[T], *, gpus: float = 0, cpus: float = 1
) -> Iterator[tuple[int, R | Lost]]:
    """The results of `work` on all jobs, each with the number of its job, in the order in which they come.

    A job takes `gpus` and `cpus` of its machine. One that begins anew, for its process or machine was lost, must give
    the same results in the same order: those that have come already are not given again. What `work` raises is raised.
    """
    import ray

    remote: Any = ray.remote(num_gpus=gpus, num_cpus=cpus, max_retries=_RETRIES, max_calls=0)(_each)
    function = ray.put(work)
    running = [(i, remote.remote(function, job)) for i, job in enumerate(jobs)]
    while running:
        (ready,), _ = ray.wait([results for _, results in running], num_returns=1)
        place = next(i for i, (_, results) in enumerate(running) if results is ready)
        index, results = running[place]
        try:
            yield index, ray.get(next(results))
        except StopIteration:
            del running[place]
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, SpinfoldError) else error from None
        except ray.exceptions.RayError as error:
            del running[place]
            yield index, Lost(f"Its process was lost {1 + _RETRIES} times: {' '.join(str(error).split())[:200]}")


def _each(work: Callable[[T], Iterator[R]], job: T) -> Iterator[R]:
    """What runs on a machine of the cluster."""
    yield from work(job)
