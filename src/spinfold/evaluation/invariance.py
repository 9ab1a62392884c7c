"""The proof that a network is still the same function, and the first block that is not when it fails.

    relative logit error = ||logits' - logits||_F / ||logits - mean(logits)||_F   over all tokens

The mean over the vocabulary is taken out of the denominator since a softmax does not see it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spinfold.compute import precision
from spinfold.networks import Network

__all__ = ["TOLERANCE", "Fingerprint", "Proof", "prove_same_function", "take_fingerprint"]

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@dataclass(frozen=True)
class Proof:
    """A measured statement with its tolerance."""

    statement: str
    measured: float
    tolerance: float
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Does it hold? NaN does not."""
        return self.measured <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        sign = "≤" if self.ok else ">"
        return f"{self.statement}: {self.measured:.2g} {sign} {self.tolerance:.2g}" + (
            f" ({self.detail})" if self.detail else ""
        )


@dataclass(frozen=True)
class Fingerprint:
    """What a network does to some tokens: its logits, and the length of every token after each block.

    Lengths are the same in any orthonormal basis, so they tell where two networks part even if one is rotated.
    """

    ids_BT: Tensor
    logits_BTV: Tensor
    lengths_LBT: Tensor


@torch.no_grad()
def take_fingerprint(network: Network, ids_BT: Tensor) -> Fingerprint:
    """Run `ids_BT` through the network with IEEE products."""
    lengths: list[Tensor] = []

    def note(_: nn.Module, __: Any, out: Any) -> None:
        lengths.append((out[0] if isinstance(out, tuple) else out).norm(dim=-1))

    handles = [layer.module.register_forward_hook(note) for layer in network.layers]
    try:
        with precision("fp32", network.device):
            logits_BTV = network(ids_BT.to(network.device))
    finally:
        for handle in handles:
            handle.remove()
    return Fingerprint(ids_BT, logits_BTV, torch.stack(lengths))


def prove_same_function(
    network: Network, original: Fingerprint, *, orthogonal: bool = True, tolerance: float | None = None
) -> Proof:
    """Compare a network with the fingerprint of the one that it should equal; fp32 or fp64 decides the tolerance."""
    now = take_fingerprint(network, original.ids_BT)
    reference = original.logits_BTV.to(now.logits_BTV)
    spread = (reference - reference.mean(-1, keepdim=True)).norm()
    error = float((now.logits_BTV - reference).norm() / spread)
    tolerance = tolerance or TOLERANCE[network.dtype]
    detail, depths = "", [len(now.lengths_LBT), len(original.lengths_LBT)]
    if not error <= tolerance and depths[0] != depths[1]:
        detail = f"it has {depths[0]} blocks, the original {depths[1]}"
    elif not error <= tolerance and orthogonal:
        gap_L = ((now.lengths_LBT - original.lengths_LBT).abs() / original.lengths_LBT).amax((1, 2))
        bad = (~(gap_L <= min(100 * tolerance, 0.1))).nonzero().flatten().tolist()
        detail = (
            f"block {bad[0]} is the first that deviates"
            if bad
            else "all blocks agree; look at the final norm and the head"
        )
    return Proof("same function: relative logit error", error, tolerance, detail)
