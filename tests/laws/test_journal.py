"""A fit that is stopped at any step goes on, and ends with the bits of one that was not.

The journal keeps every step here, and stops the fit itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from stopped import Stopped, StopsAt, every_step_kept
from torch import Tensor

from spinfold.errors import SpinfoldError
from spinfold.fitting import journal as journals
from spinfold.fitting.journal import Journal
from spinfold.fitting.layerwise import LayerwiseSettings, fit_layerwise, rows_term
from spinfold.fitting.row_objectives import kurtosis
from spinfold.folding import fold_norms
from spinfold.methods import METHODS, FitTask
from spinfold.methods import spinfold as ours
from spinfold.networks import Network
from spinfold.recipe import Recipe

STEPS = 3


@pytest.fixture(autouse=True)
def _every_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("GLOBAL", "LOCAL"):  # of spinfold's hundreds of steps a few are enough
        monkeypatch.setattr(ours, name, replace(getattr(ours, name), steps=STEPS))
    with every_step_kept():
        yield


def task_of(method: str, **changes: Any) -> FitTask:
    recipe = Recipe().with_(
        method=method, bits="W4A4KV4", calibration__samples=4, calibration__seq_len=32, fit__batch=2
    )
    recipe = recipe.with_(compute="fp32", fit__steps=STEPS, **changes)
    network = Network(zoo.FAMILIES["llama_tied"](), name=method)
    network.untie()
    fold_norms(network)
    return FitTask(network, recipe, METHODS[method].sites, lambda length, count: zoo.random_tokens(1, count, length))


def bits_of(found: Any) -> tuple[Any, ...]:
    """All that a fit gives, to the bit."""
    maps, log = found
    return log, [(name, one.config(), [t.tolist() for t in one.tensors().values()]) for name, one in maps.each()]


CASES: dict[str, dict[str, Any]] = {
    "spinquant": {"fit__loss": "both", "activations__clip": "learned"},
    "spinout": {},
    "respinquant": {},
    "optrot": {"fit__batch": 1},  # of three layers
    "optrot-plus": {"fit__batch": 1},
    "kurtail": {},
    "dartquant": {},
    "dfrot": {"fit__batch": None},
    "spinfold": {"fit__rank": 4},
}


@pytest.mark.parametrize("method", CASES)
def test_a_fit_that_is_stopped_goes_on(method: str, tmp_path: Path) -> None:
    """At each of its steps, one after the other: every attempt makes one step more, and no more than that."""
    task, whole = task_of(method, **CASES[method]), StopsAt()
    expected = bits_of(METHODS[method].fit(replace(task, journal=whole)))
    assert whole.seen >= STEPS

    for _ in range(whole.seen - 1):
        with pytest.raises(Stopped):
            METHODS[method].fit(replace(task, journal=StopsAt(tmp_path, at=2)))
    assert bits_of(METHODS[method].fit(replace(task, journal=StopsAt(tmp_path, at=2)))) == expected


def test_every_method_that_learns_is_tried() -> None:
    learned = {name for name, one in METHODS.items() if any(field.startswith("fit") for field in one.reads)}
    assert learned - {"smoothquant"} == CASES.keys()


@pytest.mark.parametrize("optimiser", ["adam", "spectral", "capped", "qr"])
@pytest.mark.parametrize("stack", [False, True])
def test_every_optimiser_goes_on(optimiser: Any, stack: bool, tmp_path: Path) -> None:
    x = torch.randn((2, 64, 8) if stack else (64, 8), generator=torch.Generator().manual_seed(0))
    start = torch.eye(8).expand(2, 8, 8) if stack else torch.eye(8)
    term, settings = rows_term(x, kurtosis, 16), LayerwiseSettings(7, 0.05, optimiser)
    expected = fit_layerwise(start, term, settings, seed=3)
    for at in (1, 2, 5):
        with pytest.raises(Stopped):
            fit_layerwise(start, term, settings, seed=3, journal=StopsAt(tmp_path / str(at), at))
        found = fit_layerwise(start, term, settings, seed=3, journal=Journal(tmp_path / str(at)))
        assert torch.equal(found[0], expected[0]) and found[1] == expected[1]


def test_nothing_is_kept_before_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "PATIENCE", 3600.0)
    for step in Journal(tmp_path).steps(5, {"x": torch.zeros(2)}):
        assert not list(tmp_path.iterdir()), step
    assert list(tmp_path.iterdir())  # a whole loop is kept at once


def test_a_loop_that_is_skipped_is_counted(tmp_path: Path) -> None:
    x = torch.zeros(1)
    for _ in (first := Journal(tmp_path)).steps(1, {"x": x}):
        x += 1
    assert len(list(first.steps(2, {"y": x}))) == 2
    second = Journal(tmp_path)
    second.skip()
    assert list(second.steps(2, {"y": x})) == []


def test_no_more_than_half_a_minute_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six loops of a step each, and of a long one, by a clock that goes 20 seconds a step."""
    seconds = itertools.count(step=20)
    now = [0]
    monkeypatch.setattr(journals, "PATIENCE", 30.0)
    monkeypatch.setattr(journals, "RATIO", 20.0)
    monkeypatch.setattr(journals, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def made(journal: Journal) -> list[int]:
        counts = []
        for total in (1, 1, 1, 1, 1, 1, 9):
            counts.append(0)
            for step in journal.steps(total, {"x": torch.zeros(1)}):
                if total == 9 and step == 5:
                    break
                now[0] = next(seconds)
                counts[-1] += 1
        return counts

    assert made(Journal(tmp_path)) == [1, 1, 1, 1, 1, 1, 5]
    assert made(Journal(tmp_path)) == [0, 0, 0, 0, 0, 0, 1]  # a step is less than half a minute, two are more


def test_a_loop_with_another_key_begins_anew(tmp_path: Path) -> None:
    for key, left in (("layers [0]", [0, 1]), ("layers [1]", [0, 1]), ("layers [1]", [])):
        assert list(Journal(tmp_path).steps(2, {"x": torch.zeros(1)}, key=key)) == left


def test_what_is_over_is_forgotten(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for total in (2, 3):
        assert len(list(journal.steps(total, {"x": torch.zeros(2)}))) == total
    assert len(list(tmp_path.iterdir())) == 2
    journal.forget()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [
    lambda kept: kept.pop("x"),
    lambda kept: kept.update(x=kept["x"][:1]),
    lambda kept: kept.update(x=kept["x"].double()),
    lambda kept: kept.update(more=kept["x"].clone()),
    lambda kept: kept.update(step=torch.tensor(9)),
    lambda kept: kept.update(step=torch.tensor(-1)),
    lambda kept: kept.update(draws=kept["draws"][:7].contiguous()),
])  # fmt: skip
def test_what_was_kept_of_another_fit_is_refused(change: Callable[[dict[str, Tensor]], Any], tmp_path: Path) -> None:
    def loop() -> list[int]:
        return list(Journal(tmp_path).steps(5, {"x": torch.zeros(2)}, torch.Generator()))

    assert len(loop()) == 5 and loop() == []
    (path,) = tmp_path.iterdir()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(SpinfoldError) as caught:
        loop()
    assert str(path) in str(caught.value) and caught.value.fix
