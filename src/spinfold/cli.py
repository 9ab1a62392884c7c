"""The command line: parses, calls the library, prints. Whatever it can do, `import spinfold` can do too.

Exit codes: 0 done; 1 a check did not hold; 2 the input or the request is wrong; 130 interrupted.
Results go to standard output, progress and errors to standard error.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from typer.exceptions import TyperException

import spinfold
from spinfold.errors import SpinfoldError
from spinfold.progress import for_terminal, launched

if TYPE_CHECKING:
    from spinfold.forecast import Forecast
    from spinfold.recipe import Recipe

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, no_args_is_help=True)
_TOGETHER = ("quantize", "evaluate")
"""What several processes of torchrun can do together."""


class Format(StrEnum):
    INT = "int"
    FP8 = "fp8"
    MXFP4 = "mxfp4"
    MXFP6 = "mxfp6"
    MXFP8 = "mxfp8"
    NVFP4 = "nvfp4"
    AMXFP4 = "amxfp4"


class RoundingMethod(StrEnum):
    RTN = "rtn"
    GPTQ = "gptq"
    GPTAQ = "gptaq"
    LDLQ = "ldlq"
    AUTOROUND = "autoround"


class Dtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Model = Annotated[
    str, typer.Argument(help="A Hugging Face folder or hub id, a .gguf file, or `smollm2`.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Silent = Annotated[bool, typer.Option("--quiet", help="Show no stages.")]
Tasks = Annotated[
    str | None,
    typer.Option(
        help="Zero-shot tasks, separated by commas, or all: boolq, piqa, siqa, hellaswag, winogrande, arc_easy, "
        "arc_challenge, openbookqa. Without --text, `evaluate` then reads no text.",
        show_default=False,
    ),
]
TaskData = Annotated[
    Path | None,
    typer.Option(help="The folder with the tasks' items, such as piqa.jsonl.", show_default=False),
]
Calibration = Annotated[
    str | None,
    typer.Option(help="The calibration text: a file (text, or JSON lines with a `text` field), or a known name."),
]
Sites = Annotated[
    str | None,
    typer.Option(
        help="Where maps may stand, separated by commas: residual, value, query_key, down. "
        "All sites of the method if not given.",
        show_default=False,
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of every random choice.", show_default=False)]
BitWidths = Annotated[
    str | None, typer.Option(help="Bits of weights, activations and KV cache, such as W4A4KV4, W4A16 or W4A4K4V2.")
]
Grid = Annotated[Format | None, typer.Option(help="The kind of grid.")]
GroupSize = Annotated[
    int | None, typer.Option(help="Weights that share a scale, in input channels. One scale per row if not given.")
]
Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu or cuda.")]
Preset = Annotated[
    str | None,
    typer.Option(help="A recipe file, or the name of one that comes with spinfold. Options given beside it win."),
]


def _version(asked: bool) -> None:
    if asked:
        print(f"spinfold {spinfold.__version__}")
        raise typer.Exit


@app.callback()
def _spinfold(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="SPINFOLD_DEBUG", help="Show the traceback of an error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Learn rotations for quantized language models, prove that they change nothing else, and round what is left."""
    context.obj["debug"] = debug
    number, count = launched()
    if count > 1 and context.invoked_subcommand not in _TOGETHER:
        raise SpinfoldError(
            f"`spinfold {context.invoked_subcommand}` can't run in {count} processes.",
            f"Only these can work together: {', '.join(_TOGETHER)}.",
            "Run it without torchrun; `compare` has --ray and --shard.",
        )
    if number > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the first process prints the result for all


@app.command()
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
    chosen = _recipe(recipe or (None if method else "spinfold")).with_(
        method=method,
        sites=_names(sites),
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
        _print_forecast(spinfold.predict(model, output, chosen, device=device), as_json)
        return
    progress = None if quiet else for_terminal()
    run = spinfold.quantize(model, output, chosen, device=device, resume=resume, progress=progress)
    if as_json:
        _print_json({"run": run.path / "run.json"} | run.data["metrics"] | {"proofs": run.data["proofs"]})
        return
    for proof in run.data["proofs"]:
        _print_proof(proof)
    if rows := run.data["metrics"]["rows"]:
        _print_table(rows[0], ([_number(value) for value in row.values()] for row in rows))
    print(f"Run: {run.path}")


@app.command()
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
    chosen = _recipe(recipe).with_(
        bits=bits, format=format and format.value, group_size=group_size, calibration__source=calibration, seed=seed
    )
    progress = None if quiet else for_terminal()
    found = spinfold.inspect(model, output, chosen, tokens=tokens, device=device, progress=progress)
    if as_json:
        _print_json(found.data)
    else:
        _print_inspection(found.data)
        if found.path is not None:
            print(f"Page: {found.path / 'index.html'}")


@app.command()
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
        sites=_names(sites) or (),
        seed=seed,
        dtype=dtype.value,
        recipe=spinfold.Recipe().with_(calibration__source=calibration),
        progress=for_terminal(),
    )
    print(f"Model: {path}")


