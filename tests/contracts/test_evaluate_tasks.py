"""`evaluate` with tasks: figures in Python, as JSON and as a table; what can't be used is refused before the model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from task_items import write_items
from tiny_run import TEXT, tiny_model

import spinfold
from spinfold.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_items(tmp_path_factory.mktemp("tasks") / "items")


def test_tasks_alone_and_with_a_text(model: Path, folder: Path, tmp_path: Path) -> None:
    alone = spinfold.evaluate(model, tasks=["piqa", "boolq"], task_data=folder, device="cpu")
    assert list(alone["tasks"]) == ["piqa", "boolq", "average"]
    assert alone["tasks"]["piqa"].keys() == {"items", "split_items", "acc", "stderr", "acc_norm"}
    assert alone["tasks"]["boolq"]["acc_norm"] is None
    assert "perplexity" not in alone

    (tmp_path / "text.txt").write_text(TEXT)
    both = spinfold.evaluate(
        model, text=str(tmp_path / "text.txt"), seq_len=32, tasks=["piqa"], task_data=folder, limit=1, device="cpu"
    )
    assert both["perplexity"] > 1 and both["tasks"]["piqa"]["items"] == 1
    assert math.isnan(both["tasks"]["piqa"]["stderr"])


def test_the_command_line_shows_the_same(model: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", str(model), "--tasks", "hellaswag, piqa", "--task-data", str(folder)]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    expected = spinfold.evaluate(model, tasks=["hellaswag", "piqa"], task_data=folder)
    assert result == json.loads(json.dumps(expected))

    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "2 of 10,042" in table and "average" in table
    assert f"{100 * expected['tasks']['hellaswag']['acc_norm']:.2f}" in table


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tasks": ["nothing"]}, "nothing"),
        ({"tasks": ["piqa"]}, "--task-data"),
        ({"tasks": ["piqa"], "task_data": "nowhere"}, "piqa.jsonl"),
    ],
)
def test_refusals_come_before_the_model(options: dict[str, object], reason: str) -> None:
    with pytest.raises(spinfold.SpinfoldError, match=reason):
        spinfold.evaluate("no-such-model", **options)  # type: ignore[arg-type]
