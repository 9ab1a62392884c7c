"""spinfold learns the rotation, proves that nothing else changed, and rounds what is left.

The verbs of the command line are functions here; everything is loaded on first use, so that `import spinfold`
and `spinfold --help` don't wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spinfold.comparison import Comparison, compare
    from spinfold.errors import CheckFailed, SpinfoldError
    from spinfold.evaluating import evaluate
    from spinfold.evaluation import Proof
    from spinfold.exporting import Exported, export, targets
    from spinfold.forecast import Forecast
    from spinfold.grid import Grid
    from spinfold.inspection import Inspection, inspect
    from spinfold.pipeline import MethodInfo, Run, methods, predict, quantize, report
    from spinfold.recipe import Recipe
    from spinfold.rotation import rotate, verify

__all__ = [
    "CheckFailed",
    "Comparison",
    "Exported",
    "Forecast",
    "Grid",
    "Inspection",
    "MethodInfo",
    "Proof",
    "Recipe",
    "Run",
    "SpinfoldError",
    "__version__",
    "compare",
    "evaluate",
    "export",
    "inspect",
    "methods",
    "predict",
    "quantize",
    "report",
    "rotate",
    "targets",
    "verify",
]
__version__ = "0.1.0"

_HOME = {
    "CheckFailed": "spinfold.errors",
    "Comparison": "spinfold.comparison",
    "Exported": "spinfold.exporting",
    "Forecast": "spinfold.forecast",
    "Grid": "spinfold.grid",
    "Inspection": "spinfold.inspection",
    "Proof": "spinfold.evaluation",
    "Recipe": "spinfold.recipe",
    "SpinfoldError": "spinfold.errors",
    "compare": "spinfold.comparison",
    "evaluate": "spinfold.evaluating",
    "export": "spinfold.exporting",
    "inspect": "spinfold.inspection",
    "rotate": "spinfold.rotation",
    "targets": "spinfold.exporting",
    "verify": "spinfold.rotation",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'spinfold' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME.get(name, "spinfold.pipeline")), name)
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """`methods`, `report`, `export` are verbs here and packages below: importing a package must not hide its verb."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


class _RegisterPlugin(MetaPathFinder):
    """Has Transformers know spinfold's quantizer once it knows its own: neither import waits for the other."""

    waits_for, plugin = "transformers.quantizers.auto", "spinfold.export.quantizer"

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == self.waits_for else None
        if spec is not None and spec.loader is not None:
            sys.meta_path.remove(self)
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                import_module(self.plugin)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _RegisterPlugin.waits_for in sys.modules:
    import_module(_RegisterPlugin.plugin)
else:
    sys.meta_path.insert(0, _RegisterPlugin())
