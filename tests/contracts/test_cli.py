"""The command line's promises: what, why and what to do; 0, 1, 2 or 130; no traceback; nothing half-written.

`run` is the whole command line but for the process around it. Bad input goes through the real library; only what
can't be caused at will (a full disk, Ctrl-C, a bug) is raised in its place.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file

import spinfold
from spinfold.cli import main
from spinfold.evaluation import Proof

TEXT = "The rain in Spain stays mainly in the plain; the theatre in the north is there.\n" * 1200
SMALL = ["--seq-len", "64", "--samples", "4", "--steps", "1", "--device", "cpu"]


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def call(*arguments: object) -> Result:
        code = main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer."""
    path = tmp_path_factory.mktemp("pristine") / "model"
    zoo.save(zoo.FAMILIES["llama"](), path)
    return zoo.write_tiny_tokenizer(path)


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8")
    return path


def tree(path: Path) -> set[str]:
    return {str(entry.relative_to(path)) for entry in path.rglob("*")}


def assert_explained(result: Result, code: int, *named: str) -> None:
    """An exit code, and what, why and what to do on standard error, without a traceback."""
    assert result.code == code, result.err
    assert "Traceback" not in result.err
    lines = [line for line in result.err.splitlines() if line]
    assert any(line.startswith("Why: ") for line in lines), result.err
    assert any(line.startswith("Do:  ") for line in lines), result.err
    assert "that it does not know" not in result.err, result.err
    for name in named:
        assert name in result.err, result.err
    assert not result.out


# ---- bad input -----------------------------------------------------------------------------------------------------


def no_such_path(model: Path, text: Path) -> list[object]:
    return [model / "nowhere"]


def no_config(model: Path, text: Path) -> list[object]:
    (model / "config.json").unlink()
    return [model]


def broken_config(model: Path, text: Path) -> list[object]:
    (model / "config.json").write_text("{")
    return [model]


def unknown_family(model: Path, text: Path) -> list[object]:
    shutil.rmtree(model)
    zoo.save(zoo.FAMILIES["gpt2"](), model)
    zoo.write_tiny_tokenizer(model)
    return [model]


def residual_behind_gains(model: Path, text: Path) -> list[object]:
    shutil.rmtree(model)
    zoo.save(zoo.FAMILIES["gemma2"](), model)
    zoo.write_tiny_tokenizer(model)
    return [model]


def truncated_weights(model: Path, text: Path) -> list[object]:
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    return [model]


def corrupt_header(model: Path, text: Path) -> list[object]:
    (model / "model.safetensors").write_bytes(b"\xff" * 4096)
    return [model]


def not_finite(model: Path, text: Path) -> list[object]:
    file = model / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[7] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    return [model]


def pickled(model: Path, text: Path) -> list[object]:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return [model]


def broken_gguf(model: Path, text: Path) -> list[object]:
    file = model.with_suffix(".gguf")
    file.write_bytes(b"GGUF" + b"\x03\x00\x00\x00" + b"\x00" * 20)
    return [file]


