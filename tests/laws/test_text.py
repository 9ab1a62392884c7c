"""Laws of texts and windows: nothing is lost, doubled or reordered unless asked, and no bad file passes."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from zoo import write_tiny_tokenizer

import spinfold.fitting.text as text_module
from spinfold.errors import SpinfoldError
from spinfold.fitting.text import load_text, texts_of, tokenize, windows

PROSE = "the inner café\nthe other one, in their thin air\n\n" * 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def refused(source: str | Path) -> SpinfoldError:
    with pytest.raises(SpinfoldError) as caught:
        load_text(source)
    error = caught.value
    assert error.what
    assert error.why
    assert error.fix
    return error


# ---- what is held out


@given(length=st.integers(1, 300))
@settings(max_examples=50)
def test_the_last_fifth_is_held_out_and_nothing_is_lost(length: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "speech.txt"
    path.write_text((PROSE * 2)[:length], "utf-8")
    seen, held_out = texts_of(str(path))
    assert seen.text + held_out.text == load_text(path).text
    assert len(held_out.text) == length // 5
    assert (seen.name, held_out.name) == ("speech", "last fifth of speech")


def test_a_text_of_its_own_leaves_calibration_the_whole_text(tmp_path: Path) -> None:
    paths = tmp_path / "a.txt", tmp_path / "b.txt"
    for path in paths:
        path.write_text(PROSE + path.stem, "utf-8")
    assert texts_of(str(paths[0]), str(paths[1])) == (load_text(paths[0]), load_text(paths[1]))


# ---- windows


@given(
    num_tokens=st.integers(1, 300),
    seq_len=st.integers(1, 40),
    count=st.integers(1, 12) | st.none(),
    seed=st.integers(0, 9),
)
@settings(max_examples=150)
def test_windows_are_distinct_aligned_pieces_of_the_text(
    num_tokens: int, seq_len: int, count: int | None, seed: int
) -> None:
    tokens_T = torch.arange(num_tokens)
    available = num_tokens // seq_len
    if available < (count or 1):
        with pytest.raises(SpinfoldError, match=f"{num_tokens:,} tokens, {(count or 1) * seq_len:,} are needed"):
            windows(tokens_T, seq_len, count, seed)
        return
    first = windows(tokens_T, seq_len, count)
    assert torch.equal(first, tokens_T[: (count or available) * seq_len].reshape(-1, seq_len))
    drawn = windows(tokens_T, seq_len, count, seed)
    assert drawn.shape == first.shape
    assert torch.equal(drawn, windows(tokens_T, seq_len, count, seed))
    starts = drawn[:, 0].tolist()
    assert len(set(starts)) == len(starts)
    assert all(start % seq_len == 0 for start in starts)
    assert torch.equal(drawn - drawn[:, :1], torch.arange(seq_len).expand_as(drawn))


def test_seeds_draw_different_windows() -> None:
    tokens_T = torch.arange(1000)
    draws = {tuple(windows(tokens_T, 10, 5, seed)[:, 0].tolist()) for seed in range(5)}
    assert len(draws) == 5


def test_windows_do_not_alias_the_text() -> None:
    tokens_T = torch.arange(20)
    windows(tokens_T, 5).fill_(-1)
    assert torch.equal(tokens_T, torch.arange(20))


# ---- tokens


def test_tokens_have_no_special_ones_and_give_the_text_back(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "the inner thing\nin there " * 30
    tokens_T = tokenize(text, tokenizer)
    assert tokens_T.dtype == torch.long
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(tokens_T.tolist())
    assert tokenizer.decode(tokens_T) == text


@pytest.mark.parametrize("max_tokens", [1, 7, 100, 901, 10_000])
def test_first_tokens_are_those_of_the_whole_text(tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
    whole_T = tokenize(PROSE, tokenizer)
    assert torch.equal(tokenize(PROSE, tokenizer, max_tokens), whole_T[:max_tokens])


def test_no_warning_about_long_texts(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    assert len(tokenize(PROSE, tokenizer)) > tokenizer.model_max_length
    assert "longer than" not in caplog.text + capfd.readouterr().err


# ---- files


@pytest.mark.parametrize(
    "encode",
    [
        str.encode,
        lambda s: codecs.BOM_UTF8 + s.encode(),
        lambda s: codecs.BOM_UTF16_LE + s.encode("utf-16-le"),
        lambda s: codecs.BOM_UTF16_BE + s.encode("utf-16-be"),
    ],
    ids=["utf-8", "utf-8 BOM", "utf-16-le", "utf-16-be"],
)
@pytest.mark.parametrize("suffix", [".txt", ".raw", ".jsonl"])
def test_every_encoding_reads_the_same(tmp_path: Path, encode: codecs._Encoder, suffix: str) -> None:
    content = json.dumps({"text": PROSE}, ensure_ascii=False) if suffix == ".jsonl" else PROSE
    path = tmp_path / f"a{suffix}"
    path.write_bytes(encode(content))
    text = load_text(path)
    assert (text.name, text.text, text.origin) == ("a", PROSE, path.name)


def test_line_ends_do_not_depend_on_the_system_that_wrote_them(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(PROSE.replace("\n", "\r\n").encode())
    assert load_text(path).text == PROSE


def test_json_lines_fields_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [{"text": "1", "content": "no"}, {"content": "2"}, {"prefix": "3", "gold_completion": " 4"}]
    path.write_text("\n\n".join(json.dumps(r) for r in records) + "\n")
    assert load_text(path).text == "1\n\n2\n\n3 4"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("empty.txt", b""),
        ("blank.txt", b" \n\t\n"),
        ("bom-only.txt", codecs.BOM_UTF8),
        ("latin1.txt", "café".encode("latin-1")),
        ("half-a-character.txt", "é".encode()[:1]),
        ("half-utf16.txt", codecs.BOM_UTF16_LE + b"a"),
        ("binary.txt", b"abc\0def"),
        ("utf32.txt", "text".encode("utf-32")),
        ("empty.jsonl", b"\n\n"),
        ("not-json.jsonl", b'{"text": "a"}\n{"text": '),
        ("list.jsonl", b'["text"]'),
        ("no-field.jsonl", b'{"body": "a"}'),
        ("number.jsonl", b'{"text": 3}'),
        ("blank-documents.jsonl", b'{"text": ""}\n{"text": " "}'),
        ("surrogate.jsonl", b'{"text": "\\ud800"}'),
        ("deep.jsonl", b"[" * 200_000),
        ("array.json", b'[\n{"text": "a"}\n]'),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    assert str(path) in refused(path).what


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "absent.txt").why
    assert "folder" in refused(tmp_path).why
    refused("a\0b")
    refused("~nobody-of-this-name/a.txt")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_huge_files_are_read_up_to_the_bound_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(text_module, "MAX_TEXT_BYTES", 1 << 20)
    line = "é" * 100 if suffix == ".txt" else json.dumps({"text": "é" * 100}, ensure_ascii=False)
    path = tmp_path / f"a{suffix}"
    path.write_text(f"{line}\n" * 6000, encoding="utf-8")  # the bound falls inside a line
    text = load_text(path)
    assert "first 1 MiB" in text.origin
    assert len(text.text.encode()) <= 1 << 20
    assert set(text.text) == {"é", "\n"}
    if suffix == ".jsonl":
        assert {len(document) for document in text.text.split("\n\n")} == {100}


def test_public_texts_without_a_network_say_what_to_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("wikitext2", "wikitext2:test", "c4"):
        error = refused(name)
        assert name in error.what
        assert "file" in error.fix
