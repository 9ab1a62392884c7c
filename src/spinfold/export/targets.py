"""What each target can run, as data: asked before any work, printed by `spinfold export --list`.

A row says: this runtime, in this version, runs this kind of run, and how that is known. A run may be exported if one of
its target's rows has no objection; else the objections of the nearest row are the answer, each with a way out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from spinfold.errors import SpinfoldError
from spinfold.export.contents import Contents
from spinfold.maps import Identity
from spinfold.recipe import Bits, Recipe

__all__ = ["BOUNDS", "TARGETS", "Bounds", "Facts", "Row", "choose", "facts_of"]

ALL_BITS: Final = (2, 3, 4, 5, 6, 7, 8, 16)
ONLINE: Final = ("query_key", "down", "skip")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that a target can run. `None` stands for "any"; a group of None is the whole row.

    `online` are the ops that it applies at inference: maps at the sites query_key and down, changes of basis on the
    skip connections. `multiple` divides every width of every linear, `block` every group of weights, or row where that
    is the group. `online_bias`: may a linear with an online op on its input have a bias? `sliding`: can attention end
    before the context does? `parallel`: can the checkpoint be served with tensor parallelism? `established` says how
    all of this is known.
    """

    target: str
    runtime: str
    format: str
    weights: tuple[int, ...]
    symmetric: tuple[bool, ...] = (True, False)
    groups: tuple[int | None, ...] | None = None
    activations: tuple[int, ...] = (16,)
    activation_symmetric: tuple[bool, ...] = (True, False)
    activation_extras: bool = False
    kv: tuple[int, ...] = (16,)
    online: tuple[str, ...] = ()
    online_bias: bool = False
    multiple: int = 1
    block: int = 1
    families: tuple[str, ...] | None = None
    moe: bool = False
    sliding: bool = True
    parallel: bool = True
    established: str

    def cells(self) -> dict[str, str]:
        """The row in words, by column."""
        any_size = "any size" if self.block == 1 else f"any multiple of {self.block}"
        groups = _groups(self.groups) if self.groups else any_size
        weights = _range(self.weights)
        if self.weights != (16,):
            weights += f" {_kind(self.symmetric)}, groups of {groups}"
        activations = _range(self.activations)
        if self.activations != (16,):
            activations += f" {_kind(self.activation_symmetric)}"
        limits = {
            f"widths multiples of {self.multiple}": self.multiple > 1,
            ", ".join(self.families or ()): self.families is not None,
            "no experts": not self.moe,
            "the context ends with a sliding window": not self.sliding,
            "no bias after an online op": self.online and not self.online_bias,
            "no tensor parallelism": not self.parallel,
        }
        return {
            "target": self.target,
            "runs in": self.runtime,
            "format": self.format,
            "weights": weights,
            "activations": activations,
            "KV": _range(self.kv),
            "online": ", ".join(self.online) or "-",
            "limits": "; ".join(text for text, applies in limits.items() if applies) or "-",
            "how it is known": self.established,
        }


_CT, _TRANSFORMERS = "compressed-tensors", "Transformers 5.23, compressed-tensors 0.20"
_VLLM_CPU, _VLLM_GPU = "vLLM 0.32 (CPU)", "vLLM 0.32 (GPU)"
_TESTED = "run: tests/contracts/test_export.py"
_gguf = partial(
    Row,
    target="gguf",
    runtime="llama.cpp (llama-cpp-python 0.3.36)",
    families=("llama", "granite", "qwen2", "qwen3", "phi3"),
    block=32,
    sliding=False,
    established="run: tests/runtime/test_llama_cpp.py",
)

