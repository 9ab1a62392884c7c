"""A run folder: what a quantization leaves behind, and what it needs to go on after it was stopped.

    RUN/recipe.yaml            the whole choice
        run.json               figures, proofs, stages, environment (written last: a run without it is unfinished)
        maps.json, .safetensors the maps by site
        model/                 config, tokenizer, model.safetensors: integers and scales of the linears, the rest in fp32
        outliers-*.npz         activation statistics before and after
        report.html            the page
        state/                 only while unfinished: results of the finished stages

Every file is written beside its place, flushed to disk and renamed, so that none is ever half there.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spinfold.errors import SpinfoldError

__all__ = ["RunFolder", "load_tensors", "read_json", "save_tensors", "write_json", "write_whole"]


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in its place at once; on any error nothing remains."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(beside)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, data: Any) -> None:
    """Write JSON, whole or not at all."""
    text = json.dumps(data, indent=1, allow_nan=True)
    write_whole(path, lambda beside: beside.write_text(text, "utf-8"))


def read_json(path: Path) -> Any:
    """Read JSON; a `SpinfoldError` names a file that is missing or broken."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SpinfoldError(f"{path} can't be read.", str(error), "Make the run again.") from None


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all."""
    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}

    def write(beside: Path) -> None:
        try:
            save_file(plain, beside, metadata)
        except SafetensorError as error:
            if "No space left" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
            raise

    write_whole(path, write)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and its metadata; a `SpinfoldError` names one that is missing or broken."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise SpinfoldError(f"{path} can't be read.", str(error), "Make the run again.") from None


class RunFolder:
    """One output folder, locked while it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def state(self) -> Path:
        """Results of finished stages, while the run is unfinished."""
        return self.path / "state"

    @property
    def finished(self) -> bool:
        """Has the run come to its end?"""
        return (self.path / "run.json").is_file() and not self.state.exists()

    @contextmanager
    def writing(self, key: dict[str, Any], *, resume: bool) -> Iterator[None]:
        """Hold the folder for one process. `key` is what the stages depend on: a resumed run must have the same.

        If the body fails before a stage has been kept, the folder is as it was before. Raises `SpinfoldError` if
        another process holds it, or if it holds another run's stages.
        """
        fresh = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise SpinfoldError(
                    f"{self.path} is in use.", "Another process is writing this run.", "Wait for it, or use another folder."
                ) from None
            try:
                self._claim(key, resume)
                yield
                shutil.rmtree(self.state, ignore_errors=True)
            except BaseException:
                if not self._kept():
                    shutil.rmtree(self.state, ignore_errors=True)
                    if fresh:
                        shutil.rmtree(self.path, ignore_errors=True)
                raise
            finally:
                (self.path / ".lock").unlink(missing_ok=True)

    def _kept(self) -> list[Path]:
        return [path for path in self.state.glob("*") if path.name != "key.json"] if self.state.is_dir() else []

    def _claim(self, key: dict[str, Any], resume: bool) -> None:
        path = self.state / "key.json"
        if not path.exists():
            write_json(path, key)
            return
        if not resume:
            raise SpinfoldError(
                f"{self.path} holds an unfinished run.", "It was stopped before its end.", "Add --resume, or remove the folder."
            )
        before = read_json(path)
        if changed := sorted(name for name in key if before.get(name) != key[name]):
            raise SpinfoldError(
                f"{self.path} can't be resumed.",
                f"It was started with another {', '.join(changed)}.",
                "Use the same command as before, or another folder.",
            )
