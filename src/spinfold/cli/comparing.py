"""The command `compare`: many runs, one table."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import spinfold
from spinfold.cli.options import Calibration, Device, TaskData, Tasks, load_recipe, names_in, shard_of
from spinfold.cli.printing import number_text, print_cell, print_table
from spinfold.errors import SpinfoldError
from spinfold.progress import for_terminal

__all__ = ["compare"]


def compare(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the comparison.")],
    model: Annotated[
        str | None, typer.Argument(help="A Hugging Face folder or hub id, a .gguf file, or `smollm2`.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="What to compare, separated by commas: a method, `label=method:field=value`, or `label=recipe.yaml`."
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="A YAML file with entries, bits, rounding, seeds and recipe. Options given beside it win."),
    ] = None,
    bits: Annotated[str | None, typer.Option(help="Bit widths, separated by commas: W4A4KV4,W4A16.")] = None,
    rounding: Annotated[str | None, typer.Option(help="Rounding methods, separated by commas: gptq,rtn.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds.", min=1)] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="The text of the figures: a file, or a known name. The last fifth of --calibration if not given."
        ),
    ] = None,
    second_text: Annotated[str | None, typer.Option(help="Another text to measure on.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Measure on this many tokens of each text; on all if not given.")
    ] = None,
    tasks: Tasks = None,
    task_data: TaskData = None,
    calibration: Calibration = None,
    recipe: Annotated[
        str | None, typer.Option(help="The settings that all entries share: a recipe file, or the name of a preset.")
    ] = None,
    device: Device = "auto",
    shard: Annotated[str, typer.Option(help="Do the I-th of N parts of the work, counted from 0: I/N.")] = "0/1",
    seconds: Annotated[float, typer.Option(help="Start nothing new after so many seconds.")] = math.inf,
    merge: Annotated[
        list[Path] | None,
        typer.Option(help="A folder of the same comparison whose cells to take over; may be given again."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Let a Ray cluster do the work: host:port of its head, `auto` for the one that this machine belongs "
            "to, `local` for one of this machine alone.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a comparison, also beside another process.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no stages, only a line for each cell.")] = False,
) -> None:
    """Compare methods x bits x rounding x seeds in one harness: a table, and a page with what error costs."""
    grid = spinfold.Grid() if plan is None else spinfold.Grid.load(plan)
    base = grid.base(load_recipe(recipe)).with_(calibration__source=calibration)
    given: dict[str, Any] = {
        "recipe": {},
        "entries": [*grid.entries, *(names_in(methods) or ())] if methods else None,
        "bits": names_in(bits),
        "rounding": names_in(rounding),
        "seeds": tuple(range(seeds)) if seeds else None,
    }
    grid = spinfold.Grid.parse(dict(grid) | {name: value for name, value in given.items() if value is not None})
    if model is not None and not grid.entries:
        raise SpinfoldError("Nothing is named to compare.", "There is no entry.", "Give --methods or --plan.")
    if model is None and not merge:
        raise SpinfoldError("No model is named.", "Only --merge needs none.", "Give a model, such as smollm2.")
    comparison = spinfold.compare(
        model,
        output,
        grid,
        recipe=base,
        text=text,
        second_text=second_text,
        max_tokens=max_tokens,
        tasks=names_in(tasks) or (),
        task_data=task_data,
        device=device,
        shard=shard_of(shard),
        seconds=seconds,
        merge=merge or (),
        ray=ray,
        resume=resume,
        on_cell=print_cell,
        progress=None if quiet else for_terminal(),
    )
    shown = ("name", *("format",) * bool(grid.formats), "bits", "rounding", "seeds", "perplexity", "perplexity_sd")
    shown = (*shown, "kl", "fit_seconds")
    print_table(shown, ([number_text(row[key]) for key in shown] for row in comparison.data["rows"]))
    for reason in comparison.failed:
        print(f"Failed: {reason}", file=sys.stderr)
    print(f"Table: {comparison.path / 'table.md'}\nPage: {comparison.path / 'index.html'}")
    if comparison.failed:
        raise typer.Exit(1)
