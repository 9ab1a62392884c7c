"""Loading against independent readings: Transformers' own loader for folders, the gguf package's for GGUF.

Everything here is bit for bit: a loader has no tolerance.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from zoo import FAMILIES, random_tokens, save, write_gguf

from spinfold.networks import gguf_reader
from spinfold.networks.embedded import fetch
from spinfold.networks.sources import resolve

GGUF_FAMILIES = {
    "llama": "llama",
    "llama_tied": "llama",
    "llama_biases": "llama",
    "llama_head_dim": "llama",
    "smollm": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "granite": "granite",
}


def assert_same(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    """Equal parameters and buffers under equal names, and equal logits."""
    for left, right in (
        (ours.state_dict(), theirs.state_dict()),
        (dict(ours.named_buffers()), dict(theirs.named_buffers())),
    ):
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert value.dtype == right[name].dtype, name
            assert torch.equal(value, right[name]), name
    tokens = random_tokens(seed=3)
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_loads_as_transformers_loads_it(tmp_path: Path, family: str, shards: int) -> None:
    save(FAMILIES[family](seed=1), tmp_path, shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards > 1)
    ours = resolve(tmp_path).load_model()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same(ours, theirs)
    assert not ours.training
    assert not any(p.requires_grad for p in ours.parameters())
    tied = ours.config.tie_word_embeddings
    assert (ours.get_output_embeddings().weight is ours.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float64, torch.float32, torch.bfloat16])
def test_types_are_those_asked_for(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    save(FAMILIES["llama_tied"](dtype=stored), tmp_path)
    ours = resolve(tmp_path).load_model(wanted)
    assert {p.dtype for p in ours.parameters()} == {wanted}
    assert_same(ours, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=wanted))


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_a_gguf_gives_back_the_model_it_was_made_from(tmp_path: Path, family: str) -> None:
    original = FAMILIES[family](seed=2)
    path = write_gguf(original, tmp_path / "tiny.gguf", GGUF_FAMILIES[family])
    assert_same(resolve(path).load_model(), original)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_tensors_are_those_of_the_gguf_package(tmp_path: Path, kind: str) -> None:
    """Blocks lie along rows, so un-permuting rows before or after dequantizing is the same."""
    original, quant = FAMILIES["llama"](), gguf.GGMLQuantizationType[kind]
    loaded = resolve(write_gguf(original, tmp_path / "tiny.gguf", "llama", quant)).load_model().state_dict()
    for name, weight in original.state_dict().items():
        values = weight.numpy()
        if values.ndim == 2:
            values = gguf.dequantize(gguf.quantize(values, quant), quant)
        assert np.array_equal(loaded[name].numpy(), values), name


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_frequency_factors_are_recognised(tmp_path: Path, factor: float, theta: float) -> None:
    """The factors come from Transformers' own rotary embedding: plain over scaled frequencies."""
    original = FAMILIES["llama"]()
    plain = {"rope_type": "default", "rope_theta": theta}
    scaled = plain | {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    frequencies = []
    for rope in (plain, scaled):
        original.config.rope_parameters = rope
        frequencies.append(type(original.model.rotary_emb)(original.config).inv_freq)
    path = write_gguf(
        original, tmp_path / "tiny.gguf", "llama", extra={"rope_freqs.weight": frequencies[0] / frequencies[1]}
    )
    checkpoint = resolve(path)
    assert checkpoint.config.rope_parameters["rope_type"] == "llama3"
    loaded = checkpoint.load_model()
    assert torch.allclose(loaded.model.rotary_emb.inv_freq, frequencies[1], rtol=1e-6)


@pytest.mark.parametrize("architecture", gguf_reader.ARCHITECTURES)
def test_name_tables_are_one_to_one_and_agree_with_the_gguf_package(architecture: str) -> None:
    table = gguf_reader.ARCHITECTURES[architecture].names
    assert len(set(table.values())) == len(table)
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    theirs = gguf.get_tensor_name_map(key, 1)
    for ours, hf in table.items():
        assert theirs.get_name(f"model.layers.0.{hf}") == f"blk.0.{ours}"


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedModel:
    return resolve("smollm2").load_model()


@pytest.mark.slow
def test_the_default_model_equals_an_independent_reading(smollm2: PreTrainedModel) -> None:
    """SmolLM2 through the gguf package's reader and name map, Q and K put back by plain indexing."""
    ours = smollm2.state_dict()
    reader = gguf.GGUFReader(fetch("smollm2"))
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    head_dim = 64
    order = [2 * j + s for s in (0, 1) for j in range(head_dim // 2)]
    for name, weight in ours.items():
        if name == "lm_head.weight":
            assert "output.weight" not in tensors
            continue
        values = tensors.pop(names.get_name(name, try_suffixes=(".weight",)))
        if "q_proj" in name or "k_proj" in name:
            values = values.reshape(-1, head_dim, values.shape[1])[:, order].reshape(values.shape)
        assert np.array_equal(weight.numpy(), values), name
    assert not tensors
    assert torch.equal(ours["lm_head.weight"], ours["model.embed_tokens.weight"])


@pytest.mark.slow
def test_the_default_model_predicts_text(smollm2: PreTrainedModel) -> None:
    """A wrong permutation, head size or frequency would cost orders of magnitude; random guessing scores 49152."""
    tokenizer = resolve("smollm2").load_tokenizer()
    text = "The capital of France is Paris. Water boils at one hundred degrees, and the sun rises in the east."
    tokens = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        assert smollm2(tokens, labels=tokens).loss.exp() < 40
