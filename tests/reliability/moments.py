"""The command line in a process of its own, to which something happens at one of its file operations.

    moments(argv, folder)                   what it does to the folder, in order: ("rename", "state/.fit.part"), ...
    spinfold(argv, folder, at, KILL)        the same, ended at one of these moments

Python tells an audit hook of each file operation before it is done, so nothing of spinfold is replaced and no clock is
read: a moment is always the same one. Processes are forked from a server that has imported spinfold and done nothing
else, which saves each of them the seconds that this takes.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any
from unittest import mock

__all__ = ["FULL_DISK", "INTERRUPT", "KILL", "PAUSE", "Ended", "Moment", "Running", "context", "moments", "spinfold"]

Moment = tuple[str, str]
"""A file operation and its path in the folder, without the number of the process."""
KILL, INTERRUPT, FULL_DISK, PAUSE = "kill", "interrupt", "full disk", "pause"

_NEEDS_SPACE = ("write", "mkdir", "rename", "flush")
_NAMES = {
    "os.mkdir": "mkdir",
    "os.rename": "rename",
    "os.chmod": "chmod",
    "os.remove": "remove",
    "os.rmdir": "remove",
    "shutil.rmtree": "remove",
}


@cache
def context() -> ForkServerContext:
    """Starts processes by forking a server that is `warm`."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["warm"])
    here = Path(__file__).parent
    source = [str(here.parents[1] / "src"), str(here.parent), str(here)]
    # Python 3.11 forgets sys.path when it starts the server.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(source), HF_HUB_OFFLINE="1"):
        ensure_running()
    return server


@dataclass(frozen=True)
class Ended:
    """What a process left: its exit code (minus the signal, if one ended it), its last words, what it was told of."""

    code: int
    errors: str
    moments: list[Moment]


class Running:
    """A process that has been started."""

    def __init__(self, argv: Sequence[str], folder: Path, at: Moment | int | None, deed: str) -> None:
        self._here, there = context().Pipe()
        self._process = context().Process(target=_live, args=(argv, str(folder), at, deed, there))
        self._process.start()
        there.close()

    def wait_for_pause(self) -> None:
        """Until it is where it was to pause."""
        assert self._here.poll(60) and self._here.recv() == PAUSE

    def go_on(self) -> None:
        """After a pause."""
        self._here.send(PAUSE)

    def end(self) -> Ended:
        """Wait for the end."""
        said: tuple[str, list[Moment]] = ("", [])
        with suppress(EOFError):  # whoever was killed has said nothing
            said = self._here.recv()
        self._process.join(60)
        assert self._process.exitcode is not None
        return Ended(self._process.exitcode, *said)


def spinfold(argv: Sequence[str], folder: Path, at: Moment | int | None = None, deed: str = KILL) -> Ended:
    """Run a command to its end, with a deed done at a moment: one of `moments`, or the n-th, counted from 1."""
    return Running(argv, folder, at, deed).end()


def moments(argv: Sequence[str], folder: Path) -> list[Moment]:
    """The moments of an undisturbed run that have their operation and path for themselves."""
    ended = spinfold(argv, folder)
    assert ended.code == 0, ended.errors
    return [one for one in ended.moments if ended.moments.count(one) == 1]


# ---- in the process ------------------------------------------------------------------------------------------------


def _live(argv: Sequence[str], folder: str, at: Moment | int | None, deed: str, pipe: Connection) -> None:
    import io

    import torch

    from spinfold.cli import main
    from spinfold.fitting import journal

    journal.PATIENCE = journal.RATIO = 0.0  # no clock is read: each step of a fit is kept
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    seen: list[Moment] = []
    is_done = disk_is_full = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal is_done, disk_is_full
        moment = _moment(event, arguments, folder)
        if moment is None:
            return
        seen.append(moment)
        if at in (moment, len(seen)) and not is_done:
            is_done = True
            if deed == KILL:
                if moment[0] == "chmod":  # comes after a write: let the kill have come in the middle of it
                    os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            elif deed == INTERRUPT:
                os.kill(os.getpid(), signal.SIGINT)
            elif deed == PAUSE:
                pipe.send(PAUSE)
                pipe.recv()
            disk_is_full = deed == FULL_DISK
        if disk_is_full and moment[0] in _NEEDS_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    sys.addaudithook(hook)
    code = main(argv)
    pipe.send((sys.stderr.getvalue(), seen))
    sys.exit(code)


def _moment(event: str, arguments: tuple[Any, ...], folder: str) -> Moment | None:
    """What an audit event means for the folder, or for what is written beside it; None if nothing."""
    if event == "open":
        path, mode, flags = arguments
        if not isinstance(path, str | os.PathLike):
            return None
        name = "write" if flags & (os.O_WRONLY | os.O_RDWR) else "flush" if mode is None else None
        if name == "flush" and not os.path.isfile(path):
            name = "look"
    else:
        name, path = _NAMES.get(event), arguments[0] if arguments else ""
    beside = os.path.join(os.path.dirname(folder), f".{os.path.basename(folder)}.")
    path = os.fsdecode(path) if isinstance(path, str | os.PathLike) else ""
    if name is None or not (path == folder or path.startswith((folder + os.sep, beside))):
        return None
    return name, re.sub(r"\.\d+(\.part)?(?=/|$)", ".part", os.path.relpath(path, folder))
