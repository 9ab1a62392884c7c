"""What rounding will do to a model, before any of it is done: where outliers are, which bits are safe, what helps.

    model -> subject           loaded, the original measured                                    subject
          -> outliers          sites, layers, channels, tokens, before and after a rotation     evaluation
          -> rotated network   random Hadamards at every site the family allows, same function  rotation
          -> places            each wire, and the weights that read it, alone on the grid at 3, 4, 6 and 8 bits
          -> verdict           all of it on the grid at the asked bits: rotated against not rotated

Every answer is a KL divergence to the original in nats per token, measured on a few windows: a place is *safe* at the
fewest bits where it alone loses at most `SAFE_KL`, about one percent of perplexity. Weights are rounded to nearest with
a coarse search of their range.

Shapes: N windows, T tokens, P tokens of all windows, V vocabulary, O out features, I in features.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from spinfold import __version__, plan
from spinfold.compute import pick_device, pick_precision, precision
from spinfold.errors import SpinfoldError
from spinfold.evaluation import measure_quality
from spinfold.evaluation.outliers import MEASURED_WIRES, Outliers, measure_outliers
from spinfold.evaluation.spikes import Spikes, find_spikes
from spinfold.files import whole_folder, write_json
from spinfold.forecast import stays_in_files, unmeasured_machine
from spinfold.formats import ClipSearch
from spinfold.maps import SiteMaps
from spinfold.methods import METHODS
from spinfold.networks import Network, family_of
from spinfold.networks.sources import resolve
from spinfold.progress import Progress, Quiet
from spinfold.recipe import Bits, Recipe
from spinfold.report.inspect_page import build_inspection
from spinfold.rotation import rotate_network
from spinfold.rounding.nearest import round_nearest
from spinfold.runtime import Quantize, quantize_wires, quantized_wires
from spinfold.subject import Subject, prepare

__all__ = ["Inspection", "Place", "advise", "inspect", "rounded_alone", "safe_bits"]

SAFE_KL = 0.01
"""Nats per token: perplexity grows by about as much, one percent."""
WORTH = 0.9
"""A rotation helps if it leaves at most this share of the loss: windows are few, and an online op has its price."""
BITS = (3, 4, 6, 8)
_WINDOW, _MOST_TOKENS = 64, 4096
_SEARCH = ClipSearch(steps=3, shrink=0.3)
_SITE_OF = {"qkv_input": "residual", "mlp_input": "residual", "attention_out": "value", "value": "value"}
_SITE_OF |= {"key": "query_key", "down": "down"}


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found, the contents of inspect.json; `path` is its folder, if one was asked for."""

    data: dict[str, Any]
    path: Path | None = None


class Place(NamedTuple):
    """One thing to be rounded: what a wire carries ("activations", "cache"), or the "weights" that read it."""

    kind: str
    wire: str


def inspect(
    model: str,
    output: str | Path | None = None,
    recipe: Recipe | None = None,
    *,
    tokens: int = 128,
    device: str = "auto",
    progress: Progress | None = None,
) -> Inspection:
    """Where a model's outliers are, which bits are safe where, and whether a rotation helps at the recipe's bits.

    Of the recipe count bits, format, group size, the grids' settings, text and seed. `tokens` of the text are looked
    at, in windows of 64. With `output`, a folder that is new or empty, `inspect.json` and the page `index.html` are
    left there. Raises `SpinfoldError` for what can't be done, before weights are loaded where that can be known.
    """
    start, progress = time.perf_counter(), progress or Quiet()
    recipe, place = recipe or Recipe(), pick_device(device)
    if min(bits := Bits.parse(recipe.bits)) == 16:
        raise SpinfoldError(f"There is nothing to inspect at {bits}.", "Nothing is rounded.", "Ask for fewer bits.")
    if not _WINDOW <= tokens <= _MOST_TOKENS:
        raise SpinfoldError(
            f"{tokens} tokens can't be used.",
            f"A window has {_WINDOW}, and what the original says of each token is held in memory.",
            f"Give {_WINDOW} to {_MOST_TOKENS}.",
        )
    if output is not None:
        plan.check_output(output)
    checkpoint = resolve(model)
    recipe = recipe.with_(method="quarot", calibration__seq_len=_WINDOW, calibration__samples=1)
    recipe = recipe.with_(sites=_sites(checkpoint.config, recipe))
    plan.plan_run(checkpoint.config, recipe)
    if stays_in_files(checkpoint, unmeasured_machine(place)):
        raise SpinfoldError(
            f"{checkpoint.name} is too large to inspect on this machine.",
            "Its weights are rounded a part at a time, which needs all of them in memory, twice in fp32.",
            "Use a machine with more memory; `quantize` needs far less.",
        )

    subject = prepare(checkpoint, recipe, place, progress, held_out_tokens=tokens, max_tokens=tokens)
    with progress.stage("find outliers"):
        before = measure_outliers(subject.network, subject.held_out_NT)
        spikes = find_spikes(subject.network, subject.held_out_NT)
    rotated = rotate_network(subject, recipe, progress)
    after = measure_outliers(rotated.network, subject.held_out_NT, at=before.places)
    networks = {"plain": subject.network, "rotated": rotated.network}
    original_PV = _log_probabilities(subject.network, subject.held_out_NT, recipe)
    places = _measure_places(networks, subject.held_out_NT, original_PV, recipe, progress)
    with progress.stage(f"round everything to {bits}", total=2) as bar:
        whole = {}
        for name, network in networks.items():  # last, since nothing is taken back
            whole[name] = _measure_whole(subject, network, recipe)
            bar.advance()
    data = {
        "schema_version": 1,
        "spinfold": __version__,
        "model": {"name": subject.network.name, "family": subject.network.family.name}
        | {"parameters": checkpoint.num_parameters, "fingerprint": checkpoint.fingerprint()},
        "recipe": recipe.model_dump(mode="json"),
        "device": {"type": place.type, "threads": torch.get_num_threads()}
        | {"compute": pick_precision(recipe.compute, place)},
        "text": {"source": subject.held_out, "windows": list(subject.held_out_NT.shape)},
        "safe_kl": SAFE_KL,
        "original": {"perplexity": subject.quality.perplexity},
        "wires": _wires(before, after, spikes),
        "tokens": _tokens(subject, spikes),
        "places": places,
        "whole": whole,
        "advice": advise(bits, recipe.sites or (), whole, places),
        "proof": rotated.proof.to_dict(),
        "seconds": time.perf_counter() - start,
    }
    if output is None:
        return Inspection(data)
    with whole_folder(Path(output)) as folder:
        write_json(folder / "inspect.json", data)
        (folder / "index.html").write_text(build_inspection(data, before, after), "utf-8")
    return Inspection(data, Path(output))


