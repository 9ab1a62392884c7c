"""What the contracts of whole runs share: a tiny model on disk, a text, a recipe of a second, and a way to stop it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zoo
from torch import Tensor

import spinfold
from spinfold.progress import Quiet
from spinfold.recipe import Recipe

__all__ = ["TEXT", "Hook", "contents", "quantize", "recipe", "tiny_model", "tree", "unsettle"]

TEXT = "The rain in Spain stays mainly in the plain; the theatre in the north is there.\n" * 100


def tiny_model(path: Path, family: str = "llama_tied") -> Path:
    """A model with its tokenizer."""
    return zoo.write_tiny_tokenizer(zoo.save(zoo.FAMILIES[family](), path))


def recipe(text: Path, **changes: Any) -> Recipe:
    """Small windows, few of them, two steps; of SpinQuant, whose fit has no other part that takes longer."""
    small = {"source": str(text), "samples": 4, "seq_len": 32}
    fit = {"steps": 2, "batch": 2}
    return Recipe.parse({"method": "spinquant", "calibration": small, "fit": fit}).with_(**changes)


def quantize(model: Path, output: Path, text: Path, **options: Any) -> spinfold.Run:
    """A whole run on the CPU; what is no option of `spinfold.quantize` changes the recipe."""
    own = {name: options.pop(name) for name in ("resume", "progress", "evaluate_on") if name in options}
    return spinfold.quantize(str(model), output, recipe(text, **options), device="cpu", **own)


class Hook(Quiet):
    """Calls `at(stage, steps done)` at every step of every stage; what it raises stops the run there."""

    def __init__(self, at: Callable[[str, int], None]) -> None:
        super().__init__()
        self.at = at

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Any]:
        self.at(name, 0)
        with super().stage(name, total):
            yield _Bar(lambda done: self.at(name, done))


class _Bar:
    def __init__(self, at: Callable[[int], None]) -> None:
        self.at, self.done = at, 0

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        self.at(self.done)


def tree(path: Path) -> set[str]:
    """Every file and folder below `path`."""
    return {str(entry.relative_to(path)) for entry in path.rglob("*")}


def contents(output: Path) -> dict[str, bytes]:
    """The bytes of everything in a run that must not depend on when or how often it was stopped."""
    timed = ("run.json", "report.html", "log.txt")
    files = [path for path in output.rglob("*") if path.is_file() and path.name not in timed]
    return {str(path.relative_to(output)): path.read_bytes() for path in files if path.suffix != ".npz"}


def unsettle(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on cos and sin are as oneMKL 2024.2 may have them in a fresh process on two cores: of a first call with
    so many numbers that two threads share them, the second half is inaccurate.
    """
    for name in ("cos", "sin"):
        monkeypatch.setattr(Tensor, name, _unsettled(getattr(Tensor, name)))


def _unsettled(exact: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    called = False

    def call(x: Tensor) -> Tensor:
        nonlocal called
        y = exact(x)
        if not called and x.numel() > 2048:
            y.view(-1)[x.numel() // 2 :] += 1e-4
        called = True
        return y

    return call
