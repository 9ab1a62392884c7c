"""Number formats: the grids that weights, activations and the KV cache are rounded to.

A KV-cache format is an `IntFormat` too: `fake_quantize` on `(..., heads, head size)` gives each head of
each token its own grid.
"""

from spinfold.formats.activation import fake_quantize
from spinfold.formats.base import Format
from spinfold.formats.integer import IntFormat
from spinfold.formats.microscaling import FLOAT_FORMATS, FloatFormat
from spinfold.formats.weights import ClipSearch, Grid, QuantizedWeight, fit_grid

__all__ = [
    "FLOAT_FORMATS",
    "ClipSearch",
    "FloatFormat",
    "Format",
    "Grid",
    "IntFormat",
    "QuantizedWeight",
    "fake_quantize",
    "fit_grid",
]
