"""The maps of a whole network, by site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from spinfold.errors import Verdict
from spinfold.maps.base import Map
from spinfold.maps.serialise import from_parts, to_parts

__all__ = ["SiteMaps"]


@dataclass(frozen=True)
class SiteMaps:
    """Which map stands at which site; None where there is none.

    `residual` has size D; the others hold one map per layer: `value` and `query_key` of size head_dim (the same for
    all heads of a layer), `down` of size F.
    """

    residual: Map | None = None
    value: tuple[Map, ...] | None = None
    query_key: tuple[Map, ...] | None = None
    down: tuple[Map, ...] | None = None

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that have a map."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)

    def at(self, site: str, layer: int) -> Map | None:
        """The map at a site of a layer."""
        maps = getattr(self, site)
        return maps[layer] if isinstance(maps, tuple) else maps

    def each(self) -> list[tuple[str, Map]]:
        """All maps with a name, such as `value.3`."""
        named: list[tuple[str, Map]] = []
        for field in fields(self):
            maps = getattr(self, field.name)
            if isinstance(maps, tuple):
                named += [(f"{field.name}.{i}", one) for i, one in enumerate(maps)]
            elif maps is not None:
                named.append((field.name, maps))
        return named

    def explain(self) -> Verdict:
        """Is every map what it claims to be?"""
        for name, one in self.each():
            if not (verdict := one.explain()):
                return Verdict(False, f"The map at {name}: {verdict.reason}", verdict.fix)
        return Verdict(True)

    def to_parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A JSON-serialisable description and named tensors, for a safetensors file."""
        configs: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for name, one in self.each():
            configs[name], parts = to_parts(one)
            tensors |= {f"{name}:{key}": value.contiguous() for key, value in parts.items()}
        return configs, tensors

    @classmethod
    def from_parts(cls, configs: dict[str, Any], tensors: dict[str, Tensor]) -> SiteMaps:
        """The inverse of `to_parts`."""
        maps: dict[str, Any] = {}
        for name, config in configs.items():
            prefix = f"{name}:"
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            site, _, index = name.partition(".")
            one = from_parts(config, own)
            maps[site] = (*maps.get(site, ()), one) if index else one
        return cls(**maps)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SiteMaps:
        """The same maps with their tensors elsewhere."""
        return self.each_replaced(lambda one: one.to(device=device, dtype=dtype))

    def each_replaced(self, change: Callable[[Map], Map]) -> SiteMaps:
        """A copy with `change` applied to every map."""
        changed: dict[str, Any] = {}
        for site in self.sites:
            here = getattr(self, site)
            changed[site] = tuple(change(one) for one in here) if isinstance(here, tuple) else change(here)
        return SiteMaps(**changed)
