"""The command line: parses, calls the library, prints. Whatever it can do, `import spinfold` can do too.

    __init__     the verbs, and `main`, which turns every error into words and an exit code
    options      what options have in common, and how their text is read
    making       the verbs that write something: quantize, rotate, export, report
    asking       those that answer a question: inspect, verify, evaluate, methods
    comparing    compare
    printing     results, on standard output
    failures     any exception as what, why and what to do

Exit codes: 0 done; 1 a check did not hold; 2 the input or the request is wrong; 130 interrupted.
Results go to standard output, progress and errors to standard error.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

import spinfold
from spinfold.cli.asking import evaluate, inspect, methods, verify
from spinfold.cli.comparing import compare
from spinfold.cli.failures import explain, notes_of
from spinfold.cli.making import export, quantize, report, rotate
from spinfold.errors import SpinfoldError
from spinfold.progress import launched

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, no_args_is_help=True)
for _verb in (quantize, inspect, rotate, verify, evaluate, compare, export, report, methods):
    app.command()(_verb)

_TOGETHER = ("quantize", "evaluate")
"""What several processes of torchrun can do together."""


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Every error becomes three short parts on standard error."""
    _wait_briefly()
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
        print(" ".join(["Interrupted.", *notes_of(request)]), file=sys.stderr)
        return 130
    except Exception as error:
        if settings["debug"]:
            traceback.print_exc()
        explained = explain(error)
        who = f"Process {launched()[0]} of {launched()[1]}: " if launched()[0] else ""
        print("\n".join([f"{who}{explained}", *notes_of(error)]), file=sys.stderr)
        return explained.exit_code


def _wait_briefly() -> None:
    """Have threads that wait for each other sleep before long, unless torch is loaded or somebody has said otherwise.

    Those of GNU's OpenMP, which torch's wheels for Linux contain, turn 300,000 times first: with another process on the
    same cores, one turns where the thread that it waits for should run.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
