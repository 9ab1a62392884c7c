"""However and wherever a command is stopped, the same command goes on and ends with the same bytes.

    kill        SIGKILL, half a file written          one run, killed twenty times
    full disk   ENOSPC from some moment on            by the audit hook, and on a real file system of a few hundred kB
    Ctrl-C      SIGINT
    another process that writes into the same folder

Moments are drawn from all file operations of an undisturbed run (`moments`), with fixed seeds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers
import zoo
from contracts.tiny_run import TEXT, quantize, tiny_model
from moments import FULL_DISK, INTERRUPT, KILL, PAUSE, Ended, Moment, Running, moments, spinfold

from spinfold.export.check import hash_files, verify_files
from spinfold.run import RunFolder

KILLS = 20
TARGETS = ["compressed-tensors", "gguf", "transformers"]
RESUME = "the same command with --resume goes on from there."
RECIPE = """\
method: spinquant
calibration: {samples: 4, seq_len: 32}
fit: {steps: 2, batch: 2}
rounding: {method: %s}
"""


@dataclass(frozen=True)
class Given:
    """A model, a text and the commands that use them."""

    folder: Path

    def quantize(self, output: Path, *more: str, rounding: str = "gptq") -> list[str]:
        return ["quantize", *self._common(output, rounding), *more]

    def compare(self, output: Path, *more: str) -> list[str]:
        measured = ["--text", str(self.folder / "text.txt"), "--max-tokens", "64"]
        return ["compare", *self._common(output, "rtn"), "--methods", "quarot,kurtail", *measured, *more]

    def _common(self, output: Path, rounding: str) -> list[str]:
        recipe = self.folder / f"{rounding}.yaml"
        recipe.write_text(RECIPE % rounding, "utf-8")
        text = str(self.folder / "text.txt")
        words = [str(self.folder / "tiny"), "-o", str(output), "--recipe", str(recipe), "--calibration", text]
        return [*words, "--device", "cpu"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("given")
    tiny_model(folder / "tiny")
    (folder / "text.txt").write_text(TEXT, "utf-8")
    return Given(folder)


@dataclass(frozen=True)
class Whole:
    """An undisturbed run: its folder, what it holds, and the moments that it had until it was finished."""

    path: Path
    files: dict[str, bytes]
    moments: list[Moment]


@pytest.fixture(scope="module")
def whole(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    output = tmp_path_factory.mktemp("whole") / "run"
    seen = moments(given.quantize(output), output)
    files = contents(output)
    assert {"maps.safetensors", "maps.json", "model/model.safetensors", "recipe.yaml", "clips.json"} <= files.keys()
    return Whole(output, files, seen[: seen.index(("rename", "state")) + 1])


def contents(output: Path) -> dict[str, bytes]:
    """The bytes of a finished run that no clock has a part in; what stands under a hidden name is no part of it."""
    assert RunFolder(output).finished
    files = {str(path.relative_to(output)): path for path in output.rglob("*") if path.is_file()}
    timed = ("run.json", "report.html", "log.txt")
    return {name: path.read_bytes() for name, path in files.items() if name[0] != "." and name not in timed}


def draw(moments: list[Moment], count: int, seed: int) -> list[Moment]:
    """Some moments, in the order in which they come."""
    return [moments[i] for i in sorted(random.Random(seed).sample(range(len(moments)), count))]


def finished(argv: list[str], folder: Path) -> Ended:
    """The command, which ends well."""
    ended = spinfold(argv, folder)
    assert ended.code == 0, ended.errors
    return ended


# ---- kill ----------------------------------------------------------------------------------------------------------


def test_a_run_killed_twenty_times_ends_with_the_same_bytes(given: Given, whole: Whole, tmp_path: Path) -> None:
    """Each kill comes later in the run than the one before, so each process has to go on from what they all left."""
    output = tmp_path / "run"
    for moment in draw(whole.moments, KILLS, seed=0):
        ended = spinfold(given.quantize(output, "--resume"), output, moment, KILL)
        assert ended.code == -9, (moment, ended.errors)
        assert not RunFolder(output).finished
    ended = finished(given.quantize(output, "--resume"), output)
    assert "fit rotations ..." not in ended.errors
    assert contents(output) == whole.files


def test_kills_at_any_count_of_file_operations(given: Given, whole: Whole, tmp_path: Path, full: bool) -> None:
    """Counted in each process anew, so that also what tidies up after a kill is killed. Runs end in between."""
    chance, kills, runs = random.Random(1), 0, 0
    while kills < (100 if full else 3):
        output = tmp_path / f"run-{runs}"
        ended = spinfold(given.quantize(output, "--resume"), output, chance.randint(1, len(whole.moments)), KILL)
        if ended.code == -9 and not RunFolder(output).finished:
            kills += 1
            continue
        assert ended.code in (0, -9), ended.errors
        assert contents(output) == whole.files
        shutil.rmtree(output)
        runs += 1


def test_a_fit_goes_on_from_its_last_step(given: Given, whole: Whole, tmp_path: Path, full: bool) -> None:
    """Killed at file operations of its steps, one of which has been kept or not."""
    every = spinfold(given.quantize(tmp_path / "count"), tmp_path / "count").moments
    steps = [number for number, (_, path) in enumerate(every, 1) if "fitting-0000" in path]
    assert len(steps) > 4
    for number in steps if full else random.Random(6).sample(steps, 2):
        output = tmp_path / f"run-{number}"
        assert spinfold(given.quantize(output), output, number, KILL).code == -9
        finished(given.quantize(output, "--resume"), output)
        assert contents(output) == whole.files


# ---- Ctrl-C --------------------------------------------------------------------------------------------------------


def test_ctrl_c_leaves_nothing_or_what_can_be_resumed(given: Given, whole: Whole, tmp_path: Path, full: bool) -> None:
    begun = whole.moments.index(("rename", ".state.part")) + 1  # then come the steps of the fit, each of which is kept
    fitted = whole.moments[whole.moments.index(("look", "state")) + 1 :]  # the fit is in its place, and that is on disk
    early, late = (
        draw(whole.moments[:begun], 5 if full else 1, seed=2),
        draw(whole.moments[begun:-1], 15 if full else 2, 3),
    )
    for number, moment in enumerate(early + late):
        output = tmp_path / f"run-{number}"
        ended = spinfold(given.quantize(output), output, moment, INTERRUPT)
        assert ended.code == 130, (moment, ended.errors)
        assert "Traceback" not in ended.errors
        last = ended.errors.splitlines()[-1]
        if moment in early:
            assert (last, output.exists()) == ("Interrupted.", False), moment
        else:
            assert last == f"Interrupted. The finished stages are kept: {RESUME}", moment
            resumed = finished(given.quantize(output, "--resume"), output)
            assert moment not in fitted or "fit rotations ..." not in resumed.errors
            assert contents(output) == whole.files


# ---- full disk -----------------------------------------------------------------------------------------------------


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_space(
    given: Given, whole: Whole, tmp_path: Path, full: bool
) -> None:
    writes = [one for one in whole.moments if one[0] in ("write", "mkdir", "rename", "flush")]
    for number, moment in enumerate(draw(writes, 20 if full else 3, seed=4)):
        output = tmp_path / f"run-{number}"
        ended = spinfold(given.quantize(output), output, moment, FULL_DISK)
        assert_no_space(ended)
        assert output.exists() == (RESUME in ended.errors), (moment, ended.errors)
        finished(given.quantize(output, "--resume"), output)
        assert contents(output) == whole.files


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    if (
        sys.platform != "linux"
        or shutil.which("mount") is None
        or subprocess.run(command, capture_output=True).returncode
    ):
        pytest.skip("to mount a small file system takes root on Linux")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_real_full_disk(given: Given, whole: Whole, small_disk: Path, full: bool) -> None:
    output = small_disk / "run"
    needed = sum(map(len, whole.files.values()))
    for share in (0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 2) if full else (0.3, 1.1):
        resize(small_disk, int(share * needed))
        assert_no_space(spinfold(given.quantize(output, "--resume"), output))
    resize(small_disk, 1 << 28)
    finished(given.quantize(output, "--resume"), output)
    assert contents(output) == whole.files


def resize(disk: Path, num_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={num_bytes}", str(disk)], check=True)


def assert_no_space(ended: Ended) -> None:
    assert ended.code == 2, ended.errors
    assert "There is no space left to write to.\nWhy: " in ended.errors
    assert "\nDo:  Free some space" in ended.errors


# ---- two at once ---------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused(given: Given, whole: Whole, tmp_path: Path) -> None:
    output = tmp_path / "run"
    first = Running(given.quantize(output), output, ("rename", "state/.layer-0001.safetensors.part"), PAUSE)
    first.wait_for_pause()
    without, resuming = (spinfold(given.quantize(output, *more), output) for more in ((), ("--resume",)))
    assert (without.code, resuming.code) == (2, 2)
    assert f"{output} is in use.\nWhy: Another process is writing this run.\nDo:  Wait for it" in resuming.errors
    first.go_on()
    assert first.end().code == 0
    assert contents(output) == whole.files


# ---- compare and export --------------------------------------------------------------------------------------------


def records(output: Path) -> dict[str, Any]:
    """The cells of a comparison without what a clock says."""
    cells = {path.name: json.loads(path.read_text()) for path in (output / "cells").glob("*.json")}
    return {name: {k: v for k, v in cell.items() if "seconds" not in k} for name, cell in cells.items()}


def test_a_killed_comparison_goes_on(given: Given, tmp_path: Path, full: bool) -> None:
    output = tmp_path / "whole"
    seen = moments(given.compare(output), output)
    expected = records(output)
    assert len(expected) == 3 and not any(cell.get("failed") for cell in expected.values())
    for number, moment in enumerate(draw(seen, 10 if full else 1, seed=5)):
        output = tmp_path / f"compare-{number}"
        assert spinfold(given.compare(output), output, moment, KILL).code == -9, moment
        finished(given.compare(output, "--resume"), output)
        assert records(output) == expected
        assert (output / "index.html").is_file()


@pytest.fixture(scope="module")
def exportable(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that every target can have."""
    folder = tmp_path_factory.mktemp("exportable")
    model = tiny_tokenizers.byte_level(zoo.save(zoo.FAMILIES["llama_tied"](), folder / "model"))
    changes = {"method": "none", "sites": [], "bits": "W4A16", "group_size": 32, "rounding__method": "rtn"}
    return quantize(model, folder / "run", given.folder / "text.txt", **changes).path


