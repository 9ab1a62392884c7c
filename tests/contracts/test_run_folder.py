"""Files and folders are whole or not there; a run folder has one writer; a full disk leaves nothing half-written."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_run import contents, recipe, tree

import spinfold
from spinfold.cli import main
from spinfold.errors import SpinfoldError
from spinfold.files import save_tensors, whole_folder, write_json, write_whole
from spinfold.run import RunFolder

KEY = {"recipe": 1}


class Boom(Exception):
    """What goes wrong in these tests."""


def fail(*_: object) -> None:
    raise Boom


# ---- files and folders ---------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a" / "file.json"
    write_json(path, [1])

    def half(beside: Path) -> None:
        beside.write_text("ha")
        assert path.read_text() == "[\n 1\n]"
        raise Boom

    with pytest.raises(Boom):
        write_whole(path, half)
    assert path.read_text() == "[\n 1\n]"
    assert tree(tmp_path) == {"a", "a/file.json"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        save_tensors(tmp_path / "tensors", {"x": torch.zeros(3)})
        write_json(tmp_path / "json", {})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize("place", ["new", "deep/er/new", "empty", "link"])
def test_a_folder_is_there_whole_or_as_it_was(place: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    before = tree(tmp_path)
    with pytest.raises(Boom), whole_folder(tmp_path / place) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").touch()
        raise Boom
    assert tree(tmp_path) == before
    with whole_folder(tmp_path / place) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("text")
        (folder / "config.json").touch()
    assert tree(tmp_path / place) == {"sub", "sub/file", "config.json"}
    assert not [name for name in tree(tmp_path) if "/." in f"/{name}"]


def test_a_folder_that_was_filled_in_the_meantime_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not empty"), whole_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis").touch()
    assert tree(tmp_path) == {"out", "out/thesis"}


# ---- one writer, and what he leaves ---------------------------------------------------------------------------------


def test_a_failure_before_a_stage_undoes_only_what_was_made(tmp_path: Path) -> None:
    own, new = tmp_path / "own", tmp_path / "a" / "b"
    own.mkdir()
    for path in (own, new):
        with pytest.raises(Boom), RunFolder(path).writing(KEY, resume=False):
            raise Boom
    assert tree(tmp_path) == {"own"}
    with pytest.raises(Boom), RunFolder(new).writing(KEY, resume=False):
        (new / "thesis").touch()  # somebody else's
        raise Boom
    assert tree(new) == {"thesis"}


def test_a_stage_that_is_done_is_kept_and_said(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(Boom) as caught, folder.writing(KEY, resume=False):
        write_json(folder.state / "layer", 0)
        raise Boom
    assert "--resume" in caught.value.__notes__[0]
    with folder.writing(KEY, resume=True):
        assert (folder.state / "layer").is_file()
        write_json(folder.path / "run.json", {})
        assert not folder.finished
    assert folder.finished
    assert tree(tmp_path) == {"run", "run/run.json"}


def test_leftovers_of_a_killed_process_go_and_the_users_files_stay(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_json(folder.state / "key.json", KEY)
    leftovers = [
        tmp_path / ".model.12.part",
        tmp_path / ".run.json.7",
        folder.state / ".layer-0001.safetensors.345.part",
    ]
    leftovers[0].mkdir()
    for path in (leftovers[0] / "x", *leftovers[1:], tmp_path / ".gitignore", tmp_path / ".v1.2.md"):
        path.touch()
    with folder.writing(KEY, resume=True):
        assert tree(tmp_path) == {".gitignore", ".v1.2.md", "state", "state/key.json"}


def test_stages_that_nobody_claims_are_not_believed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_json(folder.state / "layer-0000.safetensors", "whose?")
    with folder.writing(KEY, resume=True):
        assert tree(folder.state) == {"key.json"}


def test_a_second_writer_is_refused_and_a_third_after_the_first_is_not(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    with first.writing(KEY, resume=False):
        before = tree(tmp_path)
        for resume in (False, True):
            with pytest.raises(SpinfoldError, match="in use"), second.writing(KEY, resume=resume):
                raise AssertionError
        assert tree(tmp_path) == before
    with second.writing(KEY, resume=False):
        pass


def test_the_lock_goes_with_its_process(tmp_path: Path) -> None:
    """A lock file would stay."""
    child = os.fork()
    if child == 0:
        with RunFolder(tmp_path / "run").writing(KEY, resume=False):
            os._exit(0)
    os.waitpid(child, 0)
    with RunFolder(tmp_path / "run").writing(KEY, resume=True):
        pass


def test_a_folder_that_was_removed_while_it_was_opened_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def then_remove(path: Path, flags: int) -> int:
        descriptor = opened(path, flags)
        path.rmdir()
        return descriptor

    monkeypatch.setattr(os, "open", then_remove)
    with pytest.raises(SpinfoldError, match="in use"), RunFolder(tmp_path / "run").writing(KEY, resume=False):
        raise AssertionError


# ---- a full disk ---------------------------------------------------------------------------------------------------


@pytest.fixture
def full_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """From the n-th flush on there is no space: where a disk tells of it at the latest."""
    flushed, real = 0, os.fsync

    def arm(limit: int) -> None:
        def fsync(descriptor: int) -> None:
            nonlocal flushed
            flushed += 1
            if flushed > limit:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)

    yield arm
    monkeypatch.undo()


def half_written(path: Path) -> set[str]:
    return {name for name in tree(path) if name.rpartition("/")[2].startswith(".")}


@pytest.mark.parametrize("limit", [0, 1, 3, 5])
def test_rotate_on_a_full_disk_leaves_nothing(
    limit: int,
    full_after: Callable[[int], None],
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    full_after(limit)
    for name in ("empty", "a/b"):
        assert main(["rotate", str(model), "-o", str(tmp_path / name), "--calibration", str(text)]) == 2
        shown = capsys.readouterr()
        assert "no space left" in shown.err
        assert "Traceback" not in shown.err
        assert not shown.out
    assert tree(tmp_path) == {"empty"}


@pytest.mark.parametrize("limit", [0, 2, 5, 8, 10, 14, 18, 20])
def test_quantize_on_a_full_disk_leaves_a_run_that_can_be_resumed_or_nothing(
    limit: int,
    full_after: Callable[[int], None],
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, whole = tmp_path / "run", tmp_path / "whole"
    words = ["quantize", str(model), "--calibration", str(text), "--device", "cpu"]
    words += ["--samples", "4", "--seq-len", "32", "--method", "quarot", "-o"]
    full_after(limit)
    assert main([*words, str(output)]) == 2
    shown = capsys.readouterr()
    assert "no space left" in shown.err
    assert "Traceback" not in shown.err
    assert not half_written(tmp_path)
    assert ("--resume" in shown.err) is output.exists()
    assert output.exists() is (limit >= 10)  # the maps are kept by then
    monkeypatch.undo()
    assert main([*words, str(output), "--resume"]) == main([*words, str(whole)]) == 0
    assert contents(output) == contents(whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, timeout=20)
    except OSError as error:
        pytest.skip(f"mount can't be run: {error}")
    if done.returncode:
        pytest.skip(f"mounting a small file system is not allowed here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True, timeout=20)


@pytest.mark.parametrize("verb", ["rotate", "quantize"])
def test_a_disk_that_is_really_full(
    verb: str, small_disk: Path, model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = small_disk / "out"
    words = [verb, str(model), "-o", str(output), "--calibration", str(text)]
    rest = {"rotate": "--dtype float32", "quantize": "--samples 4 --seq-len 32 --method none --bits W16A4 --device cpu"}
    assert main([*words, *rest[verb].split()]) == 2
    assert "no space left" in capsys.readouterr().err
    assert not half_written(small_disk)
    if verb == "rotate":
        assert not tree(small_disk)
    else:  # the fit is done, and nothing that was paid for is thrown away
        assert not (output / "model").exists()
        subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True, timeout=20)
        assert main([*words, *rest[verb].split(), "--resume"]) == 0


def test_a_mount_point_can_be_filled(small_disk: Path, model: Path, text: Path) -> None:
    assert spinfold.rotate(str(model), small_disk, recipe=recipe(text)) == small_disk
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= tree(small_disk)
    assert spinfold.verify(model, small_disk, text=str(text)).ok
