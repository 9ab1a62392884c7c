"""What flows along a network's wires: rows, second moments or channel maxima of calibration tokens, in one pass.

    capture          a seeded subsample of the tokens on each wire                   for layer-wise fits
    second_moments   H = E[xᵀ x] on each wire, layer by layer                        for OptRot+
    channel_maxima   max |x_j| over all tokens                                       for SmoothQuant

The windows pass in batches and nothing is kept but the result, so the memory is the network's, one batch's inside one
layer, and what is asked for; with second moments, which are given layer by layer, the tokens' at the input of a layer.
No gradients.

Shapes: W windows, T tokens (B windows of a batch, flattened), S captured rows, L layers, N width of a wire.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from spinfold.compute import precision, square
from spinfold.distributed import everyones, share, summed
from spinfold.networks import Network, Stream, hidden_in_batches
from spinfold.progress import Progress, Quiet

__all__ = ["Captured", "capture", "channel_maxima", "pooled", "second_moments", "stacked", "watch"]


class Captured(dict[tuple[int, str], Tensor]):
    """Rows `(S, N)` by layer and wire: views of one matrix for wires that were asked for together."""

    def __init__(self, rows: Mapping[tuple[int, str], Tensor], whole: Mapping[tuple[str, ...], Tensor] | None = None):
        super().__init__(rows)
        self.whole = dict(whole or {})
        """`(L, wires, S, N)` by such wires; none where processes have shared out the windows."""


_TOKENS_PER_BATCH = {"cuda": 16384, "cpu": 4096}
_LARGEST_FP16 = 65504.0
_MOST_NUMBERS = 1 << 27  # of a batch on the widest wire


def _tokens_per_batch(network: Network) -> int:
    tokens = _TOKENS_PER_BATCH.get(network.device.type, 4096)
    return min(tokens, _MOST_NUMBERS // max(layer.mlp_width for layer in network.layers))


@torch.no_grad()
def watch(
    network: Network,
    ids_WT: Tensor,
    wires: Sequence[str],
    see: Callable[[int, str, int, Tensor], None],
    *,
    compute: str = "auto",
    progress: Progress | None = None,
) -> None:
    """Run the windows through the network and call `see(layer, wire, start, x)` for each batch on each wire.

    `x` is `(T, N)`, on query, key and value `(T, heads, N)`, on the down wire of experts `(T, experts of a token, N)`:
    what the next linear or the attention reads, ops on the wire included, for the tokens `start` ... `start + T - 1`,
    counted through all windows.
    """
    seen: dict[tuple[int, str], int] = {}

    def note(layer: int, wire: str, _: nn.Module, __: object, x: Tensor) -> None:
        x, start = (x.transpose(1, 2) if x.ndim == 4 else x).flatten(0, 1), seen.get((layer, wire), 0)
        seen[layer, wire] = start + len(x)
        see(layer, wire, start, x)

    handles = [
        layer.wire(wire).register_forward_hook(partial(note, layer.index, wire))
        for layer in network.layers
        for wire in wires
    ]
    try:
        with (progress or Quiet()).stage("capture activations", total=len(ids_WT)) as bar:
            for hidden_BTD in hidden_in_batches(network, ids_WT, compute, _tokens_per_batch(network)):
                bar.advance(len(hidden_BTD))
    finally:
        for handle in handles:
            handle.remove()


def capture(
    network: Network,
    ids_WT: Tensor,
    wires: Sequence[str | tuple[str, ...]],
    tokens: int | None,
    seed: int,
    progress: Progress | None = None,
    *,
    compute: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> Captured:
    """`tokens` rows per wire (all, if there are fewer or it is None), drawn by `seed`, as `dtype` on the device.

    The same tokens on every wire, in the order of the text. On query, key and value each token gives one row per
    head, head after head; on the down wire of experts one per expert that it meets. The wires of a tuple share a
    matrix, so that `pooled` needs no second one.
    """
    total, own, seq_len = ids_WT.numel(), share(len(ids_WT)), ids_WT.shape[1]
    drawn_S = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:tokens].sort().values
    before, until = torch.searchsorted(drawn_S, torch.tensor([own.start, own.stop]) * seq_len).tolist()
    pools = [(wire,) if isinstance(wire, str) else wire for wire in wires]
    pool_of = {wire: pool for pool in pools for wire in pool}
    whole: dict[tuple[str, ...], Tensor] = {}

    def see(layer: int, wire: str, start: int, x: Tensor) -> None:
        start += own.start * seq_len
        first, last = torch.searchsorted(drawn_S, torch.tensor([start, start + len(x)])).tolist()
        kept = x[(drawn_S[first:last] - start).to(x.device)]
        if dtype == torch.float16:  # less than a massive activation may be
            kept = kept.clamp(-_LARGEST_FP16, _LARGEST_FP16)
        pool, each = pool_of[wire], kept[:1].numel() // kept.shape[-1] if len(kept) else 0
        if not each:
            return
        if pool not in whole:
            size = len(network.layers), len(pool), (until - before) * each, kept.shape[-1]
            whole[pool] = torch.empty(size, dtype=dtype, device=x.device)
        whole[pool][layer, pool.index(wire), (first - before) * each : (last - before) * each] = kept.flatten(0, -2)

    watch(network, ids_WT[own], list(pool_of), see, compute=compute, progress=progress)
    rows = {(layer, w): x[layer, i] for pool, x in whole.items() for layer in range(len(x)) for i, w in enumerate(pool)}
    parts = everyones(rows)
    if len(parts) == 1:
        return Captured(rows, whole)
    keys = dict.fromkeys(key for part in parts for key in part)
    return Captured({key: torch.cat([part[key] for part in parts if key in part]) for key in keys})


def pooled(captured: Captured, *wires: str) -> Tensor:
    """The rows of these wires of all layers as one matrix `(S, N)`: what one rotation of them all is fitted to."""
    if wires in captured.whole:
        return captured.whole[wires].flatten(0, 2)
    layers = 1 + max(layer for layer, _ in captured)
    return torch.cat([captured[layer, wire] for layer in range(layers) for wire in wires])


def stacked(captured: Captured, wire: str) -> Tensor:
    """The rows of a wire layer by layer, `(L, S, N)`."""
    if (wire,) in captured.whole:
        return captured.whole[wire,][:, 0]
    return torch.stack([captured[layer, wire] for layer in range(1 + max(layer for layer, _ in captured))])


@torch.no_grad()
def second_moments(
    network: Network, ids_WT: Tensor, wires: Sequence[str], *, compute: str = "auto", progress: Progress | None = None
) -> Generator[tuple[int, dict[str, Tensor]], None, None]:
    """H = E[xᵀ x] by wire, `(N, N)` in fp64, of each layer in its turn; heads and experts are pooled.

    All windows pass a layer before the next one, so that those of one layer can be made smaller, or used up, before
    there are more: a wide MLP's are larger than its weights. Products as good as with IEEE arithmetic.
    """
    stream = Stream(network, ids_WT, compute, _tokens_per_batch(network), share(len(ids_WT)))
    with (progress or Quiet()).stage("capture activations", total=len(network.layers)) as bar:
        for layer in network.layers:
            sums, rows = dict[str, Tensor](), dict[str, Tensor]()
            handles = [layer.wire(wire).register_forward_hook(partial(_add_moment, sums, rows, wire)) for wire in wires]
            try:
                stream.pass_through(layer)
            finally:
                for handle in handles:
                    handle.remove()
            bar.advance()
            sums, rows = summed(sums), summed(rows)
            yield layer.index, {wire: sums.pop(wire).div_(rows[wire]) for wire in wires}


def _add_moment(
    sums: dict[str, Tensor], rows: dict[str, Tensor], wire: str, _: nn.Module, __: object, x: Tensor
) -> None:
    x_TN = x.flatten(0, -2).float()
    with precision("fp32", x.device):
        moment_NN = square(x_TN)
    sums[wire] = sums[wire].add_(moment_NN) if wire in sums else moment_NN.double()
    rows[wire] = rows.get(wire, 0) + torch.tensor(len(x_TN))


def channel_maxima(
    network: Network, ids_WT: Tensor, wires: Sequence[str], *, compute: str = "auto", progress: Progress | None = None
) -> Mapping[tuple[int, str], Tensor]:
    """max |x_j| over all tokens, `(N,)` by layer and wire."""
    maxima: dict[tuple[int, str], Tensor] = {}

    def see(layer: int, wire: str, _: int, x: Tensor) -> None:
        peak_N = x.flatten(0, -2).abs().amax(0).float()
        maxima[layer, wire] = torch.maximum(peak_N, maxima.get((layer, wire), peak_N))

    watch(network, ids_WT, wires, see, compute=compute, progress=progress)
    return maxima
