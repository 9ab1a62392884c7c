"""Fits that are stopped in their middle, each step of which is kept.

with every_step_kept(), suppress(Stopped):
    METHODS["kurtail"].fit(replace(task, journal=StopsAt(folder, at=2)))
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

from spinfold.fitting import journal as journals
from spinfold.fitting.journal import Journal

__all__ = ["Stopped", "StopsAt", "every_step_kept"]


class Stopped(Exception):
    """By the test."""


class StopsAt(Journal):
    """Raises before the n-th step that is made, of all loops, counted from 1."""

    def __init__(self, folder: Path | None = None, at: int | None = None) -> None:
        super().__init__(folder)
        self.at, self.seen = at, 0

    def steps(self, *arguments: Any, **named: Any) -> Iterator[int]:
        for step in super().steps(*arguments, **named):
            self.seen += 1
            if self.seen == self.at:
                raise Stopped
            yield step


def every_step_kept() -> AbstractContextManager[object]:
    """No clock decides what is kept."""
    return mock.patch.multiple(journals, PATIENCE=0.0, RATIO=0.0)
