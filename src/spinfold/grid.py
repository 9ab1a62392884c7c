"""What a comparison compares, as data: entries x formats x bits x rounding x seeds, each combination a cell.

An entry is a partial recipe over a base. As one word, in `--methods` or in a plan:

    quarot                                         a method, everything else as in the base
    clipped=quarot:activations.clip=0.9            its label, and fields of the recipe that differ
    published=spinquant.yaml                       a recipe file, or else the preset of that name; only what it names

As YAML, for `--plan` (an entry's own bits, formats, rounding and seeds stand in for the plan's, and a format's own bits
too; `recipe` is what all share, a format what of a recipe makes it):

    recipe: {compute: bf16}
    bits: [W4A16, W4A4KV4]
    rounding: [gptq, rtn]
    seeds: [0, 1, 2]
    formats:
      INT4: {}
      MXFP4: {format: mxfp4}
      MXFP6: {format: mxfp6, bits: [W6A16]}
    entries:
    - quarot
    - {label: block, source: block-hadamard, formats: [MXFP4]}
    - {label: layer-wise, source: spinfold, recipe: {fit: {steps: 0}}, bits: [W4A4KV4]}
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import chain, product
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from spinfold.errors import SpinfoldError
from spinfold.plan import find_method
from spinfold.recipe import Bits, Recipe, RoundingMethod, presets
from spinfold.yaml_file import parse_yaml, read_yaml

__all__ = ["Cell", "Entry", "Grid"]

_AXES = ("method", "bits", "seed", "rounding.method")
"""The fields of a recipe that have a place of their own in a table."""

BitWidths = tuple[Annotated[str, AfterValidator(lambda text: str(Bits.parse(text)))], ...]
Roundings = tuple[RoundingMethod, ...]


@dataclass(frozen=True)
class Cell:
    """One measurement: the complete `recipe` of `label`, and what of it differs from the base.

    `order` sorts the rows of a table: by bits, format, rounding and entry, in the order of the grid. `format` is what
    the grid calls the number format, if it has names for them.
    """

    label: str
    recipe: Recipe
    changes: Mapping[str, Any]
    order: tuple[int, ...]
    format: str | None = None

    @property
    def rounding(self) -> str:
        """The rounding method, or `none` where weights stay in 16 bits."""
        return self.recipe.rounding.method if self.recipe.weight_format else "none"

    @property
    def name(self) -> str:
        """A name for a file: readable, and the same exactly for the same label and recipe."""
        whole = f"{self.label}\n{self.recipe.identity()}"
        words = [self.label, self.format, self.recipe.bits, self.rounding, str(self.recipe.seed)]
        readable = "-".join(re.sub(r"[^A-Za-z0-9.]+", "-", word)[:60] for word in words if word)
        return f"{readable}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NumberFormat(_Strict):
    """What of a recipe makes a number format, and its bits if they are not the plan's."""

    recipe: dict[str, Any] = {}
    bits: BitWidths | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_fields(cls, data: Any) -> Any:
        """All fields but `bits` are the recipe's."""
        if not isinstance(data, dict) or set(data) <= {"recipe", "bits"}:
            return data
        own = {key: value for key, value in data.items() if key != "bits"}
        return {"recipe": own} | ({"bits": data["bits"]} if "bits" in data else {})


class Entry(_Strict):
    """A line of the table: a partial recipe over the base, under a label that no other entry has."""

    label: str
    recipe: dict[str, Any] = {}
    bits: BitWidths | None = None
    formats: tuple[str, ...] | None = None
    rounding: Roundings | None = None
    seeds: tuple[int, ...] | None = None

    @field_validator("label")
    @classmethod
    def _is_text(cls, label: str) -> str:
        label.encode()  # a ValueError if it holds half a character, which has no place in a file
        return label

    @model_validator(mode="before")
    @classmethod
    def _from_words(cls, data: Any) -> Any:
        """A single word becomes a mapping; the recipe of `source` goes under `recipe`."""
        if isinstance(data, str):
            return _parse(data)
        if not isinstance(data, dict) or "source" not in data:
            return data
        word = str(data["source"])
        own = {key: value for key, value in data.items() if key != "source"}
        changes = own.get("recipe") or {}
        return {"label": word} | own | {"recipe": _merge(_source(word), changes) if _is_map(changes) else changes}


