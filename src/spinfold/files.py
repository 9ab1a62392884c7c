"""Files and folders that are whole or not there: written beside their place, flushed to disk, and renamed."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spinfold.errors import SpinfoldError

__all__ = [
    "beside_of",
    "is_leftover",
    "load_tensors",
    "locked",
    "make_folders",
    "read_json",
    "remove_empty",
    "save_tensors",
    "whole_folder",
    "write_json",
    "write_whole",
]

_LAST = {"proof.json": 1, "config.json": 2}
"""What a checkpoint is known by, in the order in which it comes after all other files."""
_LEFTOVER = re.compile(r"\..+\.\d+(\.part)?")
"""The hidden name, with a process id, that a file has while it is written."""


def is_leftover(path: Path) -> bool:
    """Is this what a process was writing when it was killed, or what one is writing now?"""
    return _LEFTOVER.fullmatch(path.name) is not None


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in its place at once; on any error nothing remains."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = beside_of(path)
    try:
        beside.touch()
        mode = beside.stat().st_mode  # what the user's umask gives: safetensors makes its files private
        write(beside)
        beside.chmod(mode)
        _flush(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder for the body to fill, put in the place of `path` at once when it is done; on any error nothing remains.

    `path` is new or an empty folder. An empty one is filled rather than replaced, since it may be a mount point, or be
    where nothing else can be made; what readers look for comes last. What a killed process has left of the same folder
    is removed.
    """
    path = path.resolve()
    occupied = path.is_dir()
    above = [] if occupied else make_folders(path.parent)
    beside = path / beside_of(path).name if occupied else beside_of(path)
    moved: list[Path] = []
    try:
        for leftover in beside.parent.glob(f".{glob.escape(path.name)}.*.part"):
            with suppress(SpinfoldError), locked(leftover):  # whoever still writes holds it
                shutil.rmtree(leftover, ignore_errors=True)
        beside.mkdir()
        with locked(beside):
            yield beside
            for entry in [*beside.rglob("*"), beside]:
                _flush(entry)
            if occupied:
                entries = sorted(beside.iterdir(), key=lambda entry: _LAST.get(entry.name, 0))
                moved.extend(entry.rename(path / entry.name) for entry in entries)
                beside.rmdir()
            else:
                moved.append(beside.rename(path))
            _flush(path.parent)
    except BaseException:
        for entry in moved:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        shutil.rmtree(beside, ignore_errors=True)
        remove_empty(above)
        raise


def write_json(path: Path, data: Any) -> None:
    """Write JSON, whole or not at all."""
    text = json.dumps(data, indent=1, allow_nan=True)
    write_whole(path, lambda beside: beside.write_text(text, "utf-8"))


def read_json(path: Path) -> Any:
    """Read JSON; a `SpinfoldError` names a file that is missing or broken."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; `SpinfoldError` if another one does.

    The lock is on the folder itself, so it needs no file, and the system takes it back however the process ends. A
    file system that knows no locks gives none.
    """
    in_use = SpinfoldError(
        f"{folder} is in use.", "Another process is writing this run.", "Wait for it, or use another folder."
    )
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise in_use from None
        except OSError:
            pass
        # Another process may have failed and removed its folder since it was opened here.
        if not folder.exists() or not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise in_use
        yield
    finally:
        os.close(descriptor)


def beside_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def make_folders(path: Path) -> list[Path]:
    """Make a folder and what is missing above it; returns what was made, the deepest first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return missing


def remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _flush(path: Path) -> None:
    """Have the system write a file to disk, or the names in a folder, which not every file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
