"""Rounding back-ends, pure functions from (weight, input statistics, format) to integers and scales, and the pass
over a network that feeds them."""

from spinfold.rounding.allocate import WIDTHS, allocate, choices_of, meet_budget
from spinfold.rounding.autoround import autoround
from spinfold.rounding.gptaq import gptaq
from spinfold.rounding.gptq import GPTQReport, gptq
from spinfold.rounding.hessian import HessianAccumulator
from spinfold.rounding.ldlq import ldlq
from spinfold.rounding.nearest import round_nearest
from spinfold.rounding.network import MEASURED_WINDOWS, ROUNDINGS, RoundedLinear, round_network
from spinfold.rounding.osaq import absorb_outliers

__all__ = [
    "MEASURED_WINDOWS",
    "ROUNDINGS",
    "WIDTHS",
    "GPTQReport",
    "HessianAccumulator",
    "RoundedLinear",
    "absorb_outliers",
    "allocate",
    "autoround",
    "choices_of",
    "gptaq",
    "gptq",
    "ldlq",
    "meet_budget",
    "round_nearest",
    "round_network",
]
