"""A model with all that every method shares, loaded and measured once.

    model -> network in fp32        layers stay in the files if it is too large
    text  -> tokens                 for calibration, and others, held out, for the figures
    both  -> what the original does fingerprint, quality, reference

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spinfold.errors import SpinfoldError
from spinfold.evaluation import Fingerprint, Quality, Reference, measure_quality, take_fingerprint
from spinfold.fitting.text import load_text, tokenize, windows
from spinfold.forecast import stays_in_files, unmeasured_machine
from spinfold.networks import Network
from spinfold.networks.safetensors_reader import SafetensorsFolder
from spinfold.networks.sources import Checkpoint
from spinfold.progress import Progress
from spinfold.recipe import Calibration, Recipe

__all__ = [
    "EVAL_TOKENS",
    "HELD_OUT",
    "PROOF_TOKENS",
    "Subject",
    "load_network",
    "longest_window",
    "prepare",
    "read_tokens",
]

HELD_OUT = 0.2
"""The last fifth of the calibration text is kept for the figures, never for fitting."""
EVAL_TOKENS = {"cuda": 1 << 18, "cpu": 4096}
"""How many tokens the figures are measured on, at most."""
PROOF_TOKENS = 256
"""How many tokens of one window the fingerprint is taken on, at most."""


@dataclass(frozen=True)
class Subject:
    """A model with all that every method shares: calibration tokens, held-out windows, and what the original does.

    Tied weights are untied, else nothing has been changed. `calibration_T` and `held_out_NT` do not overlap.
    """

    network: Network
    checkpoint: Checkpoint
    calibration_T: Tensor
    held_out_NT: Tensor
    fingerprint: Fingerprint
    quality: Quality
    reference: Reference

    def windows(self, seq_len: int, count: int, seed: int) -> Tensor:
        """`count` calibration windows, or all that there are if a fit asks for more."""
        return windows(self.calibration_T, seq_len, max(1, min(count, len(self.calibration_T) // seq_len)), seed)


def prepare(
    checkpoint: Checkpoint,
    recipe: Recipe,
    device: torch.device,
    progress: Progress,
    *,
    held_out: str | None = None,
    held_out_tokens: int | None = None,
    max_tokens: int | None = None,
) -> Subject:
    """Load a model and its texts, and measure the original.

    `held_out` names the text for the figures; without it the last fifth of the calibration text serves. `max_tokens`
    saves the time to tokenize more of the calibration text than that.
    """
    calibration = recipe.calibration
    with progress.stage("load model"):
        tokenizer = checkpoint.load_tokenizer()
        network = load_network(checkpoint, device, tokenizer)
        network.untie()
    with progress.stage("read text"):
        tokens_T = read_tokens(calibration.source, network, max_tokens)
        if held_out is None:
            tokens_T, held_T = _split(tokens_T, calibration)
        else:
            held_T = read_tokens(held_out, network)
        windows(tokens_T, calibration.seq_len, calibration.samples)  # too little text is an error now, not after a fit
        limit = held_out_tokens or EVAL_TOKENS.get(device.type, EVAL_TOKENS["cpu"])
        available = len(held_T) // calibration.seq_len
        held_NT = windows(held_T, calibration.seq_len, max(1, min(available, limit // calibration.seq_len)))
    fingerprint = take_fingerprint(network, held_NT[:1, :PROOF_TOKENS])
    quality, reference = measure_quality(
        network, held_NT, keep=True, compute=recipe.compute, progress=progress, label="evaluate original"
    )
    assert reference is not None
    return Subject(network, checkpoint, tokens_T, held_NT, fingerprint, quality, reference)


def read_tokens(source: str, network: Network, max_tokens: int | None = None) -> Tensor:
    """A text in the tokens of a network, int64 `(T,)`; each has its row in the embedding."""
    tokens_T = tokenize(load_text(source), network.tokenizer, max_tokens)
    rows = network.embedding.num_embeddings
    if len(tokens_T) and (largest := int(tokens_T.max())) >= rows:
        raise SpinfoldError(
            "The tokenizer does not belong to the model.",
            f"It reads the text {source} as tokens up to {largest}, and the model has an embedding for {rows}.",
            "Put the model's own tokenizer files into its folder.",
        )
    return tokens_T


def load_network(
    checkpoint: Checkpoint, device: torch.device, tokenizer: PreTrainedTokenizerBase | None = None
) -> Network:
    """In fp32; its layers stay in the files if it is too large."""
    name = checkpoint.name
    if stays_in_files(checkpoint, unmeasured_machine(device)):
        assert isinstance(checkpoint.weights, SafetensorsFolder)
        return Network(checkpoint.open_model(), tokenizer, name, store=checkpoint.weights, device=device)
    return Network(checkpoint.load_model(torch.float32, device), tokenizer, name)


def longest_window(checkpoint: Checkpoint) -> int:
    """The longest window that a model can see."""
    return getattr(checkpoint.config, "max_position_embeddings", None) or sys.maxsize


def _split(tokens_T: Tensor, calibration: Calibration) -> tuple[Tensor, Tensor]:
    """A text's beginning, for calibration, and its end, for the figures; `SpinfoldError` if it can't serve both."""
    held = max(calibration.seq_len, int(HELD_OUT * len(tokens_T)))
    if len(tokens_T) < calibration.samples * calibration.seq_len + held:
        raise SpinfoldError(
            f"The text is too short for {calibration.samples} windows of {calibration.seq_len} tokens.",
            f"It has {len(tokens_T):,} tokens, and the last {held:,} must be kept for the figures.",
            "Pass a longer text, or ask for fewer --samples or a shorter --seq-len.",
        )
    return tokens_T[:-held], tokens_T[-held:]
