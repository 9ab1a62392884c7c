"""The notebook in examples/ runs from its first cell to its last, here with a tiny model.

Needs nbclient and ipykernel (`make docs`); skipped without.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from contracts import tiny_run

pytest.importorskip("ipykernel", reason="ipykernel is not installed: run make docs")
pytest.importorskip("nbclient", reason="nbclient is not installed: run make docs")

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny_run.TEXT * 4, "utf-8")
    model = tiny_run.tiny_model(tmp_path / "tiny")
    monkeypatch.setenv("SPINFOLD_MODEL", str(model))
    monkeypatch.setenv("SPINFOLD_TEXT", str(text))
    monkeypatch.setenv("SPINFOLD_RUNS", str(tmp_path / "runs/notebook"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "examples/tutorial.ipynb", as_version=4)
    done = NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(tmp_path))
    printed = "".join(output.get("text", "") for cell in done.cells for output in cell.get("outputs", []))
    assert "✗" not in printed
    assert "The rain in Spain" in printed
    assert (tmp_path / "runs/notebook/report.html").is_file()
