"""llama.cpp itself: files of every family and type compute what the run computes, and read a text as the same tokens.

Both are asked on real text. A random network expects it less than chance would, at a perplexity far above the size of
its vocabulary: so it is sure of its guesses, and what changes them shows.

Needs llama-cpp-python (`make test-runtimes` builds it); skipped without.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers
import torch
import zoo
from gguf_run import make_run
from tokenizers import Regex, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer

import spinfold
from spinfold.errors import SpinfoldError
from spinfold.evaluation import Proof
from spinfold.export import check as checks
from spinfold.export import gguf_writer, llama_cpp
from spinfold.export.targets import BOUNDS, TARGETS, Bounds
from spinfold.fitting.text import load_text, tokenize
from spinfold.networks.family import family_of
from spinfold.networks.pre_tokenizers import DIGITS, GPT2, PRE_TOKENIZERS
from spinfold.networks.sources import resolve
from spinfold.recipe import Recipe

pytestmark = pytest.mark.skipif(not llama_cpp.installed(), reason="llama-cpp-python is not installed")

TEXT = "The rain in Spain stays mainly in the plain; the theatre in the north is there.\n" * 5
LENGTH, TOKENS = 16, 512
"""Windows within the zoo's small sliding ones, and how many tokens of the text they hold together."""
FAMILIES = ["llama", "llama_tied", "llama_biases", "llama_head_dim", "mistral", "qwen2", "qwen3", "phi3", "granite"]
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
HALF = Bounds(top1=0.98, kl=1e-4, perplexity=5e-3)
"""For F16, where llama.cpp rounds activations to 16 bits and not to 8."""


def written(tmp_path: Path, model: Any, **options: Any) -> Path:
    (folder := tmp_path / "gguf").mkdir()
    gguf_writer.write(make_run(tmp_path / "run", model, **options), folder)
    return next(folder.iterdir())


