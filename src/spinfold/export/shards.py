"""A stream of tensors as the safetensors files of a Hugging Face folder, one shard in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from spinfold.files import save_tensors, write_json

__all__ = ["save_shards"]

_SHARD_BYTES = 4_000_000_000


def save_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = _SHARD_BYTES) -> int:
    """Write `model.safetensors`, or shards of at most `shard_bytes` (or one tensor) and their index.

    Returns the bytes of all tensors.
    """
    files: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = held = 0

    def flush() -> None:
        nonlocal held
        save_tensors(folder / f"shard-{len(files)}", shard, {"format": "pt"})
        files.append(list(shard))
        shard.clear()
        held = 0

    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if shard and held + num_bytes > shard_bytes:
            flush()
        shard[name] = tensor
        held, total = held + num_bytes, total + num_bytes
    flush()
    names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    names = names if len(files) > 1 else ["model.safetensors"]
    for i, name in enumerate(names):
        (folder / f"shard-{i}").rename(folder / name)
    if len(files) > 1:
        weight_map = {key: name for name, keys in zip(names, files, strict=True) for key in keys}
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    return total