def _sites(config: Any, recipe: Recipe) -> tuple[str, ...]:
    """The sites that can have a map in this model; query_key only where it stands before a quantizer."""
    family = family_of(config.model_type)
    sites = METHODS["quarot"].sites
    useful = {"query_key": recipe.keys_behind_rope}
    return tuple(site for site in sites if family.supports(site) and useful.get(site, True))


# ---- measuring -------------------------------------------------------------------------------------------------


def _measure_places(
    networks: Mapping[str, Network], ids_NT: Tensor, original_PV: Tensor, recipe: Recipe, progress: Progress
) -> list[dict[str, Any]]:
    """Each place alone on the grid, in each network: KL by bits, and the safe number of them."""
    groups = networks["plain"].layers[0].groups
    places = [Place("cache" if wire in ("key", "value") else "activations", wire) for wire in MEASURED_WIRES]
    places += [Place("weights", wire) for wire in groups]
    found = []
    with progress.stage("round one place at a time", total=len(places)) as bar:
        for place in places:
            one: dict[str, Any] = {"kind": place.kind, "wire": place.wire, "site": _SITE_OF[place.wire]}
            if place.kind == "weights":
                one["roles"] = list(dict.fromkeys(linear.role for linear in groups[place.wire]))
            for name, network in networks.items():
                kl = _by_bits(network, ids_NT, original_PV, recipe, place)
                one[name] = {"kl": {str(bits): value for bits, value in kl.items()}, "safe_bits": safe_bits(kl)}
            found.append(one)
            bar.advance(note=f"{place.kind}, {place.wire}")
    return found


def _by_bits(network: Network, ids_NT: Tensor, original_PV: Tensor, recipe: Recipe, place: Place) -> dict[int, float]:
    """KL at each number of bits, from few to many, until it is safe."""
    index = ("weights", "activations", "key", "value").index(place.wire if place.kind == "cache" else place.kind)
    asked = Bits.parse(recipe.bits)[index]
    choices = {asked} if recipe.float_format and place.kind != "cache" else {*BITS, asked}  # a float has one width
    kl: dict[int, float] = {}
    for bits in sorted(choices - {16}):
        alone = Bits(*(bits if i == index else 16 for i in range(4)))
        with rounded_alone(network, recipe.with_(bits=str(alone)), place):
            logp_PV = _log_probabilities(network, ids_NT, recipe)
        kl[bits] = float(F.kl_div(logp_PV, original_PV, reduction="batchmean", log_target=True))
        if kl[bits] <= SAFE_KL and (bits >= asked or asked == 16):
            break
    return kl


@torch.no_grad()
def _log_probabilities(network: Network, ids_NT: Tensor, recipe: Recipe) -> Tensor:
    """log p of every word after every token, `(P, V)`; the head in full precision as in `measure_quality`."""
    device = network.device
    with precision(pick_precision(recipe.compute, device), device):
        hidden_NTD = network.hidden(ids_NT.to(device))
    with precision("tf32", device):
        return network.logits(hidden_NTD.flatten(0, 1).float()).float().log_softmax(-1)


