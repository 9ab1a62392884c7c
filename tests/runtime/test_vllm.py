"""vLLM computes what the run computes; a transposed online map does not pass. Skipped where vLLM is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import zoo

import spinfold
from spinfold.export import check as checks
from spinfold.export.targets import Bounds
from spinfold.export.vllm import installed
from spinfold.recipe import Recipe
from spinfold.run import write_json

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not installed(), reason="vLLM is not installed")]

TEXT = "The rain in Spain stays mainly in the plain; the theatre in the north is there.\n" * 100
BOUNDS = Bounds(top1=0.85, kl=0.03, perplexity=0.05)
"""vLLM computes in bfloat16 with kernels of its own."""
IDS_NT = torch.randint(3, zoo.VOCAB, (2, 48), generator=torch.Generator().manual_seed(0))
RUNS: dict[str, dict[str, Any]] = {
    "W4A16": {"bits": "W4A16", "group_size": 32},
    "W4A16 asymmetric": {"bits": "W4A16", "group_size": 32, "weights__symmetric": False},
    "W8A8": {"bits": "W8A8", "activations__symmetric": True},
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


def make(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """A run of a tiny model whose sizes vLLM's kernels take, and its unchecked export."""
    (folder / "text.txt").write_text(TEXT)
    model = zoo.save(zoo.FAMILIES["smollm"](hidden=192), folder / "model")
    zoo.write_tiny_tokenizer(model)
    data = {"calibration": {"source": str(folder / "text.txt"), "samples": 4, "seq_len": 32}, "method": "quarot"}
    settings = {"sites": ["residual", "value"], "rounding__method": "rtn", "weights__scale_dtype": "bfloat16"} | changes
    run = spinfold.quantize(str(model), folder / "run", Recipe.parse(data).with_(**settings), device="cpu")
    return run.path, spinfold.export(run.path, "compressed-tensors", folder / "out", check=False).path


def proofs(run: Path, other_NTV: Any) -> list[spinfold.Proof]:
    run_NTV = checks.logits_of_run(run, IDS_NT, torch.device("cpu"))
    return checks.compare(run_NTV, other_NTV, IDS_NT, BOUNDS, "vllm")


@pytest.mark.parametrize("name", RUNS)
def test_vllm_computes_what_the_run_computes(name: str, tmp_path: Path) -> None:
    run, folder = make(tmp_path, **RUNS[name])
    broken = [str(proof) for proof in proofs(run, checks.logits_in("vllm", folder, IDS_NT)) if not proof.ok]
    assert not broken


def logits_with_shim(folder: Path) -> Any:
    np.save(folder.parent / "ids.npy", IDS_NT.numpy())
    arguments = ["vllm", str(folder), str(folder.parent / "ids.npy"), str(folder.parent / "logits.npy")]
    subprocess.run([sys.executable, "-c", SHIM, *arguments], check=True, env=checks.environment())
    return np.load(folder.parent / "logits.npy")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for a kernel that is there on a GPU")
def test_vllm_applies_the_online_map(tmp_path: Path) -> None:
    settings = RUNS["W8A8"] | {"sites": ["residual", "value", "down"], "online_dtype": "bfloat16"}
    run, folder = make(tmp_path, **settings)
    broken = [str(proof) for proof in proofs(run, logits_with_shim(folder)) if not proof.ok]
    assert not broken

    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    (name,) = (key for key in tensors if key.endswith("_input.weight"))
    tensors[name] = tensors[name].T.contiguous()
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    write_json(folder / "proof.json", {"files": checks.hash_files(folder)})
    assert not any(proof.ok for proof in proofs(run, logits_with_shim(folder))[:2])
