"""One file per method, and the registry of all."""

from spinfold.methods.base import FitTask, Method
from spinfold.methods.block_hadamard import BLOCK_HADAMARD
from spinfold.methods.dartquant import DARTQUANT
from spinfold.methods.dfrot import DFROT
from spinfold.methods.kurtail import KURTAIL
from spinfold.methods.none import NONE
from spinfold.methods.optrot import OPTROT
from spinfold.methods.optrot_plus import OPTROT_PLUS
from spinfold.methods.quarot import QUAROT
from spinfold.methods.respinquant import RESPINQUANT
from spinfold.methods.smoothquant import SMOOTHQUANT
from spinfold.methods.spinfold import SPINFOLD
from spinfold.methods.spinout import SPINOUT
from spinfold.methods.spinquant import SPINQUANT

__all__ = ["METHODS", "FitTask", "Method"]

_ALL = (
    NONE,
    SMOOTHQUANT,
    QUAROT,
    BLOCK_HADAMARD,
    SPINQUANT,
    SPINOUT,
    RESPINQUANT,
    OPTROT,
    OPTROT_PLUS,
    KURTAIL,
    DARTQUANT,
    DFROT,
    SPINFOLD,
)
METHODS = {method.name: method for method in _ALL}
