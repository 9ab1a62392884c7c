"""Number formats: the grids that weights, activations and the KV cache are rounded to.

Of the KV cache a `CacheFormat` says which grids keys and values have, and which tokens are on them.
"""

from spinfold.formats.activation import fake_quantize
from spinfold.formats.base import Format
from spinfold.formats.cache import CacheFormat
from spinfold.formats.clip_search import ClipSearch
from spinfold.formats.integer import IntFormat
from spinfold.formats.microscaling import FLOAT_FORMATS, FloatFormat
from spinfold.formats.weights import Grid, QuantizedWeight, fit_grid, layout

__all__ = [
    "FLOAT_FORMATS",
    "CacheFormat",
    "ClipSearch",
    "FloatFormat",
    "Format",
    "Grid",
    "IntFormat",
    "QuantizedWeight",
    "fake_quantize",
    "fit_grid",
    "layout",
]
