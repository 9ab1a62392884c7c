"""Plain data from YAML, whoever wrote it: no code, no aliases, at most a MiB, and an error that says what is wrong."""

from __future__ import annotations

from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from spinfold.errors import SpinfoldError

__all__ = ["parse_yaml", "read_yaml"]

_MAX_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """Plain data without aliases: a page of them can stand for more values than any memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"{self.peek_event().anchor!r} is an alias, which can't be used here")
        return super().compose_node(parent, index)


def parse_yaml(text: str, what: str) -> Any:
    """The plain data in a text; a `SpinfoldError` says what is wrong with `what`."""
    try:
        return yaml.load(text, _Loader)
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        RecursionError,
        AttributeError,
    ) as error:  # of numbers, dates, depth
        why = " ".join(str(error).split())[:300]
        raise SpinfoldError(f"{what} is not YAML.", f"{type(error).__name__}: {why}", "Mend it.") from None


def read_yaml(path: Path | Traversable) -> dict[str, Any]:
    """The mapping in a YAML file of at most a MiB; `SpinfoldError` for a file that holds none."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError("It is larger than a MiB.")
        text = data.decode("utf-8")
    except (OSError, ValueError) as error:
        raise SpinfoldError(f"{path} can't be read.", str(error), "Give a UTF-8 YAML file.") from None
    if not isinstance(found := parse_yaml(text, str(path)), dict):
        raise SpinfoldError(f"{path} is not a mapping.", "It holds no `key: value` lines.", "Mend the file.")
    return found