class Grid(_Strict):
    """All that is compared; `recipe` is a partial recipe that all entries share."""

    recipe: dict[str, Any] = {}
    formats: dict[str, NumberFormat] = {}
    entries: tuple[Entry, ...] = ()
    bits: BitWidths = ("W4A4KV4",)
    rounding: Roundings = ("gptq",)
    seeds: tuple[int, ...] = (0,)

    @field_validator("entries")
    @classmethod
    def _labels_differ(cls, entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        labels = ["original", *(entry.label for entry in entries)]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise ValueError(f"two entries are called {twice[0]!r}")
        return entries

    @model_validator(mode="after")
    def _formats_are_known(self) -> Self:
        asked = chain.from_iterable(entry.formats or () for entry in self.entries)
        if unknown := [name for name in asked if name not in self.formats]:
            raise ValueError(f"no format is called {unknown[0]!r}: they are {', '.join(self.formats) or 'not named'}")
        return self

    @classmethod
    def parse(cls, data: Any, origin: str = "comparison") -> Self:
        """Validate plain data; a `SpinfoldError` names every problem."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            problems = (f"{'.'.join(map(str, x['loc'])) or 'plan'}: {x['msg']}." for x in error.errors())
            raise SpinfoldError(f"The {origin} can't be used.", " ".join(problems), "Correct what is named.") from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """From a YAML file."""
        return cls.parse(read_yaml(Path(path)), f"plan {path}")

    def base(self, recipe: Recipe) -> Recipe:
        """`recipe` with what all entries share on top."""
        return Recipe.parse(_merge(recipe.model_dump(mode="json"), self.recipe))

    def cells(self, base: Recipe) -> list[Cell]:
        """All cells over the recipe `base`, seed by seed, so that a table that is not finished is balanced.

        With weights in 16 bits there is nothing to round: one cell, whatever the roundings. Raises `SpinfoldError` for
        an entry that gives no recipe.
        """
        found = {cell.name: cell for cell in self._all(base)}
        return sorted(found.values(), key=lambda cell: cell.recipe.seed)  # stable: within a seed as listed

    def _all(self, base: Recipe) -> Iterator[Cell]:
        own_bits = chain((x.bits or () for x in self.formats.values()), (x.bits or () for x in self.entries))
        every_bits = _distinct(self.bits, *own_bits)
        every_rounding = _distinct(self.rounding, *(entry.rounding or () for entry in self.entries))
        for place, entry in enumerate(self.entries):
            for name in entry.formats or tuple(self.formats) or (None,):
                format = NumberFormat() if name is None else self.formats[name]
                data = _merge(_merge(base.model_dump(mode="json"), format.recipe), entry.recipe)
                roundings = entry.rounding or self.rounding
                for bits, seed in product(entry.bits or format.bits or self.bits, entry.seeds or self.seeds):
                    for rounding in roundings if Bits.parse(bits).weights != 16 else roundings[:1]:
                        axes = {"bits": bits, "seed": seed, "rounding": {"method": rounding}}
                        recipe = Recipe.parse(_merge(data, axes), f"recipe of {entry.label[:200]!r}")
                        in_order = () if name is None else (list(self.formats).index(name),)
                        order = (every_bits.index(bits), *in_order, every_rounding.index(rounding), place)
                        yield Cell(entry.label, recipe, _changes(base, recipe), order, name)


def _parse(word: str) -> dict[str, Any]:
    """`[label=]source[:field=value]...`"""
    head, *overrides = word.split(":")
    label, _, source = head.rpartition("=")
    recipe = _source(source.strip())
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals:
            raise SpinfoldError(
                f"{word[:200]!r} names no comparison.",
                f"{override[:200]!r} is not field=value.",
                "Write label=method:field=value, such as clipped=quarot:activations.clip=0.9.",
            )
        changed = parse_yaml(value, f"The value in {override[:200]!r}")
        for key in reversed(path.strip().split(".")):
            changed = {key: changed}
        recipe = _merge(recipe, changed)
    return {"label": label.strip() or word.strip(), "recipe": recipe}


def _source(name: str) -> dict[str, Any]:
    """The partial recipe of a method's name, or of a recipe file."""
    if not name.endswith((".yaml", ".yml")):
        return {"method": find_method(name).name}
    preset = name.removesuffix(".yaml")
    if not os.path.isfile(name) and preset in presets():
        return read_yaml(resources.files("spinfold") / "recipes" / name)
    Recipe.load(name)  # says what is wrong with it
    return read_yaml(Path(name))


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `under`, section by section."""
    merged = dict(under)
    for key, value in over.items():
        merged[key] = _merge(merged[key], value) if _is_map(value) and _is_map(merged.get(key)) else value
    return merged


def _distinct(*lists: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(chain.from_iterable(lists)))


def _is_map(value: object) -> bool:
    return isinstance(value, Mapping)


def _changes(base: Recipe, recipe: Recipe) -> dict[str, Any]:
    """The fields that differ, such as `activations.clip`, without those that have a column of their own."""
    before, after = _flat(base.model_dump(mode="json")), _flat(recipe.model_dump(mode="json"))
    return {key: value for key, value in after.items() if value != before[key] and key not in _AXES}


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
