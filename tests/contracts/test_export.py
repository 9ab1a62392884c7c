"""Exported checkpoints are the run: integers bit for bit, logits within the target's bounds, whole or not there."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import zoo
from gguf_run import make_run
from safetensors import safe_open
from tiny_run import quantize, recipe, tiny_model, tree, unsettle
from torch import Tensor

import spinfold
from spinfold.cli import main
from spinfold.errors import CheckFailed, SpinfoldError
from spinfold.export import check as checks
from spinfold.export import shards
from spinfold.export.choice import Facts, choose, facts_of
from spinfold.export.compressed_tensors import read_integers
from spinfold.export.contents import Contents
from spinfold.export.targets import BOUNDS, TARGETS
from spinfold.fitting.end_to_end import FitLog
from spinfold.formats import QuantizedWeight
from spinfold.maps import BlockDiagonal, SiteMaps, random_orthogonal
from spinfold.methods import METHODS
from spinfold.networks.family import FAMILIES

SYMMETRIC = {"activations__symmetric": True}
PLAIN, ONLINE = ["residual", "value"], ["residual", "value", "down"]
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "W4A16 channel": ("llama_tied", {"bits": "W4A16"}),
    "W4A16 group, float16": ("qwen3", {"bits": "W4A16", "group_size": 32, "weights__scale_dtype": "float16"}),
    "W4A16 asymmetric channel": ("phi3", {"bits": "W4A16", "weights__symmetric": False}),
    "W4A16 asymmetric group": ("granite", {"bits": "W4A16", "weights__symmetric": False, "group_size": 32}),
    "W8A16 channel": ("phi3", {"bits": "W8A16"}),
    "W8A16 group": ("llama_biases", {"bits": "W8A16", "group_size": 32}),
    "W8A16 asymmetric channel": ("qwen3", {"bits": "W8A16", "weights__symmetric": False}),
    "W8A16 asymmetric group": ("qwen2", {"bits": "W8A16", "weights__symmetric": False, "group_size": 16}),
    "W8A8": ("mistral", {"bits": "W8A8"} | SYMMETRIC),
    "W8A8 asymmetric activations": ("qwen2", {"bits": "W8A8"}),
    "W4A8 channel": ("smollm", {"bits": "W4A8"} | SYMMETRIC),
    "W4A8 group": ("llama_head_dim", {"bits": "W4A8", "group_size": 32} | SYMMETRIC),
    "W8A8 value only": ("gemma2", {"bits": "W8A8", "sites": ["value"]} | SYMMETRIC),
    "W8A16 value only": ("gemma3", {"bits": "W8A16", "sites": ["value"]}),
    "W4A16 value only": ("olmo2", {"bits": "W4A16", "sites": ["value"], "group_size": 32}),
    "W8A8 online Hadamard": ("llama", {"bits": "W8A8", "sites": ONLINE, "online_dtype": "bfloat16"} | SYMMETRIC),
}
IDS_NT = torch.randint(3, 128, (4, 128), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Callable[[str], Path]:
    """The finished run of a name in `RUNS`, made once."""
    folder, done = tmp_path_factory.mktemp("runs"), set[str]()

    def make(name: str) -> Path:
        output = folder / name.replace(" ", "-")
        if name not in done:
            family, changes = RUNS[name]
            model = tiny_model(folder / f"model-{family}", family)
            settings = {"method": "quarot", "sites": PLAIN, "rounding__method": "rtn"} | changes
            quantize(model, output, text, **settings)
            done.add(name)
        return output

    return make


def write(run: Path, output: Path) -> Path:
    """An export that is not checked."""
    return spinfold.export(run, "compressed-tensors", output, check=False).path


def distance(run: Path, folder: Path) -> list[spinfold.Proof]:
    """The proofs of a written folder on a real text, made in this process."""
    ids_NT = zoo.text_tokens(folder)
    run_NTV = checks.logits_of_run(run, ids_NT, torch.device("cpu"))
    other_NTV = checks.RUNTIMES["compressed-tensors"](folder, ids_NT, "cpu")
    return checks.compare(run_NTV, other_NTV, ids_NT, BOUNDS["compressed-tensors"], "compressed-tensors")


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Edit the tensors of a folder."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    edit(tensors)
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"format": "pt"})


# ---- what is written is the run ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("name", RUNS)
def test_a_run_comes_back_from_transformers(name: str, run_of: Callable[[str], Path], tmp_path: Path) -> None:
    """All its integers, a transform only for an online op, and on a real text the same function, within the bounds,
    which two rows in each other's place are not.
    """
    pytest.importorskip("compressed_tensors")
    run = run_of(name)
    folder = write(run, tmp_path / "out")
    checks.verify_files(folder)
    contents = Contents.open(run)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["transform_config"] == {}) == (not facts_of(contents).online)
    integers = dict(read_integers(folder))
    assert checks.prove_integers(contents, integers, "compressed-tensors").ok
    broken = [str(proof) for proof in distance(run, folder) if not proof.ok]
    assert not broken
    change(folder, zoo.swap_rows)
    assert not all(proof.ok for proof in distance(run, folder))

    first = next(iter(integers))
    for name in {first, f"{first}.zero"} & integers.keys():
        wrong = integers | {name: integers[name].roll(1, 0)}
        assert not checks.prove_integers(contents, wrong, "compressed-tensors").ok
    has_zeros = not contents.recipe.weights.symmetric
    assert sum(name.endswith(".zero") for name in integers) == has_zeros * sum(1 for _ in contents.modules())


def test_every_family_without_experts_is_tried() -> None:
    tried = {zoo.FAMILIES[family].args[0] for family, _ in RUNS.values()}
    assert tried == {name for one in FAMILIES if not one.experts for name in one.model_types}


@pytest.mark.parametrize("name", ["W8A8 value only", "W8A8"])
def test_a_head_that_is_the_embedding_is_stored_once(name: str, run_of: Callable[[str], Path], tmp_path: Path) -> None:
    """As in a Gemma, whose head in vLLM is always its embedding; a map or a gain makes the head another matrix."""
    folder = write(run_of(name), tmp_path / "out")
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert tied == ("lm_head.weight" not in file.keys()) == (name == "W8A8 value only")  # noqa: SIM118


@pytest.mark.parametrize(
    "name", ["W4A16 asymmetric group", "W8A16 asymmetric channel", "W8A16 channel", "W4A16 group, float16"]
)
def test_the_library_reads_our_integers(name: str, run_of: Callable[[str], Path], tmp_path: Path) -> None:
    """compressed-tensors' own decompression gives scale (q - zero), rounded once, of every module."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    run = run_of(name)
    folder = write(run, tmp_path / "out")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    group = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    scheme = quantization.QuantizationScheme.model_validate(group)
    compressor = compressors.BaseCompressor.get_value_from_registry(scheme.format)
    for module, weight in Contents.open(run).modules():
        assert isinstance(weight, QuantizedWeight)
        own = {k.removeprefix(f"{module}."): v for k, v in tensors.items() if k.startswith(f"{module}.weight")}
        scale_OG = own["weight_scale"]
        expected = dataclasses.replace(weight, scale_OG=scale_OG).dequantize(scale_OG.dtype)
        assert torch.equal(compressor.decompress(own, scheme)["weight"], expected)


