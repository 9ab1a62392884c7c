"""The safetensors files of a Hugging Face folder: which they are, what their headers promise, and their tensors.

    model.safetensors                                         one file, or
    model.safetensors.index.json -> weight_map -> shards      several

Headers are parsed and checked (lengths, offsets, overlaps) by the safetensors library, which never runs code from
a file; nothing else is read as weights. Pickled checkpoints are refused for exactly that reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from spinfold.errors import SpinfoldError

__all__ = ["MAX_JSON_BYTES", "SafetensorsFolder", "read_json", "scan_folder"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BYTES_OF = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""The stored types that are plain floating-point weights."""
MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True)
class SafetensorsFolder:
    """The weight files of a folder, and of every tensor in them the shape and the file."""

    files: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]
    weight_bytes: int
    file_of: Mapping[str, Path]

    @contextmanager
    def open(self) -> Iterator[dict[str, Any]]:
        """Tensor name -> safetensors slice, read only when indexed; valid inside the `with`."""
        with ExitStack() as stack:
            slices: dict[str, Any] = {}
            for file in self.files:
                reader = stack.enter_context(safe_open(file, framework="pt"))
                slices |= {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118, it is no dict
            yield slices

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Some tensors as they are stored. They are read when they are used; no file stays open."""
        tensors: dict[str, Tensor] = {}
        for file in sorted({self.file_of[name] for name in names}):
            with safe_open(file, framework="pt") as reader:
                tensors |= {name: reader.get_tensor(name) for name in names if self.file_of[name] == file}
        return tensors


def scan_folder(folder: Path) -> SafetensorsFolder:
    """Find and check the weight files of `folder` by their headers alone.

    Raises `SpinfoldError` for weights that are missing, pickled, damaged, quantized, outside the folder, stored
    twice, or not where the index says.
    """
    files: tuple[Path, ...]
    promised: dict[str, str] | None = None
    if (folder / SINGLE).is_file():
        files = (folder / SINGLE,)
    elif (folder / INDEX).is_file():
        promised = _weight_map(folder)
        files = tuple(folder / shard for shard in sorted(set(promised.values())))
    else:
        raise _no_weights(folder)

    shapes: dict[str, tuple[int, ...]] = {}
    file_of: dict[str, Path] = {}
    weight_bytes = 0
    for file in files:
        for name, (shape, num_bytes) in _header(file).items():
            if name in shapes:
                raise SpinfoldError(
                    f"The weights in {folder} are ambiguous.",
                    f"{name} is stored in two shards.",
                    "Download the folder again, without files of other versions.",
                )
            if promised is not None and promised.get(name) != file.name:
                raise _index_differs(folder, name, promised.get(name, "no shard"), file.name)
            shapes[name], file_of[name], weight_bytes = shape, file, weight_bytes + num_bytes
    if promised is not None and (lost := sorted(promised.keys() - shapes.keys())):
        raise _index_differs(folder, lost[0], promised[lost[0]], "no shard")
    return SafetensorsFolder(files, shapes, weight_bytes, file_of)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; `SpinfoldError` when it is missing, unreadable, too large or no object."""
    what = f"{path.name} of {path.parent} cannot be read."
    fix = "Download the folder again, or point to the folder that holds the original file."
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise SpinfoldError(what, f"It is larger than {MAX_JSON_BYTES >> 20} MiB, no such file is.", fix)
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SpinfoldError(what, f"{error.strerror or error}.", fix) from error
    except (ValueError, RecursionError) as error:
        raise SpinfoldError(what, f"It is not valid JSON: {error}.", fix) from error
    if not isinstance(value, dict):
        raise SpinfoldError(what, f"It holds a JSON {type(value).__name__}, not an object.", fix)
    return value


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> shard file name, each shard a plain name of an existing file in `folder`."""
    what = f"The index {INDEX} of {folder} cannot be used."
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SpinfoldError(what, "It has no weight_map.", "Download the folder again.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & set("/\\\0:"):
            raise SpinfoldError(
                what,
                f"It places {name} in {shard!r}, which is not the name of a .safetensors file in the same folder.",
                "Do not use this folder unless you know who made it; download the model from its publisher.",
            )
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise SpinfoldError(what, f"Its shard {shard} is missing.", f"Download {shard} into {folder}.")
    return weight_map


def _header(file: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Tensor name -> (shape, bytes) of one file."""
    what = f"{file.name} of {file.parent} cannot be read as weights."
    tensors: dict[str, tuple[tuple[int, ...], int]] = {}
    try:
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118, it is no dict
                view = reader.get_slice(name)
                shape, kind = tuple(view.get_shape()), view.get_dtype()
                if kind not in BYTES_OF:
                    raise SpinfoldError(
                        what,
                        f"{name} is stored as {kind}: an already quantized checkpoint.",
                        "Pass the full-precision model that it was made from.",
                    )
                num_elements = 1
                for length in shape:
                    num_elements *= length
                tensors[name] = shape, num_elements * BYTES_OF[kind]
    except (SafetensorError, OSError, ValueError) as error:
        raise SpinfoldError(
            what,
            f"The file is damaged or incomplete: {error}.",
            "Download it again and compare its checksum with the publisher's.",
        ) from error
    if not tensors:
        raise SpinfoldError(what, "It holds no tensors.", "Download it again.")
    return tensors


def _index_differs(folder: Path, name: str, promised: str, found: str) -> SpinfoldError:
    return SpinfoldError(
        f"The shards in {folder} do not belong together.",
        f"The index places {name} in {promised}; it is in {found}.",
        "Download the folder again, without files of other versions.",
    )


def _no_weights(folder: Path) -> SpinfoldError:
    what = f"{folder} holds no weights that spinfold can load."
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        return SpinfoldError(
            what,
            f"Its weights are pickled ({pickles[0]}), and a pickle can run any code when it is opened.",
            "If you trust the source, convert it in an environment of its own: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder).",
        )
    if (folder / "adapter_config.json").is_file():
        return SpinfoldError(
            what,
            "It is an adapter (adapter_config.json) for another model.",
            "Merge the adapter into its base model (merge_and_unload in PEFT) and save that.",
        )
    return SpinfoldError(what, f"Neither {SINGLE} nor {INDEX} is there.", "Download the model's .safetensors files.")
