"""A rotated folder is a plain Hugging Face model, whole or not there, and `verify` tells it from a wrong one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import spinfold
from spinfold import checkpoint
from spinfold.errors import CheckFailed, SpinfoldError
from spinfold.networks import Network
from spinfold.recipe import Recipe

FAMILIES = ("llama_tied", "llama_biases", "qwen2", "phi3", "granite")
TEXT = "The rain in Spain stays mainly in the plain; the theatre in the north is there.\n" * 200
IDS_BT = zoo.random_tokens(0, 2, 40)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per family: weights, tokenizer, a chat template, generation settings."""
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        model = zoo.FAMILIES[family]()
        model.generation_config.do_sample, model.generation_config.top_k = True, 7
        zoo.save(model, folder / family)
        zoo.write_tiny_tokenizer(folder / family)
        tokenizer = AutoTokenizer.from_pretrained(folder / family)
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
        tokenizer.save_pretrained(folder / family)
    return folder


def rotate(model: Path, output: Path, text: str, **options: object) -> Path:
    recipe = Recipe().with_(calibration__source=text, fit__steps=1, fit__batch=2)
    return spinfold.rotate(str(model), output, recipe=recipe, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def rotated(models: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every family rotated, in float32."""
    folder = tmp_path_factory.mktemp("rotated")
    for family in FAMILIES:
        rotate(models / family, folder / family, text, dtype="float32")
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def relative_error(model: Path, other: Path) -> float:
    both = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (model, other))
    with torch.no_grad():
        expected, actual = (one(IDS_BT).logits for one in both)
    return float((actual - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm())


def tree(path: Path) -> set[str]:
    return {str(entry.relative_to(path)) for entry in path.rglob("*")}


# ---- what is written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_function_with_other_weights(family: str, models: Path, rotated: Path) -> None:
    assert relative_error(models / family, rotated / family) <= 1e-5
    before, after = stored(models / family), stored(rotated / family)
    assert set(after) == set(before) | {"lm_head.weight"}
    matrices = [name for name, tensor in before.items() if tensor.ndim == 2]
    assert len(matrices) > 8
    for name in matrices:
        assert before[name].shape == after[name].shape
        assert (before[name] - after[name]).norm() > 0.1 * before[name].norm(), name


def test_transformers_loads_it_without_spinfold(rotated: Path) -> None:
    """In a process where importing spinfold fails."""
    code = """
import sys
sys.modules["spinfold"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
for path in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    assert not model.config.tie_word_embeddings
    assert "spinfold" not in str(model.config)
    tokenizer = AutoTokenizer.from_pretrained(path)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "rain"}], tokenize=False)
    assert chat == "rain\\n", chat
    assert model.generation_config.top_k == 7
