"""The commands that answer a question: `inspect`, `verify`, `evaluate`, `methods`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

import spinfold
from spinfold.cli.options import (
    BitWidths,
    Device,
    Grid,
    GroupSize,
    Json,
    Model,
    Preset,
    Seed,
    Silent,
    TaskData,
    Tasks,
    load_recipe,
    names_in,
)
from spinfold.cli.printing import number_text, print_inspection, print_json, print_proof, print_table, print_tasks
from spinfold.progress import for_terminal

__all__ = ["evaluate", "inspect", "methods", "verify"]


def inspect(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A folder for the page and inspect.json, new or empty.")
    ] = None,
    bits: BitWidths = None,
    format: Grid = None,
    group_size: GroupSize = None,
    calibration: Annotated[str | None, typer.Option(help="The text to look at: a file, or a known name.")] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens to look at.")] = 128,
    seed: Seed = None,
    device: Device = "auto",
    recipe: Preset = None,
    quiet: Silent = False,
    as_json: Json = False,
) -> None:
    """Look at a model before anything is rounded: outliers, the bits that are safe where, and whether to rotate."""
    chosen = load_recipe(recipe).with_(
        bits=bits, format=format and format.value, group_size=group_size, calibration__source=calibration, seed=seed
    )
    progress = None if quiet else for_terminal()
    found = spinfold.inspect(model, output, chosen, tokens=tokens, device=device, progress=progress)
    if as_json:
        print_json(found.data)
    else:
        print_inspection(found.data)
        if found.path is not None:
            print(f"Page: {found.path / 'index.html'}")


def verify(
    original: Model,
    other: Annotated[str, typer.Argument(help="The model that should compute the same.", show_default=False)],
    text: Annotated[
        str | None, typer.Option(help="The text to compare them on: a file, or a known name.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Do two models compute the same function? Exit code 0 if they do, 1 with the reason if not."""
    proof = spinfold.verify(original, other, text=text)
    if as_json:
        print_json(proof.to_dict())
    else:
        print_proof(proof.to_dict())
    if not proof.ok:
        raise typer.Exit(1)


def evaluate(
    model: Annotated[
        str,
        typer.Argument(help="A run, a Hugging Face folder or hub id, a .gguf file, or `smollm2`.", show_default=False),
    ],
    text: Annotated[
        str | None,
        typer.Option(help="A text file, or a known name; the last fifth of sotu if not given.", show_default=False),
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Length of a window, in tokens.")] = 2048,
    max_tokens: Annotated[
        int | None, typer.Option(help="Stop after this many tokens; the whole text if not given.")
    ] = None,
    tasks: Tasks = None,
    task_data: TaskData = None,
    limit: Annotated[int | None, typer.Option(help="Items of each task; all if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity: the text tokenized once, windows that don't overlap, mean over the predicted tokens.

    And accuracy on zero-shot tasks, as lm-evaluation-harness does.
    """
    result = spinfold.evaluate(
        model,
        text=text,
        seq_len=seq_len,
        max_tokens=max_tokens,
        tasks=names_in(tasks) or (),
        task_data=task_data,
        limit=limit,
        progress=for_terminal(),
    )
    if as_json:
        print_json(result)
        return
    results = result.pop("tasks", {})
    print_table(("measure", "value"), ((name, number_text(value)) for name, value in result.items()))
    if results:
        print_tasks(results)


def methods(as_json: Json = False) -> None:
    """List the methods: the paper, the sites of the maps, and what they need and cost."""
    rows = [dataclasses.asdict(info) for info in spinfold.methods()]
    if as_json:
        print_json(rows)
        return
    header = ("method", "what it does", "sites (* online)", "needs", "paper")
    print_table(
        header,
        (
            (
                row["name"],
                row["summary"],
                ", ".join(site + "*" * (site in row["online"]) for site in row["sites"]) or "-",
                ", ".join(need for need in ("data", "backprop") if row[f"needs_{need}"]) or "-",
                row["paper"] or "-",
            )
            for row in rows
        ),
    )
