"""A map as data and back: a JSON-serialisable config, and tensors under dotted names.

    chain of a Hadamard and scales  ->  {"kind": "chain", "maps": [{"kind": "hadamard", …}, {"kind": "diagonal", …}]}
                                        {"0.signs": …, "1.scale": …}

`from_parts(*to_parts(m))` computes the same bits as m.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from spinfold.errors import SpinfoldError
from spinfold.maps.base import Map
from spinfold.maps.composed import BlockDiagonal, Chain, Kronecker
from spinfold.maps.hadamard import Hadamard
from spinfold.maps.held import Dense
from spinfold.maps.linear import Diagonal, Identity, Orthogonal, Permutation
from spinfold.maps.lowrank import LowRankCorrection

__all__ = ["from_parts", "to_parts"]

Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]


def to_parts(linear_map: Map) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors). The tensors are the map's own, not copies."""
    return linear_map.config(), linear_map.tensors()


def from_parts(config: Config, tensors: Tensors) -> Map:
    """The map that `to_parts` described. Raises SpinfoldError for an unknown kind or an incomplete description."""
    kind = config.get("kind")
    build = _BUILDERS.get(str(kind))
    if build is None:
        raise SpinfoldError(
            f"There is no map of kind {kind!r}.",
            f"The kinds are {', '.join(sorted(_BUILDERS))}.",
            "The file may be damaged, or written by a newer spinfold: update and read it again.",
        )
    try:
        linear_map = build(config, tensors)
        if linear_map.size != config.get("size", linear_map.size):
            raise ValueError(f"the config says size {config['size']}, the tensors {linear_map.size}")
        return linear_map
    except (KeyError, RuntimeError, TypeError, ValueError) as error:  # torch's errors are RuntimeErrors
        raise SpinfoldError(
            f"The description of a map of kind {kind!r} is incomplete or inconsistent.",
            f"Missing entry: {error}." if isinstance(error, KeyError) else f"{error}.",
            "Write the map again, or restore the file from a copy.",
        ) from error


def _part(config: Config, tensors: Tensors, name: str) -> Map:
    prefix = f"{name}."
    inner = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    return from_parts(config, inner)


_BUILDERS: dict[str, Callable[[Config, Tensors], Map]] = {
    "identity": lambda c, t: Identity(c["size"]),
    "orthogonal": lambda c, t: Orthogonal(t["R"]),
    "dense": lambda c, t: Dense(t["M"]),
    "diagonal": lambda c, t: Diagonal(t["scale"]),
    "permutation": lambda c, t: Permutation(t["order"]),
    "hadamard": lambda c, t: Hadamard(
        c["size"], c["seed"], t["signs"] if c["signed"] else None, transposed=c["transposed"]
    ),
    "low_rank": lambda c, t: LowRankCorrection(t["U"], t["K"]),
    "kronecker": lambda c, t: Kronecker(_part(c["left"], t, "left"), _part(c["right"], t, "right")),
    "block_diagonal": lambda c, t: BlockDiagonal(_part(c["block"], t, "block"), c["count"]),
    "chain": lambda c, t: Chain(*(_part(part, t, str(index)) for index, part in enumerate(c["maps"]))),
}