@app.command()
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
        _print_json(proof.to_dict())
    else:
        _print_proof(proof.to_dict())
    if not proof.ok:
        raise typer.Exit(1)


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(help="A run, a Hugging Face folder or hub id, a .gguf file, or `smollm2`.", show_default=False),
    ],
    text: Annotated[
        str | None,
        typer.Option(help="The evaluation text: a file, or a known name.", show_default=False),
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
        tasks=_names(tasks) or (),
        task_data=task_data,
        limit=limit,
        progress=for_terminal(),
    )
    if as_json:
        _print_json(result)
        return
    results = result.pop("tasks", {})
    _print_table(("measure", "value"), ((name, _number(value)) for name, value in result.items()))
    if results:
        _print_tasks(results)


@app.command()
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
        typer.Option(help="The text of the figures: a file, or a known name. A part of --calibration if not given."),
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
    base = grid.base(_recipe(recipe)).with_(calibration__source=calibration)
    given: dict[str, Any] = {
        "recipe": {},
        "entries": [*grid.entries, *(_names(methods) or ())] if methods else None,
        "bits": _names(bits),
        "rounding": _names(rounding),
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
        tasks=_names(tasks) or (),
        task_data=task_data,
        device=device,
        shard=_shard(shard),
        seconds=seconds,
        merge=merge or (),
        ray=ray,
        resume=resume,
        on_cell=_print_cell,
        progress=None if quiet else for_terminal(),
    )
    shown = ("name", *("format",) * bool(grid.formats), "bits", "rounding", "seeds", "perplexity", "perplexity_sd")
    shown = (*shown, "kl", "fit_seconds")
    _print_table(shown, ([_number(row[key]) for key in shown] for row in comparison.data["rows"]))
    for reason in comparison.failed:
        print(f"Failed: {reason}", file=sys.stderr)
    print(f"Table: {comparison.path / 'table.md'}\nPage: {comparison.path / 'index.html'}")
    if comparison.failed:
        raise typer.Exit(1)


@app.command()
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
        _print_table(rows[0], (row.values() for row in rows))
        return
    if run is None or to is None or output is None:
        missing = " and ".join(
            name for name, value in (("a run", run), ("--to", to), ("--output", output)) if value is None
        )
        raise SpinfoldError("The export is not complete.", f"It lacks {missing}.", "See spinfold export --help.")
    exported = spinfold.export(run, to, output, check=check, device=device, text=text, progress=for_terminal())
    for proof in exported.data["proofs"]:
        _print_proof(proof)
    print(f"Checkpoint: {exported.path}")
    for row in exported.rows:
        print(f"Runs in: {row.runtime} ({row.established})")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="The folder of a run.", show_default=False)]) -> None:
    """Write the one-file page of a run, and print where it is."""
    print(f"Report: {spinfold.report(run)}")


