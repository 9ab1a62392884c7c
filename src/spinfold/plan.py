"""Every refusal that config, family, recipe and output folder allow, before a weight is read.

    plan_run(config, recipe)         the request itself: method, sites, format, group size, window lengths
    check_seq_len(config, seq_len)   a window that the model can see as a whole
    check_output(path, resume)       a folder that may be written, and holds nothing that would be lost

Each returns nothing, or raises `SpinfoldError`.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spinfold.errors import SpinfoldError
from spinfold.files import is_leftover
from spinfold.formats import FLOAT_FORMATS, FloatFormat
from spinfold.formats.microscaling import ELEMENTS
from spinfold.methods import METHODS, Method
from spinfold.networks import ONLINE_SITES, Family, family_of
from spinfold.recipe import Bits, Override, Recipe
from spinfold.rounding import choices_of

__all__ = ["ONLINE_SITES", "check_output", "check_seq_len", "find_method", "is_run", "plan_run"]

RUN_FILES = ("run.json", "state/key.json")
"""A folder that holds one of these is a run, finished or not."""


def plan_run(config: Any, recipe: Recipe) -> None:
    """Refuse a recipe that this model can't have. `config` is the Hugging Face config."""
    family, method = family_of(config.model_type), find_method(recipe.method)
    _check_sites(method, recipe.sites, family)
    method.suits(recipe).require(f"The method {method.name!r} can't do what the recipe asks.")
    _check_widths(config, method, family)
    _check_format(config, family, recipe)
    _check_group_size(config, family, recipe)
    _check_mixed(config, family, recipe)
    check_seq_len(config, recipe.calibration.seq_len)
    _check_cache(config, recipe)
    if method.needs_data and recipe.fit.seq_len is not None:
        check_seq_len(config, recipe.fit.seq_len)


def find_method(name: str) -> Method:
    """The method of that name."""
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1)
    raise SpinfoldError(
        f"There is no method {name!r}.",
        f"The nearest name is {near[0]!r}." if near else "No method has a similar name.",
        f"Use one of {', '.join(METHODS)}; `spinfold methods` says what they do.",
    )


def check_seq_len(config: Any, seq_len: int) -> None:
    """A window needs a token to predict and no more positions than the model was trained for."""
    most = getattr(config, "max_position_embeddings", None)
    if seq_len < 2 or (most is not None and seq_len > most):
        raise SpinfoldError(
            f"A sequence length of {seq_len} tokens can't be used.",
            "A window needs two tokens at least: one to read, one to predict."
            if seq_len < 2
            else f"The model has {most} positions (max_position_embeddings).",
            f"Give --seq-len a number from 2 to {most or 'what the model can read'}.",
        )