TARGETS: Final[tuple[Row, ...]] = (
    Row(
        target=_CT,
        runtime=_TRANSFORMERS,
        format="pack-quantized",
        weights=(4, 8),
        symmetric=(True,),
        established=_TESTED,
    ),
    Row(
        target=_CT,
        runtime=_TRANSFORMERS,
        format="pack-quantized",
        weights=(4, 8),
        symmetric=(False,),
        established=_TESTED + "; load with CompressedTensorsConfig(dequantize=True)",
    ),
    Row(
        target=_CT,
        runtime=_TRANSFORMERS,
        format="int-quantized",
        weights=(8,),
        symmetric=(True,),
        groups=(None,),
        activations=(8,),
        established=_TESTED,
    ),
    Row(
        target=_CT,
        runtime=_TRANSFORMERS,
        format="int-quantized",
        weights=(4,),
        symmetric=(True,),
        activations=(8,),
        activation_symmetric=(True,),
        established=_TESTED,
    ),
    Row(
        target=_CT,
        runtime=_VLLM_CPU,
        format="pack-quantized",
        weights=(4,),
        multiple=32,
        established="run: tests/runtime/test_vllm.py, groups of 32; of 128 by hand; sizes read in the source",
    ),
    Row(
        target=_CT,
        runtime=_VLLM_CPU,
        format="int-quantized",
        weights=(8,),
        symmetric=(True,),
        groups=(None,),
        activations=(8,),
        activation_symmetric=(True,),
        established="run: tests/runtime/test_vllm.py",
    ),
    Row(
        target=_CT,
        runtime=_VLLM_CPU,
        format="int-quantized",
        weights=(4,),
        symmetric=(True,),
        groups=(None, 128),
        activations=(8,),
        activation_symmetric=(True,),
        multiple=32,
        established="run: tests/runtime/test_vllm.py, whole rows; groups of 128 by hand",
    ),
    Row(
        target=_CT,
        runtime=_VLLM_GPU,
        format="pack-quantized",
        weights=(4, 8),
        symmetric=(True,),
        groups=(None, 32, 64, 128),
        online=("down",),
        multiple=64,
        parallel=False,
        established="read in the source; the online map run on a CPU through compressed-tensors' own transforms",
    ),
    Row(
        target=_CT,
        runtime=_VLLM_GPU,
        format="int-quantized",
        weights=(8,),
        symmetric=(True,),
        groups=(None,),
        activations=(8,),
        activation_symmetric=(True,),
        online=("down",),
        parallel=False,
        established="the file run in vLLM's CPU build with its missing kernel replaced; the GPU kernel read",
    ),
    _gguf(format="F16", weights=(16,)),
    _gguf(format="Q8_0", weights=(5, 6, 7, 8), symmetric=(True,)),
    _gguf(format="Q4_0", weights=(2, 3, 4), symmetric=(True,)),
    _gguf(format="Q4_1", weights=(2, 3, 4), symmetric=(False,)),
    Row(
        target="transformers",
        runtime="Transformers 5.23 + spinfold",
        format="spinfold",
        weights=ALL_BITS,
        activations=ALL_BITS,
        activation_extras=True,
        kv=ALL_BITS,
        online=ONLINE,
        online_bias=True,
        moe=True,
        parallel=False,
        established="run: tests/contracts/test_plugin.py",
    ),
)


@dataclass(frozen=True)
class Bounds:
    """How far a target's logits may be from those of the run in memory, as means over the predicted tokens.

    `top1` is the least share of tokens with the same best guess, `kl` the most nats from the run's distribution to the
    target's, `perplexity` the largest relative change of perplexity.
    """

    top1: float
    kl: float
    perplexity: float


BOUNDS: Final[dict[str, Bounds]] = {
    # Scales, embedding and head are rounded to 16 bits, and Transformers computes in that dtype: SmolLM2 in bfloat16 is
    # 0.002 nats away, and with activations of 8 bits, some of which then go the other way, 0.006.
    "compressed-tensors": Bounds(top1=0.9, kl=1e-2, perplexity=0.01),
    # llama.cpp rounds activations to 8 bits before products with quantized weights.
    "gguf": Bounds(top1=0.93, kl=1e-2, perplexity=0.02),
    "transformers": Bounds(top1=0.99, kl=1e-5, perplexity=1e-3),
}


@dataclass(frozen=True)
class Facts:
    """What of a run decides whether a target can have it.

    `online` are the ops that its network needs, `widths` the sizes of its linears, `rows` those along which they sum.
    """

    family: str
    recipe: Recipe
    online: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    down_bias: bool = False
    moe: bool = False


def facts_of(contents: Contents) -> Facts:
    """The facts of an opened run."""
    maps = contents.maps
    linears = list(contents.network.linears)
    present = {
        "query_key": any(not isinstance(one, Identity) for one in maps.query_key or ()),
        "down": any(not isinstance(one, Identity) for one in maps.down or ()),
        "skip": isinstance(maps.residual, tuple),
    }
    return Facts(
        family=contents.family.name,
        recipe=contents.recipe,
        online=tuple(op for op in ONLINE if present[op]),
        widths=tuple(sorted({width for linear in linears for width in linear.weight_OI.shape})),
        rows=tuple(sorted({linear.weight_OI.shape[1] for linear in linears})),
        down_bias=any(linear.role == "down" and linear.bias_O is not None for linear in linears),
        moe=any(linear.expert is not None for linear in linears),
    )