def truncated_gguf(model: Path, text: Path) -> list[object]:
    file = zoo.write_gguf(zoo.FAMILIES["llama"](), model.with_suffix(".gguf"), "llama")
    os.truncate(file, file.stat().st_size // 2)
    return [file]


def corrupt_gguf(model: Path, text: Path) -> list[object]:
    file = zoo.write_gguf(zoo.FAMILIES["llama"](), model.with_suffix(".gguf"), "llama")
    data = bytearray(file.read_bytes())
    data[16:400:3] = b"\xff" * len(data[16:400:3])
    file.write_bytes(data)
    return [file]


def bits(model: Path, text: Path) -> list[object]:
    return [model, "--bits", "W9Z4"]


def no_length(model: Path, text: Path) -> list[object]:
    return [model, "--seq-len", "0"]


def beyond_the_model(model: Path, text: Path) -> list[object]:
    return [model, "--seq-len", "257"]


def group_size(model: Path, text: Path) -> list[object]:
    return [model, "--group-size", "7"]


def no_such_method(model: Path, text: Path) -> list[object]:
    return [model, "--method", "quarto"]


def site_of_no_method(model: Path, text: Path) -> list[object]:
    return [model, "--method", "none", "--sites", "residual"]


def no_such_site(model: Path, text: Path) -> list[object]:
    return [model, "--sites", "residual,elbow"]


def no_such_recipe(model: Path, text: Path) -> list[object]:
    return [model, "--recipe", "spinquand"]


def no_such_device(model: Path, text: Path) -> list[object]:
    return [model, "--device", "abacus"]


def empty_text(model: Path, text: Path) -> list[object]:
    text.write_bytes(b"")
    return [model]


def binary_text(model: Path, text: Path) -> list[object]:
    text.write_bytes(bytes(range(256)) * 64)
    return [model]


def too_little_text(model: Path, text: Path) -> list[object]:
    text.write_text("The rain.")
    return [model]


def missing_text(model: Path, text: Path) -> list[object]:
    text.unlink()
    return [model]


BAD = {
    no_such_path: ("nowhere",),
    no_config: ("config.json",),
    broken_config: ("config.json",),
    unknown_family: ("gpt2",),
    residual_behind_gains: ("gain", "--sites value,query_key,down"),
    truncated_weights: ("model.safetensors",),
    corrupt_header: ("model.safetensors",),
    not_finite: (),
    pickled: ("pytorch_model.bin",),
    broken_gguf: ("model.gguf",),
    truncated_gguf: ("model.gguf",),
    corrupt_gguf: ("model.gguf",),
    bits: ("W9Z4", "W4A4KV4"),
    no_length: ("seq_len",),
    beyond_the_model: ("257", "256"),
    group_size: ("7", "96", "160", "2, 4, 8, 16, 32"),
    no_such_method: ("'quarto'", "'quarot'"),
    site_of_no_method: ("'none'",),
    no_such_site: ("residual",),
    no_such_recipe: ("'spinquant'",),
    no_such_device: ("abacus",),
    empty_text: ("text.txt",),
    binary_text: ("text.txt",),
    too_little_text: ("tokens",),
    missing_text: ("text.txt",),
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_bad_input_is_explained_and_leaves_nothing_behind(
    spoil: Callable[[Path, Path], list[object]], model: Path, text: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    arguments = spoil(model, text)
    options = SMALL[2:] if "--seq-len" in arguments else SMALL
    options = options[:-2] if "--device" in arguments else options
    before = tree(tmp_path)
    result = run("quantize", *arguments, "-o", tmp_path / "out", "--calibration", text, *options)
    assert tree(tmp_path) == before
    lines = [line for line in result.err.splitlines() if " ..." not in line and ": stopped" not in line]
    assert_explained(Result(result.code, result.out, "\n".join(lines)), 2, *BAD[spoil])


@pytest.mark.parametrize("verb", ["quantize", "rotate"])
@pytest.mark.parametrize("occupied", ["notes", "run", "file", "below a file"])
def test_an_output_that_holds_something_is_left_alone(
    verb: str, occupied: str, tmp_path: Path, run: Callable[..., Result]
) -> None:
    place = output = tmp_path / "out"
    if occupied in ("notes", "run"):
        place.mkdir()
        place /= "notes.txt" if occupied == "notes" else "run.json"
    place.write_text("dear diary")
    output = output / "deeper" if occupied == "below a file" else output
    before = tree(tmp_path)
    assert_explained(run(verb, tmp_path / "model", "-o", output), 2, str(output))
    assert tree(tmp_path) == before
    assert place.read_text() == "dear diary"


# ---- usage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantise"],
        ["quantize"],
        ["quantize", "smollm2"],
        ["quantize", "smollm2", "-o", "x", "--samples", "many"],
        ["quantize", "smollm2", "-o", "x", "--rounding", "up"],
        ["verify", "one"],
        ["methods", "--yaml"],
    ],
    ids=" ".join,
)
def test_usage_errors_point_to_help(arguments: list[str], run: Callable[..., Result]) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert "Do:  See spinfold" in result.err
    assert "--help" in result.err
    assert not result.out


def test_help_and_version(run: Callable[..., Result]) -> None:
    assert run("--version") == (0, f"spinfold {spinfold.__version__}\n", "")
    assert run().out == run("--help").out
    assert run("quantize", "--help").code == 0


# ---- what can't be caused at will ----------------------------------------------------------------------------------


def raises(error: BaseException) -> Callable[..., None]:
    def verb(*_: object, **__: object) -> None:
        raise error

    return verb


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors"),
        RuntimeError("write failed: No space left on device (os error 28)"),
    ],
    ids=["system", "library"],
)
def test_a_full_disk(error: Exception, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spinfold, "report", raises(error))
    assert_explained(run("report", "x"), 2, "no space left")


def test_too_little_memory(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spinfold, "report", raises(torch.OutOfMemoryError("CUDA out of memory.")))
    assert_explained(run("report", "x"), 2, "memory")


def test_other_refusals_of_the_system(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spinfold, "report", raises(PermissionError(errno.EACCES, "Permission denied", "page.html")))
    assert_explained(run("report", "x"), 2, "page.html", "Permission denied")


def test_ctrl_c_is_one_line(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spinfold, "report", raises(KeyboardInterrupt()))
    assert run("report", "x") == (130, "", "Interrupted.\n")


