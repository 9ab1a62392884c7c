"""The header of a GGUF file, read without believing it.

    magic | version | tensor count | key count | keys and values | tensor table | padding | tensor data

A GGUF header is a stream of lengths, and each of them may lie. `scan` walks it once over a memory map, compares
every count, length, offset and size with what the file can hold, and keeps only numbers and short strings. So a
damaged file is refused in time linear in its header and without allocating what it asks for.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from spinfold.errors import SpinfoldError

__all__ = ["GgufFile", "GgufTensor", "scan"]

Value = int | float | bool | str

MAX_STRING_BYTES = 16 << 20
MAX_DIMENSIONS = 4
ARRAY, STRING = 9, 8
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One row of the tensor table; `shape` is in torch's order, `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """A scanned header: scalar metadata, the lengths of array metadata, and the tensor table."""

    path: Path
    metadata: Mapping[str, Value]
    array_lengths: Mapping[str, int]
    tensors: Mapping[str, GgufTensor]
    header_bytes: int

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def weight_bytes(self) -> int:
        return sum(t.num_bytes for t in self.tensors.values())


class _Malformed(Exception):
    """The file contradicts itself; the text completes 'The file is damaged: ...'."""


@dataclass
class _Cursor:
    """Reads little-endian values from `buffer`, never past its end."""

    buffer: mmap.mmap
    at: int = 0

    def take(self, num_bytes: int, what: str) -> int:
        """Step over `num_bytes`; the position where they start."""
        start = self.at
        if num_bytes > len(self.buffer) - start:
            raise _Malformed(f"{what} at byte {start} needs {num_bytes} bytes, {len(self.buffer) - start} are left")
        self.at += num_bytes
        return start

    def number(self, layout: str, what: str) -> int | float | bool:
        value: int | float | bool = struct.unpack_from(layout, self.buffer, self.take(struct.calcsize(layout), what))[0]
        # The shortest decimal that names the same fp32: 1e-5 stays 1e-5 in the config.
        return float(str(np.float32(value))) if layout == "<f" else value

    def count(self, layout: str, what: str, min_bytes_each: int) -> int:
        """A number of things that follow, each of at least `min_bytes_each`: bounds every loop over them."""
        value = int(self.number(layout, what))
        if value * min_bytes_each > len(self.buffer) - self.at:
            raise _Malformed(f"{what} is {value}, more than the rest of the file can hold")
        return value

    def string(self, what: str) -> str:
        length = self.count("<Q", f"the length of {what}", 1)
        if length > MAX_STRING_BYTES:
            raise _Malformed(f"{what} is {length} bytes long")
        start = self.take(length, what)
        try:
            return self.buffer[start : self.at].decode("utf-8")
        except UnicodeDecodeError:
            raise _Malformed(f"{what} at byte {start} is not UTF-8") from None


def scan(path: Path) -> GgufFile:
    """Read and check the header of the GGUF file at `path`; no tensor data is touched.

    Raises `SpinfoldError` for a file that is not GGUF, of another version, cut short or inconsistent.
    """
    what = f"{path.name} cannot be read as a GGUF model."
    again = "Download the file again and compare its checksum with the publisher's."
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise SpinfoldError(what, "It does not start with the bytes 'GGUF'.", "Pass a .gguf model file.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                return _scan(path, _Cursor(buffer, 4))
    except _Malformed as error:
        raise SpinfoldError(what, f"The file is damaged: {error}.", again) from None
    except OSError as error:
        raise SpinfoldError(what, f"{error.strerror or error}.", "Check the path and its permissions.") from error


def _scan(path: Path, cursor: _Cursor) -> GgufFile:
    version = int(cursor.number("<I", "the version"))
    if version not in (2, 3):
        big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
        raise SpinfoldError(
            f"{path.name} cannot be read as a GGUF model.",
            "It is stored big-endian." if big_endian else f"It has GGUF version {version}; versions 2 and 3 are known.",
            "Convert the model again with a current llama.cpp, on a little-endian machine.",
        )
    num_tensors = cursor.count("<Q", "the number of tensors", 8 + 4 + 4 + 8)
    num_keys = cursor.count("<Q", "the number of metadata keys", 8 + 4 + 1)

    metadata: dict[str, Value] = {}
    lengths: dict[str, int] = {}
    for _ in range(num_keys):
        key = cursor.string("a metadata key")
        if key in metadata or key in lengths:
            raise _Malformed(f"the metadata key {key!r} appears twice")
        kind = int(cursor.number("<I", f"the type of {key!r}"))
        if kind == STRING:
            metadata[key] = cursor.string(f"the value of {key!r}")
        elif kind == ARRAY:
            lengths[key] = _skip_array(cursor, key)
        elif kind in SCALARS:
            metadata[key] = cursor.number(SCALARS[kind], f"the value of {key!r}")
        else:
            raise _Malformed(f"{key!r} has the unknown type {kind}")

    rows = [_tensor_row(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise _Malformed(f"general.alignment is {alignment!r}, not a power of two")
    data_start = -(-cursor.at // alignment) * alignment

    tensors: dict[str, GgufTensor] = {}
    for row in rows:
        tensor = GgufTensor(row.name, row.shape, row.kind, data_start + row.offset, row.num_bytes)
        if tensor.offset + tensor.num_bytes > len(cursor.buffer):
            raise _Malformed(
                f"tensor {row.name!r} ends at byte {tensor.offset + tensor.num_bytes}, "
                f"the file at {len(cursor.buffer)} (an unfinished download?)"
            )
        if row.name in tensors:
            raise _Malformed(f"tensor {row.name!r} appears twice")
        tensors[row.name] = tensor
    # Without this, a small file could list the same bytes a million times and ask for terabytes.
    end, before = data_start, ""
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        if tensor.offset < end:
            raise _Malformed(f"tensors {before!r} and {tensor.name!r} overlap")
        end, before = tensor.offset + tensor.num_bytes, tensor.name
    return GgufFile(path, metadata, lengths, tensors, data_start)


def _skip_array(cursor: _Cursor, key: str) -> int:
    """Step over an array value; its length."""
    kind = int(cursor.number("<I", f"the element type of {key!r}"))
    if kind != STRING and kind not in SCALARS:
        raise _Malformed(f"{key!r} is an array of the unsupported type {kind}")
    size = 8 if kind == STRING else struct.calcsize(SCALARS[kind])
    length = cursor.count("<Q", f"the length of {key!r}", size)
    if kind == STRING:
        for _ in range(length):
            cursor.take(int(cursor.number("<Q", f"a string length in {key!r}")), f"a string in {key!r}")
    else:
        cursor.take(length * size, f"the values of {key!r}")
    return length


def _tensor_row(cursor: _Cursor) -> GgufTensor:
    """One row of the table, `offset` still relative to the start of the data."""
    name = cursor.string("a tensor name")
    num_dimensions = int(cursor.number("<I", f"the number of dimensions of {name!r}"))
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise _Malformed(f"tensor {name!r} has {num_dimensions} dimensions")
    fastest_first = [int(cursor.number("<Q", f"the shape of {name!r}")) for _ in range(num_dimensions)]
    number = int(cursor.number("<I", f"the type of {name!r}"))
    offset = int(cursor.number("<Q", f"the offset of {name!r}"))
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise _Malformed(f"tensor {name!r} has the unknown type {number}") from None
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    num_elements = 1
    for length in fastest_first:
        num_elements *= length
    if num_elements == 0 or fastest_first[0] % block_size:
        raise _Malformed(f"tensor {name!r} has shape {fastest_first}, impossible in {kind.name}")
    return GgufTensor(name, tuple(reversed(fastest_first)), kind, offset, num_elements // block_size * block_bytes)
