"""What most contracts are tried on: a tiny model with its tokenizer, and a text."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import TEXT, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, "utf-8")
    return path
