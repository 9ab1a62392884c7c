"""Models seen through their family: facts as data, the labelled view, and where models come from."""

from spinfold.networks.family import FAMILIES, INPUT_WIRE, ONLINE_SITES, SITES, Family, family_of
from spinfold.networks.network import SKIP_WIRES, WIRES, Layer, Linear, Network, Wire

__all__ = [
    "FAMILIES",
    "INPUT_WIRE",
    "ONLINE_SITES",
    "SITES",
    "SKIP_WIRES",
    "WIRES",
    "Family",
    "Layer",
    "Linear",
    "Network",
    "Wire",
    "family_of",
]
