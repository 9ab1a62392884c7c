"""Round all linears of a network, layer by layer, each on inputs from the already rounded prefix.

For each layer, and in it for each wire in the order in which tokens meet them (q k v, o, gate up, down), the layer
runs on the calibration tokens up to that wire, with the online maps active and activations unquantized; then every
linear that reads it is rounded. Learned rounding takes a layer as a whole. What a back-end needs besides the weight:

    hessian    the second moment of the wire              (`stream`)
    original   the same tokens in the unrounded network: a second stream, through a copy of each layer

Rounding to nearest needs neither: a few windows are passed through for its errors alone.

Shapes: N windows, T tokens, B windows per batch, D residual width, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from spinfold.distributed import dealt
from spinfold.formats import Format, QuantizedWeight
from spinfold.networks import Layer, Linear, Network
from spinfold.progress import Progress, Quiet
from spinfold.recipe import Recipe
from spinfold.rounding.allocate import meet_budget
from spinfold.rounding.autoround import autoround
from spinfold.rounding.matrix import measure, round_matrix
from spinfold.rounding.nearest import round_nearest
from spinfold.rounding.stream import Moments, Stream, copy_layer, moments_of

__all__ = ["MEASURED_WINDOWS", "ROUNDINGS", "RoundedLinear", "round_network"]

ROUNDINGS: Mapping[str, tuple[str, ...]] = {
    "rtn": (),
    "gptq": ("hessian",),
    "gptaq": ("hessian", "original"),
    "ldlq": ("hessian",),
    "autoround": ("original",),
}
"""What each rounding needs besides the weight."""
MEASURED_WINDOWS = 2
"""Windows on which rounding to nearest measures its errors."""


@dataclass(frozen=True)
class RoundedLinear:
    """One linear, by its key in the layer, on its grid. `error` and `nearest_error` are its relative squared output
    errors, tr(E H E^T) / tr(W H W^T), of this rounding and of rounding to nearest; None if nothing was measured. Those
    of `gptaq` are taken from its own target."""

    layer: int
    key: str
    weight: QuantizedWeight
    error: float | None = None
    nearest_error: float | None = None
    damping: float | None = None

    @property
    def name(self) -> str:
        """Such as `layers.3.down`, or `layers.3.down@5` of an expert."""
        return f"layers.{self.layer}.{self.key}"

    @property
    def role(self) -> str:
        """Such as `down`, whichever expert it is."""
        return self.key.partition("@")[0]

    @property
    def expert(self) -> int | None:
        """The 5 of `down@5`."""
        return int(number) if (number := self.key.partition("@")[2]) else None


def round_network(
    network: Network,
    recipe: Recipe,
    ids_NT: Tensor | None = None,
    *,
    done: Sequence[list[RoundedLinear]] = (),
    progress: Progress | None = None,
) -> Iterator[list[RoundedLinear]]:
    """Round in place, and yield each layer's linears when they are; weights become the dequantized values.

    Where a layer is not on the device for good, the list that was yielded is kept, to be put in place in each turn: its
    elements may be replaced by the same that lie elsewhere.

    `ids_NT` are the calibration windows; `rtn` alone needs none, and has no errors then. `done` holds the first layers
    of an earlier run with the same arguments: they are put in place, not rounded again, and the rest comes out as it
    would have. A budget is met first (`allocate.meet_budget`).
    """
    progress = progress or Quiet()
    if recipe.budget is not None:
        assert ids_NT is not None
        recipe = meet_budget(network, recipe, ids_NT, progress=progress)
    settings = recipe.rounding
    with progress.stage(f"round weights ({settings.method})", total=len(network.layers)) as bar:
        needs_data = ROUNDINGS[settings.method] or settings.absorb is not None
        if ids_NT is not None:
            layers = _on_data(network, recipe, ids_NT if needs_data else ids_NT[:MEASURED_WINDOWS], done)
        else:
            assert not needs_data
            layers = _on_weights(network, recipe, done)
        for i, rounded in enumerate(layers):
            if i >= len(done):
                yield rounded
            bar.advance()


def _place(layer: Layer, rounded: Sequence[RoundedLinear]) -> None:
    """The rounded weights as the layer's, while it is present."""
    linears = layer.linears
    for one in rounded:
        w_OI = linears[one.key].weight_OI
        w_OI.copy_(one.weight.to(w_OI.device).dequantize())


def _settle(layer: Layer, rounded: list[RoundedLinear]) -> list[RoundedLinear]:
    """The rounded weights as the layer's for good; where they lie if the layer comes and goes: on the host."""
    if layer.away is not None:
        rounded = [replace(one, weight=one.weight.to("cpu")) for one in rounded]
    layer.change(partial(_place, rounded=rounded))
    return rounded


def _on_weights(network: Network, recipe: Recipe, done: Sequence[list[RoundedLinear]]) -> Iterator[list[RoundedLinear]]:
    """All layers' linears, those of `done` as they are."""
    for layer in network.layers:
        with layer.present():
            rounded = (
                done[layer.index]
                if layer.index < len(done)
                else [one for linear in layer.linears.values() for one in _round_alike([linear], None, recipe)]
            )
            yield _settle(layer, rounded)


