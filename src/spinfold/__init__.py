"""spinfold learns the rotation, proves that nothing else changed, and rounds what is left.

The verbs of the command line are functions here; everything is loaded on first use, so that `import spinfold`
and `spinfold --help` don't wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spinfold.errors import CheckFailed, SpinfoldError
    from spinfold.pipeline import MethodInfo, Proof, Run, evaluate, methods, quantize, report, rotate, verify
    from spinfold.recipe import Recipe

__all__ = [
    "CheckFailed",
    "MethodInfo",
    "Proof",
    "Recipe",
    "Run",
    "SpinfoldError",
    "__version__",
    "evaluate",
    "methods",
    "quantize",
    "report",
    "rotate",
    "verify",
]
__version__ = "0.1.0"

_HOME = {"CheckFailed": "spinfold.errors", "SpinfoldError": "spinfold.errors", "Recipe": "spinfold.recipe"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'spinfold' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME.get(name, "spinfold.pipeline")), name)
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """`methods` and `report` are verbs here and packages below: importing the package must not hide the verb."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
