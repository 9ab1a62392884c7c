"""Models seen through their family: facts as data, the labelled view, and where models come from."""

from spinfold.networks.family import FAMILIES, INPUT_WIRE, ONLINE_SITES, SITES, Family, family_of
from spinfold.networks.layer import Layer, Linear
from spinfold.networks.network import Network
from spinfold.networks.placement import Store
from spinfold.networks.rope import Rope
from spinfold.networks.stream import Stream, hidden_in_batches
from spinfold.networks.wired import Attended
from spinfold.networks.wires import SKIP_WIRES, WIRES, Wire

__all__ = [
    "FAMILIES",
    "INPUT_WIRE",
    "ONLINE_SITES",
    "SITES",
    "SKIP_WIRES",
    "WIRES",
    "Attended",
    "Family",
    "Layer",
    "Linear",
    "Network",
    "Rope",
    "Store",
    "Stream",
    "Wire",
    "family_of",
    "hidden_in_batches",
]
