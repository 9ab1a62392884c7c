"""What llama.cpp computes from a GGUF file, through the optional package llama-cpp-python.

On a CPU it rounds activations to 8 bits per block of 32 before a product with a quantized weight, and to fp16 before
one with an F16 weight; keys and values are kept in fp16. So its logits are near those of the run, never equal.

Shapes: N windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spinfold.errors import SpinfoldError

__all__ = ["installed", "logits", "tokens_of", "tokens_per_second"]

_listener: Any = None


def installed() -> bool:
    """Can llama-cpp-python be imported?"""
    try:
        import llama_cpp  # noqa: F401
    except (ImportError, OSError, RuntimeError):  # its shared library may be missing, or built for another CPU
        return False
    return True


def logits(path: Path, ids_NT: Tensor, threads: int | None = None) -> Tensor:
    """The logits `(N, T, V)`, fp32, of each window by itself. Raises `SpinfoldError` if the file does not load."""
    model = _load(path, ids_NT.shape[1], logits_all=True, **_threads(threads))
    windows = []
    for ids_T in ids_NT.tolist():
        model.reset()
        model.eval(ids_T)
        windows.append(np.array(model.scores[: len(ids_T)], dtype=np.float32))
    return torch.from_numpy(np.stack(windows))


def tokens_of(path: Path, text: str, special: bool = False) -> list[int]:
    """How llama.cpp's own tokenizer reads a text, with what it puts around it if `special`."""
    return list(_load(path, 8, vocab_only=True).tokenize(text.encode(), add_bos=special, special=True))


def tokens_per_second(path: Path, prompt: list[int], count: int, threads: int | None = None) -> float:
    """The speed of greedy generation of `count` tokens after a prompt, the prompt's own time left out."""
    model = _load(path, len(prompt) + count, **_threads(threads))
    model.eval(prompt)
    start = time.perf_counter()
    for _ in range(count):
        model.eval([model.sample(temp=0.0)])
    return count / (time.perf_counter() - start)


def _threads(count: int | None) -> dict[str, int | None]:
    """For one token at a time, and for many."""
    return {"n_threads": count, "n_threads_batch": count}


def _load(path: Path, num_tokens: int, **options: Any) -> Any:
    try:
        from llama_cpp import Llama
    except (ImportError, OSError, RuntimeError) as error:
        raise SpinfoldError(
            "llama.cpp can't be asked.",
            f"llama-cpp-python does not load: {error}.",
            "Run pip install llama-cpp-python (it compiles llama.cpp), or leave out the check.",
        ) from None
    lines: list[str] = []
    _listen(lines)
    try:
        return Llama(str(path), n_ctx=num_tokens, n_batch=max(num_tokens, 32), verbose=False, **options)
    except (ValueError, AssertionError, RuntimeError) as error:
        why = " ".join(line for line in lines if "error" in line) or str(error)
        raise SpinfoldError(f"llama.cpp does not load {path.name}.", why, "Export the run again.") from None


def _listen(lines: list[str]) -> None:
    """Collect what llama.cpp logs: its exceptions say only that something failed."""
    import llama_cpp

    def note(level: int, text: bytes, _: Any) -> None:
        lines.append(text.decode("utf-8", "replace").strip())

    global _listener
    _listener = llama_cpp.llama_log_callback(note)  # llama.cpp keeps only its address
    llama_cpp.llama_log_set(_listener, None)