@contextmanager
def rounded_alone(network: Network, recipe: Recipe, place: Place) -> Iterator[None]:
    """One place of all layers on the recipe's grid, inside the block."""
    if place.kind == "weights":
        weights = [x.weight_OI for layer in network.layers for x in layer.groups[place.wire]]
        before = [w_OI.clone() for w_OI in weights]
        _round(weights, recipe)
        try:
            yield
        finally:
            for w_OI, old_OI in zip(weights, before, strict=True):
                w_OI.copy_(old_OI)
        return
    if place.kind == "cache":
        take_off = quantize_wires(network, recipe)
        try:
            yield
        finally:
            take_off()
        return
    quantizers = {layer: quantized_wires(layer, recipe, SiteMaps())[place.wire][0] for layer in network.layers}
    for layer, format in quantizers.items():
        layer.wire(place.wire).ops.append(Quantize(format))
    try:
        yield
    finally:
        for layer in quantizers:
            del layer.wire(place.wire).ops[-1]


@torch.no_grad()
def _round(weights: Sequence[Tensor], recipe: Recipe) -> None:
    """Round to nearest in place, the range searched coarsely if the recipe has it searched."""
    format, search = recipe.weight_format, _SEARCH if recipe.clip_search else None
    if format is None:
        return
    for w_OI in weights:
        w_OI.copy_(round_nearest(w_OI, format, search, scale_dtype=recipe.scale_dtype).dequantize())


def _measure_whole(subject: Subject, network: Network, recipe: Recipe) -> dict[str, float | None]:
    """The figures with all weights and wires on the recipe's grids, which stay there."""
    _round([linear.weight_OI for linear in network.linears], recipe)
    quantize_wires(network, recipe)
    quality, _ = measure_quality(network, subject.held_out_NT, reference=subject.reference, compute=recipe.compute)
    return {"kl": quality.kl, "perplexity": quality.perplexity}


# ---- saying ----------------------------------------------------------------------------------------------------


def safe_bits(kl: Mapping[int, float]) -> int | None:
    """The fewest bits from which on the loss is at most `SAFE_KL`; None if it never is."""
    safe = None
    for bits in sorted(kl, reverse=True):
        if not kl[bits] <= SAFE_KL:  # not a number is not safe either
            break
        safe = bits
    return safe


def advise(
    bits: Bits, sites: Sequence[str], whole: Mapping[str, Mapping[str, Any]], places: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """To rotate or not, by the loss at `bits` as it is and rotated at `sites`; the reason; and the bits to think over.

    `whole` and `places` are those of `inspect`'s data. A rotation must take at least a tenth of the loss away.
    """
    plain, rotated = whole["plain"]["kl"], whole["rotated"]["kl"]
    loses = f"Rounded to {bits}, the model loses {plain:.3g} nats per token as it is"
    if plain <= SAFE_KL:
        rotate, reason = False, f"{loses}, which is little (up to {SAFE_KL:g} is about one percent of perplexity)."
    elif not rotated <= WORTH * plain:
        rotate, reason = False, f"{loses} and {rotated:.3g} with random Hadamards, which are no help in this format."
    else:
        rotate, reason = True, f"{loses} and {rotated:.3g} with random Hadamards at {', '.join(sites)}."
    method = "none" if not rotate else "quarot" if rotated <= SAFE_KL else "spinfold"
    if method == "spinfold":
        reason += " A learned rotation can take more of it away."
    basis = "rotated" if rotate else "plain"
    asked = {"weights": bits.weights, "activations": bits.activations, "key": bits.keys, "value": bits.values}
    unsafe = [
        {key: one[key] for key in ("kind", "wire", "roles") if key in one} | {"safe_bits": one[basis]["safe_bits"]}
        for one in places
        if asked[one["wire"] if one["kind"] == "cache" else one["kind"]] < (one[basis]["safe_bits"] or 16)
    ]
    return {"rotate": rotate, "method": method, "sites": list(sites) if rotate else [], "reason": reason} | {
        "options": f"{'--recipe' if method == 'spinfold' else '--method'} {method} --bits {bits}"
        + (f" --sites {','.join(sites)}" if rotate else ""),
        "unsafe": unsafe,
    }


def _wires(before: Outliers, after: Outliers, spikes: Spikes) -> list[dict[str, Any]]:
    """The outliers of each wire: mean over layers, the worst layer, and the outlier channels by layer."""
    rows = []
    for w, wire in enumerate(before.wires):
        row: dict[str, Any] = {"wire": wire, "channels": {str(k): v for k, v in spikes.channels[wire].items()}}
        for name, outliers in (("plain", before), ("rotated", after)):
            kurtosis_L, ratio_L = outliers.kurtosis_LW[:, w], outliers.peak_to_rms_LW[:, w]
            row[name] = {"kurtosis": kurtosis_L.tolist(), "peak_to_rms": ratio_L.tolist()}
            row[name] |= {"largest": outliers.largest_LW[:, w].tolist()}
        rows.append(row)
    return rows


def _tokens(subject: Subject, spikes: Spikes) -> list[dict[str, Any]]:
    """The massive tokens, with what is written there."""
    tokenizer = subject.network.tokenizer
    rows = []
    for (window, position), (layers, largest) in sorted(spikes.tokens.items()):
        ids = [int(subject.held_out_NT[window, position])]
        text = tokenizer.decode(ids) if tokenizer is not None else ""
        rows.append({"window": window, "position": position, "text": text, "layers": layers, "largest": largest})
    return rows
