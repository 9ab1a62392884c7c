"""The maps of a whole network, by site."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from spinfold.errors import Verdict
from spinfold.maps.base import Map
from spinfold.maps.composed import Chain
from spinfold.maps.linear import Orthogonal
from spinfold.maps.serialise import from_parts, to_parts

__all__ = ["SiteMaps"]


@dataclass(frozen=True)
class SiteMaps:
    """Which map stands at which site; None where there is none.

    `residual` has size D: one basis for the whole stream, or one per boundary. The others hold one map per layer:
    `value` and `query_key` of size head_dim (the same for all heads of a layer), `down` of size F.

    A *boundary* is a point where a norm reads the stream: 2l before the attention of layer l, 2l + 1 before its MLP,
    2L before the head. Between boundaries i and i + 1 the stream passes a branch by a skip connection, which has to
    change its basis from R_i to R_{i+1}. `skip` holds these 2L changes where they are not to be R_iᵀ R_{i+1}, computed
    from the residual maps: cheaper ones that equal it exactly, or that stand in for it and change the function.

    `qkv_input` and `mlp_input` stand behind a norm, after the residual basis: diagonal, since its gain takes them.
    """

    residual: Map | tuple[Map, ...] | None = None
    value: tuple[Map, ...] | None = None
    query_key: tuple[Map, ...] | None = None
    down: tuple[Map, ...] | None = None
    skip: tuple[Map, ...] | None = None
    qkv_input: tuple[Map, ...] | None = None
    mlp_input: tuple[Map, ...] | None = None

    def __post_init__(self) -> None:
        bases = len(self.residual) if isinstance(self.residual, tuple) else 0
        if self.skip is not None and bases != len(self.skip) + 1:
            raise ValueError("skip holds one map between each two of the residual bases")

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that have a map."""
        return tuple(f.name for f in fields(self) if f.name != "skip" and getattr(self, f.name) is not None)

    def at(self, site: str, layer: int) -> Map | None:
        """The map at a site that has one map per layer: any but the residual."""
        if site == "residual":
            raise ValueError("the residual stream has boundaries, not layers: use residual_at")
        maps = getattr(self, site)
        return maps and maps[layer]

    def residual_at(self, boundary: int) -> Map | None:
        """The basis of the residual stream at a boundary, 0 to 2L."""
        return self.residual[boundary] if isinstance(self.residual, tuple) else self.residual

    def norm_output_at(self, boundary: int) -> Map | None:
        """The map on what the norm at a boundary, 0 to 2L - 1, gives: the stream's basis, then the norm's scales."""
        layer, is_mlp = divmod(boundary, 2)
        pair = self.residual_at(boundary), self.at("mlp_input" if is_mlp else "qkv_input", layer)
        maps = [one for one in pair if one is not None]
        return Chain(*maps) if len(maps) == 2 else next(iter(maps), None)

    def skip_at(self, boundary: int) -> Map | None:
        """What carries the stream from a boundary's basis to the next one's; None where the basis stays."""
        if self.skip is not None:
            return self.skip[boundary]
        if isinstance(self.residual, tuple):
            here, after = self.residual[boundary : boundary + 2]
            return Orthogonal(here.inverse().matrix() @ after.matrix())
        return None

    @property
    def exact(self) -> bool:
        """Do the changes of basis on the skip connections lead from each basis to the next, to fp32 precision?"""
        if self.skip is None or not isinstance(self.residual, tuple):
            return True
        steps = zip(self.residual, self.skip, self.residual[1:], strict=False)
        gaps = ((skip.apply(here.matrix()) - after.matrix()).abs().max() for here, skip, after in steps)
        return all(float(gap) < 1e-5 for gap in gaps)

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

    def each_replaced(self, change: Callable[[Map], Map], sites: Collection[str] | None = None) -> SiteMaps:
        """A copy with `change` applied to every map, or to those at `sites`. One map at two places stays one."""
        changed: dict[str, Any] = {}
        once: dict[int, Map] = {}
        for field in fields(self):
            here = getattr(self, field.name)
            if here is None or (sites is not None and field.name not in sites):
                changed[field.name] = here
                continue
            for one in here if isinstance(here, tuple) else (here,):
                once.setdefault(id(one), change(one))
            changed[field.name] = tuple(once[id(one)] for one in here) if isinstance(here, tuple) else once[id(here)]
        return SiteMaps(**changed)
