"""The stages of a run that a stopped process has kept are read; those it has not are done, and kept.

    RUN/state/fitting-NNNN.safetensors   a loop of the fit, so far    fitting.journal
    RUN/state/fit                        maps and log of the fit      kept_rotation
    RUN/state/allocation.json            the recipe, budget spent     kept_allocation
    RUN/state/layer-NNNN.safetensors     a layer's rounded linears    kept_rounding

Either way the bytes are the same. Of several processes the first one reads and writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch import Tensor

from spinfold.checkpoint import load_maps, rounded_tensors, save_maps
from spinfold.distributed import on_first
from spinfold.errors import SpinfoldError, reading
from spinfold.files import load_tensors, read_json, save_tensors, whole_folder, write_json
from spinfold.fitting.end_to_end import FitLog
from spinfold.fitting.journal import Journal
from spinfold.formats import QuantizedWeight
from spinfold.maps import SiteMaps
from spinfold.networks import Network
from spinfold.progress import Progress
from spinfold.recipe import Recipe
from spinfold.rotation import Rotated, rotate_network
from spinfold.rounding import RoundedLinear, meet_budget, round_network
from spinfold.run import RunFolder
from spinfold.subject import Subject

__all__ = ["kept_allocation", "kept_rotation", "kept_rounding"]


def kept_rotation(folder: RunFolder, subject: Subject, recipe: Recipe, progress: Progress) -> Rotated:
    """The rotated network, from the maps, or from the steps of their fit, that a stopped process has kept."""
    kept, journal = folder.state / "fit", Journal(folder.state)

    def read() -> tuple[SiteMaps, FitLog] | None:
        if not kept.is_dir():
            return None
        data = read_json(kept / "log.json")
        log = FitLog(tuple(map(float, data["losses"])), int(data["samples"]), dict(data["clips"]))
        return load_maps(kept), log

    with reading(kept):
        if found := on_first(read):
            journal.forget()
            maps, log = found
            return rotate_network(subject, recipe, progress, maps=maps, log=log)
    try:
        rotated = rotate_network(subject, recipe, progress, journal=journal)
    except (ArithmeticError, LookupError, RuntimeError, ValueError) as error:
        if not journal.restored:
            raise
        why = f"The fit failed after it had gone on from {journal.restored[-1].name}: {error}"[:500]
        raise SpinfoldError(
            f"What was kept of a fit in {folder.state} can't be used.", why, "Make the run again."
        ) from None

    def keep() -> None:
        with whole_folder(kept) as part:
            save_maps(part, rotated.maps)
            write_json(part / "log.json", asdict(rotated.log))

    on_first(keep)
    journal.forget()
    return rotated


def kept_allocation(
    folder: RunFolder, subject: Subject, network: Network, recipe: Recipe, progress: Progress
) -> Recipe:
    """The recipe with its budget spent, once, on a width for each linear; itself if it has none."""
    if recipe.budget is None:
        return recipe
    kept = folder.state / "allocation.json"
    if found := on_first(lambda: read_json(kept) if kept.is_file() else None):
        return Recipe.parse(found)
    calibration = recipe.calibration
    ids_NT = subject.windows(calibration.seq_len, calibration.samples, recipe.seed)
    spent = meet_budget(network, recipe, ids_NT, progress=progress)
    on_first(lambda: write_json(kept, spent.model_dump(mode="json")))
    return spent


def kept_rounding(
    folder: RunFolder, subject: Subject, network: Network, recipe: Recipe, progress: Progress
) -> list[RoundedLinear]:
    """All rounded linears, layer by layer, each layer kept as soon as it is done."""
    if recipe.weight_format is None:
        return []

    def file_of(layer: int) -> Path:
        return folder.state / f"layer-{layer:04}.safetensors"

    def read() -> list[list[RoundedLinear]]:
        done: list[list[RoundedLinear]] = []
        while (path := file_of(len(done))).is_file():
            tensors, metadata = load_tensors(path)
            with reading(path):
                done.append(_read_layer(tensors, metadata, recipe))
        return done

    def keep(layer: list[RoundedLinear]) -> None:
        save_tensors(file_of(layer[0].layer), rounded_tensors(layer), _layer_metadata(layer))

    done = on_first(read)
    rounded = [one for layer in done for one in layer]
    calibration = recipe.calibration
    ids_NT = subject.windows(calibration.seq_len, calibration.samples, recipe.seed)
    for layer in round_network(network, recipe, ids_NT, done=done, progress=progress):
        on_first(partial(keep, layer))
        if not network.resident:  # from the file it takes no memory
            tensors, metadata = load_tensors(file_of(layer[0].layer))
            layer[:] = _read_layer(tensors, metadata, recipe)
        rounded += layer
    return rounded


def _layer_metadata(layer: Sequence[RoundedLinear]) -> dict[str, str]:
    return {x.name: f"{x.error!r} {x.nearest_error!r} {x.damping!r}" for x in layer}


def _read_layer(tensors: dict[str, Tensor], metadata: dict[str, str], recipe: Recipe) -> list[RoundedLinear]:
    layer = []
    for name, text in metadata.items():
        _, index, role = name.split(".")
        parts = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        numbers = [None if word == "None" else float(word) for word in text.split()]
        format = recipe.weight_format_of(name)
        assert format is not None
        layer.append(RoundedLinear(int(index), role, QuantizedWeight.from_tensors(parts, format), *numbers))
    return layer