def test_a_closed_pipe_is_the_readers_choice(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spinfold, "report", raises(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    monkeypatch.setattr("sys.stdout", SimpleNamespace())
    assert run("report", "x").code == 0


def test_a_bug_asks_for_debug_and_debug_shows_it(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spinfold, "report", raises(ZeroDivisionError("division by zero")))
    plain, debug = run("report", "x"), run("--debug", "report", "x")
    assert plain.code == debug.code == 2
    assert "Why: ZeroDivisionError: division by zero" in plain.err
    assert "--debug" in plain.err
    assert "Traceback" not in plain.err
    assert "Traceback" in debug.err
    monkeypatch.setenv("SPINFOLD_DEBUG", "1")
    assert "Traceback" in run("report", "x").err


# ---- options reach the library, results reach standard output ------------------------------------------------------


def test_options_beat_the_recipe_and_the_recipe_beats_defaults(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def quantize(model: str, output: Path, recipe: spinfold.Recipe, **rest: object) -> object:
        seen.update(rest, model=model, output=output, recipe=recipe)
        return SimpleNamespace(path=output, data={"proofs": [], "metrics": {"rows": []}})

    monkeypatch.setattr(spinfold, "quantize", quantize)
    words = "quantize m -o out --recipe spinquant --sites value,residual --bits w4a8 --group-size 32 --rounding rtn "
    words += "--calibration c4 --samples 7 --seq-len 99 --steps 3 --seed 5 --format int --device cpu --resume"
    assert run(*words.split()).code == 0
    recipe = seen["recipe"]
    assert recipe == spinfold.Recipe.load("spinquant").with_(
        sites=("residual", "value"),
        bits="W4A8KV16",
        group_size=32,
        rounding__method="rtn",
        calibration__source="c4",
        calibration__samples=7,
        calibration__seq_len=99,
        fit__steps=3,
        seed=5,
    )
    assert recipe.fit.step_rule == "capped"
    assert (seen["model"], seen["output"], seen["device"], seen["resume"]) == ("m", Path("out"), "cpu", True)


@pytest.mark.parametrize(("measured", "code"), [(3e-7, 0), (0.4, 1), (float("nan"), 1)])
def test_verify_answers_by_its_exit_code(
    measured: float, code: int, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        spinfold, "verify", lambda *_, **__: Proof("same function", measured, 1e-5, "block 3 deviates first")
    )
    plain, as_json = run("verify", "a", "b"), run("verify", "a", "b", "--json")
    assert plain.code == as_json.code == code
    assert "block 3 deviates first" in plain.out
    assert json.loads(as_json.out)["ok"] is (code == 0)


def test_methods_as_json(run: Callable[..., Result]) -> None:
    listed = json.loads(run("methods", "--json").out)
    assert [method["name"] for method in listed] == [method.name for method in spinfold.methods()]
    table = run("methods").out
    assert all(method["name"] in table for method in listed)


def test_a_run_from_end_to_end(run: Callable[..., Result], model: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    made = run("quantize", model, "-o", output, "--calibration", text, "--method", "quarot", *SMALL)
    assert made.code == 0, made.err
    assert str(output) in made.out
    assert "original" in made.out
    assert not [name for name in tree(output) if name.endswith((".part", ".lock")) or name.startswith("state")]

    measured = run("evaluate", output, "--text", text, "--seq-len", 64, "--max-tokens", 640, "--json")
    assert measured.code == 0, measured.err
    assert json.loads(measured.out)["perplexity"] > 1

    assert_explained(run("quantize", model, "-o", output, *SMALL), 2, str(output), "--resume")
    page = run("report", output)
    assert page.code == 0, page.err
    assert (output / "report.html").is_file()


def test_a_rotated_model_verifies_and_another_one_does_not(
    run: Callable[..., Result], model: Path, tmp_path: Path
) -> None:
    made = run("rotate", model, "-o", tmp_path / "rotated", "--dtype", "float32")
    assert made.code == 0, made.err
    assert run("verify", model, tmp_path / "rotated").code == 0
    zoo.save(zoo.FAMILIES["llama"](1), tmp_path / "other")
    zoo.write_tiny_tokenizer(tmp_path / "other")
    assert run("verify", model, tmp_path / "other").code == 1


@pytest.mark.parametrize(("given", "turns"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_that_wait_turn_briefly_unless_told_otherwise(given: dict[str, str], turns: str) -> None:
    """What OpenMP itself says of it when torch is loaded behind the command line."""
    code = "import sys, spinfold.cli; spinfold.cli.main(['--version']); assert 'torch' not in sys.modules; import torch"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    environment = inherited | {"OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": os.pathsep.join(sys.path)} | given
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    if "GOMP_" not in said.stderr:
        pytest.skip("torch has another OpenMP here")
    assert f"GOMP_SPINCOUNT = '{turns}'" in said.stderr
