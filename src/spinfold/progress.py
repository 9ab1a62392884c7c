"""What a long run shows while it works, and what it remembers of each stage afterwards.

    with progress.stage("fit rotations", total=100) as bar:
        bar.advance(1, note="loss 3.21")

    Live     a terminal: stage, bar, elapsed, time left, note; finished stages stay as lines
    Plain    a log: a line when a stage starts and ends, and at most one in ten seconds between
    Quiet    nothing
    Logged   what another one shows, and a line in a file when a stage ends

All of them record every finished stage. Stages may nest.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from spinfold.allocator import resident_bytes, return_freed_memory

__all__ = ["Bar", "Live", "Logged", "Plain", "Progress", "Quiet", "StageRecord", "for_terminal", "launched"]


@dataclass(frozen=True)
class StageRecord:
    """A finished stage. `peak_bytes` is the high-water mark at its end: of GPU memory where a GPU is in use, of the
    process's resident memory otherwise."""

    name: str
    seconds: float
    peak_bytes: int


class Bar(Protocol):
    """One stage under way."""

    @abstractmethod
    def advance(self, n: int = 1, note: str = "") -> None:
        """`n` more of the stage's total are done; `note` replaces the one shown, if it is not empty."""


class Progress(Protocol):
    """Shows stages and records them."""

    records: list[StageRecord]

    @abstractmethod
    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Bar]:
        """A stage of `total` steps (None: not known). Recorded when it ends without an exception."""


class _Shown(Bar, Protocol):
    """A bar that its progress closes."""

    @abstractmethod
    def close(self, seconds: float, peak_bytes: int, finished: bool) -> None: ...


class _Recorder(Progress):
    """Times stages; what a stage looks like is the subclass's."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.records = []
        self.clock = clock

    @abstractmethod
    def _open(self, name: str, total: int | None) -> _Shown: ...

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Bar]:
        start, finished = self.clock(), False
        bar = self._open(name, total)
        try:
            yield bar
            finished = True
        finally:
            seconds, peak = self.clock() - start, peak_bytes()
            bar.close(seconds, peak, finished)
            if finished:
                self.records.append(StageRecord(name, seconds, peak))
            return_freed_memory()


class Quiet(_Recorder):
    """Records and shows nothing."""

    def _open(self, name: str, total: int | None) -> _Shown:
        return _QuietBar()


class _QuietBar(_Shown):
    def advance(self, n: int = 1, note: str = "") -> None:
        pass

    def close(self, seconds: float, peak_bytes: int, finished: bool) -> None:
        pass


class Plain(_Recorder):
    """Lines for a log file, `interval` seconds apart at least."""

    def __init__(
        self, stream: TextIO | None = None, interval: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(clock)
        self.stream = stream or sys.stderr
        self.interval = interval

    def _open(self, name: str, total: int | None) -> _Shown:
        return _PlainBar(self, name, total)

    def say(self, line: str) -> None:
        """Write a line at once."""
        print(line, file=self.stream, flush=True)


class _PlainBar(_Shown):
    def __init__(self, plain: Plain, name: str, total: int | None) -> None:
        self.plain, self.name, self.total = plain, name, total
        self.done, self.note = 0, ""
        self.start = self.last = plain.clock()
        plain.say(f"{name} ...")

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        self.note = note or self.note
        now = self.plain.clock()
        if now - self.last < self.plain.interval or self.done == self.total:
            return
        self.last = now
        parts = [f"{self.done}" if self.total is None else f"{self.done} of {self.total}"]
        if self.total and self.done:
            parts.append(f"{_duration((now - self.start) * (self.total - self.done) / self.done)} left")
        self.plain.say(f"{self.name}: {', '.join(parts + [self.note] * bool(self.note))}")

    def close(self, seconds: float, peak_bytes: int, finished: bool) -> None:
        end = "done in" if finished else "stopped after"
        figures = f"{_duration(seconds)}, at most {_gigabytes(peak_bytes)} so far"
        self.plain.say(f"{self.name}: {end} {figures}" + (f", {self.note}" if self.note else ""))


class _MemoryColumn(ProgressColumn):
    """What is in use now."""

    def render(self, task: Task) -> Text:
        return Text(_gigabytes(bytes_in_use()))


class Live(_Recorder):
    """Bars on a terminal."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self.console = console or Console(stderr=True)
        self.depth = 0
        self.display = RichProgress(
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            _MemoryColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            refresh_per_second=4,
            speed_estimate_period=120,  # steps may take seconds: average over many of them
        )

    def _open(self, name: str, total: int | None) -> _Shown:
        if self.depth == 0:
            self.display.start()
        self.depth += 1
        return _LiveBar(self, name, total)


class _LiveBar(_Shown):
    def __init__(self, live: Live, name: str, total: int | None) -> None:
        self.live, self.name, self.total = live, name, total
        self.done, self.note = 0, ""
        self.task: TaskID = live.display.add_task(name, total=total, note="", count="")

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        self.note = note or self.note
        count = str(self.done) if self.total is None else f"{self.done}/{self.total}"
        self.live.display.update(self.task, advance=n, note=self.note, count=count)

    def close(self, seconds: float, peak_bytes: int, finished: bool) -> None:
        live = self.live
        live.display.remove_task(self.task)
        mark = ("✓ ", "green") if finished else ("✗ ", "red")
        figures = f"  {_duration(seconds)}  {_gigabytes(peak_bytes)}  {self.note}"
        live.console.print(Text.assemble(mark, self.name, (figures, "dim")))
        live.depth -= 1
        if live.depth == 0:
            live.display.stop()


class Logged(Progress):
    """Another progress, with a line appended to the file `path` when a stage ends: when, what, seconds, peak memory."""

    def __init__(self, shown: Progress, path: Path) -> None:
        self.shown, self.path, self.records = shown, path, shown.records

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Bar]:
        start, end = time.monotonic(), "stopped"
        try:
            with self.shown.stage(name, total) as bar:
                yield bar
            end = "done"
        finally:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            line = f"{now}  {end:7}  {time.monotonic() - start:9.2f} s  {peak_bytes() / 1e9:8.3f} GB  {name}\n"
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)


def launched() -> tuple[int, int]:
    """The number of this process among those that torchrun has started, and how many they are; imports nothing."""
    alone = "RANK" not in os.environ
    return (0, 1) if alone else (int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", 1)))


def for_terminal(stream: TextIO | None = None) -> Progress:
    """`Live` where `stream` (standard error by default) is a terminal, else `Plain`; of several processes one shows."""
    if launched()[0] > 0:
        return Quiet()
    stream = stream or sys.stderr
    console = Console(file=stream)
    return Live(console) if console.is_terminal and not console.is_dumb_terminal else Plain(stream)


def peak_bytes() -> int:
    """The high-water mark of GPU memory if a GPU is in use, of resident memory otherwise; imports nothing for it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def bytes_in_use() -> int:
    """GPU memory if a GPU is in use, resident memory otherwise; where the system does not tell, the most there was."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.memory_allocated())
    try:
        return resident_bytes()
    except OSError:
        return peak_bytes()


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def _duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
