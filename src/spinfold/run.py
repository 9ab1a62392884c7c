"""A run folder: what a quantization leaves behind, and what it needs to go on after it was stopped.

    RUN/recipe.yaml             the whole choice
        maps.json, .safetensors the maps by site
        model/                  config, tokenizer, and tensors: integers and scales of the linears, the rest in fp32
        outliers-*.npz          activation statistics before and after
        run.json                figures, proofs, stages, environment
        report.html             the page
        log.txt                 when each stage ended, its seconds and peak memory, of stopped attempts too
        state/                  only while unfinished: key.json, what the run was asked for, its finished stages, and
                                the steps of a fit so far

Files and folders are written beside their place, flushed to disk and renamed, so that none is ever half there. A run
is finished when it has a run.json and no state/ any more.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spinfold.errors import SpinfoldError, reading
from spinfold.files import (
    beside_of,
    is_leftover,
    locked,
    make_folders,
    read_json,
    remove_empty,
    whole_folder,
    write_json,
)
from spinfold.fitting.journal import KEPT_LOOPS

__all__ = ["RunFolder"]


class RunFolder:
    """One output folder, locked while it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def state(self) -> Path:
        """Results of finished stages, and the steps of a fit, while the run is unfinished."""
        return self.path / "state"

    @property
    def log(self) -> Path:
        """Where the stages are logged while the run is unfinished."""
        return self.state / "log.txt"

    @property
    def finished(self) -> bool:
        """Has the run come to its end?"""
        return (self.path / "run.json").is_file() and not self.state.exists()

    @contextmanager
    def writing(self, key: dict[str, Any], *, resume: bool) -> Iterator[None]:
        """Hold the folder for one process. `key` is what the stages depend on: a resumed run must have the same.

        If the body fails before a stage has been kept, everything is as it was before; afterwards the error carries a
        note that the run can be resumed. Raises `SpinfoldError` if another process holds the folder, or if it holds
        another run's stages.
        """
        made = make_folders(self.path)
        with locked(self.path):
            self._check(key, resume)
            try:
                self._claim(key)
                yield
                # One rename ends the run: whoever is killed while he cleans up leaves no state that looks alive.
                shutil.rmtree(self.state.rename(beside_of(self.state)), ignore_errors=True)
            except BaseException as error:
                kept = self._kept()
                if isinstance(error, SpinfoldError):  # a fit that fails by itself would fail there again
                    kept = [path for path in kept if not path.match(KEPT_LOOPS)]
                if kept:
                    error.add_note("The finished stages are kept: the same command with --resume goes on from there.")
                else:
                    shutil.rmtree(self.state, ignore_errors=True)
                    remove_empty(made)
                raise

    @property
    def _key(self) -> Path:
        return self.state / "key.json"

    def _kept(self) -> list[Path]:
        """The stages that are done, and the steps of a fit."""
        return [path for path in self.state.glob("*") if path not in (self._key, self.log) and not is_leftover(path)]

    def _check(self, key: dict[str, Any], resume: bool) -> None:
        """Refuse to touch the stages of another run."""
        if not self._key.is_file():
            return
        if not resume:
            why = "It was stopped before its end."
            raise SpinfoldError(f"{self.path} holds an unfinished run.", why, "Add --resume, or remove the folder.")
        with reading(self._key, "Remove the folder, and run without --resume."):
            before = dict(read_json(self._key))
        if changed := sorted(name for name in key if before.get(name) != key[name]):
            raise SpinfoldError(
                f"{self.path} can't be resumed.",
                f"It was started with another {', '.join(changed)}.",
                "Use the same command as before, or another folder.",
            )

    def _claim(self, key: dict[str, Any]) -> None:
        """Clear away what a killed process was writing, and make the state this run's."""
        for leftover in [*self.path.glob(".*"), *self.state.glob(".*")]:
            if is_leftover(leftover):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        if not self._key.is_file():
            shutil.rmtree(self.state, ignore_errors=True)  # stages of nobody knows what
            with whole_folder(self.state) as state:  # without its key it would be somebody else's folder
                write_json(state / self._key.name, key)
