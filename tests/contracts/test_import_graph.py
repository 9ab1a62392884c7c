"""Imports go down only.

The table is the architecture: a module may import from lower floors, and from its own floor as long as no two
packages there import each other, however indirectly. Imports inside functions count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import spinfold

ROOT = Path(spinfold.__file__).parent

FLOORS: tuple[tuple[str, ...], ...] = (
    ("allocator", "errors", "progress", "distributed", "cluster", "compute", "kernels", "files", "yaml_file"),
    ("formats", "maps", "networks"),
    ("recipe",),
    ("runtime",),
    ("fitting", "folding"),
    ("methods", "rounding", "evaluation", "report"),
    ("plan", "checkpoint", "run", "export", "forecast"),
    ("subject", "rotation", "kept"),
    ("pipeline", "evaluating", "exporting", "grid"),
    ("comparison", "bench", "inspection"),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
FLOOR_OF = {unit: number for number, floor in enumerate(FLOORS) for unit in floor}
FILES = sorted(ROOT.rglob("*.py"))


def unit_of(module: str) -> str:
    """The top-level module or package of `spinfold.a.b`: `a`; of spinfold itself: `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(file: Path) -> Iterator[str]:
    """The units of spinfold that a file imports, its own left out."""
    own = file.relative_to(ROOT).with_suffix("").parts[0]
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names if alias.name.split(".")[0] == "spinfold"]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import; this project writes absolute ones"
            names = [alias.name for alias in node.names if alias.name != "__version__"]
            if node.module == "spinfold":  # a submodule, or a name of the package itself
                found = [f"spinfold.{name}" if name in FLOOR_OF else "spinfold" for name in names]
            else:
                found = [node.module] if (node.module or "").startswith("spinfold.") else []
        else:
            continue
        yield from (unit for module in found if module and (unit := unit_of(module)) != own)


def test_every_module_has_a_floor() -> None:
    units = {file.relative_to(ROOT).with_suffix("").parts[0] for file in FILES}
    assert units <= set(FLOOR_OF), "Give the new module a place in FLOORS, and in docs/architecture.md."


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_imports_go_down(file: Path) -> None:
    own = file.relative_to(ROOT).with_suffix("").parts[0]
    upwards = [unit for unit in imports(file) if FLOOR_OF[unit] > FLOOR_OF[own]]
    assert not upwards, f"{own} stands below {upwards}"


def test_no_cycles_between_packages() -> None:
    graph: dict[str, set[str]] = {}
    for file in FILES:
        graph.setdefault(file.relative_to(ROOT).with_suffix("").parts[0], set()).update(imports(file))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"Packages import each other: {' -> '.join(error.args[1])}")
