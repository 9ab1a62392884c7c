"""A network in a rotated basis: fitted, folded, proved to be the same function, and written as a plain model.

    Subject -> Rotated    maps fitted and folded, same function proved                      rotate_network
    model   -> folder     full precision, plain Hugging Face                                rotate
    models  -> Proof      the same function, or not, as far as their numbers can tell       verify

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from spinfold import plan
from spinfold.checkpoint import round_weights, save_folder
from spinfold.compute import pick_device
from spinfold.distributed import alike
from spinfold.errors import CheckFailed, SpinfoldError
from spinfold.evaluation import (
    TOLERANCE,
    Proof,
    cast_tolerance,
    measure_quality,
    prove_perplexity_kept,
    prove_same_function,
    take_fingerprint,
)
from spinfold.fitting.end_to_end import FitLog
from spinfold.fitting.journal import Journal
from spinfold.fitting.text import windows
from spinfold.folding import fold, fold_norms
from spinfold.maps import SiteMaps, as_held, orthogonality_gap
from spinfold.methods import METHODS, FitTask
from spinfold.networks import Network
from spinfold.networks.sources import Checkpoint, resolve
from spinfold.progress import Progress, Quiet
from spinfold.recipe import Recipe
from spinfold.subject import PROOF_TOKENS, Subject, load_network, longest_window, prepare, read_tokens

__all__ = ["Rotated", "prove_orthogonal", "rotate", "rotate_network", "sites_of", "verify"]

_CAST_TOKENS = 2048
"""How many tokens show whether a cast has moved the perplexity."""


@dataclass(frozen=True)
class Rotated:
    """A network with its maps folded, and how it came to them."""

    network: Network
    maps: SiteMaps
    log: FitLog
    proof: Proof
    seconds: float


def sites_of(recipe: Recipe) -> tuple[str, ...]:
    """The sites that a run uses: the recipe's, or else the method's own; no query_key map without a quantizer there."""
    if recipe.sites is not None:
        return recipe.sites
    sites = METHODS[recipe.method].sites
    return sites if recipe.keys_behind_rope else tuple(site for site in sites if site != "query_key")


def rotate_network(
    subject: Subject,
    recipe: Recipe,
    progress: Progress,
    *,
    maps: SiteMaps | None = None,
    log: FitLog | None = None,
    journal: Journal | None = None,
) -> Rotated:
    """Fit the recipe's method on a copy of the subject's network, fold, and prove that the function is the same.

    With `maps` (of an earlier fit) nothing is fitted; with a `journal` a fit that was stopped goes on. Raises
    `CheckFailed` naming the first deviating block, unless the maps themselves are approximate (`SiteMaps.exact`): then
    the proof says how far.
    """
    start = time.perf_counter()
    network, sites = subject.network.copy(), sites_of(recipe)
    if "residual" in sites:
        fold_norms(network)
    if maps is None:
        asked = 0

        def draw(seq_len: int, count: int) -> Tensor:
            nonlocal asked
            ids_NT = subject.windows(seq_len, count, recipe.seed)
            asked = max(asked, len(ids_NT))
            return ids_NT

        task = FitTask(network, recipe, sites, draw, progress, journal or Journal())
        maps, log = alike(METHODS[recipe.method].fit(task))
        log = replace(log, samples=log.samples or asked)
        maps.explain().require(f"The method {recipe.method} gave a map that can't be folded.")
    if recipe.online_dtype != "float32":
        maps = maps.each_replaced(lambda one: as_held(one, getattr(torch, recipe.online_dtype)), ("down",))
    with progress.stage("fold maps"):
        fold(network, maps)
    with progress.stage("prove the same function"):
        proof = prove_same_function(network, subject.fingerprint)
    if not proof.ok and maps.exact:  # approximate maps make another function, and the proof says how far it is
        raise CheckFailed(
            "The rotated network is not the same function.",
            str(proof),
            "This is a defect of spinfold: report it with the model's config; nothing was quantized.",
        )
    return Rotated(network, maps, log or FitLog(), proof, time.perf_counter() - start)


def prove_orthogonal(maps: SiteMaps) -> tuple[Proof, dict[str, float]]:
    """Are the maps orthogonal that claim it? And at each site the largest entry of |M^T M - I|; NaN if one is."""
    gap_of: dict[str, float] = {}  # a map without tensors is often the same in all layers
    gaps: dict[str, list[float]] = {}
    for name, one in maps.each():
        if one.orthogonal:
            key = name if one.tensors() else f"{type(one).__name__} {one.config()}"
            if key not in gap_of:
                gap_of[key] = orthogonality_gap(one.matrix().double())
            gaps.setdefault(name.partition(".")[0], []).append(gap_of[key])
    worst = {site: _worst(here) for site, here in gaps.items()}
    return Proof("orthogonal: largest entry of |RRᵀ - I|", _worst(worst.values()), 1e-6), worst


def _worst(gaps: Iterable[float]) -> float:
    """The largest; NaN if there is one, which `max` may pass over."""
    return float(torch.tensor([0.0, *gaps], dtype=torch.float64).max())


def rotate(
    model: str,
    output: str | Path,
    *,
    method: str = "quarot",
    sites: Sequence[str] = ("residual", "value"),
    seed: int = 0,
    dtype: str = "bfloat16",
    recipe: Recipe | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Path:
    """Write a folder with the same model in a rotated basis: full precision, plain Hugging Face, no online ops.

    `recipe` has the settings of a learned method and the text; windows longer than the model can see are cut. Raises
    `SpinfoldError` for a site that needs an online op, and `CheckFailed` if the function is not the same, or if its
    perplexity moves by more than 0.5 % when the weights are rounded to `dtype`.
    """
    progress, output = progress or Quiet(), Path(output)
    if online := [site for site in sites if site in plan.ONLINE_SITES]:
        raise SpinfoldError(
            f"A plain checkpoint can't hold a map at {', '.join(online)}.",
            "These sites need an op at inference, which a Hugging Face folder has no place for.",
            "Use --sites residual,value, or `spinfold quantize`, whose runs keep online ops.",
        )
    if method in METHODS and METHODS[method].skips and "residual" in sites:
        raise SpinfoldError(
            f"A plain checkpoint can't hold what the method {method!r} makes.",
            "Its bases change from block to block by an op on the skip connections, which a Hugging Face folder has no "
            "place for.",
            "Use --sites value, another method, or `spinfold quantize`, whose runs keep online ops.",
        )
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise SpinfoldError(
            f"Dtype {dtype!r} can't be written.", "It is not known.", f"Use one of: {', '.join(kinds)}."
        )
    recipe = (recipe or Recipe()).with_(method=method, sites=tuple(sites), seed=seed)
    place = pick_device(device)
    plan.check_output(output)
    checkpoint = resolve(model)
    seq_len = min(recipe.calibration.seq_len, longest_window(checkpoint))
    recipe = recipe.with_(calibration__seq_len=seq_len, calibration__samples=1)  # nothing is rounded by its Hessian
    plan.plan_run(checkpoint.config, recipe)
    few = None if METHODS[method].needs_data else _CAST_TOKENS
    subject = prepare(checkpoint, recipe, place, progress, held_out_tokens=_CAST_TOKENS, max_tokens=few)
    network = rotate_network(subject, recipe, progress).network
    if kinds[dtype] != torch.float32:
        round_weights(network, kinds[dtype])
        models = (subject.network, network)
        before, after = (measure_quality(one, subject.held_out_NT, compute="fp32")[0] for one in models)
        kept = prove_perplexity_kept(before, after, network.embedding.num_embeddings)
        if not kept.ok:
            raise CheckFailed(f"The model does not stand the rounding to {dtype}.", str(kept), "Use --dtype float32.")
    with progress.stage("write checkpoint"):
        beside = checkpoint.path / "generation_config.json"
        save_folder(network, output, kinds[dtype], also=[beside] if beside.is_file() else [])
    return output


def verify(
    original: str | Path,
    other: str | Path,
    *,
    text: str | None = None,
    tolerance: float | None = None,
    device: str = "auto",
    tokens: int = PROOF_TOKENS,
) -> Proof:
    """Are two models the same function? Their logits are compared in fp32 on `tokens` tokens of a text.

    If `other` is stored in 16 bits, rounding alone moves its logits: `cast_tolerance` says how far, and then its
    perplexity must be the same within 0.5 % too. `tolerance` replaces all of this by one bound on the logits. A model
    without a tokenizer is compared on random tokens. The proof's detail says what was done.
    """
    place = pick_device(device)
    first, second = _full_precision(original), _full_precision(other)
    sizes = [checkpoint.config.vocab_size for checkpoint in (first, second)]
    if sizes[0] != sizes[1]:
        detail = f"their vocabularies have {sizes[0]} and {sizes[1]} entries"
        return Proof("same function: relative logit error", math.inf, TOLERANCE[torch.float32], detail)
    stored = second.stored_dtype
    cast = cast_tolerance(stored, second.config.num_hidden_layers) if tolerance is None else None

    tokenizer = first.load_tokenizer() if first.has_tokenizer else None
    network = load_network(first, place, tokenizer)
    ids_NT = _some_windows(network, text, min(longest_window(first), longest_window(second), max(tokens, 512)))
    fingerprint = take_fingerprint(network, ids_NT[:1, :tokens])
    before = measure_quality(network, ids_NT, compute="fp32")[0] if cast and tokenizer is not None else None
    del network
    twin = load_network(second, place)
    proof = prove_same_function(twin, fingerprint, tolerance=tolerance or cast)
    remarks = [proof.detail] if proof.detail else []
    if tokenizer is None:
        remarks.append("on random tokens, since the original has no tokenizer")
    if cast:
        remarks.append(f"stored in {str(stored).removeprefix('torch.')}")
    if proof.ok and before is not None:
        kept = prove_perplexity_kept(before, measure_quality(twin, ids_NT, compute="fp32")[0], sizes[0])
        if not kept.ok:
            return kept
        remarks.append(kept.detail)
    return replace(proof, detail="; ".join(remarks))


def _full_precision(model: str | Path) -> Checkpoint:
    """A model that may be compared; a run is refused."""
    if plan.is_run(Path(model)):
        raise SpinfoldError(
            f"{model} is a quantized run, which is not the same function and does not claim to be.",
            "What was proved before its weights were rounded stands in its report.",
            "Compare full-precision models; `spinfold evaluate` measures a run.",
        )
    return resolve(str(model))


def _some_windows(network: Network, text: str | None, seq_len: int) -> Tensor:
    """Up to `_CAST_TOKENS` tokens in windows, `(N, T)`: of a text, or random ones if the model has no tokenizer."""
    if network.tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(network.embedding.num_embeddings, (1, seq_len), generator=generator)
    tokens_T = read_tokens(text or "sotu", network, _CAST_TOKENS)
    return windows(tokens_T, min(seq_len, max(2, len(tokens_T))))
