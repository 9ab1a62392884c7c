"""Outliers: how far the activations on each wire are from what an integer grid likes.

A *row* is what one quantization scale covers: a token's channels, on the key and value wires a token's channels
of one head. Of a row x with n entries,

    kurtosis       n Σ x⁴ / (Σ x²)²        1 if all |x| are equal, 3 for a Gaussian, n if one entry holds everything
    peak to RMS    max |x| / √(Σ x² / n)   1 if all |x| are equal, √n if one entry holds everything

A grid that reaches the peak has steps in proportion to it, so its noise grows with the square of peak to RMS.
The kurtosis is the non-central one of KurTail (Akhondzadeh et al. 2025): the grid doesn't care about the mean either.

Shapes: B batch, T tokens, R rows, C channels, L layers, W wires.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from spinfold.errors import SpinfoldError
from spinfold.networks import Network, hidden_in_batches

__all__ = [
    "MEASURED_WIRES",
    "OUTLIER_WINDOWS",
    "Outliers",
    "Surface",
    "kurtosis",
    "max_pool",
    "measure_outliers",
    "peak_to_rms",
]

MEASURED_WIRES = ("qkv_input", "key", "value", "attention_out", "mlp_input", "down")
MAX_SURFACE = (128, 192)
OUTLIER_WINDOWS = 2
"""Windows on which a run measures them: a thousand tokens, each a row or more at every place."""
SCHEMA_VERSION = 1


def kurtosis(x_RC: Tensor) -> Tensor:
    """Non-central kurtosis of each row, `(R,)`, in [1, C]; a row of zeros is flat: 1."""
    return _statistics(x_RC)[0]


def peak_to_rms(x_RC: Tensor) -> Tensor:
    """Largest magnitude over root mean square of each row, `(R,)`, in [1, √C]; a row of zeros is flat: 1."""
    return _statistics(x_RC)[1]


def max_pool(x_TC: Tensor, size: tuple[int, int] = MAX_SURFACE) -> tuple[Tensor, tuple[int, int]]:
    """|x| in at most `size` disjoint cells, each its largest entry, and the extent of a cell."""
    steps = -(-x_TC.shape[0] // size[0]), -(-x_TC.shape[1] // size[1])
    return F.max_pool2d(x_TC.abs()[None], steps, ceil_mode=True)[0], steps


def _statistics(x_RC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Kurtosis, peak to RMS and largest magnitude of each row.

    A row is taken over its largest magnitude: both ratios are scale free, and fourth powers can't overflow.
    """
    x_RC = x_RC.to(torch.promote_types(x_RC.dtype, torch.float32))
    peak_R = torch.linalg.vector_norm(x_RC, math.inf, dim=-1)
    flat_R = peak_R == 0
    square_RC = (x_RC / torch.where(flat_R, 1, peak_R)[..., None]).square_()
    second_R = square_RC.mean(-1)
    fourth_R = torch.linalg.vecdot(square_RC, square_RC) / x_RC.shape[-1]
    return (
        torch.where(flat_R, 1, fourth_R / second_R.square()),
        torch.where(flat_R, 1, second_R.rsqrt()),
        peak_R,
    )


@dataclass(frozen=True, eq=False)
class Surface:
    """|x| over tokens and channels at one place, max-pooled so that every peak survives.

    `peaks_TC[i, j]` covers tokens `i * step_tokens ...` and channels `j * step_channels ...`.
    """

    layer: int
    wire: str
    peaks_TC: NDArray[np.float32]
    step_tokens: int = 1
    step_channels: int = 1

    @property
    def place(self) -> tuple[int, str]:
        """`(layer, wire)`."""
        return self.layer, self.wire

    @property
    def largest(self) -> float:
        """The largest finite peak; 0 if there is none."""
        return float(self.peaks_TC.max(initial=0, where=np.isfinite(self.peaks_TC)))