def check_output(path: str | Path, resume: bool = False) -> None:
    """A folder that is new, empty, or, with `resume`, an earlier run; in a place where one may write."""
    path = Path(path)
    what = f"The output folder {path} can't be used."
    if path.is_dir():
        if is_run(path) and not resume:
            raise SpinfoldError(
                what, "It holds an earlier run.", "Go on with that run by --resume, or choose another folder."
            )
        held = sorted(entry.name for entry in path.iterdir() if not is_leftover(entry))
        if held and not is_run(path):
            some = ", ".join(held[:3]) + (f" and {len(held) - 3} more" if len(held) > 3 else "")
            raise SpinfoldError(what, f"It already holds something else: {some}.", "Choose a new or empty folder.")
    place = path
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise SpinfoldError(what, f"{place} is there, and it is not a folder.", "Choose another path.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise SpinfoldError(what, f"You may not write in {place}.", "Choose a folder that you may write in.")


def is_run(path: Path) -> bool:
    """Does the folder hold a run of spinfold, finished or not?"""
    return any((path / name).is_file() for name in RUN_FILES)


def _check_sites(method: Method, sites: tuple[str, ...] | None, family: Family) -> None:
    """Sites that the method serves and the family allows."""
    possible = [site for site in method.allowed if family.supports(site)]
    fix = f"Use --sites {','.join(possible)}." if possible else "Leave --sites out, or choose another --method."
    asked = method.sites if sites is None else sites
    if not asked and method.allowed:
        raise SpinfoldError("No site is named.", f"The method {method.name!r} needs a place for its maps.", fix)
    for site in asked:
        what = f"The method {method.name!r} can't have a map at the site {site!r} in a {family.name} model."
        if site not in method.allowed:
            raise SpinfoldError(what, f"It has maps at: {', '.join(method.allowed) or 'no site at all'}.", fix)
        if not (verdict := family.supports(site)):
            raise SpinfoldError(what, verdict.reason, fix)


def _check_widths(config: Any, method: Method, family: Family) -> None:
    """OptRot+ handles the second moments of all layers as one stack."""
    if method.name == "optrot-plus" and len(widths := sorted(family.mlp_widths(config))) > 1:
        raise SpinfoldError(
            f"The method {method.name!r} can't serve this model.",
            f"It needs MLPs of one width; here some layers have experts, and {widths[0]} and {widths[1]} both occur.",
            "Choose another --method, such as optrot.",
        )


def _check_format(config: Any, family: Family, recipe: Recipe) -> None:
    """A floating-point format fixes its bits and its blocks, and whole blocks make a row."""
    for why, fix in _objections(config, family, recipe):
        raise SpinfoldError(f"The format {recipe.format} can't be used as the recipe asks.", why, fix)
    if recipe.kv_format is not None and recipe.kv.format != "int":
        for why, fix in _objections_to_cache(_head_dim(config), recipe):
            raise SpinfoldError(f"The KV cache can't have the format {recipe.kv.format} as asked.", why, fix)


def _objections_to_cache(head_dim: int, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Why a head's keys or values can't be in a floating-point format, and what to do."""
    format, asked = recipe.float_format_of(recipe.kv.format), Bits.parse(recipe.bits)
    if wrong := {asked.keys, asked.values} - {format.bits, 16}:
        keys, values = (16 if bits == 16 else format.bits for bits in asked[2:])
        near = asked._replace(keys=keys, values=values)
        yield f"Its numbers have {format.bits} bits, not {min(wrong)}.", f"Use --bits {near}, or kv.format int."
    if recipe.kv.key_group or recipe.kv.value_group:
        fix = "Leave kv.key_group and kv.value_group out."
        yield "Its blocks lie along the head, and groups along the tokens.", fix
    if head_dim % (format.group_size or 1):
        why = f"A head has {head_dim} numbers, and it takes whole blocks of {format.group_size}."
        yield why, "Use another kv.format, or kv.format int."


def _objections(config: Any, family: Family, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Why a format can't be had, and what to do."""
    if recipe.format == "int":
        if recipe.floats.model_dump(exclude_none=True):
            yield "`floats` chooses variants of floating-point formats.", "Leave it out, or choose another --format."
        return
    own, asked, format = FLOAT_FORMATS[recipe.format], Bits.parse(recipe.bits), recipe.float_format
    assert format is not None
    if format.bits != own.bits:
        same = " or ".join(name for name, element in ELEMENTS.items() if element.bits == own.bits)
        yield f"Its elements have {own.bits} bits, and {format.element} has {format.bits}.", f"Choose {same}."
    if wrong := {asked.weights, asked.activations} - {own.bits, 16}:
        weights, activations = (16 if bits == 16 else own.bits for bits in asked[:2])
        near = asked._replace(weights=weights, activations=activations)
        yield f"Its numbers have {own.bits} bits, not {min(wrong)}.", f"Use --bits {near}, or --format int."
    if own.group_size and (recipe.group_size or recipe.activations.per_head):
        fix = "Leave --group-size and activations.per_head out."
        yield f"Its blocks are of {own.group_size} numbers, by definition.", fix
    widths = sorted(set().union(*_inputs(config, family).values()))
    if own.group_size and any(width % own.group_size for width in widths):
        why = f"The linears of this model have {', '.join(map(str, widths))} inputs, and it takes whole blocks of"
        yield f"{why} {own.group_size}.", "Use --format int or fp8, or another model."


def _check_group_size(config: Any, family: Family, recipe: Recipe) -> None:
    """A group size must divide the input of every linear, and there must be weights to group."""
    size = recipe.group_size
    if size is None:
        return
    what = f"A group size of {size} can't be used."
    if recipe.weight_format is None:
        raise SpinfoldError(what, "The weights stay in 16 bits.", "Leave --group-size out, or ask for fewer bits.")
    widths = sorted(set().union(*_inputs(config, family).values()))
    common = math.gcd(*widths)
    if common % size:
        divisors = [str(n) for n in range(2, common + 1) if common % n == 0]
        raise SpinfoldError(
            what,
            f"The linears of this model have {', '.join(map(str, widths))} inputs, and it does not divide them all.",
            f"Use one of {', '.join(divisors)}." if divisors else "Leave --group-size out.",
        )


def _inputs(config: Any, family: Family) -> dict[str, set[int]]:
    """How many inputs the linears of each role have."""
    own = {"o": {config.num_attention_heads * _head_dim(config)}, "down": family.mlp_widths(config)}
    return {role: own.get(role, {config.hidden_size}) for role in family.linears}


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or int(config.hidden_size // config.num_attention_heads)


def _check_cache(config: Any, recipe: Recipe) -> None:
    """Keys before RoPE need a RoPE that can be turned back and no map behind it; some token must be quantized."""
    cache, what = recipe.kv_format, "The KV cache can't be had as the recipe asks."
    if cache is None:
        return
    if cache.before_rope:
        if "query_key" in (recipe.sites or ()):
            why = "The map at the site query_key stands behind RoPE, and kv.before_rope quantizes keys before it."
            raise SpinfoldError(what, why, "Leave the site query_key out, or kv.before_rope.")
        given = getattr(config, "rope_parameters", None) or {}
        kinds = {one.get("rope_type", "default") for one in (given, *given.values()) if isinstance(one, dict)}
        if changing := sorted(kinds & {"dynamic", "longrope"}):
            why = f"This model's RoPE ({changing[0]}) turns a key otherwise when the text gets longer."
            raise SpinfoldError(what, why, "Leave kv.before_rope out.")
    seq_len, first = recipe.calibration.seq_len, cache.sink + cache.residual + cache.group
    if first > seq_len:
        why = f"It quantizes the first token when it holds {first}, and windows have {seq_len}: nothing would be."
        raise SpinfoldError(what, why, "Use a smaller kv.sink, kv.residual or group, or a longer --seq-len.")


def _objections_to_override(one: Override, format: FloatFormat, widths: list[int]) -> Iterator[tuple[str, str]]:
    """Why linears of these widths can't be on a floating-point grid that an override asks for."""
    if one.bits not in (None, format.bits):
        why = f"Its linears are in floating point of {format.bits} bits, and it asks for {one.bits}."
        yield why, "Name another `format` beside the bits, such as int."
    if one.symmetric is not None:
        yield "Floating-point numbers are symmetric, all of them.", "Leave `symmetric` out."
    if (format.scale != "real" or format.bits < 8) and one.group_size is not None:
        yield f"{format.element.upper()} has blocks by definition.", "Leave `group_size` out."
    if any(width % (format.group_size or 1) for width in widths):
        inputs = ", ".join(map(str, widths))
        why = f"Its linears have {inputs} inputs, and it takes whole blocks of {format.group_size}."
        yield why, "Use the format int or fp8 there."


def _check_mixed(config: Any, family: Family, recipe: Recipe) -> None:
    """Overrides that mean some linear of this model and fit it; a budget that its narrowest grids may meet."""
    if recipe.candidates and recipe.budget is None:
        raise SpinfoldError("Candidates can't be had here.", "A budget chooses among them, and there is none.",
                            "Name a `budget` in bits per weight, or leave `candidates` out.")  # fmt: skip
    if not recipe.overrides and recipe.budget is None:
        return
    inputs, everywhere = _inputs(config, family), Override(match="*")
    if recipe.weight_format is None:
        why = "The weights stay in 16 bits."
        raise SpinfoldError("Overrides and a budget can't be had here.", why, "Leave them out, or ask for fewer bits.")
    for number, one in enumerate(recipe.overrides):
        what = f"The override {one.match!r} can't be used."
        meant = {role for i in range(config.num_hidden_layers) for role in inputs if one.fits(f"layers.{i}.{role}")}
        if not meant:
            last, roles = config.num_hidden_layers - 1, ", ".join(inputs)
            why = f"It fits no linear of this model: they are layers.0.ROLE to layers.{last}.ROLE, with ROLE {roles}."
            raise SpinfoldError(what, why, "Write a pattern such as layers.*.down or layers.0.*.")
        widths = sorted(set().union(*(inputs[role] for role in meant)))
        before = recipe.model_copy(update={"overrides": recipe.overrides[:number]})
        for linear in (f"layers.{i}.{role}" for i in range(config.num_hidden_layers) for role in meant):
            if one.fits(linear) and isinstance(format := before.weight_format_of(linear, one), FloatFormat):
                for why, fix in _objections_to_override(one, format, widths):
                    raise SpinfoldError(what, why, fix)
        if isinstance(one.group_size, int) and any(width % one.group_size for width in widths):
            why = f"Its linears have {', '.join(map(str, widths))} inputs, which {one.group_size} does not divide."
            common = math.gcd(*widths)
            divisors = [str(n) for n in range(2, common + 1) if common % n == 0]
            raise SpinfoldError(what, why, f"Use one of {', '.join(['row', *divisors])}.")
    if recipe.budget is not None and not recipe.overrides:
        widths = sorted(set().union(*inputs.values()))
        grids = [recipe.weight_format_of("", choice) for choice in choices_of("", recipe)]
        for grid in grids:
            if isinstance(grid, FloatFormat):
                for why, fix in _objections_to_override(everywhere, grid, widths):
                    raise SpinfoldError("The budget can't be had with these candidates.", why, fix)
        scale_bits = recipe.scale_dtype.itemsize * 8
        least = min(grid.bits_per_number(max(widths), scale_bits) for grid in grids if grid)
        if recipe.budget < least:
            raise SpinfoldError(
                f"A budget of {recipe.budget} bits per weight can't be met.",
                f"The narrowest grids take {least:.3g} bits per weight or more, with their scales.",
                "Raise the budget, or use larger groups.",
            )
