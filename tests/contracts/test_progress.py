"""Progress records what ended, shows at most a line in ten seconds in a log, and never hides an exception."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import ProgressColumn

from spinfold.progress import Live, Logged, Plain, Progress, Quiet, for_terminal


class Clock:
    """A clock that is told what time it is."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain() -> tuple[Plain, Clock, io.StringIO]:
    clock, stream = Clock(), io.StringIO()
    return Plain(stream, clock=clock), clock, stream


def live() -> tuple[Live, Clock, io.StringIO]:
    clock, stream = Clock(), io.StringIO()
    return Live(Console(file=stream, force_terminal=True, width=120, color_system=None), clock), clock, stream


def quiet() -> tuple[Quiet, Clock, io.StringIO]:
    clock = Clock()
    return Quiet(clock), clock, io.StringIO()


Make = Callable[[], tuple[Progress, Clock, io.StringIO]]
KINDS = pytest.mark.parametrize("make", [plain, live, quiet])


@KINDS
def test_finished_stages_are_recorded_inner_ones_first(make: Make) -> None:
    progress, clock, _ = make()
    with progress.stage("outer", total=2) as bar:
        clock.now += 1
        with progress.stage("inner") as inner:
            clock.now += 2
            inner.advance(note="[1, 2]")
        bar.advance(2)
    assert [(record.name, record.seconds) for record in progress.records] == [("inner", 2.0), ("outer", 3.0)]
    assert all(record.peak_bytes > 1 << 20 for record in progress.records)


@KINDS
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_exception_passes_and_its_stage_is_not_recorded(make: Make, kind: type[BaseException]) -> None:
    progress, clock, stream = make()
    with pytest.raises(kind), progress.stage("fit", total=3) as bar:
        clock.now += 4
        bar.advance()
        raise kind
    assert not progress.records
    assert not stream.getvalue() or "4.0 s" in stream.getvalue()
    with progress.stage("next"):  # the display still works
        pass
    assert len(progress.records) == 1


def test_a_log_has_a_line_at_both_ends_and_one_in_ten_seconds_between() -> None:
    progress, clock, stream = plain()
    with progress.stage("fit", total=100) as bar:
        for step in range(100):
            clock.now += 0.5
            bar.advance(note=f"loss {step}")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "fit ..."
    assert lines[1] == "fit: 20 of 100, 40 s left, loss 19"
    assert re.fullmatch(r"fit: done in 50 s, at most \d+\.\d GB so far, loss 99", lines[-1])
    assert len(lines) == 2 + 4


def test_a_stage_of_unknown_length_promises_no_end() -> None:
    progress, clock, stream = plain()
    with progress.stage("read") as bar:
        clock.now += 60
        bar.advance(7)
    assert stream.getvalue().splitlines()[1] == "read: 7"


def test_a_terminal_keeps_a_line_of_each_finished_stage() -> None:
    progress, clock, stream = live()
    with progress.stage("fit", total=2) as bar:
        clock.now += 185
        bar.advance(2, note="loss [3.2]")
    assert "✓ fit  3 min 05 s" in stream.getvalue()
    assert "loss [3.2]" in stream.getvalue()


def test_a_terminal_shows_the_memory_in_use() -> None:
    progress, _, _ = live()
    assert isinstance(progress, Live)
    with progress.stage("fit", total=2):
        held = torch.ones(1 << 28, dtype=torch.uint8)
        (task,) = progress.display.tasks
        cells = [str(column(task)) for column in progress.display.columns if isinstance(column, ProgressColumn)]
        (shown,) = (float(cell.removesuffix(" GB")) for cell in cells if cell.endswith(" GB"))
    assert held.numel() / 1e9 < shown < 200


def test_a_pipe_gets_lines() -> None:
    assert isinstance(for_terminal(io.StringIO()), Plain)


# ---- the log -------------------------------------------------------------------------------------------------------


def test_a_log_has_a_line_for_every_stage_that_ended_and_says_how(tmp_path: Path) -> None:
    shown, _, _ = quiet()
    path = tmp_path / "log.txt"
    progress = Logged(shown, path)
    with progress.stage("outer"), progress.stage("inner") as bar:
        bar.advance()
    with pytest.raises(KeyboardInterrupt), progress.stage("fit"):
        raise KeyboardInterrupt
    Logged(shown, path).stage("never entered")
    lines = [line.split() for line in path.read_text("utf-8").splitlines()]
    assert [(words[1], words[-1]) for words in lines] == [("done", "inner"), ("done", "outer"), ("stopped", "fit")]
    assert progress.records is shown.records
    assert [record.name for record in progress.records] == ["inner", "outer"]