@dataclass(frozen=True, eq=False)
class Outliers:
    """The statistics of every layer and wire, `(L, W)` each, and the surfaces of some. A wire never met holds NaN."""

    wires: tuple[str, ...]
    kurtosis_LW: NDArray[np.float64]
    peak_to_rms_LW: NDArray[np.float64]
    worst_peak_to_rms_LW: NDArray[np.float64]
    largest_LW: NDArray[np.float64]
    tokens: int
    surfaces: tuple[Surface, ...] = ()

    @property
    def places(self) -> tuple[tuple[int, str], ...]:
        """Where the surfaces are, for `measure_outliers(..., at=before.places)`."""
        return tuple(surface.place for surface in self.surfaces)

    def surface(self, place: tuple[int, str]) -> Surface | None:
        """The surface at `(layer, wire)`, if there is one."""
        return next((surface for surface in self.surfaces if surface.place == place), None)

    def save(self, path: str | Path) -> Path:
        """Write one `.npz`, whole or not at all."""
        path = Path(path)
        arrays: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "wires": np.array(self.wires),
            "kurtosis": self.kurtosis_LW,
            "peak_to_rms": self.peak_to_rms_LW,
            "worst_peak_to_rms": self.worst_peak_to_rms_LW,
            "largest": self.largest_LW,
            "tokens": self.tokens,
            "surface_layers": np.array([s.layer for s in self.surfaces], dtype=np.int64),
            "surface_wires": np.array([s.wire for s in self.surfaces], dtype=np.str_),
            "surface_steps": np.array([(s.step_tokens, s.step_channels) for s in self.surfaces], dtype=np.int64),
        }
        arrays |= {f"surface_{i}": s.peaks_TC for i, s in enumerate(self.surfaces)}
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with beside.open("wb") as file:
                np.savez_compressed(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Outliers:
        """Read what `save` wrote. Raises `SpinfoldError` for anything else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                if (version := int(file["schema_version"])) != SCHEMA_VERSION:
                    raise ValueError(f"it has schema version {version}, and this spinfold knows {SCHEMA_VERSION}")
                places = zip(file["surface_layers"], file["surface_wires"], file["surface_steps"], strict=True)
                surfaces = tuple(
                    Surface(int(layer), str(wire), file[f"surface_{i}"], int(tokens), int(channels))
                    for i, (layer, wire, (tokens, channels)) in enumerate(places)
                )
                return cls(
                    wires=tuple(map(str, file["wires"])),
                    kurtosis_LW=file["kurtosis"],
                    peak_to_rms_LW=file["peak_to_rms"],
                    worst_peak_to_rms_LW=file["worst_peak_to_rms"],
                    largest_LW=file["largest"],
                    tokens=int(file["tokens"]),
                    surfaces=surfaces,
                )
        except (OSError, ValueError, KeyError, BadZipFile, EOFError, ZlibError) as error:
            why = f"{type(error).__name__}: {error}."
            raise SpinfoldError(f"Outlier statistics {path} can't be read.", why, "Measure them again.") from None


@torch.no_grad()
def measure_outliers(
    network: Network,
    ids_BT: Tensor,
    *,
    surfaces: int = 2,
    at: Iterable[tuple[int, str]] | None = None,
    compute: str = "fp32",
) -> Outliers:
    """Statistics of what stands on each wire, ops on the wire included, over all windows `(B, T)`, one at a time.

    Means are over rows, `worst_peak_to_rms` and `largest` are maxima. The surfaces show the first window at the
    `surfaces` places of largest kurtosis, or at the given `(layer, wire)` places. Raises `ValueError` if there is
    no window or no such place. The network is left as it was.
    """
    if ids_BT.ndim != 2 or not ids_BT.numel():
        raise ValueError(f"Token windows must be (B, T) and not empty, got {tuple(ids_BT.shape)}.")
    chosen = None if at is None else tuple(at)
    for layer, wire in chosen or ():
        if wire not in MEASURED_WIRES or not 0 <= layer < len(network.layers):
            raise ValueError(f"There is no wire {wire!r} at layer {layer} among those measured.")

    tallies = {(layer.index, wire): _Tally() for layer in network.layers for wire in MEASURED_WIRES}
    handles = [
        layer.wire(wire).register_forward_hook(_listen(tallies[layer.index, wire]))
        for layer in network.layers
        for wire in MEASURED_WIRES
    ]
    try:
        for _ in hidden_in_batches(network, ids_BT, compute, ids_BT.shape[1]):
            pass
    finally:
        for handle in handles:
            handle.remove()

    summaries_4LW = np.array([tally.summary() for tally in tallies.values()]).T
    kurtosis_LW, mean_LW, worst_LW, largest_LW = summaries_4LW.reshape(4, len(network.layers), len(MEASURED_WIRES))
    if chosen is None:
        met = [place for place, tally in tallies.items() if tally.rows]
        chosen = tuple(sorted(met, key=lambda place: -tallies[place].summary()[0])[:surfaces])
    return Outliers(
        wires=MEASURED_WIRES,
        kurtosis_LW=kurtosis_LW,
        peak_to_rms_LW=mean_LW,
        worst_peak_to_rms_LW=worst_LW,
        largest_LW=largest_LW,
        tokens=ids_BT.numel(),
        surfaces=tuple(
            Surface(*place, tallies[place].peaks_TC.numpy(), *tallies[place].steps)
            for place in chosen
            if tallies[place].rows
        ),
    )


class _Tally:
    """Running statistics of one wire. Every wire keeps a small surface, so that one pass finds and shows the worst."""

    def __init__(self) -> None:
        self.rows = 0
        self.kurtosis = self.peak_to_rms = self.worst = self.largest = 0.0
        self.peaks_TC, self.steps = torch.empty(0, 0), (1, 1)

    def add(self, x: Tensor) -> None:
        kurtosis_R, ratio_R, peak_R = _statistics(x.reshape(-1, x.shape[-1]))
        if not self.rows:
            x_TC = x[0].transpose(0, 1).flatten(1) if x.ndim == 4 else x[0]  # heads side by side
            peaks_TC, self.steps = max_pool(x_TC.float())
            self.peaks_TC = peaks_TC.cpu()
        self.rows += len(peak_R)
        self.kurtosis += kurtosis_R.double().sum().item()
        self.peak_to_rms += ratio_R.double().sum().item()
        self.worst = max(self.worst, ratio_R.max().item())
        self.largest = max(self.largest, peak_R.max().item())

    def summary(self) -> tuple[float, float, float, float]:
        """Mean kurtosis, mean and largest peak to RMS, largest magnitude."""
        if not self.rows:
            return (float("nan"),) * 4
        return self.kurtosis / self.rows, self.peak_to_rms / self.rows, self.worst, self.largest


def _listen(tally: _Tally) -> Callable[[Any, Any, Tensor], None]:
    def hook(_module: Any, _args: Any, out: Tensor) -> None:
        tally.add(out)

    return hook
