"""Where a model comes from: a folder, a hub id, a `.gguf` file, or the embedded `smollm2`; and whether it is sound.

    resolve(source) -> Checkpoint        headers only: config, shapes, sizes, every refusal they allow
    Checkpoint.load_model(dtype)         the weights, all of them and nothing else, every value finite
    Checkpoint.read_some(count)          a few of them, to see how fast they are read
    Checkpoint.open_model()              the network without its layers' weights, which stay in the files (`placement`)

The config is a claim and the headers are what is there. The network is first built without memory (on the `meta`
device) and compared with the headers, so a config that asks for the wrong sizes is refused before it is obeyed.
No code from a checkpoint is ever run.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    TOKENIZER_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as hf_logging

from spinfold.errors import SpinfoldError
from spinfold.networks import embedded, gguf_reader
from spinfold.networks.gguf_header import GgufFile, scan
from spinfold.networks.placement import built_without_weights
from spinfold.networks.safetensors_reader import SafetensorsFolder, read_json, scan_folder

__all__ = ["Checkpoint", "resolve", "transformers_errors"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
SOURCES = "a model folder, a .gguf file, a hub id such as org/name, or smollm2"

SIZES = re.compile(
    r"hidden_size|intermediate_size|vocab_size|head_dim|max_position_embeddings|num_attention_heads"
    r"|num_key_value_heads|n_embd|n_head|n_positions|n_ctx|d_model|d_ff|n_layers?|num_layers|num_hidden_layers"
)
LAYER_COUNTS = re.compile(r"n_layers?|num_layers|num_hidden_layers")
MAX_SIZE, MAX_LAYERS = 2**31 - 1, 4096
HARMLESS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias|attention\.masked_bias)$")
"""Tables that old versions of Transformers saved and that new ones compute."""
MAX_TABLE_BYTES = 256 << 20
"""A network's computed tables (rotary frequencies, masks) may be this large, or as large as its weights."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
SAMPLE_BYTES, NUM_SAMPLES = 1 << 20, 8
DTYPE_OF = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Plain floating-point types by their name in safetensors and GGUF files."""


@dataclass(frozen=True)
class Checkpoint:
    """A model whose headers have been checked; its weights are read by `load_model`, a few of them by `read_some`."""

    name: str
    kind: Literal["folder", "gguf"]
    path: Path
    config: PreTrainedConfig
    weights: SafetensorsFolder | GgufFile = field(repr=False)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every stored weight under its Transformers name."""
        if isinstance(self.weights, GgufFile):
            tensors = self.weights.tensors
            return {hf: tensors[name].shape for name, hf in gguf_reader.hf_names(self.weights).items()}
        return self.weights.shapes

    @property
    def layer_matrices(self) -> dict[str, tuple[int, ...]]:
        """Of `shapes`, the matrices in layers, stacks of them included; a folder of the base model says no `model.`."""
        return {name: shape for name, shape in self.shapes.items() if "layers." in name and len(shape) > 1}

    @property
    def weight_bytes(self) -> int:
        """Size of the weights as stored."""
        return self.weights.weight_bytes

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """The coarsest floating-point type among the stored weights; None if some are in quantized blocks (GGUF)."""
        if isinstance(self.weights, GgufFile):
            kinds = {tensor.kind.name for tensor in self.weights.tensors.values()}
        else:
            with self.weights.open() as tensors:
                kinds = {tensor.get_dtype() for tensor in tensors.values()}
        if not kinds <= DTYPE_OF.keys():
            return None
        return max((DTYPE_OF[kind] for kind in kinds), key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def num_parameters(self) -> int:
        """Number of stored weights; a tied head counts once."""
        return sum(_product(shape) for shape in self.shapes.values())

    @property
    def has_tokenizer(self) -> bool:
        """Is there a tokenizer beside the weights, whether or not it can be read? A GGUF file holds its own."""
        return self.kind == "gguf" or any((self.path / name).is_file() for name in TOKENIZER_FILES)

    def fingerprint(self) -> str:
        """SHA-256 over the names, sizes and contents of the checkpoint's files, the same wherever it lies.

        A large file counts with its first and last MiB (headers included) and some MiB spread between them, so
        this tells checkpoints apart in well under a second; it does not prove that no byte was altered.
        """
        total = hashlib.sha256()
        for file in sorted(self._files(), key=lambda f: f.name):
            size = file.stat().st_size
            total.update(f"{file.name}\0{size}\0".encode())
            with file.open("rb") as stream:
                if size <= (NUM_SAMPLES + 2) * SAMPLE_BYTES:
                    total.update(stream.read())
                    continue
                for index in range(NUM_SAMPLES + 2):
                    stream.seek((size - SAMPLE_BYTES) * index // (NUM_SAMPLES + 1))
                    total.update(stream.read(SAMPLE_BYTES))
        return total.hexdigest()

    def load_model(self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> PreTrainedModel:
        """The model in `dtype` on `device`, in eval mode and without gradients.

        Raises `SpinfoldError` when a weight is missing, unexpected, of another shape, or not finite in `dtype`.
        """
        model_class = _model_class(self.config)
        what = f"The weights of {self.name} cannot be loaded."
        with transformers_errors(what), _open(self.weights, self.config, dtype) as state:
            # A state dict instead of the path: only what was checked above is read, and nothing else in the folder
            # (adapters, other weight files, custom code) has a say.
            model, info = model_class.from_pretrained(
                None,
                config=self.config,
                state_dict=state,
                dtype=dtype,
                attn_implementation=_attention(model_class),
                output_loading_info=True,
            )
        _check_loaded(what, model, info)
        _check_finite(self.name, model, dtype)
        model.requires_grad_(False)
        return model.to(device).eval()

    def read_some(self, count: int, *, but: int = 0) -> list[Tensor]:
        """The smallest matrices of the layers, in fp32, as many as have `count` weights together. With `but`, those
        behind the ones that have so many; from the front again, where there are no more.
        """
        matrices = sorted(self.layer_matrices.items(), key=lambda item: _product(item[1]))
        all_of_them = sum(_product(shape) for _, shape in matrices)
        but, count, names = min(but, all_of_them), min(count, all_of_them), list[str]()
        for name, shape in [*matrices, *matrices]:
            if but > 0:
                but -= _product(shape)
            elif count > 0:
                names.append(name)
                count -= _product(shape)
        if isinstance(self.weights, GgufFile):
            return list(gguf_reader.state_dict(self.weights, self.config, names=names).values())
        # A copy even of what is fp32 already: a tensor of a file is read when it is used.
        return [weight.to(torch.float32, copy=True) for weight in self.weights.read(names).values()]

    @property
    def can_stay_in_files(self) -> bool:
        """Can layers be read one by one? Not from GGUF, nor where Transformers merges stored weights (experts)."""
        if not isinstance(self.weights, SafetensorsFolder):
            return False
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        return {name for name, _ in self.open_model().named_parameters()} - tied <= self.weights.shapes.keys()

    def open_model(self) -> PreTrainedModel:
        """The network without memory for its weights, in eval mode; its tables are computed."""
        model_class = _model_class(self.config)
        with transformers_errors(f"The network of {self.name} cannot be built."), built_without_weights():
            model = AutoModelForCausalLM.from_config(
                self.config, dtype=torch.float32, attn_implementation=_attention(model_class)
            )
        return model.requires_grad_(False).eval()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that lies with the weights, for GGUF inside the file; `SpinfoldError` when it is unusable."""
        what = f"The tokenizer of {self.name} cannot be loaded."
        with transformers_errors(what, "Put the original tokenizer files (tokenizer.json and its configs) beside it."):
            safe = {"trust_remote_code": False, "local_files_only": True}
            if self.kind == "gguf":
                # The class that AutoTokenizer takes: it would read the header several times more, to find the config.
                tokenizer_class = TOKENIZER_MAPPING.get(type(self.config), PreTrainedTokenizerFast)
                tokenizer = tokenizer_class.from_pretrained(self.path.parent, gguf_file=self.path.name, **safe)
            else:
                tokenizer = AutoTokenizer.from_pretrained(self.path, **safe)
            # Without its files, Transformers may build a tokenizer that knows no words.
            if not tokenizer("a b", add_special_tokens=False)["input_ids"]:
                raise ValueError("no tokenizer files were found, or they hold no vocabulary")
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise SpinfoldError(what, f"It is a {type(tokenizer).__name__}, not a text tokenizer.", "Use a text model.")
        return tokenizer

    def _files(self) -> list[Path]:
        if self.kind == "gguf":
            return [self.path]
        assert isinstance(self.weights, SafetensorsFolder)
        described = (p for p in self.path.iterdir() if p.suffix in (".json", ".txt", ".model", ".jinja"))
        return [*self.weights.files, *(p for p in described if p.is_file())]


def resolve(source: str | Path) -> Checkpoint:
    """Find the model that `source` names and check everything its headers can tell.

    `smollm2` is the embedded default (write ./smollm2 for a folder of that name); then an existing path; then a
    hub id, downloaded into the Hugging Face cache. Raises `SpinfoldError` otherwise, or when the model is unsound.
    """
    text = str(source).strip()
    if text == "smollm2":
        return _gguf(embedded.fetch("smollm2"), name="smollm2")
    path = Path(os.path.expanduser(text)) if text else None
    if path is not None and _exists(path):
        if path.is_dir():
            return _folder(path, name=path.resolve().name)
        if path.suffix == ".gguf":
            return _gguf(path, name=path.stem)
        raise SpinfoldError(
            f"{path} is not a model.",
            "It is a single file, and not a .gguf file.",
            "Pass the folder that holds config.json and the .safetensors files.",
        )
    if HUB_ID.fullmatch(text) and not text.endswith(".gguf"):
        return _folder(_download(text), name=text)
    raise SpinfoldError(f"There is no model {text[:200]!r}.", "No file or folder has this path.", f"Pass {SOURCES}.")


def _gguf(path: Path, name: str) -> Checkpoint:
    file = scan(path)
    what = f"The network in {path.name} cannot be built."
    with transformers_errors(what):
        config = gguf_reader.config_of(file)
    return _checked(Checkpoint(name, "gguf", path, config, file))


def _folder(folder: Path, name: str) -> Checkpoint:
    if not (folder / "config.json").is_file():
        raise SpinfoldError(f"{folder} is not a model folder.", "It has no config.json.", f"Pass {SOURCES}.")
    raw = read_json(folder / "config.json")
    _check_config(name, raw)
    weights = scan_folder(folder)
    with transformers_errors(f"The config of {name} cannot be used."):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return _checked(Checkpoint(name, "folder", folder, config, weights))


def _download(hub_id: str) -> Path:
    """The local snapshot of a hub repository: safetensors, configs and tokenizer, no code and no pickles."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))
    except Exception as error:  # the hub client raises its own, httpx's and the system's errors
        raise SpinfoldError(
            f"There is no folder {hub_id}, and the model of that name could not be downloaded.",
            f"The hub client reports: {_first_line(error)}",
            "Check the name and the network; or download the folder elsewhere and pass its path; or use smollm2.",
        ) from error


# ---- checks before anything is allocated -----------------------------------------------------------------------


def _check_config(name: str, raw: dict[str, Any]) -> None:
    """Refuse what a config must not say before any of its numbers is used, even as a loop bound."""
    what = f"The config of {name} cannot be used."
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise SpinfoldError(what, "It names no model_type.", "Use a config.json written by Transformers.")
    if model_type not in CONFIG_MAPPING:
        why = f"The installed Transformers does not know model_type {model_type!r}"
        why += ", and code from a checkpoint is never run." if "auto_map" in raw else "."
        raise SpinfoldError(what, why, "Update Transformers, or use a model of a supported family.")
    for section in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            if section.get(key):
                method = section[key].get("quant_method", "unnamed") if isinstance(section[key], dict) else "unnamed"
                raise SpinfoldError(
                    f"{name} is already quantized.",
                    f"Its config has a {key} (method {method}).",
                    "Pass the full-precision model that it was made from.",
                )
        for key, value in section.items():
            if not SIZES.fullmatch(key) or value is None or isinstance(value, dict):
                continue
            most = MAX_LAYERS if LAYER_COUNTS.fullmatch(key) else MAX_SIZE
            for number in value if isinstance(value, list) else [value]:
                if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= most:
                    raise SpinfoldError(
                        what,
                        f"{key} is {number!r}; it must be an integer from 1 to {most}.",
                        "Restore the publisher's config.json.",
                    )


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    """Compare the network that the config describes, built on `meta`, with the tensors that are stored."""
    config, stored = checkpoint.config, checkpoint.shapes
    model_class = _model_class(config)
    what = f"The config of {checkpoint.name} does not describe its weights."
    fix = "Restore the config.json that belongs to these weights, or download the model again."
    unbuilt = f"The network of {checkpoint.name} cannot be built from its config."
    with transformers_errors(unbuilt), torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, attn_implementation=_attention(model_class))
    described = {name: tuple(p.shape) for name, p in skeleton.named_parameters()}
    for name, shape in described.items():
        if name in stored and stored[name] != shape:
            raise SpinfoldError(what, f"{name} should be {list(shape)}, it is stored as {list(stored[name])}.", fix)
    # By number, not by name: Transformers renames and merges weights (experts) while it loads them.
    num_described, num_stored = sum(map(_product, described.values())), checkpoint.num_parameters
    if num_described > num_stored:
        absent = [name for name in described if name not in stored]
        raise SpinfoldError(
            what,
            f"It describes {num_described:,} parameters, {num_stored:,} are stored"
            + (f"; missing are {_some(absent)}." if absent else "."),
            fix,
        )
    table_bytes = sum(b.numel() * b.element_size() for b in skeleton.buffers())
    if table_bytes > max(MAX_TABLE_BYTES, checkpoint.weight_bytes):
        raise SpinfoldError(what, f"The tables it asks for (positions, masks) would take {table_bytes:,} bytes.", fix)
    return checkpoint


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The causal language model that Transformers has for `config`."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise SpinfoldError(
            f"A {config.model_type} model does not generate text.",
            "Transformers has no causal language model for this config.",
            "Pass a decoder-only language model.",
        )
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    chosen: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    return chosen


def _attention(model_class: type[PreTrainedModel]) -> str:
    """PyTorch's fused attention, except where it cannot express the model's (soft-capped scores)."""
    return "sdpa" if model_class._supports_sdpa else "eager"


# ---- checks after loading --------------------------------------------------------------------------------------


def _check_loaded(what: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Turn Transformers' loading report into errors: by itself it would fill gaps with random numbers."""
    fix = "Download the model again; the weights and config.json must come from the same version."
    if missing := sorted(info["missing_keys"]):
        raise SpinfoldError(what, f"{len(missing)} weights are missing: {_some(missing)}.", fix)
    if mismatched := sorted(str(key) for key in info["mismatched_keys"]):
        raise SpinfoldError(what, f"{len(mismatched)} weights have the wrong shape: {_some(mismatched)}.", fix)
    if unexpected := sorted(key for key in info["unexpected_keys"] if not HARMLESS.search(key)):
        raise SpinfoldError(what, f"The network has no place for {len(unexpected)} of them: {_some(unexpected)}.", fix)
    if failed := sorted(map(str, info.get("conversion_errors") or ())) or info.get("error_msgs"):
        raise SpinfoldError(what, f"Some could not be converted: {_some(list(failed))}.", fix)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    if tied and head is not None and head.weight is not embedding.weight:
        raise SpinfoldError(
            what,
            "The config ties the head to the embedding, but both are stored and they differ.",
            "Set tie_word_embeddings to false in config.json if the stored head is the right one.",
        )


def _check_finite(name: str, model: PreTrainedModel, dtype: torch.dtype) -> None:
    for parameter_name, parameter in model.named_parameters():
        # A finite sum has finite terms; a sum that is not may have overflowed.
        if not bool(parameter.sum().isfinite()) and not bool(torch.isfinite(parameter).all()):
            raise SpinfoldError(
                f"The weights of {name} are not all finite.",
                f"{parameter_name} holds NaN, infinity, or a value too large for {str(dtype).removeprefix('torch.')}.",
                "Download the model again, or load it in float32.",
            )


# ---- small things ------------------------------------------------------------------------------------------------


@contextmanager
def _open(
    weights: SafetensorsFolder | GgufFile, config: PreTrainedConfig, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    if isinstance(weights, GgufFile):
        yield gguf_reader.state_dict(weights, config, dtype)
    else:
        with weights.open() as state:
            yield state


@contextmanager
def transformers_errors(what: str, fix: str = "Check that all files come from the same model.") -> Iterator[None]:
    """Report whatever a library makes of a bad checkpoint as `SpinfoldError`, and keep the library silent."""
    logger = logging.getLogger("transformers")
    level, bars = logger.level, hf_logging.is_progress_bar_enabled()
    logger.setLevel(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    except (SpinfoldError, MemoryError):
        raise
    except Exception as error:  # any type: configs and tokenizers are parsed by code of many authors
        raise SpinfoldError(what, _first_line(error), fix) from error
    finally:
        logger.setLevel(level)
        if bars:
            hf_logging.enable_progress_bar()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # e.g. a name longer than the file system allows
        return False


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300] if lines else 'no details'}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for length in shape:
        result *= length
    return result
