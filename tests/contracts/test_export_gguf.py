"""What the GGUF writer writes is what our reader, the gguf package and Transformers read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny_tokenizers
import torch
import zoo
from gguf_run import make_run
from tiny_run import TEXT
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

from spinfold.checkpoint import load_run
from spinfold.errors import SpinfoldError
from spinfold.export.check import prove_integers
from spinfold.export.contents import Contents
from spinfold.export.gguf_tokenizer import tokenizer_metadata
from spinfold.export.gguf_writer import read_integers, write
from spinfold.networks.gguf_header import scan
from spinfold.networks.pre_tokenizers import pre_tokenizer_name
from spinfold.networks.sources import Checkpoint, resolve

FAMILIES = ["llama", "llama_tied", "llama_biases", "llama_head_dim", "mistral", "qwen2", "qwen3", "phi3", "granite"]
CPU = torch.device("cpu")
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""As these models' tokenizer.json spells them."""


def export(tmp_path: Path, model: Any, **options: Any) -> Checkpoint:
    """The written file, opened by our reader."""
    return resolve(written(tmp_path, model, **options))


def written(tmp_path: Path, model: Any, embeddings: Any = "F16", **options: Any) -> Path:
    (folder := tmp_path / "gguf").mkdir()
    write(make_run(tmp_path / "run", model, **options), folder, embeddings=embeddings)
    (file,) = folder.iterdir()
    return file


def model_with(family: str = "llama", **settings: Any) -> Any:
    """A network of the zoo with other settings in its config, built anew."""
    build = zoo.FAMILIES[family]
    assert isinstance(build, partial)
    return zoo._build(build.args[0], build.args[1] | settings)


# ---- weights and config --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_reader_and_writer_are_inverse(tmp_path: Path, family: str) -> None:
    checkpoint = export(tmp_path, zoo.FAMILIES[family](), weights__scale_dtype="float16")
    run = load_run(tmp_path / "run", CPU)
    read = checkpoint.load_model().state_dict()
    for name, value in run.model.state_dict().items():
        stored_in_half = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert torch.equal(read[name], value.half().float() if stored_in_half else value), name

    ours, theirs = run.config, checkpoint.config
    for key in theirs.to_diff_dict().keys() - {
        "transformers_version",
        "model_type",
        "sliding_window",
        "original_max_position_embeddings",
        "tie_word_embeddings",
    }:
        if hasattr(ours, key) and not (family == "mistral" and key in ("max_position_embeddings", "attention_bias")):
            assert getattr(theirs, key) == getattr(ours, key), key
    assert theirs.tie_word_embeddings == (family == "llama_tied")


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ({"bits": "W4A16", "group_size": 32, "weights__symmetric": False}, "Q4_1"),
        ({"bits": "W8A16", "group_size": 32}, "Q8_0"),
        ({"bits": "W3A16", "group_size": 96}, "Q4_0"),
        ({"bits": "W16A16"}, "F16"),
    ],
)
def test_every_type(tmp_path: Path, recipe: dict[str, Any], kind: str) -> None:
    model = model_with(intermediate_size=192)
    checkpoint = export(tmp_path, model, **recipe)
    kinds = {name: tensor.kind.name for name, tensor in scan(checkpoint.path).tensors.items()}
    assert {k for name, k in kinds.items() if name.startswith("blk") and "norm" not in name} == {kind}
    assert {k for name, k in kinds.items() if "norm" in name} == {"F32"}
    assert checkpoint.path.name == f"model-{kind}.gguf"
    run, read = load_run(tmp_path / "run", CPU).model.state_dict(), checkpoint.load_model().state_dict()
    for name, value in run.items():
        assert torch.allclose(read[name], value, rtol=2**-10, atol=2**-10 * float(value.abs().max())), name


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama_biases", {"bits": "W4A16", "group_size": 32}),
        ("granite", {"bits": "W2A16", "weights__symmetric": False}),
        ("qwen3", {"bits": "W8A16", "group_size": 32}),
        ("phi3", {"bits": "W3A16", "group_size": 32}),
    ],
)
def test_the_integers_come_back(tmp_path: Path, family: str, recipe: dict[str, Any]) -> None:
    """Bit for bit and in the run's order; two rows swapped are found."""
    written(tmp_path, zoo.FAMILIES[family](), **{"group_size": None} | recipe)
    contents, read = Contents.open(tmp_path / "run"), dict(read_integers(tmp_path / "gguf"))
    assert prove_integers(contents, read, "gguf").ok
    for name, q_OI in read.items():
        assert not prove_integers(contents, read | {name: q_OI.roll(1, 0)}, "gguf").ok


