"""vLLM computes what the run computes on real text, of every family; a transposed online map does not pass.

Skipped where vLLM is not installed.
"""

from __future__ import annotations

import dataclasses
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
from torch import Tensor

import spinfold
from spinfold.export import check as checks
from spinfold.export.targets import Bounds
from spinfold.export.vllm import installed
from spinfold.files import write_json
from spinfold.fitting.end_to_end import FitLog
from spinfold.maps import BlockDiagonal, SiteMaps, random_orthogonal
from spinfold.methods import METHODS
from spinfold.networks.family import FAMILIES, family_of
from spinfold.recipe import Recipe

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not installed(), reason="vLLM is not installed")]

TEXT = "The rain in Spain stays mainly in the plain; the theatre in the north is there.\n" * 100
BOUNDS = Bounds(top1=0.85, kl=0.03, perplexity=0.05)
"""vLLM computes in bfloat16 with kernels of its own."""
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
"""Those that vLLM's kernels take."""
GROUPS: dict[str, Any] = {"bits": "W4A16", "group_size": 32}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, GROUPS) for family in ("llama", "llama_tied", "llama_biases", "mistral", "qwen2", "qwen3")},
    **{family: (family, GROUPS) for family in ("phi3", "granite", "gemma2", "gemma3", "olmo2")},
    "asymmetric": ("llama", GROUPS | {"weights__symmetric": False}),
    "W8A8": ("llama", {"bits": "W8A8", "activations__symmetric": True}),
    "W4A8": ("qwen2", {"bits": "W4A8", "activations__symmetric": True}),
}
# vLLM's CPU build has no kernel for online maps: the product that its GPU kernel computes stands in for it, in the
# test's process only. It shows that file and convention are right, not that the kernel is.
SHIM = """
import sys
from torch.nn import functional as F
from vllm.model_executor.layers.quantization.compressed_tensors.transform import module
from spinfold.export import check
module.HadamardTransform.cpu_linear = staticmethod(lambda x, weight, bias: F.linear(x, weight, bias))
sys.exit(check.main(*sys.argv[1:]))
"""


def make(folder: Path, family: str, **changes: Any) -> tuple[Path, Path]:
    """A run of a tiny model with every map that can be folded into it, and its unchecked export."""
    (folder / "text.txt").write_text(TEXT)
    model_type, settings = zoo.FAMILIES[family].args
    model = zoo.save(zoo._build(model_type, settings | SIZES), folder / "model")
    zoo.write_tiny_tokenizer(model)
    residual = family_of(model_type).supports("residual").ok
    data = {"calibration": {"source": str(folder / "text.txt"), "samples": 4, "seq_len": 32}, "method": "quarot"}
    options = {"sites": ["residual", "value"] if residual else ["value"]}
    options |= {"rounding__method": "rtn", "weights__scale_dtype": "bfloat16"} | changes
    run = spinfold.quantize(str(model), folder / "run", Recipe.parse(data).with_(**options), device="cpu")
    return run.path, spinfold.export(run.path, "compressed-tensors", folder / "out", check=False).path


def ids_of(run: Path) -> Tensor:
    """Windows of real text in the run's own tokens, longer than the zoo's small sliding ones."""
    return zoo.text_tokens(run / "model", 8, 48)


def proofs(run: Path, other_NTV: Any) -> list[spinfold.Proof]:
    ids_NT = ids_of(run)
    run_NTV = checks.logits_of_run(run, ids_NT, torch.device("cpu"))
    return checks.compare(run_NTV, other_NTV, ids_NT, BOUNDS, "vllm")


@pytest.mark.parametrize("name", RUNS)
def test_vllm_computes_what_the_run_computes(name: str, tmp_path: Path) -> None:
    family, changes = RUNS[name]
    run, folder = make(tmp_path, family, **changes)
    broken = [str(proof) for proof in proofs(run, checks.logits_in("vllm", folder, ids_of(run))) if not proof.ok]
    assert not broken


def test_every_family_without_experts_is_tried() -> None:
    tried = {zoo.FAMILIES[family].args[0] for family, _ in RUNS.values()}
    assert tried == {name for one in FAMILIES if not one.experts for name in one.model_types}


def logits_with_shim(run: Path, folder: Path) -> Any:
    np.save(folder.parent / "ids.npy", ids_of(run).numpy())
    arguments = ["vllm", str(folder), str(folder.parent / "ids.npy"), str(folder.parent / "logits.npy")]
    subprocess.run([sys.executable, "-c", SHIM, *arguments], check=True, env=checks.environment())
    return np.load(folder.parent / "logits.npy")


def change_maps(folder: Path, change: Callable[[list[Tensor]], list[Tensor]]) -> list[str]:
    """Other online maps in a folder, as if they had been written so; the names of their tensors."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    names = sorted(key for key in tensors if key.endswith("_input.weight"))
    tensors |= zip(names, change([tensors[name] for name in names]), strict=True)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    write_json(folder / "proof.json", {"files": checks.hash_files(folder)})
    return names


@pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for a kernel that is there on a GPU")
def test_vllm_applies_the_online_map(tmp_path: Path) -> None:
    settings = {"sites": ["residual", "value", "down"], "online_dtype": "bfloat16"}
    run, folder = make(tmp_path, "llama", **RUNS["W8A8"][1], **settings)
    broken = [str(proof) for proof in proofs(run, logits_with_shim(run, folder)) if not proof.ok]
    assert not broken

    (name,) = change_maps(folder, lambda maps: [one.T.contiguous() for one in maps])
    assert name.endswith("R4_input.weight")
    assert not any(proof.ok for proof in proofs(run, logits_with_shim(run, folder))[:2])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for a kernel that is there on a GPU")
@pytest.mark.parametrize("settings", [RUNS["W8A8"][1], GROUPS], ids=["W8A8", "W4A16"])
def test_vllm_applies_a_learned_map_of_each_layer(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rotation on blocks of 64 in each layer, as if it had been learned; with the layers swapped it fails."""

    def fit(task: Any) -> tuple[SiteMaps, FitLog]:
        blocks = (BlockDiagonal(random_orthogonal(64, seed), 3) for seed, _ in enumerate(task.network.layers))
        return SiteMaps(down=tuple(blocks)), FitLog()

    monkeypatch.setitem(METHODS, "quarot", dataclasses.replace(METHODS["quarot"], fit=fit))
    run, folder = make(tmp_path, "llama", **settings, sites=["down"], online_dtype="bfloat16")
    broken = [str(proof) for proof in proofs(run, logits_with_shim(run, folder)) if not proof.ok]
    assert not broken

    assert len(change_maps(folder, lambda maps: maps[::-1])) == 2
    assert not any(proof.ok for proof in proofs(run, logits_with_shim(run, folder))[:2])
