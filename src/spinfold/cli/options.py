"""What the commands' options have in common: their types, their help, and how their text is read."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import spinfold
from spinfold.errors import SpinfoldError

if TYPE_CHECKING:
    from spinfold.recipe import Recipe

__all__ = [
    "BitWidths",
    "Calibration",
    "Device",
    "Dtype",
    "Format",
    "Grid",
    "GroupSize",
    "Json",
    "Model",
    "Preset",
    "RoundingMethod",
    "Seed",
    "Silent",
    "Sites",
    "TaskData",
    "Tasks",
    "load_recipe",
    "names_in",
    "shard_of",
]


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


def load_recipe(source: str | None) -> Recipe:
    """A recipe file or preset; the defaults if none is named."""
    return spinfold.Recipe() if source is None else spinfold.Recipe.load(source)


def names_in(text: str | None) -> tuple[str, ...] | None:
    """`residual, value` as a tuple."""
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def shard_of(text: str) -> tuple[int, int]:
    """`0/2` as numbers."""
    part, _, count = text.partition("/")
    if part.isdecimal() and count.isdecimal() and int(part) < int(count):
        return int(part), int(count)
    raise SpinfoldError(
        f"Shard {text!r} can't be used.", "It is not I/N with I from 0 to N - 1.", "Write --shard 0/2 and --shard 1/2."
    )