def test_embedding_and_head_in_q8_0(tmp_path: Path) -> None:
    file = scan(written(tmp_path, zoo.FAMILIES["qwen2"](), embeddings="Q8_0"))
    assert {file.tensors[name].kind.name for name in ("token_embd.weight", "output.weight")} == {"Q8_0"}


@pytest.mark.parametrize(
    ("rope_parameters", "model_type"),
    [
        ({"rope_type": "linear", "factor": 4.0}, "qwen3"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            | {"original_max_position_embeddings": 8192},
            "llama",
        ),
    ],
)
def test_scaled_rope_comes_back(tmp_path: Path, rope_parameters: dict[str, Any], model_type: str) -> None:
    rope_parameters = {"rope_theta": 5e5} | rope_parameters
    model = model_with(model_type, rope_parameters=rope_parameters, max_position_embeddings=16384)
    assert export(tmp_path, model).config.rope_parameters == rope_parameters


@pytest.mark.parametrize(("family", "context"), [("mistral", 16), ("phi3", 256), ("qwen2", 256)])
def test_the_context_ends_with_the_sliding_window(tmp_path: Path, family: str, context: int) -> None:
    assert export(tmp_path, zoo.FAMILIES[family]()).config.max_position_embeddings == context


# ---- tokenizer -----------------------------------------------------------------------------------------------------


def fields(file: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("kind", [tiny_tokenizers.byte_level, tiny_tokenizers.character_level])
def test_transformers_reads_the_same_tokenizer(tmp_path: Path, kind: Callable[[Path], Path]) -> None:
    checkpoint = export(tmp_path, model_with(vocab_size=400), tokenizer=kind)
    before, after = AutoTokenizer.from_pretrained(tmp_path / "run" / "model"), checkpoint.load_tokenizer()
    for text in (TEXT[:300], "in 1912 the  other\nday"):
        assert after(text, add_special_tokens=False)["input_ids"] == before(text, add_special_tokens=False)["input_ids"]
    assert (after.bos_token_id, after.eos_token_id) == (before.bos_token_id, before.eos_token_id)
    assert after.chat_template == before.chat_template == tiny_tokenizers.TEMPLATE


def test_metadata_of_a_byte_level_tokenizer(tmp_path: Path) -> None:
    metadata = fields(
        written(tmp_path, zoo.FAMILIES["llama"](), tokenizer=partial(tiny_tokenizers.byte_level, bos=True))
    )
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert metadata["tokenizer.ggml.model"] == "gpt2" and metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata["tokenizer.ggml.merges"][:2] == ["Ġ t", "h e"]
    assert len(tokens) == len(types) == zoo.VOCAB
    assert [types[tokens.index(t)] for t in ("<s>", "Ġt", "[PAD127]")] == [3, 1, 5]  # control, normal, unused
    assert metadata["tokenizer.ggml.bos_token_id"] == 1 and metadata["tokenizer.ggml.eos_token_id"] == 2
    assert metadata["tokenizer.ggml.add_bos_token"] and not metadata["tokenizer.ggml.add_eos_token"]
    assert metadata["general.name"] == "tiny/model" and metadata["general.file_type"] == 2


def test_metadata_of_a_character_level_tokenizer(tmp_path: Path) -> None:
    folder = tiny_tokenizers.character_level(tmp_path)
    metadata = tokenizer_metadata(folder.iterdir(), 400, {})
    of = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    score = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True))
    assert [of[t] for t in ("<unk>", "<0x0A>", "<s>", "the"[:1])] == [2, 6, 3, 1]
    assert 0 > score["▁t"] > score["he"] > score["▁the"] > score["▁▁"] == score["▁▁▁▁"]
    assert metadata["tokenizer.ggml.model"] == "llama" and metadata["tokenizer.ggml.add_space_prefix"] is True