def choose(target: str, facts: Facts) -> list[Row]:
    """The rows of a target that can run this run, or a `SpinfoldError` with the reasons and the nearest choice."""
    rows = [row for row in TARGETS if row.target == target]
    if not rows:
        known = dict.fromkeys(row.target for row in TARGETS)
        raise SpinfoldError(
            f"There is no target {target[:200]!r}.", "No writer has this name.", f"Use one of: {', '.join(known)}."
        )
    objections = {row: list(_objections(row, facts)) for row in rows}
    if fitting := [row for row, found in objections.items() if not found]:
        return fitting
    row, found = min(objections.items(), key=lambda item: sum(cost for cost, _, _ in item[1]))
    _, whys, fixes = zip(*found, strict=True)
    elsewhere = dict.fromkeys(other.target for other in TARGETS if not list(_objections(other, facts)))
    instead = f" Or export to {' or '.join(elsewhere)}, which can have it as it is." if elsewhere else ""
    raise SpinfoldError(
        f"This run can't be exported to {target}.",
        f"The nearest thing that it runs is {row.format} in {row.runtime}: " + " ".join(whys),
        f"Make the run with {', '.join(dict.fromkeys(fixes))}." + instead,
    )


def _objections(row: Row, facts: Facts) -> Iterator[tuple[int, str, str]]:
    """Why a row can't have a run: how far from it that is, the reason, and what the run should have been made with."""
    recipe = facts.recipe
    bits, grid, kinds = Bits.parse(recipe.bits), recipe.activations, (row.weights, row.activations, row.kv, row.kv)
    near = Bits(*(min(allowed, key=lambda b: (abs(b - own), -b)) for own, allowed in zip(bits, kinds, strict=True)))
    cached = ("a KV cache",) if bits.keys == bits.values else ("cached keys", "cached values")
    for what, own, allowed in zip(("weights", "activations", *cached), bits, kinds, strict=False):
        if own not in allowed:
            yield 2, f"{what} of {_either(allowed)} bits, not {own}.", f"--bits {near}"
    if bits.weights == near.weights != 16:
        if recipe.weights.symmetric not in row.symmetric:
            fix = f"weights.symmetric: {row.symmetric[0]}".lower()
            yield 1, f"weight grids are {_kind(row.symmetric)}.", fix
        if recipe.overrides:
            yield 4, "all linears have one weight grid.", "no overrides and no budget"
        if row.groups is not None and recipe.group_size not in row.groups:
            fix = " or ".join(f"--group-size {size}" if size else "no --group-size" for size in row.groups)
            yield 1, f"weights share a scale by groups of {_groups(row.groups)}.", fix
        if any(size % row.block for size in facts.rows):
            yield 4, f"every row of weights must be a multiple of {row.block}.", "another model"
        elif recipe.group_size and recipe.group_size % row.block:
            yield 1, f"weights share a scale by groups of a multiple of {row.block}.", f"--group-size {row.block}"
    if bits.activations == near.activations != 16:
        if grid.symmetric not in row.activation_symmetric:
            fix = f"activations.symmetric: {row.activation_symmetric[0]}".lower()
            yield 1, f"activation grids are {_kind(row.activation_symmetric)}.", fix
        if not row.activation_extras and (grid.per_head or grid.clip != 1):
            yield 1, "a token's whole range is covered.", "activations.per_head: false and activations.clip: 1.0"
    if missing := [op for op in facts.online if op not in row.online]:
        sites = "a method with one residual basis" if missing == ["skip"] else "--sites residual,value"
        yield 1, f"there is no place for the online op at {', '.join(missing)}.", sites
    elif facts.online and facts.down_bias and not row.online_bias:
        yield 1, "an online op may not stand before a linear with a bias.", "--sites residual,value"
    if any(width % row.multiple for width in facts.widths):
        yield 4, f"every width must be a multiple of {row.multiple}.", "another model"
    if row.families is not None and facts.family not in row.families:
        yield 4, f"known are {_either(row.families)} models, not {facts.family}.", "another model"
    if facts.moe and not row.moe:
        yield 4, "nothing is written for it of layers with experts.", "a model without experts"


def _range(bits: tuple[int, ...]) -> str:
    """`2-8, 16` for all of them."""
    return "2-8, 16" if bits == ALL_BITS else ", ".join(map(str, bits))


def _groups(sizes: tuple[int | None, ...]) -> str:
    return _either(tuple(size or "a row" for size in sizes))


def _either(values: tuple[Any, ...]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last


def _kind(symmetric: tuple[bool, ...]) -> str:
    return " or ".join("symmetric" if one else "asymmetric" for one in symmetric)
