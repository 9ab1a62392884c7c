"""What is left of a fit that is stopped: the tensors that its loops move, every half minute.

    for step in journal.steps(total, {"rotation": R_NN}, draws):     the steps that are left
        ...                                                          moves R_NN in place

A fit is repeatable, so the n-th loop of one that goes on is the n-th loop of the one that was stopped: it begins where
that was kept, or it is over at once, and whatever is computed between the loops is computed again.

    FOLDER/fitting-NNNN.safetensors    loop n: its tensors, the state of its random numbers, and the steps made
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Generator, Tensor

from spinfold.distributed import is_first, on_first
from spinfold.errors import SpinfoldError, reading
from spinfold.files import load_tensors, save_tensors
from spinfold.progress import Bar

__all__ = ["KEPT_LOOPS", "Journal"]

KEPT_LOOPS = "fitting-*.safetensors"

PATIENCE, RATIO = 30.0, 20.0
"""So many seconds of a loop may be lost, or of any loop so many times what it takes to keep it."""


class Journal:
    """The loops of one fit, kept in a folder by the first of several processes; without a folder nothing is kept."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self.loops = folder, 0
        self.restored: list[Path] = []
        """What was read: if the fit fails then, that may be why."""
        self._seconds = 0.0

    def steps(
        self,
        total: int,
        tensors: Mapping[str, Tensor],
        draws: Generator | None = None,
        bar: Bar | None = None,
        key: str = "",
    ) -> Iterator[int]:
        """Number the steps that are left of `total`, with `tensors` and `draws` as the last kept one has left them.

        `bar` is told of those that were made. A loop with another `key` is another one, and begins anew. All processes
        must have the same tensors. Raises `SpinfoldError` if what was kept is not of this loop.
        """
        path = self.folder / f"fitting-{self.loops:04}.safetensors" if self.folder else None
        self.loops += 1
        done = self._restored(path, total, tensors, draws, key)
        if done and bar:
            bar.advance(done)
        kept_at = time.monotonic()
        for step in range(done, total):
            yield step
            patience = PATIENCE if step + 1 < total else 0.0
            if path and is_first() and time.monotonic() - kept_at >= max(patience, RATIO * self._seconds):
                start = time.monotonic()
                save_tensors(path, _state(step + 1, tensors, draws), {"key": key})
                kept_at = time.monotonic()
                self._seconds = kept_at - start

    def skip(self) -> None:
        """Count a loop that each process makes for itself: nothing of it is kept."""
        self.loops += 1

    def forget(self) -> None:
        """Remove what was kept: the fit is over."""
        if self.folder and is_first():
            for path in self.folder.glob(KEPT_LOOPS):
                path.unlink()

    @torch.no_grad()
    def _restored(
        self, path: Path | None, total: int, tensors: Mapping[str, Tensor], draws: Generator | None, key: str
    ) -> int:
        """How many steps were kept; `tensors` and `draws` are then as they were."""
        if path is None or not (found := on_first(lambda: load_tensors(path) if path.is_file() else None)):
            return 0
        kept, metadata = found
        if metadata.get("key", "") != key:
            return 0
        expected = _state(0, tensors, draws)
        for name in sorted(expected.keys() | kept.keys()):
            own, there = (None if t is None else (t.shape, t.dtype) for t in (expected.get(name), kept.get(name)))
            if own != there:
                why = f"{name} should be {own or 'absent'} and is {there or 'absent'}."
                raise SpinfoldError(f"{path} is not a state of this fit.", why, "Make the run again.")
        with reading(path):
            done = int(kept["step"])
            if not 0 < done <= total:
                raise ValueError(f"{done} of {total} steps can't have been made")
            if draws is not None:
                draws.set_state(kept["draws"])
            for name, tensor in tensors.items():
                tensor.copy_(kept[name])
        self.restored.append(path)
        return done


def _state(step: int, tensors: Mapping[str, Tensor], draws: Generator | None) -> dict[str, Tensor]:
    own = {"step": torch.tensor(step)} | ({} if draws is None else {"draws": draws.get_state()})
    return own | {name: tensor.detach() for name, tensor in tensors.items()}
