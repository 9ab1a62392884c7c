"""Damage to sound data: bytes that flip, end early or lie; trees of plain data with a value that nobody expects."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

__all__ = ["NAMES", "ODD", "damaged", "json_bytes", "twisted"]

NAMES = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>\"'",
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "$(touch pwned)`touch pwned`;touch pwned|&",
    "../../../etc/passwd",
    "/etc/passwd",
    "..\\..\\x",
    "-rf --help",
    "a\0b",
    "line\nbreak\r\x1b[31m",
    "\u202egnp.exe",
    "%s%n{0.__class__}",
    "\ud800",
    "ａ" * 300,
    "x" * 5000,
    "",
    " ",
    "CON",
    "~root/x",
    "file:///etc/passwd",
    "https://example.invalid/x",
    "org/name",
    "[bold]x[/bold][/]",
)
"""Names that mean something to a browser, a shell, a template, a terminal or a file system."""

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 0.0, -0.0, 0.5, 1e-45, 1e308, float("inf"), float("nan")),
    *(127, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *([], {}, [[]], [None], {"": None}, [0] * 1000, {"a": {"b": {"c": 1}}}, "0", "1e9", "nan", "null", "auto"),
    *NAMES,
)
"""Values at the ends of what a number, a name or a container can be."""


def damaged(data: bytes, chance: Random, end: int | None = None) -> bytes:
    """One to four changes among the first `end` bytes."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        end = min(len(data) if end is None else end, len(changed))
        at = chance.randrange(end or 1)
        size = chance.choice((1, 2, 4, 8))
        match chance.randrange(8):
            case 0 | 1 if end:
                changed[at] ^= 1 << chance.randrange(8)
            case 2 if end:
                changed[at] = chance.choice((0, 1, 9, 0x22, 0x2C, 0x5D, 0x7F, 0x80, 0xFF))
            case 3 | 4:  # a number that lies
                extreme = chance.choice(
                    (0, 1, 1 << 8 * size - 1, (1 << 8 * size) - 1, (1 << 8 * size - 1) - 1, 1 << 4 * size)
                )
                changed[at : at + size] = (extreme & ((1 << 8 * size) - 1)).to_bytes(size, "little")
            case 5:
                del changed[chance.randrange(len(changed) + 1) :]
            case 6:
                del changed[at : at + chance.randint(1, 64)]
            case _:
                changed[at:at] = changed[at : at + chance.randint(1, 64)] or b"\0"
    return bytes(changed)


def twisted(value: Any, chance: Random) -> Any:
    """A copy of plain data with one to three places changed: another value, none, another key, one level more."""
    holder = [copy.deepcopy(value)]
    for _ in range(chance.randint(1, 3)):
        places = list(_places(holder))
        container, key = chance.choice(places[1:] or places)  # the whole is replaced only if it has no parts
        match chance.randrange(8):
            case 0:
                del container[key]
                holder = holder or [None]
            case 1 if isinstance(container, dict):
                container[str(chance.choice(NAMES))] = container.pop(key)
            case 2:
                container[key] = [container[key]]
            case 3:
                container[key] = {"a": container[key]}
            case 4 if isinstance(container[key], int | float):
                container[key] = chance.choice((-1, 2, 1e-9, 1 << 20)) * container[key]
            case _:
                container[key] = copy.deepcopy(chance.choice(ODD))
    return holder[0]


def _places(container: Any) -> Any:
    """Every container with every key that it has."""
    for key in list(container) if isinstance(container, dict) else range(len(container)):
        yield container, key
        if isinstance(container[key], dict | list):
            yield from _places(container[key])


def json_bytes(value: Any, chance: Random) -> bytes:
    """Plain data as JSON, one time in eight with its bytes damaged too."""
    data = json.dumps(value).encode()
    return data if chance.randrange(8) else damaged(data, chance)
