"""A Hugging Face tokenizer as GGUF metadata, such that llama.cpp reads a text as the same tokens.

    tokenizer.ggml.model   gpt2                                        llama
    tokenizer.json         BPE over bytes written as characters        BPE over characters, bytes as a last resort
    decides                merges, in order; `pre`, a name for how     scores: of all pairs that make up a token, the
                           a text is cut before                        one with the highest score is merged first

`llama` knows tokens where BPE knows pairs. Both agree if every pair that makes up a token is a merge, and the merges
of one token stand together: then the score of a token is minus their place. `_scores` checks exactly this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer

from spinfold.errors import SpinfoldError
from spinfold.networks.pre_tokenizers import pre_tokenizer_name

__all__ = ["Metadata", "tokenizer_metadata"]

Metadata = dict[str, bool | int | float | str | list[int] | list[float] | list[str]]

_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
"""Name in Transformers -> name in GGUF, whose spelling is the format's."""
_SPACE, _BYTE = "▁", re.compile("<0x[0-9A-F]{2}>")


def tokenizer_metadata(files: Iterable[Path], vocab_size: int, config_ids: Mapping[str, Any]) -> Metadata:
    """The `tokenizer.*` keys of the tokenizer in `files`, for a model with `vocab_size` embeddings.

    `config_ids` are the special tokens that the model's config names (`bos`, `eos`, `pad`; of several the first
    counts), used where the tokenizer has none. Raises `SpinfoldError` for a tokenizer that llama.cpp is not known to
    follow.
    """
    by_name = {file.name: file for file in files}
    if lost := [name for name in ("tokenizer.json", "tokenizer_config.json") if name not in by_name]:
        raise _refusal(f"It has no {lost[0]}.", "Save it as a fast tokenizer, and make the run again.")
    tokenizer = json.loads(by_name["tokenizer.json"].read_text("utf-8"))
    settings = json.loads(by_name["tokenizer_config.json"].read_text("utf-8"))
    tokens, types = _tokens(tokenizer, vocab_size)
    result: Metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    by_characters = tokenizer["model"].get("byte_fallback", False)
    result |= _character_level(tokenizer, tokens, types) if by_characters else _byte_level(tokenizer)
    result |= _special(by_name["tokenizer.json"], settings, tokens, config_ids)
    if template := _chat_template(by_name, settings):
        result["tokenizer.chat_template"] = template
    return result


def _tokens(tokenizer: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and type of every embedding's token; rows without a token are padding that is never read."""
    model, added = tokenizer["model"], tokenizer.get("added_tokens", [])
    if model["type"] != "BPE":
        raise _refusal(f"Its model is {model['type']}; only BPE is written.", "Use a model with a BPE tokenizer.")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    known = [(text, i, TokenType.NORMAL) for text, i in model["vocab"].items()]
    known += [(t["content"], t["id"], TokenType.CONTROL if t["special"] else TokenType.USER_DEFINED) for t in added]
    if model.get("byte_fallback"):
        known += [(text, i, TokenType.BYTE) for text, i in model["vocab"].items() if _BYTE.fullmatch(text)]
        known += [(text, i, TokenType.UNKNOWN) for text, i in model["vocab"].items() if text == "<unk>"]
    for text, i, kind in known:
        if i < vocab_size:  # the model can't read one that has no embedding
            tokens[i], types[i] = text, int(kind)
    if len(set(tokens)) < vocab_size:
        raise _refusal("Two of its tokens have the same text.", "Remove one of them from tokenizer.json.")
    return tokens, types


def _byte_level(tokenizer: dict[str, Any]) -> Metadata:
    """GPT-2's kind. llama.cpp normalises nothing; NFC changes only texts that are not composed, which are rare."""
    model, normalizer = tokenizer["model"], tokenizer.get("normalizer")
    name = pre_tokenizer_name(tokenizer)
    if name is None or (normalizer is not None and normalizer["type"] != "NFC"):
        raise _refusal(
            "llama.cpp is not known to have its way of cutting a text into pieces (pre_tokenizer and normalizer in "
            "tokenizer.json), and a similar one would silently give other tokens.",
            "Use another target, or add the way to networks/pre_tokenizers.py if llama.cpp has it.",
        )
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(model)],
        "tokenizer.ggml.add_space_prefix": False,
    }


