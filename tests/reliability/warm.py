"""What each process of `moments` finds done: everything imported, and one model loaded, which fills library tables."""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path

import plotly.offline  # noqa: F401
import torch
import zoo

import spinfold.cli
import spinfold.comparison
import spinfold.evaluating
import spinfold.exporting  # noqa: F401
from spinfold.networks.sources import resolve

platform.processor()  # asks a program, once
torch.set_num_threads(1)  # threads do not survive a fork
with tempfile.TemporaryDirectory() as _folder:
    zoo.save(zoo.FAMILIES["llama_tied"](), Path(_folder))
    resolve(_folder).load_model()
