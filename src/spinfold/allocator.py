"""What the process holds, what is free, and what the C library does with freed memory (only glibc's is asked)."""

from __future__ import annotations

import ctypes
import os
import resource
from contextlib import suppress
from pathlib import Path

__all__ = ["free_bytes", "keep_freed_memory", "resident_bytes", "return_freed_memory"]


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for the next tensor, up to a GiB, instead of returning it to the system.

    Otherwise each large tensor comes from the system page by page, which takes as long as an operation on it. For the
    whole process, from now on.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 1 << 30)


def return_freed_memory() -> None:
    """Have the C library give back to the system what it keeps, so that what comes next has a peak of its own."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_bytes() -> int:
    """Host memory that is there to be taken; where the system does not say, all there is."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident_bytes() -> int:
    """Memory that this process has now. Raises `OSError` where the system does not tell."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