"""
    command = [sys.executable, "-c", code, *(str(rotated / family) for family in FAMILIES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_says_what_is_there(family: str, models: Path, rotated: Path) -> None:
    before, after = (json.loads((path / family / "config.json").read_text()) for path in (models, rotated))
    assert after["tie_word_embeddings"] is False
    assert after["dtype"] == "float32"
    assert after["architectures"] == before["architectures"]
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed <= {"tie_word_embeddings"}
    assert str(models) not in (rotated / family / "config.json").read_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_hold_what_they_say(dtype: str, models: Path, text: str, tmp_path: Path) -> None:
    output = rotate(models / "granite", tmp_path / "out", text, dtype=dtype)
    assert {str(tensor.dtype) for tensor in stored(output).values()} == {f"torch.{dtype}"}
    assert json.loads((output / "config.json").read_text())["dtype"] == dtype
    proof = spinfold.verify(models / "granite", output, text=text)
    assert proof.ok, proof
    assert proof.measured > 1e-5
    assert f"stored in {dtype}" in proof.detail


def test_large_models_are_sharded(
    models: Path, rotated: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_SHARD_BYTES", 100_000)
    output = rotate(models / "phi3", tmp_path / "out", text, dtype="float32")
    index = json.loads((output / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in output.glob("*.safetensors"))
    assert len(shards) > 3
    assert sorted(set(index["weight_map"].values())) == shards
    for shard in shards:
        with safe_open(output / shard, framework="pt") as file:
            assert all(index["weight_map"][name] == shard for name in file.keys())  # noqa: SIM118
    whole, parts = stored(rotated / "phi3"), stored(output)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in whole.values())
    assert relative_error(rotated / "phi3", output) == 0


def test_files_have_the_modes_of_the_users_umask(rotated: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    expected = (tmp_path / "file").stat().st_mode
    assert {path.stat().st_mode for path in (rotated / "qwen2").iterdir()} == {expected}


def test_a_learned_rotation(models: Path, text: str, tmp_path: Path) -> None:
    output = rotate(models / "qwen2", tmp_path / "out", text, method="spinquant", dtype="float32")
    assert relative_error(models / "qwen2", output) <= 1e-5


def test_the_seed_decides(models: Path, rotated: Path, text: str, tmp_path: Path) -> None:
    again = rotate(models / "qwen2", tmp_path / "again", text, dtype="float32")
    other = rotate(models / "qwen2", tmp_path / "other", text, dtype="float32", seed=1)
    weights = "model.safetensors"
    assert (again / weights).read_bytes() == (rotated / "qwen2" / weights).read_bytes()
    assert (other / weights).read_bytes() != (again / weights).read_bytes()


# ---- where it is written -------------------------------------------------------------------------------------------


def test_an_empty_folder_is_filled_and_a_deep_one_made(models: Path, text: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    inode = (tmp_path / "empty").stat().st_ino
    outputs = [rotate(models / "qwen2", tmp_path / name, text) for name in ("empty", "a/b/c")]
    assert tree(outputs[0]) == tree(outputs[1])
    assert not [name for name in tree(tmp_path) if name.rpartition("/")[2].startswith(".")]
    assert (tmp_path / "empty").stat().st_ino == inode  # it may be a mount point


@pytest.mark.parametrize("output", ["new", "empty", "a/b/c"])
def test_a_weight_too_large_leaves_nothing_behind(output: str, text: str, tmp_path: Path) -> None:
    model = zoo.FAMILIES["qwen2"]()
    model.model.layers[0].mlp.up_proj.weight.mul_(1e6)
    zoo.write_tiny_tokenizer(zoo.save(model, tmp_path / "model"))
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    with pytest.raises(SpinfoldError, match=r"up_proj.*65504|up_proj.*6\.55e\+04"):
        rotate(tmp_path / "model", tmp_path / output, text, dtype="float16")
    assert tree(tmp_path) == before


def test_a_failed_cast_is_a_failed_check(
    models: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def coarse(network: Network, dtype: torch.dtype) -> None:
        network.head.weight.copy_(network.head.weight.sign())

    monkeypatch.setattr("spinfold.rotation.round_weights", coarse)
    monkeypatch.setattr("spinfold.rotation.prove_perplexity_kept", lambda *_: spinfold.Proof("perplexity", 0.1, 0.005))
    with pytest.raises(CheckFailed, match="bfloat16"):
        rotate(models / "qwen2", tmp_path / "out", text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("site", ["query_key", "down"])
def test_online_sites_have_no_place_in_a_folder(site: str, models: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(SpinfoldError, match=site):
        rotate(models / "qwen2", tmp_path / "out", text, sites=("residual", site))


def test_a_network_with_ops_on_its_wires_is_refused(tmp_path: Path) -> None:
    network = Network(zoo.FAMILIES["qwen2"]())
    network.layers[1].wire("down").ops.append(torch.nn.Identity())
    with pytest.raises(SpinfoldError, match="down"):
        checkpoint.save_folder(network, tmp_path / "out", torch.float32)
    assert not list(tmp_path.iterdir())


# ---- verify --------------------------------------------------------------------------------------------------------


def spoil(folder: Path, output: Path, dtype: torch.dtype) -> Path:
    """A copy in `dtype` in which the second MLP has lost the gain of its norm."""
    shutil.copytree(folder, output)
    tensors = stored(folder)
    gain_D = 0.5 + torch.rand(96, generator=torch.Generator().manual_seed(0))
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.1.mlp.{name}.weight"] /= gain_D
    save_file({k: v.to(dtype) for k, v in tensors.items()}, output / "model.safetensors", {"format": "pt"})
    return output


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_holds_to_1e5(family: str, models: Path, rotated: Path, text: str) -> None:
    proof = spinfold.verify(models / family, rotated / family, text=text)
    assert proof.ok, proof
    assert proof.tolerance == 1e-5
    assert not proof.detail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_lost_gain_fails_in_any_dtype_and_the_block_is_named(
    dtype: torch.dtype, models: Path, rotated: Path, text: str, tmp_path: Path
) -> None:
    other = spoil(rotated / "llama_tied", tmp_path / "other", dtype)
    proof = spinfold.verify(models / "llama_tied", other, text=text)
    assert not proof.ok
    assert "block 1 is the first" in proof.detail


def test_a_tolerance_replaces_the_rule(models: Path, rotated: Path, text: str, tmp_path: Path) -> None:
    other = spoil(rotated / "qwen2", tmp_path / "other", torch.bfloat16)
    proof = spinfold.verify(models / "qwen2", other, text=text, tolerance=10.0)
    assert proof.ok
    assert proof.tolerance == 10


def test_other_sizes_are_no_crash(models: Path, text: str, tmp_path: Path) -> None:
    proof = spinfold.verify(models / "qwen2", models / "llama_tied", text=text)
    assert not proof.ok
    assert "3 blocks" in proof.detail
    config = json.loads((models / "qwen2" / "config.json").read_text()) | {"vocab_size": 64}
    tensors = stored(models / "qwen2")
    small = {name: tensor[:64] if "embed" in name or "lm_head" in name else tensor for name, tensor in tensors.items()}
    save_file({k: v.contiguous() for k, v in small.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    proof = spinfold.verify(models / "qwen2", tmp_path, text=text)
    assert not proof.ok
    assert "128 and 64" in proof.detail


def test_a_model_without_a_tokenizer_is_compared_on_random_tokens(tmp_path: Path) -> None:
    zoo.save(zoo.FAMILIES["qwen2"](), tmp_path / "a")
    zoo.save(zoo.FAMILIES["qwen2"](1), tmp_path / "b")
    same, other = (spinfold.verify(tmp_path / "a", tmp_path / name) for name in "ab")
    assert same.ok
    assert "random tokens" in same.detail
    assert not other.ok


@pytest.mark.slow
def test_smollm2_rotated_to_bfloat16_is_smollm2(tmp_path: Path) -> None:
    output = spinfold.rotate("smollm2", tmp_path / "out")
    proof = spinfold.verify("smollm2", output)
    assert proof.ok, proof
    assert "perplexity" in proof.detail
    assert AutoTokenizer.from_pretrained(output).chat_template
