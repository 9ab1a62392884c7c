"""How far to clip each wire's range: the ratio of least squared rounding error, or one learned with the maps.

    searched    c* = argmin over c of  mean ||x M - Q_c(x M)||²,   Q_c quantization of c times a grid's own range
    learned     from there, by the gradient of an end-to-end fit's loss

A range a little smaller than a token's own costs its few largest entries less than the finer steps gain on all others.
How much smaller depends on bits and width: for Gaussian rows at 4 bits 0.86 at 576 numbers, 0.95 at 64, 1 at 8 bits.

Shapes: T tokens, R rows of G groups of g, ... the leading axes of a wire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from spinfold.distributed import share, summed
from spinfold.fitting.capture import watch
from spinfold.formats import CacheFormat, Format, fake_quantize
from spinfold.formats.base import extent
from spinfold.formats.cache import tokens_of
from spinfold.kernels import kernels_run_on
from spinfold.maps import Map, SiteMaps
from spinfold.networks import Attended, Network
from spinfold.progress import Progress
from spinfold.recipe import Recipe
from spinfold.runtime import Clips, QuantizeCache, quantized_wires

__all__ = ["CLIP_RATIOS", "CLIP_WINDOWS", "LearnedClips", "search_clips"]

CLIP_WINDOWS = 2
"""Windows that a search looks at: one ratio per wire is a mean over all their tokens, and needs no more."""
CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
_NUMBERS_PER_BLOCK = 2**17


def search_clips(
    network: Network,
    recipe: Recipe,
    ids_WT: Tensor,
    maps: SiteMaps | None = None,
    progress: Progress | None = None,
) -> Clips:
    """The ratio by layer and wire, for the wires whose clip the recipe leaves to a search; empty if there is none.

    `maps` are those that the quantizers act through, if they are not folded into the network.
    """
    searched: dict[str, tuple[Format, Map | None]] = {}
    for layer in network.layers:
        for wire, (format, map) in quantized_wires(layer, recipe, maps or SiteMaps()).items():
            if isinstance(recipe.clip_of(wire), str):
                searched[f"{layer.index}.{wire}"] = format, map
    if not searched:
        return {}
    errors: dict[str, Tensor] = {}

    def see(layer: int, wire: str, _: int, x: Tensor) -> None:
        if (name := f"{layer}.{wire}") not in searched:
            return
        format, map = searched[name]
        y = x.float() if map is None else map.apply(x.float())
        if wire in ("key", "value") and tokens_of(format):
            y = y.mT.contiguous()  # a channel's tokens, side by side
        errors[name] = errors.get(name, 0) + _errors(y, format)

    wires = list(dict.fromkeys(name.partition(".")[2] for name in searched))
    cache = recipe.kv_format if recipe.kv_format and not recipe.kv_format.by_token else None
    if cache:
        wires = [wire for wire in wires if wire not in ("key", "value")]
    with _probes(network, cache, see):
        watch(network, ids_WT[share(len(ids_WT))], wires, see, compute=recipe.compute, progress=progress)
    errors = summed(errors)
    best = torch.stack(list(errors.values())).argmin(1).tolist()
    return {name: CLIP_RATIOS[index] for name, index in zip(errors, best, strict=True)}


def _errors(y: Tensor, format: Format) -> Tensor:
    """Σ (Q(y) - y)² for each of the ratios; on a CPU in blocks of rows that stay in its cache."""
    formats = [replace(format, clip=ratio) for ratio in CLIP_RATIOS]
    if kernels_run_on(y):
        return torch.stack([fake_quantize(y, one).sub_(y).square_().sum() for one in formats])
    errors = []
    for y_RGg in format.split(y.reshape(-1, y.shape[-1])).split(max(1, _NUMBERS_PER_BLOCK // y.shape[-1])):
        extremes = low_RG1, high_RG1 = extent(y_RGg)
        whole_RG1 = format.whole_of(low_RG1, high_RG1)
        grids = [one.grid(*extremes, whole=whole_RG1) for one in formats]
        values = (format.values(format.nearest(y_RGg, *grid), *grid) for grid in grids)
        errors.append(torch.stack([q_RGg.sub_(y_RGg).square_().sum() for q_RGg in values]))
    return torch.stack(errors).sum(0)


@contextmanager
def _probes(
    network: Network, cache: CacheFormat | None, see: Callable[[int, str, int, Tensor], None]
) -> Iterator[None]:
    """Show keys and values as quantizers on the cache wires would be given them, inside the block."""
    placed: list[nn.ModuleList] = []
    if cache is not None:
        for layer in network.layers:
            placed.append(layer.wire("cache").ops)
            placed[-1].append(_Probe(QuantizeCache(cache, None, None, layer.rope), partial(see, layer.index)))
    try:
        yield
    finally:
        for ops in placed:
            del ops[-1]


class _Probe(nn.Module):
    """Shows what a cache's quantizers would be given, and lets it pass."""

    def __init__(self, op: QuantizeCache, see: Callable[[str, int, Tensor], None]) -> None:
        super().__init__()
        self.op, self.see = op, see

    def forward(self, seen: Attended) -> Attended:
        for wire, x_BHTN in self.op.inputs(seen).items():
            self.see(wire, 0, x_BHTN)
        return seen


class LearnedClips:
    """Clip ratios as leaves of a fit, one number each, and Adam's steps for them.

    A ratio has so small a say in the loss that its gradient's size means little: Adam moves each by about
    `learning_rate` a step. It stays in [0.3, 1].
    """

    def __init__(self, start: Clips, device: torch.device, learning_rate: float = 0.003) -> None:
        self.leaves = {name: torch.tensor(float(c), device=device).requires_grad_() for name, c in start.items()}
        self.params, self.learning_rate = list(self.leaves.values()), learning_rate
        self.adam = torch.optim.Adam(self.params, learning_rate, betas=(0.9, 0.95), foreach=True)
        for leaf in self.params:  # else it would make them in its first step
            moments = {name: torch.zeros_like(leaf, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            self.adam.state[leaf] = {"step": torch.tensor(0.0), **moments}

    @property
    def state(self) -> dict[str, Tensor]:
        """All that a step reads and moves in place."""
        moments = {f"{name}.{key}": x for name, leaf in self.leaves.items() for key, x in self.adam.state[leaf].items()}
        return self.leaves | moments

    def step(self, lr_scale: float) -> None:
        """Move all ratios in place by a share of the learning rate."""
        self.adam.param_groups[0]["lr"] = self.learning_rate * lr_scale
        self.adam.step()
        with torch.no_grad():
            for leaf in self.leaves.values():
                leaf.clamp_(0.3, 1.0)

    def zero_grad(self) -> None:
        """Set gradients to zero; their memory stays, as a captured CUDA graph needs it."""
        self.adam.zero_grad(set_to_none=False)

    def settled(self) -> dict[str, float]:
        """The ratios as they are now."""
        return dict(
            zip(self.leaves, torch.stack([leaf.detach() for leaf in self.leaves.values()]).tolist(), strict=True)
        )
