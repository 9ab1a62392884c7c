"""Whatever is wrong with an input, it is refused in three parts or it does no harm.

Inputs are made by damaging sound ones (`inputs`), each from its kind and number alone, and judged in a process of their
own (`judge`). A failure names kind and number: `judge("gguf", 124)` tries number 123 last.
"""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import pytest
from damage import NAMES
from inputs import KINDS, Sound
from judge import MEMORY, judge

import spinfold
from spinfold.errors import SpinfoldError
from spinfold.fitting.text import load_text
from spinfold.grid import Grid
from spinfold.networks.sources import resolve
from spinfold.recipe import Recipe
from spinfold.report import build_comparison, build_report, comparison_rows

SAMPLE = 12


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_input_is_refused_or_harmless(kind: str, full: bool, record_property: Any) -> None:
    count = KINDS[kind][0]
    tally = judge(kind, count if full else count // SAMPLE)
    record_property(kind, f"{tally.refused} refused, {tally.accepted} accepted, slowest {tally.slowest:.1f} s")
    assert not tally.wrong, "\n".join([f"{len(tally.wrong)} of {count}:", *tally.wrong[:10]])
    assert tally.refused + tally.accepted == (count if full else count // SAMPLE)
    assert tally.refused > tally.accepted / 20, "hardly anything was hostile"
    assert tally.peak_bytes < MEMORY


def test_there_are_two_thousand_and_more() -> None:
    assert sum(count for count, _ in KINDS.values()) >= 2000


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return Sound(tmp_path_factory.mktemp("sound"))


def test_what_is_damaged_was_sound(sound: Sound, tmp_path: Path) -> None:
    """Else every refusal would be for the wrong reason."""
    for model in (sound.folder, sound.run):
        assert spinfold.evaluate(model, text=str(sound.text), seq_len=16, max_tokens=32, device="cpu")["perplexity"] > 1
    for model in (sound.sharded, sound.gguf):
        resolve(model).load_model()
    load_text(sound.text)
    spinfold.report(sound.run)
    spinfold.export(sound.run, "transformers", tmp_path / "out", check=False)
    spinfold.compare(None, tmp_path / "merged", merge=[sound.comparison])


# ---- pages ---------------------------------------------------------------------------------------------------------


class _Skeleton(HTMLParser):
    """The elements of a page with the names of their attributes, and nothing of its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))


def renamed(value: Any, name: str) -> Any:
    """The same data with every string in it, but for a few that must be what they are, replaced by a name."""
    if isinstance(value, dict):
        kept = ("bits", "created")
        return {key: one if key in kept else renamed(one, name) for key, one in value.items()}
    if isinstance(value, list):
        return [renamed(one, name) for one in value]
    return name if isinstance(value, str) and value != "original" else value


def test_names_add_no_element_to_a_page(sound: Sound, full: bool) -> None:
    """Each string of a run's data is replaced at once; the page has the elements that it has with harmless names."""
    run = json.loads((sound.run / "run.json").read_text())
    cells = [json.loads(path.read_text()) for path in sorted((sound.comparison / "cells").glob("*.json"))]
    about = json.loads((sound.comparison / "comparison.json").read_text())

    def skeletons(name: str) -> list[Any]:
        hostile = renamed(cells, name)
        data = renamed(about, name) | {"rows": comparison_rows(hostile)}
        pages = build_report(renamed(run, name), folder=name), build_comparison(data, hostile)
        return [_Skeleton(page).elements for page in pages]

    harmless = skeletons("name")
    assert min(map(len, harmless)) > 50
    names = [name for name in NAMES if name.strip() and name.isprintable()]
    for name in names if full else names[:4]:
        assert skeletons(name) == harmless, name


def test_names_reach_files_only_inside_the_folder(sound: Sound, tmp_path: Path) -> None:
    """The label of an entry becomes a part of its cell's name; half a character is refused."""
    with pytest.raises(SpinfoldError, match="surrogates not allowed"):
        Grid.parse({"entries": [{"label": "\ud800", "source": "quarot"}]})
    whole = [name for name in NAMES if "\ud800" not in name]
    labels = [{"label": f"{name}{number}", "source": "quarot"} for number, name in enumerate(whole)]
    for cell in Grid.parse({"entries": labels}).cells(Recipe()):
        assert (tmp_path / f"{cell.name}.json").parent == tmp_path
        (tmp_path / f"{cell.name}.json").touch()
    assert len(list(tmp_path.iterdir())) == len(labels)


def test_inputs_are_the_same_every_time(sound: Sound, tmp_path: Path) -> None:
    files = []
    for folder in (tmp_path / "one", tmp_path / "other"):
        folder.mkdir()
        KINDS["safetensors"][1](sound, folder, Random("safetensors 5"))
        files.append((folder / "folder" / "model.safetensors").read_bytes())
    assert files[0] == files[1]
