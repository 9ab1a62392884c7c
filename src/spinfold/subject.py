"""A model with all that every method shares, loaded and measured once.

    model -> network in fp32        layers stay in the files if it is too large
    texts -> tokens                 to calibrate on, and those held out, for the figures
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
from spinfold.fitting.text import Text, load_text, texts_of, tokenize, windows
from spinfold.forecast import stays_in_files, unmeasured_machine
from spinfold.networks import Network
from spinfold.networks.safetensors_reader import SafetensorsFolder
from spinfold.networks.sources import Checkpoint
from spinfold.progress import Progress
from spinfold.recipe import Recipe

__all__ = [
    "EVAL_TOKENS",
    "PROOF_TOKENS",
    "Subject",
    "load_network",
    "longest_window",
    "prepare",
    "read_tokens",
]

EVAL_TOKENS = {"cuda": 1 << 18, "cpu": 4096}
"""How many of the tokens held out the figures are measured on, at most: the first ones."""
PROOF_TOKENS = 256
"""How many tokens of one window the fingerprint is taken on, at most."""


@dataclass(frozen=True)
class Subject:
    """A model with all that every method shares: calibration tokens, held-out windows, and what the original does.

    Tied weights are untied, else nothing has been changed. `held_out` is the name of the text of `held_out_NT`
    (`fitting.text.texts_of`).
    """

    network: Network
    checkpoint: Checkpoint
    calibration_T: Tensor
    held_out: str
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

    `held_out` names the text of the figures, else it is the calibration text's last fifth; `held_out_tokens` of it are
    used. `max_tokens` saves the time to tokenize more of the calibration text than that.
    """
    seq_len = recipe.calibration.seq_len
    with progress.stage("load model"):
        tokenizer = checkpoint.load_tokenizer()
        network = load_network(checkpoint, device, tokenizer)
        network.untie()
    with progress.stage("read text"):
        calibration_text, held_out_text = texts_of(recipe.calibration.source, held_out)
        tokens_T = read_tokens(calibration_text, network, max_tokens)
        windows(tokens_T, seq_len, recipe.calibration.samples)  # too little text is an error now, not after a fit
        limit = held_out_tokens or EVAL_TOKENS.get(device.type, EVAL_TOKENS["cpu"])
        held_NT = windows(read_tokens(held_out_text, network, max(limit, seq_len)), seq_len)
    fingerprint = take_fingerprint(network, held_NT[:1, :PROOF_TOKENS])
    quality, reference = measure_quality(
        network, held_NT, keep=True, compute=recipe.compute, progress=progress, label="evaluate original"
    )
    assert reference is not None
    return Subject(network, checkpoint, tokens_T, held_out_text.name, held_NT, fingerprint, quality, reference)


def read_tokens(text: Text | str, network: Network, max_tokens: int | None = None) -> Tensor:
    """A text, or the one that is named, in the tokens of a network, int64 `(T,)`; each has its row in the embedding."""
    text = load_text(text) if isinstance(text, str) else text
    tokens_T = tokenize(text, network.tokenizer, max_tokens)
    rows = network.embedding.num_embeddings
    if len(tokens_T) and (largest := int(tokens_T.max())) >= rows:
        raise SpinfoldError(
            "The tokenizer does not belong to the model.",
            f"It reads the text {text.name} as tokens up to {largest}, and the model has an embedding for {rows}.",
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