@app.command()
def methods(as_json: Json = False) -> None:
    """List the methods: the paper, the sites of the maps, and what they need and cost."""
    rows = [dataclasses.asdict(info) for info in spinfold.methods()]
    if as_json:
        _print_json(rows)
        return
    header = ("method", "what it does", "sites (* online)", "needs", "paper")
    _print_table(
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Every error becomes three short parts on standard error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    settings = {"debug": False}
    command = typer.main.get_command(app)
    try:
        with command.make_context("spinfold", arguments or ["--help"], obj=settings) as context:
            command.invoke(context)
        return 0
    except typer.Exit as request:
        return request.exit_code
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  else the interpreter complains when it flushes at exit
        return 0
    except KeyboardInterrupt as request:
        print(" ".join(["Interrupted.", *_notes(request)]), file=sys.stderr)
        return 130
    except Exception as error:
        if settings["debug"]:
            traceback.print_exc()
        explained = _explain(error)
        who = f"Process {launched()[0]} of {launched()[1]}: " if launched()[0] else ""
        print("\n".join([f"{who}{explained}", *_notes(error)]), file=sys.stderr)
        return explained.exit_code


def _notes(error: BaseException) -> list[str]:
    """What else there is to say, such as that the run can be resumed."""
    return getattr(error, "__notes__", [])


def _explain(error: Exception) -> SpinfoldError:
    """Any exception as what, why and what to do."""
    if isinstance(error, SpinfoldError):
        return error
    if isinstance(error, TyperException):
        verb = context.command_path if (context := getattr(error, "ctx", None)) else "spinfold"
        return SpinfoldError(error.format_message(), "", f"See {verb} --help.")
    if _means_no_space(error):
        return SpinfoldError(
            "There is no space left to write to.",
            str(error),
            "Free some space, or choose an output folder on another disk; nothing half-written was kept.",
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return SpinfoldError(
            "The memory is not enough.",
            str(error).partition("\n")[0] or "The system refused to give more.",
            "Ask for fewer --samples or a shorter --seq-len, or use another --device.",
        )
    if isinstance(error, OSError):
        return SpinfoldError(
            f"{error.filename or 'A file'} can't be used.",
            f"The system says: {error.strerror or error}.",
            "Check that it exists and that you may read and write it.",
        )
    return SpinfoldError(
        "spinfold stopped at an error that it does not know.",
        f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
        "Run it again as `spinfold --debug ...` and report the traceback: this is a bug.",
    )


def _means_no_space(error: BaseException) -> bool:
    """ENOSPC or a quota, also where a library reports it in its own words or as the cause of another error."""
    full = (errno.ENOSPC, errno.EDQUOT)
    seen = (isinstance(error, OSError) and error.errno in full) or any(os.strerror(code) in str(error) for code in full)
    cause = error.__cause__ or error.__context__
    return seen or (cause is not None and _means_no_space(cause))


def _recipe(source: str | None) -> Recipe:
    return spinfold.Recipe() if source is None else spinfold.Recipe.load(source)


def _names(text: str | None) -> tuple[str, ...] | None:
    """`residual, value` as a tuple."""
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def _shard(text: str) -> tuple[int, int]:
    """`0/2` as numbers."""
    part, _, count = text.partition("/")
    if part.isdecimal() and count.isdecimal() and int(part) < int(count):
        return int(part), int(count)
    raise SpinfoldError(
        f"Shard {text!r} can't be used.", "It is not I/N with I from 0 to N - 1.", "Write --shard 0/2 and --shard 1/2."
    )


# ---- printing ----------------------------------------------------------------------------------------------------


def _print_json(value: object) -> None:
    print(json.dumps(_finite(value), indent=2, default=str))


def _finite(value: object) -> object:
    """JSON has no NaN and no infinity: these become null."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    table = Table(*(Column(name, overflow="fold") for name in header), box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _print_cell(cell: Mapping[str, Any]) -> None:
    names = ("perplexity", "second_perplexity", "kl", "fit_seconds", "rounding_seconds", "evaluation_seconds")
    numbers = ", ".join(f"{name.replace('_', ' ')} {_number(cell[name])}" for name in names if cell.get(name))
    what = " ".join(str(cell[name]) for name in ("label", "format", "bits", "rounding") if cell.get(name))
    print(f"{what} seed {cell['seed']}: {cell.get('failed') or numbers}", flush=True)


def _print_forecast(forecast: Forecast, as_json: bool) -> None:
    """The stages; then `SpinfoldError` if they don't fit."""
    from spinfold.report.tables import human_bytes, human_seconds

    if as_json:
        _print_json(forecast.to_dict())
    else:
        rows = [(one.name, one.seconds, one.peak_bytes, one.peak_device_bytes) for one in forecast.stages]
        rows.append(("all", forecast.seconds, forecast.peak_bytes, forecast.peak_device_bytes))
        _print_table(
            ("stage", "time", "memory", "GPU memory"),
            (
                (name, human_seconds(s), human_bytes(ram), "-" if gpu is None else human_bytes(gpu))
                for name, s, ram, gpu in rows
            ),
        )
    forecast.fits().require("This run does not fit on this machine.")


def _print_inspection(found: Mapping[str, Any]) -> None:
    """What loses how much where, where the outliers are, and what to do."""
    from spinfold.report.inspect_page import place_rows, place_titles, spike_rows

    _print_table(place_titles(found), place_rows(found))
    print()
    _print_table(("outliers", "where"), spike_rows(found))
    advice = found["advice"]
    print(f"\n{'Rotate' if advice['rotate'] else 'Do not rotate'}. {advice['reason']}")
    print(f"Next: spinfold quantize {found['model']['name']} -o RUN {advice['options']}")


def _print_tasks(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Accuracies in percent; how many of the published items stand behind each is said beside it."""
    rows = []
    for name, r in results.items():
        acc, error, norm = ("-" if r[key] is None else f"{100 * r[key]:.2f}" for key in ("acc", "stderr", "acc_norm"))
        rows.append((name, f"{r['items']:,} of {r['split_items']:,}", acc, error, norm))
    _print_table(("task", "items", "acc %", "±", "acc_norm %"), rows)


def _print_proof(proof: Mapping[str, Any]) -> None:
    relation = "≤" if proof["ok"] else ">"
    print(f"{proof['statement']}: {proof['measured']:.2g} {relation} {proof['tolerance']:.2g}")
    if proof.get("detail"):
        print(proof["detail"])


def _number(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
