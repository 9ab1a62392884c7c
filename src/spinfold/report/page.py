"""The report of a run as one HTML file that needs nothing else: no network, no server, no second file.

    run.json  →  first_screen.py, run_sections.py  ┐
    outliers  →  outlier_sections.py               ┴→  template.html, drawn by document.py  →  report.html

Every part of a run may be missing; what depends on it is left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from spinfold.errors import SpinfoldError, reading
from spinfold.evaluation.outliers import Outliers
from spinfold.report.document import render
from spinfold.report.first_screen import (
    environment_of,
    lede_of,
    measured_on,
    proof_line,
    sizes_of,
    tiles_of,
    uses_of,
    what_would_load,
)
from spinfold.report.outlier_sections import outlier_panels, surfaces
from spinfold.report.run_sections import cost_sections, fit_sections, rounding_sections
from spinfold.report.tables import cells, columns_of
from spinfold.report.values import Data, items, part, plain_json

__all__ = ["build_report", "write_report"]


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run folder, whole or not at all, from what the folder holds.

    Raises `SpinfoldError` if there is no readable run.json.
    """
    run_dir = Path(run_dir)
    try:
        run = json.loads((run_dir / "run.json").read_text("utf-8"))
        if not isinstance(run, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise SpinfoldError(
            f"{run_dir} is not the folder of a run.",
            f"Its run.json can't be read: {error}.",
            "Give the folder that `spinfold quantize` wrote.",
        ) from None
    before, after = (run_dir / f"outliers-{when}.npz" for when in ("before", "after"))
    outliers = [Outliers.load(path) if path.is_file() else None for path in (before, after)]
    with reading(run_dir / "run.json"):
        page = build_report(run, *outliers, folder=run_dir.resolve().name)
    path = run_dir / "report.html"
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def build_report(
    run_json: Data,
    outliers_before: Outliers | None = None,
    outliers_after: Outliers | None = None,
    *,
    folder: str = "RUN",
) -> str:
    """The page's HTML. `folder` is what the run is called where the page says how to use it."""
    sections = [
        *surfaces(outliers_before, outliers_after),
        *outlier_panels(outliers_before, outliers_after),
        *rounding_sections(run_json),
        *fit_sections(run_json),
        *cost_sections(run_json),
    ]
    recipe = part(run_json, "recipe")
    rows = [row for row in items(part(run_json, "metrics").get("rows")) if isinstance(row, Mapping)]
    return render(
        "template.html",
        sections,
        name=part(run_json, "model").get("name") or folder,
        lede=lede_of(run_json),
        tiles=tiles_of(run_json, rows),
        sizes=sizes_of(run_json),
        columns=columns_of(rows),
        rows=cells(rows),
        measured_on=measured_on(run_json),
        proofs=[proof_line(proof) for proof in items(run_json.get("proofs")) if isinstance(proof, Mapping)],
        loads=what_would_load(run_json, folder),
        uses=uses_of(run_json, folder),
        recipe=yaml.safe_dump(json.loads(plain_json(recipe)), sort_keys=False, allow_unicode=True) if recipe else "",
        environment=environment_of(run_json),
    )
