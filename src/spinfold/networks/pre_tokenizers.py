"""How byte-level BPE tokenizers cut a text before merging: llama.cpp's names for what tokenizer.json spells out.

    tokenizer.json: a regular expression (Split), single digits (Digits), GPT-2's own expression (ByteLevel)
    GGUF:           `tokenizer.ggml.pre`, a name whose expression is built into llama.cpp

A name that is close but not the same gives other tokens and says nothing, so what the table does not hold is unknown.
Of `tekken` and `gpt-4o` llama.cpp itself (llama-cpp-python 0.3.36) knows no combining marks, and the case of ASCII
letters alone: it cuts LÉ|ON where the tokenizer has one word (`tests/runtime/test_llama_cpp.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["PRE_TOKENIZERS", "pre_tokenizer_name"]

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN35 = (
    rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

DIGITS: Final = "<digits>"
"""Stands for: each digit alone, then GPT-2's expression."""
GPT2: Final = "<gpt-2>"
"""Stands for: GPT-2's expression, which the ByteLevel step knows."""

PRE_TOKENIZERS: Mapping[tuple[str, bool], str] = {
    (GPT2, False): "gpt-2",
    (DIGITS, False): "smollm",
    (rf"{_ENGLISH}|{_WORD}|\p{{N}}{{1,3}}|{_REST}", True): "llama-bpe",
    (rf"{_ENGLISH}|{_WORD}|\p{{N}}{{1,3}}|{_REST}", False): "dbrx",
    (rf"{_ENGLISH}|{_WORD}|\p{{N}}|{_REST}", False): "qwen2",
    (_QWEN35, False): "qwen35",
    (rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}|{_CASED_REST}", True): "tekken",
    (
        rf"{_START}{_UPPER}*{_LOWER}+{_ENGLISH}?|{_START}{_UPPER}+{_LOWER}*{_ENGLISH}?|\p{{N}}{{1,3}}|{_CASED_REST}",
        False,
    ): "gpt-4o",
}
"""(expression, does a piece that is a token skip the merges?) -> name."""


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str | None:
    """The name of the cutting in a tokenizer.json; None for one that llama.cpp is not known to have."""
    outer = tokenizer.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    expression = _expression([{key: v for key, v in step.items() if key != "trim_offsets"} for step in steps])
    ignore_merges = bool(tokenizer["model"].get("ignore_merges", False))
    return PRE_TOKENIZERS.get((expression, ignore_merges)) if expression else None


def _expression(steps: list[dict[str, Any]]) -> str | None:
    bytes_only, with_regex = (
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex} for use_regex in (False, True)
    )
    match steps:
        case [step] if step == with_regex:
            return GPT2
        case [{"type": "Digits", "individual_digits": True}, step] if step == with_regex:
            return DIGITS
        case [{"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False}, step] if (
            step == bytes_only
        ):
            return regex
    return None
