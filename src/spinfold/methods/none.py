"""No maps: the baseline that every other method is measured against."""

from __future__ import annotations

from spinfold.fitting.end_to_end import FitLog
from spinfold.maps import SiteMaps
from spinfold.methods.base import FitTask, Method

__all__ = ["NONE"]


def _fit(_: FitTask) -> tuple[SiteMaps, FitLog]:
    return SiteMaps(), FitLog()


NONE = Method(name="none", summary="no rotation", paper="", sites=(), allowed=(), fit=_fit, reads=())