def ids_of(run: Path, length: int) -> Tensor:
    """Windows of real text in the tokens of the run's own tokenizer, which all stand in its small vocabulary."""
    return zoo.text_tokens(run / "model", TOKENS // length, length)


def proofs(tmp_path: Path, file: Path, length: int = LENGTH) -> list[Proof]:
    """Top-1 agreement, KL and perplexity of the file in llama.cpp against the run in memory."""
    ids_NT = ids_of(tmp_path / "run", length)
    run_NTV = checks.logits_of_run(tmp_path / "run", ids_NT, torch.device("cpu"))
    return compared(run_NTV, file, ids_NT)


def compared(logits_NTV: Tensor, file: Path, ids_NT: Tensor) -> list[Proof]:
    there_NTV = llama_cpp.logits(file, ids_NT, threads=1)  # more only wait for each other on a busy machine
    assert bool(torch.isfinite(there_NTV).all())
    bounds = HALF if file.stem.endswith("F16") else BOUNDS["gguf"]
    return checks.compare(logits_NTV, there_NTV, ids_NT, bounds, "gguf")


def broken(proofs: list[Proof]) -> list[str]:
    return [str(proof) for proof in proofs if not proof.ok]


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_is_the_run(tmp_path: Path, family: str, kind: str, rotated: bool) -> None:
    file = written(tmp_path, zoo.FAMILIES[family](), rotated=rotated, **TYPES[kind])
    assert not broken(proofs(tmp_path, file))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotated_file_is_the_model_that_was_rotated(tmp_path: Path, family: str) -> None:
    """In 16 bits llama.cpp gives what the model gave before a map was folded into it."""
    make_run(tmp_path / "plain", zoo.FAMILIES[family](), **TYPES["F16"])
    file = written(tmp_path, zoo.FAMILIES[family](), rotated=True, **TYPES["F16"])
    ids_NT = ids_of(tmp_path / "run", LENGTH)
    assert not broken(compared(zoo.FAMILIES[family]()(ids_NT).logits, file, ids_NT))


def test_every_family_that_llama_cpp_has_is_tried() -> None:
    tried = {family_of(zoo.FAMILIES[family].args[0]).name for family in FAMILIES}
    assert {tried == set(row.families) for row in TARGETS if row.target == "gguf"} == {True}


@pytest.mark.parametrize("name", NARROW)
def test_other_grids_fit_into_the_blocks(tmp_path: Path, name: str) -> None:
    """Fewer bits than the block has, and groups of more than one block."""
    kind, recipe = NARROW[name]
    file = written(tmp_path, zoo._build("granite", {"hidden_size": 128, "intermediate_size": 192}), **recipe)
    assert file.stem.endswith(kind) and not broken(proofs(tmp_path, file))


def test_the_verb_proves_what_it_writes(tmp_path: Path) -> None:
    """GPTQ's integers bit for bit; compared on windows no longer than the sliding one, after which they'd differ."""
    model = tiny_tokenizers.byte_level(zoo.save(zoo.FAMILIES["mistral"](), tmp_path / "model"))
    (text := tmp_path / "text.txt").write_text(load_text("sotu").text[:8000])
    settings = {"calibration__source": str(text), "calibration__samples": 4, "calibration__seq_len": 32}
    settings |= {"method": "quarot", "sites": ["residual", "value"], "weights__scale_dtype": "float16"}
    run = spinfold.quantize(str(model), tmp_path / "run", Recipe().with_(**TYPES["Q4_0"], **settings), device="cpu")
    exported = spinfold.export(run.path, "gguf", tmp_path / "out", text=str(text), device="cpu").data["proofs"]
    assert len(exported) == 4 and all(proof["ok"] for proof in exported)
    assert exported[0]["statement"] == "gguf: integers that differ from the run's" and exported[0]["measured"] == 0
    assert "30 tokens" in exported[1]["detail"]


right_rows = gguf_writer.permute
WRONG_ROWS: dict[str, Callable[[Any, int], Any]] = {
    "in Transformers' order": lambda weight, num_heads: weight,
    "of heads half as large": lambda weight, num_heads: right_rows(weight, 2 * num_heads),
}


@pytest.mark.parametrize("kind", ["Q4_0", "F16"])
@pytest.mark.parametrize("rows", WRONG_ROWS)
def test_other_rows_of_queries_and_keys_are_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: str, kind: str
) -> None:
    """Which agreement and KL tell; perplexity may stay where it was, for a random network guesses no better now."""
    monkeypatch.setattr(gguf_writer, "permute", WRONG_ROWS[rows])
    file = written(tmp_path, zoo.FAMILIES["llama"](), rotated=True, **TYPES[kind])
    top1, kl, _ = proofs(tmp_path, file)
    assert top1.measured > 2 * top1.tolerance and kl.measured > 10 * kl.tolerance


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
    assert not broken(proofs(tmp_path, file, length=128))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", [tiny_tokenizers.byte_level, tiny_tokenizers.character_level])
def test_llama_cpp_reads_the_same_tokens(tmp_path: Path, kind: Callable[..., Path], bos: bool) -> None:
    file = written(tmp_path, zoo._build("llama", {"vocab_size": 400}), tokenizer=partial(kind, bos=bos))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    for text in (TEXT, "in 1912 the  other\nday", " then, four    spaces", "the<s>the"):
        assert llama_cpp.tokens_of(file, text) == tokenizer(text, add_special_tokens=False)["input_ids"], text
        assert llama_cpp.tokens_of(file, text, special=bos) == tokenizer(text)["input_ids"], text
    assert metadata_in_llama_cpp(file)["tokenizer.chat_template"] == tokenizer.chat_template
    assert tokenizer.chat_template == tiny_tokenizers.TEMPLATE


def metadata_in_llama_cpp(file: Path) -> dict[str, str]:
    from llama_cpp import Llama

    return dict(Llama(str(file), vocab_only=True, verbose=False).metadata)