def _character_level(tokenizer: dict[str, Any], tokens: list[str], types: list[int]) -> Metadata:
    """SentencePiece's kind."""
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": _scores(tokens, types, _merges(tokenizer["model"])),
        "tokenizer.ggml.add_space_prefix": _space_prefix(tokenizer),
    }


def _scores(tokens: list[str], types: list[int], merges: list[tuple[str, str]]) -> list[float]:
    """Minus the place of a token's merges among those of all tokens; 0 for what no merge makes.

    Runs of spaces share one place, for their merges are mixed, longer runs first. With equal scores llama.cpp takes
    the leftmost pair; in a row of spaces that pair is also the one that makes the longest run.
    """
    place: dict[str, int] = {}
    for text, _ in groupby(_run_or_itself(a + b) for a, b in merges):
        if text in place:
            raise _refusal(f"The merges that give {text!r} do not stand together.", "Use another target.")
        place[text] = len(place) + 1
    normal = {text for text, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL}
    possible = {(t[:i], t[i:]) for t in normal for i in range(1, len(t)) if t[:i] in normal and t[i:] in normal}
    if odd := possible.symmetric_difference(merges):
        raise _refusal(f"Its merges and its tokens do not agree on {' + '.join(min(odd))!r}.", "Use another target.")
    return [float(-place.get(_run_or_itself(text), 0)) for text in tokens]


def _run_or_itself(text: str) -> str:
    return _SPACE * 2 if set(text) == {_SPACE} and len(text) > 1 else text


def _space_prefix(tokenizer: dict[str, Any]) -> bool:
    """Does a space go before a text? Spaces are written as ▁ by a normalizer (older files) or a pre-tokenizer.

    A text that begins with a space gets another one in llama.cpp and from the normalizer, from the pre-tokenizer not:
    llama.cpp has no way to say so, and such texts are rare.
    """
    outer = tokenizer.get("normalizer") or {"type": "Sequence", "normalizers": []}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    match outer.get("normalizers", [outer]), tokenizer.get("pre_tokenizer"):
        case [[{"type": "Prepend", "prepend": "▁"}, step], None] if step == replace:
            return True
        case [[step], None] if step == replace:
            return False
        case [[], {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}]:
            return bool(scheme != "never")
    raise _refusal("llama.cpp is not known to have its normalizer and pre_tokenizer.", "Use another target.")


def _special(file: Path, settings: dict[str, Any], tokens: list[str], config_ids: Mapping[str, Any]) -> Metadata:
    """The ids of special tokens, and which of them the tokenizer itself puts around a text."""
    id_of = {text: i for i, text in enumerate(tokens)}
    ids: dict[str, int] = {}
    for name in _SPECIAL:
        token = settings.get(f"{name}_token")
        text = token["content"] if isinstance(token, dict) else token
        found = id_of.get(text) if text else config_ids.get(name)
        if isinstance(found, list):
            found = found[0]
        if found is not None and found < len(tokens):
            ids[name] = found
    reader = Tokenizer.from_file(str(file))
    bare, full = (reader.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), None)
    before, after = (None, None) if at is None else (full[:at], full[at + len(bare) :])
    if before not in ([], [ids.get("bos")]) or after not in ([], [ids.get("eos")]):
        raise _refusal(f"It makes {full} of a text whose tokens are {bare}.", "Use another target.")
    result: Metadata = {f"tokenizer.ggml.{_SPECIAL[name]}_token_id": i for name, i in ids.items()}
    return result | {"tokenizer.ggml.add_bos_token": bool(before), "tokenizer.ggml.add_eos_token": bool(after)}


def _chat_template(files: Mapping[str, Path], settings: dict[str, Any]) -> str | None:
    """A file of its own, or a setting: one template, or several of which `default` is the one."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].read_text("utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """As pairs; older files join them by a space."""
    return [tuple(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in model["merges"]]


def _refusal(why: str, fix: str) -> SpinfoldError:
    return SpinfoldError("The model's tokenizer can't be written as GGUF.", why, fix)
