"""`pytest tests/reliability --full` tries as much as docs/reliability.md counts; without it, a sample of each kind."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="tests/reliability: every kill and every hostile input")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Was everything asked for? This file is read too late for the command line if other folders are tested too."""
    return bool(request.config.getoption("full", default=False))
