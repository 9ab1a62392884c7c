"""Tokenizers of the two kinds that llama.cpp knows, small enough for the networks of the zoo.

byte_level(path)         GPT-2's kind, ASCII in at most 128 tokens
character_level(path)    SentencePiece's kind, with a token for every byte: 384 tokens
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

__all__ = ["TEMPLATE", "byte_level", "character_level"]

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
SPECIAL = ["<unk>", "<s>", "</s>", "<|endoftext|>"]  # the last is looked for in every model called phi3


def byte_level(path: Path, pre_tokenizer: pre_tokenizers.PreTokenizer | None = None, bos: bool = False) -> Path:
    """Write a tokenizer over bytes, cut by GPT-2's expression unless told otherwise; returns `path`."""
    characters = ["Ċ", "Ġ", *map(chr, range(33, 127))]
    merges = [("Ġ", "t"), ("h", "e"), ("i", "n"), ("Ġt", "he"), ("e", "r"), ("1", "2"), ("Ġ", "Ġ")]
    words = SPECIAL + characters + ["".join(pair) for pair in merges]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _save(tokenizer, path, bos)


def character_level(path: Path, bos: bool = True) -> Path:
    """Write a tokenizer over characters that falls back to bytes, with a space before every text; returns `path`.

    Its merges are, as SentencePiece's are when Transformers reads them, all pairs that make up a token, by token.
    """
    pieces = ["▁t", "he", "th", "the", "▁the", "in", "er", "▁▁", "▁▁▁▁"]
    words = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *map(chr, range(33, 127)), *pieces]
    merges = [(p[:i], p[i:]) for p in pieces for i in range(1, len(p)) if {p[:i], p[i:]} <= set(words)]
    model = models.BPE(
        {word: i for i, word in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _save(tokenizer, path, bos)


def _save(tokenizer: Tokenizer, path: Path, bos: bool) -> Path:
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    return path
