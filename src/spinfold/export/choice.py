"""Can a target have a run, and as which of its rows?

A run may be exported if one of its target's rows has no objection; else the objections of the nearest row are the
answer, each with a way out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spinfold.errors import SpinfoldError
from spinfold.export.contents import Contents
from spinfold.export.targets import ONLINE, TARGETS, Row, either, kinds_text, sizes_text
from spinfold.maps import Identity
from spinfold.recipe import Bits, Recipe

__all__ = ["Facts", "choose", "facts_of"]


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
            yield 2, f"{what} of {either(allowed)} bits, not {own}.", f"--bits {near}"
    of_weights = {one.format for one in recipe.overrides if one.format} if bits.weights != 16 else set()
    of_all = {recipe.format} if (bits.weights, bits.activations) != (16, 16) else set()
    if other := sorted((of_weights | of_all).difference(row.formats)):
        known = either(tuple("integers" if name == "int" else name for name in row.formats))
        fix = "--format int" if recipe.format in other else "no overrides of the format"
        yield 3, f"weights and activations are {known}, not {' and '.join(other)}.", fix
    if recipe.overrides and not row.mixed and bits.weights != 16:
        yield 4, "all linears have one weight grid.", "no overrides and no budget"
    if not other and bits.weights == near.weights != 16:
        if recipe.weights.symmetric not in row.symmetric:
            fix = f"weights.symmetric: {row.symmetric[0]}".lower()
            yield 1, f"weight grids are {kinds_text(row.symmetric)}.", fix
        if row.groups is not None and recipe.group_size not in row.groups:
            fix = " or ".join(f"--group-size {size}" if size else "no --group-size" for size in row.groups)
            yield 1, f"weights share a scale by groups of {sizes_text(row.groups)}.", fix
        if any(size % row.block for size in facts.rows):
            yield 4, f"every row of weights must be a multiple of {row.block}.", "another model"
        elif recipe.group_size and recipe.group_size % row.block:
            yield 1, f"weights share a scale by groups of a multiple of {row.block}.", f"--group-size {row.block}"
    if bits.activations == near.activations != 16:
        if grid.symmetric not in row.activation_symmetric:
            fix = f"activations.symmetric: {row.activation_symmetric[0]}".lower()
            yield 1, f"activation grids are {kinds_text(row.activation_symmetric)}.", fix
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
        yield 4, f"known are {either(row.families)} models, not {facts.family}.", "another model"
    if facts.moe and not row.moe:
        yield 4, "nothing is written for it of layers with experts.", "a model without experts"
