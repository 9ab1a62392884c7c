"""Hostile input judged in a process of its own: how it ended, its time and memory, and what it touched.

An input passes if it is refused by a `SpinfoldError` with all of its three parts, or if it does no harm: within
`SECONDS` and `MEMORY`, without a file written outside of the folder, without a process, a connection, or a line of code
that came with it.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from moments import context

__all__ = ["Tally", "judge"]

SECONDS, MEMORY = 20, 1 << 30
_FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class")
_FORBIDDEN += ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname")
_WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.truncate")


class _TooLong(BaseException):
    """No `except Exception` may hide it."""


@dataclass
class Tally:
    """How the inputs of a kind ended. `wrong` says of each that did not pass what happened, by its number."""

    refused: int = 0
    accepted: int = 0
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0
    peak_bytes: int = 0
    """How much the process grew while it judged them all."""


def judge(kind: str, count: int) -> Tally:
    """The first `count` inputs of a kind, which are the same every time."""
    here, there = context().Pipe()
    process = context().Process(target=_judge, args=(kind, count, there))
    process.start()
    there.close()
    tally: Tally = here.recv()
    process.join()
    return tally


def _judge(kind: str, count: int, pipe: Connection) -> None:
    from inputs import KINDS, Sound

    tally = Tally()
    sys.dont_write_bytecode = True
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    root = Path(tempfile.mkdtemp(prefix="hostile-")).resolve()
    tempfile.tempdir = str(root)
    try:
        sound, make = Sound(root), KINDS[kind][1]
        watch = _Watch(root)
        sys.addaudithook(watch)
        signal.signal(signal.SIGALRM, _too_long)
        peak = 0
        for number in range(count):
            action = make(sound, _fresh(root), Random(f"{kind} {number}"))
            if not number:
                peak = _peak_bytes()
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                limit = pages * resource.getpagesize() + MEMORY
                resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
            _one(action, watch, tally, f"{kind} {number}")
        tally.peak_bytes = _peak_bytes() - peak
    except BaseException:
        tally.wrong.append(traceback.format_exc())
    finally:
        os.chdir("/")
        shutil.rmtree(root)
    pipe.send(tally)


def _one(action: Any, watch: _Watch, tally: Tally, name: str) -> None:
    from spinfold.errors import SpinfoldError

    start, what = time.perf_counter(), ""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    watch.seen.clear()
    watch.on = True
    try:
        action()
        tally.accepted += 1
    except SpinfoldError as error:
        tally.refused += 1
        if not (error.what.strip() and error.why.strip() and error.fix.strip()):
            what = f"lacks a part: {error}"
        if len(str(error)) > 10_000:
            what = f"{len(str(error))} characters long: {str(error)[:200]}"
    except BaseException as error:
        watch.on = False
        where = traceback.extract_tb(error.__traceback__)[-4:]
        what = f"{type(error).__name__}: {str(error)[:200]}\n  " + "\n  ".join(
            f"{f.filename}:{f.lineno}" for f in where
        )
    finally:
        watch.on = False
        signal.setitimer(signal.ITIMER_REAL, 0)
    tally.slowest = max(tally.slowest, time.perf_counter() - start)
    if what or watch.seen:
        tally.wrong.append(f"{name}: {what} {dict(watch.seen) or ''}")


class _Watch:
    """An audit hook that remembers what must not happen."""

    def __init__(self, root: Path) -> None:
        self.root, self.on, self.seen = str(root), False, Counter[str]()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in _FORBIDDEN:
            self.seen[f"{event} {arguments[:1]!r:.100}"] += 1
        elif event == "exec":
            if getattr(arguments[0], "co_filename", "").startswith(self.root):
                self.seen[f"ran {arguments[0].co_filename}"] += 1
        elif event in _WRITES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            path = arguments[0]
            if isinstance(path, str | bytes | os.PathLike):
                place = os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(path))))
                if not f"{place}/".startswith(f"{self.root}/") and os.fsdecode(path) != os.devnull:
                    self.seen[f"{event} {path!r:.100}"] += 1


def _fresh(root: Path) -> Path:
    """An empty folder for one input."""
    os.chdir(root)
    shutil.rmtree(root / "case", ignore_errors=True)
    (root / "case").mkdir()
    return root / "case"


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _too_long(*_: object) -> None:
    raise _TooLong(f"more than {SECONDS} s")