@torch.no_grad()
def _on_data(
    network: Network, recipe: Recipe, ids_NT: Tensor, done: Sequence[list[RoundedLinear]]
) -> Iterator[list[RoundedLinear]]:
    """The same with statistics of what the layers before have made of the calibration tokens."""
    stream, needs = Stream(network, ids_NT, recipe.compute), ROUNDINGS[recipe.rounding.method]
    unrounded = stream.copy() if "original" in needs else None
    for layer in network.layers:
        with layer.present():
            drifts = unrounded and "hessian" in needs and layer.index >= len(done)
            original = (unrounded.copy(), copy_layer(layer)) if unrounded and drifts else None
            if unrounded:
                unrounded.pass_through(layer)
            passed = False
            if layer.index < len(done):
                rounded = done[layer.index]
            elif recipe.rounding.method == "autoround":
                assert unrounded is not None
                rounded = _learn_layer(layer, recipe, stream, unrounded.batches)
            else:
                passed = stream.is_one_batch and original is None
                rounded = _round_layer(layer, recipe, stream, original, in_passing=passed)
            yield _settle(layer, rounded)
            if layer.index + 1 < len(network.layers) and not passed:
                stream.pass_through(layer)


def _round_layer(
    layer: Layer, recipe: Recipe, stream: Stream, original: tuple[Stream, Layer] | None, in_passing: bool
) -> list[RoundedLinear]:
    """Wire by wire, each on what the linears before it have become; `in_passing` takes the stream through the layer."""
    rounded: list[RoundedLinear] = []
    groups = layer.groups

    def round_behind(wire: str) -> None:
        linears = groups[wire]
        experts = dict.fromkeys(x.expert for x in linears)
        moments = moments_of(stream, layer, wire, experts, original)
        jobs = ((alike, one) for expert, one in moments for alike in _alike(linears, expert, recipe))
        group = list(chain.from_iterable(dealt(jobs, lambda job: _round_alike(*job, recipe))))
        _place(layer, group)
        rounded.extend(group)

    if in_passing:
        stream.stop_at(layer, groups, round_behind)
    else:
        for wire in groups:
            round_behind(wire)
    return rounded


def _alike(linears: Sequence[Linear], expert: int | None, recipe: Recipe) -> Iterable[list[Linear]]:
    """Those of an expert by their format; each by itself where the inputs have no say."""
    alone = recipe.rounding.method == "rtn" and recipe.rounding.absorb is None
    if alone:
        return [[linear] for linear in linears if linear.expert == expert]
    readers: dict[Format, list[Linear]] = {}
    for linear in linears:
        if linear.expert == expert:
            readers.setdefault(_format_of(linear, recipe), []).append(linear)
    return readers.values()


def _round_alike(linears: Sequence[Linear], moments: Moments | None, recipe: Recipe) -> list[RoundedLinear]:
    """Linears of one format that share their statistics are rounded as one matrix and taken apart again."""
    w_OI = torch.cat([linear.weight_OI for linear in linears])
    whole, errors = round_matrix(w_OI, moments, _format_of(linears[0], recipe), recipe)
    sizes = [len(linear.weight_OI) for linear in linears]
    parts = zip(linears, whole.split(sizes), errors.split(sizes), strict=True)
    return [RoundedLinear(x.layer, x.key, part, *numbers) for x, part, numbers in parts]


def _learn_layer(layer: Layer, recipe: Recipe, stream: Stream, wanted: Sequence[Tensor]) -> list[RoundedLinear]:
    """All of them at once; the errors of each are those that the other back-ends would report."""
    weights, _, _ = autoround(
        layer,
        {key: _format_of(linear, recipe) for key, linear in layer.linears.items()},
        stream.batches,
        wanted,
        stream.kwargs_of[layer.index],
        recipe.rounding,
        seed=recipe.seed + layer.index,
        search=recipe.clip_search,
        scale_dtype=recipe.scale_dtype,
        mode=stream.mode,
    )
    linears = layer.linears
    before = {key: linear.weight_OI.clone() for key, linear in linears.items()}
    _place(layer, [RoundedLinear(layer.index, key, weight) for key, weight in weights.items()])
    rounded: list[RoundedLinear] = []
    for wire, readers in layer.groups.items():
        for expert, moments in moments_of(stream, layer, wire, dict.fromkeys(x.expert for x in readers)):
            for key in (x.key for x in readers if x.expert == expert):
                w_OI, format = before[key], _format_of(linears[key], recipe)
                nearest = round_nearest(w_OI, format, recipe.clip_search, scale_dtype=recipe.scale_dtype)
                errors = measure(w_OI, moments.hessian_II, weights[key], nearest).split([len(w_OI)])
                rounded.append(RoundedLinear(layer.index, key, weights[key], *errors[0]))
    return rounded


def _format_of(linear: Linear, recipe: Recipe) -> Format:
    format = recipe.weight_format_of(f"layers.{linear.layer}.{linear.key}")
    assert format is not None
    return format