def test_special_tokens_that_only_the_config_names(tmp_path: Path) -> None:
    files = tiny_tokenizers.byte_level(tmp_path)
    settings = json.loads((files / "tokenizer_config.json").read_text())
    (files / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": None, "eos_token": None}))
    metadata = tokenizer_metadata(files.iterdir(), zoo.VOCAB, {"bos": 7, "eos": [9, 11], "pad": 5000})
    ids = {key: metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "padding", "unknown")}
    assert ids == {"bos": 7, "eos": 9, "padding": None, "unknown": 0}


def split(expression: str) -> pre_tokenizers.PreTokenizer:
    cut = pre_tokenizers.Split(Regex(expression), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize(
    ("pre_tokenizer", "ignore_merges", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), False, "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            False,
            "smollm",
        ),
        (split(LLAMA3), True, "llama-bpe"),
        (split(LLAMA3), False, "dbrx"),
        (split(QWEN2), False, "qwen2"),
        (split(QWEN35), False, "qwen35"),
        (split(TEKKEN), True, "tekken"),
        (split(GPT4O), False, "gpt-4o"),
        (split(QWEN2), True, None),
        (split(r"\s+"), False, None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), False, None),
        (pre_tokenizers.Whitespace(), False, None),
    ],
)
def test_a_cut_has_llama_cpps_name_or_none(
    pre_tokenizer: Any, ignore_merges: bool, name: str | None, tmp_path: Path
) -> None:
    folder = tiny_tokenizers.byte_level(tmp_path, pre_tokenizer)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["ignore_merges"] = ignore_merges
    assert pre_tokenizer_name(tokenizer) == name


# ---- refusals ------------------------------------------------------------------------------------------------------


def edited(tmp_path: Path, kind: Callable[[Path], Path], edit: Callable[[dict[str, Any]], None]) -> list[Path]:
    """The files of a tiny tokenizer whose tokenizer.json was edited."""
    file = kind(tmp_path) / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    edit(tokenizer)
    file.write_text(json.dumps(tokenizer))
    return list(tmp_path.iterdir())


def remove_merge(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["merges"].remove(["▁", "the"])


def part_merges(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["merges"].remove(["th", "e"])
    tokenizer["model"]["merges"].append(["th", "e"])


@pytest.mark.parametrize(
    ("kind", "edit", "why"),
    [
        (tiny_tokenizers.byte_level, lambda t: t.update(normalizer={"type": "Lowercase"}), "cutting"),
        (tiny_tokenizers.byte_level, lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "cutting"),
        (tiny_tokenizers.character_level, lambda t: t.update(normalizer={"type": "NFKC"}), "normalizer"),
        (tiny_tokenizers.character_level, remove_merge, "do not agree"),
        (tiny_tokenizers.character_level, part_merges, "do not stand together"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_not_follow_is_refused(
    tmp_path: Path, kind: Callable[[Path], Path], edit: Callable[[dict[str, Any]], None], why: str
) -> None:
    with pytest.raises(SpinfoldError, match=why):
        tokenizer_metadata(edited(tmp_path, kind, edit), 400, {})


@pytest.mark.parametrize(
    ("model", "recipe", "why"),
    [
        (partial(zoo.FAMILIES["gemma2"]), {}, "gemma2"),
        (partial(model_with, hidden_act="gelu"), {}, "SiLU"),
        (partial(model_with, "phi3", head_dim=32), {}, "heads of 32"),
        (zoo.FAMILIES["llama"], {"group_size": 16}, "blocks? of"),
        (zoo.FAMILIES["llama"], {"bits": "W8A16", "weights__symmetric": False}, "asymmetric"),
        (partial(zoo.FAMILIES["llama"], hidden=72), {"bits": "W16A16", "embeddings": "Q8_0", "group_size": None}, "72"),
    ],
)
def test_a_run_that_llama_cpp_cannot_have_is_refused_before_a_byte_is_written(
    tmp_path: Path, model: Callable[[], Any], recipe: dict[str, Any], why: str
) -> None:
    with pytest.raises(SpinfoldError, match=why):
        written(tmp_path, model(), **recipe)
    assert not list((tmp_path / "gguf").iterdir())
