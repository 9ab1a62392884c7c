"""Draw a run's worst outliers before and after its rotations as one static picture.

    python benchmarks/outlier_picture.py RUN -o docs/images/outliers.png

Reads what `spinfold quantize` left in RUN (outliers-before.npz, outliers-after.npz) and needs matplotlib. Both
surfaces of a place have the same height scale: what looks flat is flat.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.axes3d import Axes3D

from spinfold.evaluation.outliers import Outliers, Surface

WIRES = {
    "qkv_input": "input of q, k, v",
    "key": "keys",
    "value": "values",
    "attention_out": "input of o",
    "mlp_input": "input of gate and up",
    "down": "input of down",
}


def draw(axes: Axes3D, surface: Surface, ceiling: float, title: str) -> None:
    """|x| over channels and tokens, coloured by height."""
    tokens, channels = (np.arange(n) * step for n, step in zip(surface.peaks_TC.shape, steps(surface), strict=True))
    grid = np.meshgrid(channels, tokens)
    peaks = surface.peaks_TC
    corners = (peaks[:-1, :-1], peaks[1:, :-1], peaks[:-1, 1:], peaks[1:, 1:])
    colors = colormaps["viridis"](np.maximum.reduce(corners) / ceiling)  # a spike is as bright as its tip
    look = {"facecolors": colors, "shade": False, "linewidth": 0, "antialiased": False}
    axes.plot_surface(*grid, peaks, rcount=128, ccount=192, **look)
    axes.set(xlabel="channel", ylabel="token", zlabel="|x|", zlim=(0, ceiling))
    axes.set_title(f"{title}: largest |x| = {surface.largest:.4g}", fontsize=11, y=0.97)
    axes.view_init(elev=24, azim=-52)
    axes.set_box_aspect((1.3, 1.3, 0.75), zoom=1.08)
    axes.tick_params(labelsize=7, pad=0)
    axes.locator_params(nbins=5)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.pane.set_visible(False)
        axis._axinfo["grid"].update(color="#e3e7ec", linewidth=0.6)


def steps(surface: Surface) -> tuple[int, int]:
    """Tokens and channels per cell."""
    return surface.step_tokens, surface.step_channels


def picture(before: Outliers, after: Outliers, name: str, path: Path, place: tuple[int, str] | None = None) -> None:
    """Write the surfaces at one place (the worst that both have, if not given) side by side as a PNG."""
    shared = [spot for spot in before.places if after.surface(spot)]
    place = place or next(iter(shared), None)
    pair = [outliers.surface(place) for outliers in (before, after)] if place else []
    if place is None or not all(pair):
        raise SystemExit(f"Both files must have a surface there; they share {shared or 'none'}.")
    ceiling = max(surface.largest for surface in pair if surface)
    figure = Figure(figsize=(11, 4.2), facecolor="white")  # not pyplot: no display, no global state
    axes = figure.subplots(1, 2, subplot_kw={"projection": "3d"})
    for ax, surface, title in zip(axes, pair, ("original", "rotated"), strict=True):
        assert surface is not None
        draw(ax, surface, ceiling, title)
    figure.suptitle(f"{name}, layer {place[0]}, {WIRES[place[1]]}", fontsize=12, y=0.99)
    figure.subplots_adjust(left=0, right=0.97, bottom=0.05, top=0.93, wspace=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, pil_kwargs={"optimize": True})


def main() -> None:
    """Parse, load, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/images/outliers.png"))
    parser.add_argument("--place", help="which surface, as LAYER:WIRE; the one of largest kurtosis if not given")
    given = parser.parse_args()
    layer, _, wire = (given.place or "").partition(":")
    place = (int(layer), wire) if given.place else None
    name = json.loads((given.run / "run.json").read_text("utf-8"))["model"]["name"]
    before, after = (Outliers.load(given.run / f"outliers-{when}.npz") for when in ("before", "after"))
    picture(before, after, name, given.output, place)


if __name__ == "__main__":
    main()
