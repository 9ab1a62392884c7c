"""Wires: named tensors inside a layer. Whatever stands on one, an online map, a quantizer, every token passes.

    qkv_input      input of q, k, v            (B, T, D)
    query, key     after RoPE, per head        (B, heads, T, head_dim)
    value          per head                    (B, heads, T, head_dim)
    cache          both as they are attended   an `Attended`
    attention_out  input of o                  (B, T, heads * head_dim)
    mlp_input      input of gate, up           (B, T, D)     experts: (1, T, D), all tokens of the batch
    down           input of down               (B, T, F)     experts: (1, K, T, F), as if an expert were a head
    attention_skip the stream past attention   (B, T, D)
    mlp_skip       the stream past the MLP     (B, T, D)

A layer of experts has one wire for all of them. Its router stays in floating point and reads the norm's output itself,
before the wire: a quantizer on `mlp_input` does not change which experts a token meets.

Shapes: B batch, T tokens, D residual width, F MLP width, K experts of a token.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["CACHED_WIRES", "SKIP_WIRES", "WIRES", "Skip", "Through", "Wire"]

CACHED_WIRES = ("key", "value")
"""A cache holds what their last op makes of what the others give, so that op stays by itself: not fused, with or
without a cache they give the same bits."""
SKIP_WIRES = ("attention_skip", "mlp_skip")
WIRES = ("qkv_input", "query", "key", "value", "cache", "attention_out", "mlp_input", "down", *SKIP_WIRES)


class Wire(nn.Module):
    """The ops on one wire, applied in order. A forward hook on a wire sees what the next linear reads.

    On the wires of experts it also sees, as the second argument, which K experts each token meets, `(T, K)`.

    An op may offer `with_next(op)`, one function that does both up to rounding, or None; and `added_to(branch, x,
    factor)`, which is branch + (op(x) - x) / factor. A wire that is not `fused` leaves the first alone.
    """

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.ops, self.fused = nn.ModuleList(), fused

    def forward(self, x: Tensor, experts_TK: Tensor | None = None) -> Tensor:
        ops = list[Any](self.ops)
        while ops:
            op = ops.pop(0)
            if self.fused and ops and hasattr(op, "with_next") and (both := op.with_next(ops[0])) is not None:
                op, _ = both, ops.pop(0)
            x = op(x)
        return x

    def added_to(self, branch: Tensor, x: Tensor, factor: float) -> Tensor:
        """branch + (wire(x) - x) / factor."""
        if len(self.ops) == 1 and hasattr(self.ops[0], "added_to"):
            return cast(Any, self.ops[0]).added_to(branch, x, factor)
        return branch + (self(x) - x) / factor


class Through:
    """A forward pre-hook that sends a module's first input through a wire.

    An object rather than a closure, so that a deep copy of the model refers to the copied wire.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": self.wire(kwargs["hidden_states"])}
        return (self.wire(args[0]), *args[1:]), kwargs


class Skip:
    """Two hooks that send a skip connection through a wire, though the sum is out of a hook's reach.

    With the stream x noted where the branch leaves it, at its norm, the branch's last module is made to give
    b + (wire(x) - x) / f, which the layer adds up to x + f (b + (wire(x) - x) / f) = wire(x) + f b.

    An object rather than closures, for deep copies, as `Through`. A wire without ops costs nothing.
    """

    def __init__(self, wire: Wire, factor: float) -> None:
        self.wire, self.factor = wire, factor
        self.x_BTD: Tensor | None = None

    def leave(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.x_BTD = args[0] if len(self.wire.ops) else None

    def join(self, writer: nn.Module, args: tuple[Tensor, ...], branch_BTD: Tensor) -> Tensor:
        if self.x_BTD is None:
            return branch_BTD
        x_BTD, self.x_BTD = self.x_BTD, None
        with torch.autocast(x_BTD.device.type, enabled=False):  # the stream is never rounded to 16 bits by autocast
            return self.wire.added_to(branch_BTD, x_BTD, self.factor)
