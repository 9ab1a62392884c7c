"""One file per published method, and the registry of all."""

from spinfold.methods.base import FitTask, Method
from spinfold.methods.none import NONE
from spinfold.methods.quarot import QUAROT
from spinfold.methods.spinquant import SPINQUANT

__all__ = ["METHODS", "FitTask", "Method"]

METHODS = {method.name: method for method in (NONE, QUAROT, SPINQUANT)}
