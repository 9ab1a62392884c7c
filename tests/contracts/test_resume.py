"""A run that was stopped, anywhere and anyhow, goes on and ends with the same bytes as one that was not.

Stops are placed by the progress that a run reports, so each happens at exactly the step that its test names. What a
killed process leaves is a copy of its folder at that moment; what Ctrl-C leaves is what the process tidies up. Real
signals to real processes, at any of their file operations, are in tests/reliability.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_run import TEXT, Hook, contents, quantize, tiny_model, tree

from spinfold.errors import SpinfoldError
from spinfold.progress import Quiet
from spinfold.run import RunFolder

BEFORE_ANYTHING_IS_KEPT = [("load model", 0), ("read text", 0), ("evaluate original", 0), ("fit rotations", 1)]
LATER = [("round weights (gptq)", 0), ("round weights (gptq)", 1), ("round weights (gptq)", 2)]
LATER += [("round weights (gptq)", 3), ("evaluate quantized", 0), ("write checkpoint", 0)]


@pytest.fixture(scope="module")
def uninterrupted(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    files = contents(quantize(model, tmp_path_factory.mktemp("whole") / "run", text).path)
    assert {"maps.safetensors", "maps.json", "model/model.safetensors", "recipe.yaml"} <= files.keys()
    return files


def interrupt_at(*place: object) -> Hook:
    def at(*here: object) -> None:
        if here == place:
            raise KeyboardInterrupt

    return Hook(at)


@pytest.mark.parametrize("place", BEFORE_ANYTHING_IS_KEPT, ids=str)
@pytest.mark.parametrize("made", [False, True], ids=["new", "made by the user"])
def test_ctrl_c_before_anything_is_kept_leaves_nothing(
    place: tuple[str, int], made: bool, model: Path, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "deep" / "run"
    if made:
        output.mkdir(parents=True)
    before = tree(tmp_path)
    with pytest.raises(KeyboardInterrupt) as caught:
        quantize(model, output, text, progress=interrupt_at(*place))
    assert tree(tmp_path) == before
    assert not getattr(caught.value, "__notes__", [])


@pytest.mark.parametrize("place", LATER, ids=str)
def test_ctrl_c_later_keeps_what_is_done(
    place: tuple[str, int], model: Path, text: Path, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    output = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt) as caught:
        quantize(model, output, text, progress=interrupt_at(*place))
    assert "--resume" in caught.value.__notes__[0]
    with pytest.raises(SpinfoldError, match="--resume"):
        quantize(model, output, text)
    progress = Hook(lambda *_: None)
    assert contents(quantize(model, output, text, resume=True, progress=progress).path) == uninterrupted
    assert "fit rotations" not in [record.name for record in progress.records]
    assert not (output / "state").exists()


def test_a_run_stopped_again_and_again_still_ends_the_same(
    model: Path, text: Path, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    output = tmp_path / "run"
    for place in LATER:
        with pytest.raises(KeyboardInterrupt):
            quantize(model, output, text, resume=True, progress=interrupt_at(*place))
    assert contents(quantize(model, output, text, resume=True).path) == uninterrupted


@pytest.mark.parametrize("place", [("fit rotations", 1), *LATER], ids=str)
def test_what_a_killed_process_leaves_can_be_resumed(
    place: tuple[str, int], model: Path, text: Path, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    output, left = tmp_path / "run", tmp_path / "left"

    def copy(*here: object) -> None:
        if here == place:
            shutil.copytree(output, left)

    quantize(model, output, text, progress=Hook(copy))
    # What it had half written beside a file's place, under the names that such files have.
    (left / "state" / ".layer-0002.safetensors.4711.part").write_bytes(b"half")
    (left / ".model.4711.part").mkdir()
    (left / ".model.4711.part" / "model.safetensors").write_bytes(b"half")
    (left / ".report.html.4711").write_bytes(b"half")
    assert contents(quantize(model, left, text, resume=True).path) == uninterrupted


def test_a_process_killed_at_its_very_end_can_be_resumed(
    model: Path, text: Path, tmp_path: Path, uninterrupted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """run.json is there, and so is the state: not finished."""
    output, left = tmp_path / "run", tmp_path / "left"

    def copy_instead_of_the_report(path: Path) -> None:
        shutil.copytree(path, left)

    with monkeypatch.context() as patched:
        patched.setattr("spinfold.pipeline.write_report", copy_instead_of_the_report)
        quantize(model, output, text)
    assert (left / "run.json").is_file()
    assert not RunFolder(left).finished
    assert contents(quantize(model, left, text, resume=True).path) == uninterrupted
    assert (left / "report.html").is_file()


def test_resume_of_nothing_is_a_run(model: Path, text: Path, tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    assert contents(quantize(model, tmp_path / "run", text, resume=True).path) == uninterrupted
    with pytest.raises(SpinfoldError, match="finished"):
        quantize(model, tmp_path / "run", text, resume=True)
    assert contents(tmp_path / "run") == uninterrupted


@pytest.mark.parametrize("change", ["recipe", "text", "evaluation", "model"])
def test_a_run_is_resumed_as_what_it_was_or_not_at_all(change: str, model: Path, text: Path, tmp_path: Path) -> None:
    output, same = tmp_path / "run", tmp_path / "same.txt"
    same.write_bytes(text.read_bytes())
    own = Path(shutil.copytree(model, tmp_path / "model"))
    with pytest.raises(KeyboardInterrupt):
        quantize(own, output, same, progress=interrupt_at("round weights (gptq)", 1))
    changes: dict[str, object] = {}
    if change == "recipe":
        changes["seed"] = 1
    elif change == "text":
        same.write_text(TEXT.replace("rain", "snow"), "utf-8")
    elif change == "evaluation":
        changes["evaluate_on"] = str(text)
    else:
        tiny_model(own, "llama")
    before = tree(output)
    with pytest.raises(SpinfoldError, match="another") as caught:
        quantize(own, output, same, resume=True, **changes)
    assert not getattr(caught.value, "__notes__", [])
    assert tree(output) == before


def test_a_second_process_is_refused_and_disturbs_nothing(
    model: Path, text: Path, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    """The lock is per open file, so a second run in this process meets it as one in another process does."""
    output = tmp_path / "run"
    refusals = []

    def again(stage: str, done: int) -> None:
        if (stage, done) in (("load model", 0), ("round weights (gptq)", 1)):
            for resume in (False, True):
                with pytest.raises(SpinfoldError) as caught:
                    quantize(model, output, text, resume=resume, progress=Quiet())
                refusals.append(str(caught.value))

    assert contents(quantize(model, output, text, progress=Hook(again)).path) == uninterrupted
    assert len(refusals) == 4
    assert all("in use" in refusals[i] for i in (1, 3))
