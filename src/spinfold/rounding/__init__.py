"""Rounding back-ends, pure functions from (weight, input statistics, format) to integers and scales, and the pass
over a network that feeds them."""

from spinfold.rounding.gptq import GPTQReport, gptq
from spinfold.rounding.hessian import HessianAccumulator
from spinfold.rounding.nearest import round_nearest
from spinfold.rounding.network import RoundedLinear, round_network

__all__ = ["ROUNDINGS", "GPTQReport", "HessianAccumulator", "RoundedLinear", "gptq", "round_nearest", "round_network"]

# What each rounding needs besides the weight: nothing, or the Hessian of the linear's inputs.
ROUNDINGS: dict[str, tuple[str, ...]] = {"rtn": (), "gptq": ("hessian",)}