def export(run: Path, target: str, output: Path) -> list[str]:
    return ["export", str(run), "--to", target, "-o", str(output), "--no-check"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("made", [False, True], ids=["new", "made by the user"])
def test_a_killed_export_can_be_repeated(target: str, exportable: Path, tmp_path: Path, made: bool, full: bool) -> None:
    run = Path(shutil.copytree(exportable, tmp_path / "run"))

    def into(output: Path) -> list[str]:
        if made:
            output.mkdir(parents=True, exist_ok=True)
        return export(run, target, output)

    seen = moments(into(tmp_path / "whole" / "out"), tmp_path / "whole" / "out")
    expected = hash_files(tmp_path / "whole" / "out")
    last = "proof.json" if target == "gguf" else "config.json"
    for number, moment in enumerate(draw(seen, min(10, len(seen)) if full else 1, seed=6)):
        output = tmp_path / f"killed-{number}" / "out"
        assert spinfold(into(output), output, moment, KILL).code == -9, moment
        if not (output / last).exists():
            for part in output.glob("[!.]*"):  # a folder of the user's is filled file by file, and not emptied for him
                part.unlink()
            finished(into(output), output)
        verify_files(output)
        assert hash_files(output) == expected
        assert os.listdir(output.parent) == ["out"]


@pytest.mark.parametrize("target", TARGETS)
def test_an_export_onto_a_full_disk_leaves_nothing(
    target: str, exportable: Path, small_disk: Path, tmp_path: Path, full: bool
) -> None:
    """Full for real, so that it shows in the libraries that write the files."""
    run = Path(shutil.copytree(exportable, tmp_path / "run"))
    finished(export(run, target, tmp_path / "whole"), tmp_path / "whole")
    before = (run / "run.json").read_bytes()
    expected = hash_files(tmp_path / "whole")
    needed = sum(path.stat().st_size for path in (tmp_path / "whole").iterdir())
    for share in (0.02, 0.2, 0.4, 0.6, 0.8, 0.9) if full else (0.5,):
        resize(small_disk, int(share * needed))
        assert_no_space(spinfold(export(run, target, small_disk / "out"), small_disk / "out"))
        assert not os.listdir(small_disk)
        assert (run / "run.json").read_bytes() == before
    resize(small_disk, 1 << 28)
    finished(export(run, target, small_disk / "out"), small_disk / "out")
    assert hash_files(small_disk / "out") == expected
