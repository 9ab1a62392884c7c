"""A decoder layer seen through its family: its linears by role, its norms, its wires and its head layout.

Shapes: B batch, T tokens, D residual width, F MLP width, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from spinfold.networks.family import INPUT_WIRE, Family, Part
from spinfold.networks.placement import Away
from spinfold.networks.rope import Rope
from spinfold.networks.wires import CACHED_WIRES, SKIP_WIRES, WIRES, Skip, Through, Wire

__all__ = ["Layer", "Linear", "parts_of"]


@dataclass(frozen=True)
class Linear:
    """One named linear of a layer: rows of a parameter, the experts' rows one after the other if it has three axes."""

    role: str
    layer: int
    name: str
    module: nn.Module
    rows: slice
    attribute: str = "weight"
    expert: int | None = None

    @property
    def key(self) -> str:
        """Its name in the layer: the role, such as `down`, of an expert `down@5`."""
        return self.role if self.expert is None else f"{self.role}@{self.expert}"

    @property
    def parameter(self) -> str:
        """The name of the parameter that holds it."""
        return f"{self.name}.{self.attribute}"

    @property
    def weight_OI(self) -> Tensor:
        """A view of the weight; write through it with `copy_`."""
        weight = cast(Tensor, getattr(self.module, self.attribute)).data
        return weight.view(-1, weight.shape[-1])[self.rows]

    @property
    def bias_O(self) -> Tensor | None:
        """A view of the bias, or None."""
        bias = cast(Tensor | None, getattr(self.module, "bias", None))
        return None if bias is None else bias.data[self.rows]


def parts_of(layer: nn.Module, family: Family) -> dict[str, Part]:
    """The layer's linears by role: a router and experts, if it has a router."""
    sparse = family.experts and family.experts["router"].module in dict(layer.named_modules())
    return dict(family.linears) | (dict(family.experts) if sparse else {})


class Layer:
    """One decoder layer: its linears, norms, wires and head layout. Its weights may be `away` (see `placement`).

    `foldable` are all linears. The router is one that is not quantized: it is small, and it decides which experts a
    token meets.
    """

    def __init__(
        self, module: nn.Module, index: int, prefix: str, family: Family, config: Any, rotary: nn.Module
    ) -> None:
        self.module, self.index, self.prefix = module, index, prefix
        self.away: Away | None = None
        attention, mlp = module.get_submodule(family.attention), module.get_submodule(family.mlp)
        self.head_dim: int = int(cast(int, attention.head_dim))
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        parts = parts_of(module, family)
        self.foldable = [linear for role, part in parts.items() for linear in self._linears(role, part)]
        norms = [family.attention_norm, family.mlp_norm]
        self.attention_norm, self.mlp_norm = (n and module.get_submodule(n) for n in norms)

        self.wires = nn.ModuleDict({name: Wire(fused=name not in CACHED_WIRES) for name in WIRES})
        module.wires = self.wires
        attention.wires = self.wires
        rope = Rope(rotary, getattr(attention, "layer_type", None))
        cast(Any, module).rope = rope
        attention.register_forward_pre_hook(rope.note, with_kwargs=True)
        o, down = (module.get_submodule(parts[role].module) for role in ("o", "down"))
        through = [(attention, "qkv_input"), (o, "attention_out")]
        if "router" in parts:
            down.wires = self.wires
        else:
            through += [(mlp, "mlp_input"), (down, "down")]
        for target, wire in through:
            target.register_forward_pre_hook(Through(self.wire(wire)), with_kwargs=True)
        if not family.post_norms:  # a norm between a branch and the stream leaves no place to join it
            factor = getattr(config, family.residual_factor) if family.residual_factor else 1.0
            norms_and_writers = (self.attention_norm, o), (self.mlp_norm, mlp)
            for name, (norm, writer) in zip(SKIP_WIRES, norms_and_writers, strict=True):
                skip = Skip(self.wire(name), factor)
                cast(nn.Module, norm).register_forward_pre_hook(skip.leave)
                writer.register_forward_hook(skip.join)

    def _linears(self, role: str, part: Part) -> Iterator[Linear]:
        module = self.module.get_submodule(part.module)
        weight = cast(Tensor, getattr(module, part.attribute))
        height = weight.shape[-2]
        queries, keys, half = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, height // 2
        sizes = {"q": queries, "k": keys, "v": keys, "gate": half, "up": half}
        first = sum(sizes[other] for other in part.fused[: part.index])
        last = first + sizes[role] if part.fused else height
        name = f"{self.prefix}.{part.module}"
        for expert in range(len(weight)) if weight.ndim == 3 else [None]:
            rows = slice(first, last) if expert is None else slice(expert * height + first, expert * height + last)
            yield Linear(role, self.index, name, module, rows, part.attribute, expert)

    @property
    def linears(self) -> dict[str, Linear]:
        """The linears that are quantized, by key."""
        return {linear.key: linear for linear in self.foldable if linear.role != "router"}

    @property
    def groups(self) -> dict[str, list[Linear]]:
        """The linears by the wire that they read, in the order in which a token meets them."""
        groups: dict[str, list[Linear]] = {}
        for linear in self.linears.values():
            groups.setdefault(INPUT_WIRE[linear.role], []).append(linear)
        return groups

    @property
    def mlp_width(self) -> int:
        """F, the inputs of the down projection, of each expert's if there are some."""
        return self.groups["down"][0].weight_OI.shape[1]

    @property
    def rope(self) -> Rope:
        """RoPE as its keys meet it."""
        return cast(Rope, self.module.rope)

    def wire(self, name: str) -> Wire:
        """The wire of that name."""
        return cast(Wire, self.wires[name])

    @contextmanager
    def present(self) -> Iterator[Layer]:
        """Its weights are on the device, at least within this block."""
        away = self.away
        if away is None:
            yield self
            return
        try:
            self._fetch(away)
            yield self
        finally:
            away.users -= 1
            if not away.users:
                away.forget(self.module)

    def _fetch(self, away: Away) -> None:
        away.users += 1
        if away.users == 1:
            away.fetch(self.module)
            for do in away.changes:
                do(self)

    def settle(self) -> None:
        """Keep the weights on the device for good."""
        if self.away is not None:
            self._fetch(self.away)
            self.away = None

    def change(self, do: Callable[[Layer], None]) -> None:
        """Let `do(layer)` change the weights, for good."""
        if self.away is not None:
            self.away.change(do)
        if self.away is None or self.away.users:
            do(self)

    def __call__(self, x_BTD: Tensor, **kwargs: Any) -> Tensor:
        with self.present():
            out = self.module(x_BTD, **kwargs)
        return out[0] if isinstance(out, tuple) else out
