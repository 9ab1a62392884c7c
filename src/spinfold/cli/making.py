"""The commands that write something: `quantize`, `rotate`, `export`, `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import spinfold
from spinfold.cli.options import (
    BitWidths,
    Calibration,
    Device,
    Dtype,
    Grid,
    GroupSize,
    Json,
    Model,
    Preset,
    RoundingMethod,
    Seed,
    Silent,
    Sites,
    load_recipe,
    names_in,
)
from spinfold.cli.printing import number_text, print_forecast, print_json, print_proof, print_table
from spinfold.errors import SpinfoldError
from spinfold.progress import for_terminal

__all__ = ["export", "quantize", "report", "rotate"]


def quantize(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder for the run; it must not hold anything else.")
    ],
    method: Annotated[str | None, typer.Option(help="A method that `spinfold methods` lists.")] = None,
    sites: Sites = None,
    bits: BitWidths = None,
    format: Grid = None,
    group_size: GroupSize = None,
    rounding: Annotated[RoundingMethod | None, typer.Option(help="How weights get onto the grid.")] = None,
    calibration: Calibration = None,
    samples: Annotated[int | None, typer.Option(help="Number of calibration windows.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Length of a window, in tokens.")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of optimiser steps of a learned method.")] = None,
    seed: Seed = None,
    device: Device = "auto",
    recipe: Preset = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what each stage will take, in time and memory, and if it fits.")
    ] = False,
    quiet: Silent = False,
    as_json: Json = False,
) -> None:
    """Quantize a model: fit rotations, fold them, prove that the function is the same, round, measure."""
    chosen = load_recipe(recipe or (None if method else "spinfold")).with_(
        method=method,
        sites=names_in(sites),
        bits=bits,
        format=format and format.value,
        group_size=group_size,
        rounding__method=rounding and rounding.value,
        calibration__source=calibration,
        calibration__samples=samples,
        calibration__seq_len=seq_len,
        fit__steps=steps,
        seed=seed,
    )
    if plan:
        print_forecast(spinfold.predict(model, output, chosen, device=device), as_json)
        return
    progress = None if quiet else for_terminal()
    run = spinfold.quantize(model, output, chosen, device=device, resume=resume, progress=progress)
    if as_json:
        print_json({"run": run.path / "run.json"} | run.data["metrics"] | {"proofs": run.data["proofs"]})
        return
    for proof in run.data["proofs"]:
        print_proof(proof)
    if rows := run.data["metrics"]["rows"]:
        print_table(rows[0], ([number_text(value) for value in row.values()] for row in rows))
    print(f"Run: {run.path}")


def rotate(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for the model; it must not exist yet.")],
    method: Annotated[str, typer.Option(help="A method that `spinfold methods` lists.")] = "quarot",
    sites: Annotated[
        str, typer.Option(help="Where maps may stand, separated by commas; only sites that can be folded.")
    ] = "residual,value",
    calibration: Calibration = None,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="The number format of the weights that are written.")] = Dtype.BFLOAT16,
) -> None:
    """Fold rotations into a model's weights and write it in full precision: the same function, easier to round."""
    path = spinfold.rotate(
        model,
        output,
        method=method,
        sites=names_in(sites) or (),
        seed=seed,
        dtype=dtype.value,
        recipe=spinfold.Recipe().with_(calibration__source=calibration),
        progress=for_terminal(),
    )
    print(f"Model: {path}")


def export(
    run: Annotated[Path | None, typer.Argument(help="The folder of a finished run.", show_default=False)] = None,
    to: Annotated[
        str | None, typer.Option("--to", help="A target that --list lists: compressed-tensors, gguf or transformers.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The folder for the checkpoint; it must not hold anything else."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Load it in the target, and compare it with the run in memory.")
    ] = True,
    text: Annotated[
        str | None, typer.Option(help="The text to compare on: a file, or a known name.", show_default=False)
    ] = None,
    device: Device = "auto",
    show: Annotated[bool, typer.Option("--list", help="List what each target can run, and how that is known.")] = False,
) -> None:
    """Write a run for another runtime, load it there, and prove that it computes what the run computes."""
    if show:
        rows = [row.cells() for row in spinfold.targets()]
        print_table(rows[0], (row.values() for row in rows))
        return
    if run is None or to is None or output is None:
        missing = " and ".join(
            name for name, value in (("a run", run), ("--to", to), ("--output", output)) if value is None
        )
        raise SpinfoldError("The export is not complete.", f"It lacks {missing}.", "See spinfold export --help.")
    exported = spinfold.export(run, to, output, check=check, device=device, text=text, progress=for_terminal())
    for proof in exported.data["proofs"]:
        print_proof(proof)
    print(f"Checkpoint: {exported.path}")
    for row in exported.rows:
        print(f"Runs in: {row.runtime} ({row.established})")


def report(run: Annotated[Path, typer.Argument(help="The folder of a run.", show_default=False)]) -> None:
    """Write the one-file page of a run, and print where it is."""
    print(f"Report: {spinfold.report(run)}")