def test_scales_of_16_bits_are_written_as_they_are(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    run = run_of("W4A16 group, float16")
    tensors = safetensors.torch.load_file(write(run, tmp_path / "out") / "model.safetensors")
    for module, weight in Contents.open(run).modules():
        assert isinstance(weight, QuantizedWeight)
        stored_OG = tensors[f"{module}.weight_scale"]
        assert stored_OG.dtype == weight.scale_OG.dtype == torch.float16
        assert torch.equal(stored_OG, weight.scale_OG)


@pytest.mark.parametrize(("name", "num_bytes"), [("W4A16 channel", 100_000), ("W4A16 asymmetric group", 2_000)])
def test_a_large_checkpoint_has_shards(
    name: str, num_bytes: int, run_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they cut between a weight and its zero points."""
    pytest.importorskip("compressed_tensors")
    run = run_of(name)
    one = write(run, tmp_path / "one")
    monkeypatch.setattr(shards.save_shards, "__defaults__", (num_bytes,))
    many = write(run, tmp_path / "many")
    assert checks.prove_integers(Contents.open(run), dict(read_integers(many)), "compressed-tensors").ok
    files = sorted(path.name for path in many.glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert torch.equal(*(checks.RUNTIMES["compressed-tensors"](folder, IDS_NT, "cpu") for folder in (one, many)))


# ---- the online map ------------------------------------------------------------------------------------------------


@pytest.fixture
def learned(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with another rotation on blocks of 40 in each layer, as if it had been learned."""

    def fit(task: Any) -> tuple[SiteMaps, FitLog]:
        blocks = (BlockDiagonal(random_orthogonal(40, seed), 4) for seed, _ in enumerate(task.network.layers))
        return SiteMaps(down=tuple(blocks)), FitLog()

    monkeypatch.setitem(METHODS, "quarot", dataclasses.replace(METHODS["quarot"], fit=fit))
    settings = {"bits": "W8A8", "sites": ["down"], "online_dtype": "bfloat16"} | SYMMETRIC
    run = tmp_path / "run"
    quantize(tiny_model(tmp_path / "model", "llama"), run, text, method="quarot", rounding__method="rtn", **settings)
    return run


def test_a_learned_online_map_of_each_layer(learned: Path, tmp_path: Path) -> None:
    """It holds; transposed, or the layers' maps swapped, it does not: the proof sees what it is there to see."""
    pytest.importorskip("compressed_tensors")
    folder = write(learned, tmp_path / "out")
    names = [f"model.layers.{i}.mlp.down_proj.R4_L{i}_input.weight" for i in (0, 1)]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert [file.get_slice(name).get_shape() for name in names] == [[40, 40], [40, 40]]
    assert all(proof.ok for proof in distance(learned, folder))

    def transpose(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: tensors[name].T for name in names}

    def swap(tensors: dict[str, Tensor]) -> None:
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]

    for edit in (transpose, swap):
        change(folder, edit)
        assert not any(proof.ok for proof in distance(learned, folder)[:2])
        change(folder, edit)
    assert all(proof.ok for proof in distance(learned, folder))


def test_one_map_for_all_layers_is_stored_once(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = write(run_of("W8A8 online Hadamard"), tmp_path / "out")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        stored = [name for name in file.keys() if "_input" in name]  # noqa: SIM118
    config = json.loads((folder / "config.json").read_text())["quantization_config"]["transform_config"]
    assert stored == ["model.layers.0.mlp.down_proj.R4_input.weight"]
    (group,) = config["config_groups"].values()
    assert group["apply"][0]["targets"] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]


# ---- the whole verb ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_writes_checks_and_notes(
    run_of: Callable[[str], Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("compressed_tensors")
    run, out = run_of("W8A8"), tmp_path / "out"
    arguments = ["export", run, "--to", "compressed-tensors", "-o", out, "--text", text, "--device", "cpu"]
    assert main([str(one) for one in arguments]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "KL divergence from the run" in printed and "Runs in: vLLM 0.32 (CPU)" in printed
    proof = json.loads((out / "proof.json").read_text())
    assert len(proof["proofs"]) == 4 and all(one["ok"] for one in proof["proofs"])
    assert set(proof["files"]) == tree(out) - {"proof.json"}

    def noted() -> list[Any]:
        proofs = json.loads((run / "run.json").read_text())["proofs"]
        return [one for one in proofs if one["statement"].startswith("compressed-tensors")]

    assert noted() == proof["proofs"]
    assert "KL divergence from the run" in (run / "report.html").read_text("utf-8")
    write(run, tmp_path / "again")  # without a check: the proofs of the earlier export give way
    assert not noted()


def test_the_list_names_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--list"]) == 0
    assert {row.target for row in TARGETS} <= set(capsys.readouterr().out.split())
    assert main(["export"]) == 2
    assert "It lacks a run and --to and --output." in capsys.readouterr().err


def test_the_page_has_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text("utf-8")
    for row in TARGETS:
        assert "| " + " | ".join(row.cells().values()) + " |" in page


# ---- nothing half-written, nothing that isn't what it says ---------------------------------------------------------


def test_a_failed_check_leaves_nothing(
    run_of: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of("W8A8")
    before = (run / "run.json").read_bytes()
    monkeypatch.setattr(checks, "logits_in", lambda runtime, folder, ids_NT, device: torch.randn(*ids_NT.shape, 128))
    with pytest.raises(CheckFailed, match="KL divergence"):
        spinfold.export(run, "compressed-tensors", tmp_path / "out", text=str(text), device="cpu")
    assert not tree(tmp_path)
    assert (run / "run.json").read_bytes() == before


def test_a_full_disk_leaves_nothing(
    run_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = run_of("W8A8")
    monkeypatch.setattr("spinfold.files.save_file", full)
    assert main(["export", str(run), "--to", "compressed-tensors", "-o", str(tmp_path / "out"), "--no-check"]) == 2
    assert "no space left" in capsys.readouterr().err
    assert not tree(tmp_path)


@pytest.mark.slow
def test_a_kill_leaves_no_checkpoint(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, spinfold, spinfold.exporting as e\n"
        "e.checks.hash_files = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "spinfold.export(sys.argv[1], 'compressed-tensors', sys.argv[2], check=False)"
    )
    run, out = run_of("W8A8"), tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": str(Path(spinfold.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code, str(run), str(out)], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    checks.verify_files(write(run, out))


def test_another_folder_is_left_alone(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("everything")
    with pytest.raises(SpinfoldError, match=r"thesis\.tex"):
        write(run_of("W8A8"), tmp_path)
    with pytest.raises(SpinfoldError, match="earlier run"):
        write(run_of("W8A8"), run_of("W8A8"))
    assert tree(tmp_path) == {"thesis.tex"}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: flip(folder / "model.safetensors"), "model.safetensors has been changed"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "model.safetensors has been changed"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "adapter.bin").touch(), "adapter.bin was added"),
        (lambda folder: (folder / "proof.json").unlink(), "can't be read"),
    ],
    ids=["tampered", "truncated", "missing", "added", "unproved"],
)
def test_the_check_loads_nothing_that_was_changed(
    harm: Callable[[Path], None],
    said: str,
    run_of: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = write(run_of("W8A8"), tmp_path / "out")
    harm(folder)
    monkeypatch.setitem(checks.RUNTIMES, "compressed-tensors", lambda *_: pytest.fail("it was loaded"))
    assert checks.main("compressed-tensors", str(folder), "ids.npy", "logits.npy") == 2
    assert said in capsys.readouterr().err


def test_the_fresh_process_settles_vector_functions(
    run_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the runtime computes first."""
    folder, angles = write(run_of("W8A8"), tmp_path / "out"), torch.arange(4096.0)
    exact = angles.cos()
    monkeypatch.setitem(checks.RUNTIMES, "compressed-tensors", lambda *_: angles.cos())
    unsettle(monkeypatch)
    assert not torch.equal(angles.cos(), exact)
    unsettle(monkeypatch)
    np.save(tmp_path / "ids.npy", IDS_NT.numpy())
    logits = tmp_path / "logits.npy"
    assert checks.main("compressed-tensors", str(folder), str(tmp_path / "ids.npy"), str(logits)) == 0
    assert np.array_equal(np.load(logits), exact.numpy())


@pytest.mark.parametrize(("code", "kind"), [(1, CheckFailed), (2, SpinfoldError)])
def test_the_words_of_the_other_process_come_through(
    code: int, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(stderr: str) -> SpinfoldError:
        done = subprocess.CompletedProcess([], code, "", stderr)
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
        with pytest.raises(SpinfoldError) as error:
            checks.logits_in("gguf", tmp_path, IDS_NT)
        return error.value

    own = ended('noise\nspinfold error: ["What.", "Why.", "Fix."]\n')
    assert type(own) is kind and (own.what, own.why, own.fix) == ("What.", "Why.", "Fix.")
    foreign = ended("Traceback\nRuntimeError: no kernel\n")
    assert isinstance(foreign, CheckFailed) and "no kernel" in foreign.why


def test_a_process_that_was_killed_names_the_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], -signal.SIGILL, "", "loading\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(CheckFailed, match=r"loading It was ended by SIGILL\."):
        checks.logits_in("gguf", tmp_path, IDS_NT)


# ---- runs that can't be read ---------------------------------------------------------------------------------------


@pytest.fixture
def broken(run_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a run, to be broken."""
    run = tmp_path / "run"
    for path in run_of("W8A8").rglob("*"):
        if path.is_file():
            (run / path.relative_to(run_of("W8A8"))).parent.mkdir(parents=True, exist_ok=True)
            (run / path.relative_to(run_of("W8A8"))).write_bytes(path.read_bytes())
    return run


def rename_tensor(run: Path) -> None:
    change(run / "model", lambda tensors: tensors.update(odd=tensors.pop("layers.0.q.q")))


def cut_tensor(run: Path) -> None:
    change(run / "model", lambda tensors: tensors.update({"layers.0.q.q": tensors["layers.0.q.q"][1:]}))


def from_the_future(run: Path) -> None:
    data = json.loads((run / "run.json").read_text())
    data["recipe"]["schema_version"] = 2
    (run / "run.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    "harm",
    [
        rename_tensor,
        cut_tensor,
        from_the_future,
        lambda run: os.truncate(run / "model" / "model.safetensors", 5000),
        lambda run: (run / "model" / "model.safetensors").unlink(),
        lambda run: (run / "run.json").unlink(),
        lambda run: (run / "state").mkdir(),
        lambda run: (run / "maps.safetensors").write_bytes(b"no maps"),
    ],
    ids=["renamed", "cut", "future", "truncated", "no weights", "not a run", "unfinished", "no maps"],
)
def test_a_broken_run_is_refused(harm: Callable[[Path], None], broken: Path, tmp_path: Path) -> None:
    harm(broken)
    with pytest.raises(SpinfoldError) as error:
        write(broken, tmp_path / "out")
    assert error.value.why or error.value.fix
    assert not (tmp_path / "out").exists()


# ---- what a target can't have ---------------------------------------------------------------------------------------


def facts(
    family: str = "llama",
    online: tuple[str, ...] = (),
    down_bias: bool = False,
    rows: tuple[int, ...] = (64, 128),
    **changes: Any,
) -> Facts:
    settings = {"bits": "W4A16"} | changes
    made = recipe(Path("text"), **settings)
    return Facts(family, made, online, widths=(64, 128), rows=rows, down_bias=down_bias)


@pytest.mark.parametrize(
    ("target", "run", "why", "fix"),
    [
        ("compressed-tensors", facts(bits="W3A16"), "4 or 8 bits, not 3", "--bits W4A16KV16"),
        ("compressed-tensors", facts(bits="W16A16"), "4 or 8 bits, not 16", "--bits W8A16KV16"),
        ("compressed-tensors", facts(bits="W4A16KV4"), "KV cache of 16 bits, not 4", "--bits W4A16KV16"),
        ("compressed-tensors", facts(bits="W8A8", weights__symmetric=False), "grids are symmetric", "symmetric: true"),
        ("compressed-tensors", facts(bits="W8A8", group_size=32), "groups of a row", "no --group-size"),
        ("compressed-tensors", facts(bits="W4A8", online=("down",), **SYMMETRIC), "at down", "--sites residual,value"),
        ("compressed-tensors", facts(online=("query_key",)), "online op at query_key", "--sites residual,value"),
        ("compressed-tensors", facts(online=("skip",)), "online op at skip", "one residual basis"),
        ("compressed-tensors", facts(online=("down",), down_bias=True), "", "--sites residual,value"),
        ("compressed-tensors", facts(bits="W8A8", activations__clip=0.9), "whole range", "clip: 1.0"),
        ("gguf", facts(group_size=16), "groups of a multiple of 32", "--group-size 32"),
        ("gguf", facts(rows=(64, 80)), "weights of 16 bits, not 4", "transformers"),
        ("gguf", facts(bits="W8A16", weights__symmetric=False), "grids are symmetric", "symmetric: true"),
        ("gguf", facts(bits="W4A8"), "activations of 16 bits, not 8", "--bits W4A16KV16"),
        ("gguf", facts(bits="W3A16KV3"), "a KV cache of 16 bits, not 3", "--bits W3A16KV16"),
        ("gguf", facts(online=("down",)), "no place for the online op at down", "--sites residual,value"),
        ("gguf", facts(online=("query_key", "down")), "at query_key, down", "--sites residual,value"),
        ("gguf", facts(online=("skip",)), "online op at skip", "one residual basis"),
        ("gguf", facts("gemma2", group_size=32), "not gemma2", "transformers"),
        ("mlx", facts(), "", "compressed-tensors, gguf, transformers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_run_there_is_refused(target: str, run: Facts, why: str, fix: str) -> None:
    with pytest.raises(SpinfoldError) as error:
        choose(target, run)
    assert why in error.value.why and fix in error.value.fix


@pytest.mark.parametrize("target", ["compressed-tensors", "gguf"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe_mixed"])
def test_experts_are_for_the_plugin(family: str, target: str, tmp_path: Path) -> None:
    """Which has tests of its own for them."""
    run = facts_of(make_run(tmp_path / "run", zoo.EXPERTS[family](), bits="W4A16", group_size=16))
    assert choose("transformers", run)
    with pytest.raises(SpinfoldError) as error:
        choose(target, run)
    assert "layers with experts" in error.value.why and "Or export to transformers" in error.value.fix


@pytest.mark.parametrize("family", [one.name for one in FAMILIES])
def test_llama_cpp_has_a_family_or_refuses_it_by_name(family: str) -> None:
    run = facts(family, group_size=32)
    if family in ("llama", "granite", "qwen2", "qwen3", "phi3"):
        assert choose("gguf", run)
        return
    with pytest.raises(SpinfoldError, match=f"not {family}"):
        choose("gguf", run)


@pytest.mark.parametrize("group_size", [None, 32, 64])
@pytest.mark.parametrize(("bits", "symmetric"), [(b, True) for b in range(2, 9)] + [(b, False) for b in range(2, 5)])
def test_llama_cpp_has_a_type_for_every_grid_up_to_8_bits(bits: int, symmetric: bool, group_size: int | None) -> None:
    changes = {"weights__symmetric": symmetric, "group_size": group_size}
    (row,) = choose("gguf", facts(bits=f"W{bits}A16", **changes))
    assert row.format == ("Q8_0" if bits > 4 else "Q4_0" if symmetric else "Q4_1")


@pytest.mark.parametrize("bits", ["W2A2KV2", "W4A4KV4", "W8A16", "W16A4"])
def test_the_plugin_refuses_nothing(bits: str) -> None:
    assert choose("transformers", facts("olmo2", ("query_key", "down", "skip"), True, bits=bits))


def test_a_refusal_comes_before_any_work(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    quantize(tiny_model(tmp_path / "model"), run, text, method="none", sites=[], bits="W3A16", rounding__method="rtn")
    with pytest.raises(SpinfoldError, match="can't be exported"):
        write(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