PROBES = [
    "The rain; camelCase HTTPServer iPhone XMLHttpRequest",  # `Ġrain` is a token that no merges make
    "It's we'll THEY'LL I'm you'RE 'tis O'Neil's '12",
    "1 12 123 1234 12345, a1b22c 3.14 \u00bd \u00b23 \u0663\u0664\u0665 \u2167",
    "a  b   c \n\n d\t\te \n  f\r\n\r\ng   a\u00a0b\u2003c",
    "(a/b)//c://d...!!\n\n-- --x_y _z $100% @a#b hi\U0001f600!",
    "na\u00efve \u041c\u0438\u0440 \u65e5\u672c\u8a9e\u3068text\u4e2d\u6587\u3002",
]
"""Where the cuts differ: cases, contractions, digits, white space, punctuation, other scripts."""
UPPERCASE, MARKS = "L\u00c9ON", "e\u0301a n\u0303o \u0915\u093e \u0939\u093f\u0928\u094d\u0926\u0940"
CASE_OF_ASCII_ONLY = {"tekken", "gpt-4o"}
"""Cuts by case, for which llama.cpp's own expressions know the case of ASCII letters alone, and no marks."""
CUTS = {name: cut for cut, name in PRE_TOKENIZERS.items()}


def pairs_tokenizer(path: Path, expression: str, ignore_merges: bool) -> Path:
    """A tokenizer that merges any two characters that meet in a probe: then each place of a cut is seen in the tokens.

    Published merges would not do, since what they were learned from was cut already.
    """
    gpt2, raw = (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex) for use_regex in (True, False))
    if expression == GPT2:
        cut = gpt2
    elif expression == DIGITS:
        cut = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    else:
        cut = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), raw])
    file = tiny_tokenizers.byte_level(path, cut) / "tokenizer.json"
    tokenizer = json.loads(file.read_text("utf-8"))
    model = tokenizer["model"]
    texts = [raw.pre_tokenize_str(text)[0][0] for text in (*PROBES, UPPERCASE, MARKS)]
    pairs = dict.fromkeys(pair for text in texts for pair in pairwise(text))
    merges = dict.fromkeys([*map(tuple, model["merges"]), *pairs])
    words = dict.fromkeys([*model["vocab"], *sorted(raw.alphabet()), *map("".join, merges), "\u0120rain"])
    model |= {"vocab": {word: i for i, word in enumerate(words)}, "merges": [list(pair) for pair in merges]}
    file.write_text(json.dumps(tokenizer | {"model": model | {"ignore_merges": ignore_merges}}), "utf-8")
    return path


def in_pairs(tmp_path: Path, name: str) -> tuple[Path, Any]:
    """A file that says `name` for its cut, and the tokenizer it is made from."""
    expression, ignore_merges = CUTS[name]
    cut = partial(pairs_tokenizer, expression=expression, ignore_merges=ignore_merges)
    file = written(tmp_path, zoo._build("llama", {"vocab_size": 1000, "num_hidden_layers": 1}), tokenizer=cut)
    assert metadata_in_llama_cpp(file)["tokenizer.ggml.pre"] == name
    return file, AutoTokenizer.from_pretrained(tmp_path / "run" / "model")


@pytest.mark.parametrize("name", CUTS)
def test_llama_cpp_cuts_a_text_at_the_same_places(tmp_path: Path, name: str) -> None:
    file, tokenizer = in_pairs(tmp_path, name)
    for text in (*PROBES, load_text("sotu").text[:20_000]):
        assert llama_cpp.tokens_of(file, text) == tokenize(text, tokenizer).tolist(), text[:100]
    # Known, and no file can help it. A newer llama.cpp for which this fails has learned it: then these are probes too.
    for text in (UPPERCASE, MARKS):
        same = llama_cpp.tokens_of(file, text) == tokenize(text, tokenizer).tolist()
        assert same == (name not in CASE_OF_ASCII_ONLY), text


def test_no_two_cuts_read_the_probes_alike(tmp_path: Path) -> None:
    """So a file with the name of another cut would be found."""
    texts = (*PROBES, MARKS)
    read = {}
    for name, (expression, ignore_merges) in CUTS.items():
        tokenizer = AutoTokenizer.from_pretrained(pairs_tokenizer(tmp_path / name, expression, ignore_merges))
        read[name] = str([tokenize(text, tokenizer).tolist() for text in texts])
    assert len(set(read.values())) == len(CUTS)


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
