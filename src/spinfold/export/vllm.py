"""What vLLM computes from a compressed-tensors folder, through the optional package vllm (or its CPU build).

vLLM gives log-probabilities of prompt tokens, not logits; for agreement, KL and perplexity they are as good. It keeps
a global state of what it has loaded, so one process serves one checkpoint.

Shapes: N windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinfold.errors import SpinfoldError
from spinfold.files import read_json

__all__ = ["installed", "logits"]

_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_INT4_W4A8": "0",  # else a CPU with AMX rounds the activations of W4A16 to 8 bits
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}


def installed() -> bool:
    """Can vLLM be imported?"""
    try:
        import vllm  # noqa: F401
    except (ImportError, OSError, RuntimeError):  # its compiled part may be built for another CPU or GPU
        return False
    return True


def logits(folder: Path, ids_NT: Tensor) -> Tensor:
    """Log-probabilities `(N, T, V)`, fp32; the last token's are -inf but for its own guess, which nothing reads.

    Raises `SpinfoldError` if vLLM is not installed. Its own errors come through: a scheme without a kernel is one.
    """
    os.environ |= {name: value for name, value in _SETTINGS.items() if name not in os.environ}
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise SpinfoldError("vLLM can't be asked.", f"It does not import: {error}.", "Run pip install vllm.") from None
    torch.cpu._init_amx()  # Linux ends a process that uses AMX and has not asked for it
    size = read_json(folder / "config.json")["vocab_size"]
    model = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=ids_NT.shape[1] + 1,
        max_logprobs=size,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=size, detokenize=False)
    outputs = model.generate([{"prompt_token_ids": ids_T} for ids_T in ids_NT.tolist()], sampling, use_tqdm=False)
    return torch.stack([_after_each_token(output, size) for output in outputs])


def _after_each_token(output: Any, size: int) -> Tensor:
    """`(T, V)`: row t is about token t + 1, with which vLLM keeps it; there is none about the first token."""
    rows_TV = torch.full((len(output.prompt_logprobs), size), -torch.inf)
    for t, row in enumerate(output.prompt_logprobs[1:]):
        rows_TV[t, list(row)] = torch.tensor([one.logprob for one in row.values()])
    rows_TV[-1, output.outputs[0].token_ids[0]] = 0
    return rows_TV
