"""What a run will take, said before any of it is done: seconds, memory and GPU memory of each stage.

    seconds = products / rate of products + passes over numbers / rate of passes + what reading and launches take
    bytes   = what the pipeline holds while the stage works, counted from config, headers and recipe

Rates are measured on the machine, in five seconds and what a little reading takes, twice. The numbers of passes
and the few other constants were measured before, on CPUs and on H100s (docs/planning.md); what they predict there is
compared with what is measured.

In bytes, with P parameters (head untied), D residual width, F MLP width, V words, held the tokens of the figures:

    network     4 P                                          the original; a second one from the fit on
                8 V D + 4 P / L                              or this much, where layers stay in the checkpoint's files
    fit         2 P                                          a copy in bf16, on a GPU, of a fit by back-propagation
    reference   4 (V + held) D                               what the original's head reads, and the head
    logits      4 V × tokens of a chunk                      2 such arrays for the original, 5 with a reference
    Hessian     8 × the largest width², several copies        all roundings but rtn and autoround
    stream      4 D × calibration tokens                      likewise; two of them for gptaq and autoround
    graph       4 × tokens of a pass × L (5.5 D + 3.5 F)       fits by back-propagation; of one layer if checkpointed

`machine` has the rates and the room, `reading` what a little of the beginning takes, `sizes` the model, `seconds`,
`fits` and `memory` the formulas, `stages` the run.

Shapes: L layers, T tokens of a window.
"""

from __future__ import annotations

from spinfold.forecast.machine import Machine, measure_machine, unmeasured_machine
from spinfold.forecast.reading import CHARACTERS, UNREAD, Reading, measure_reading
from spinfold.forecast.sizes import Sizes
from spinfold.forecast.stages import HELD_SHARE, Forecast, StageForecast, forecast, stays_in_files

__all__ = [
    "CHARACTERS",
    "HELD_SHARE",
    "UNREAD",
    "Forecast",
    "Machine",
    "Reading",
    "Sizes",
    "StageForecast",
    "forecast",
    "measure_machine",
    "measure_reading",
    "stays_in_files",
    "unmeasured_machine",
]
