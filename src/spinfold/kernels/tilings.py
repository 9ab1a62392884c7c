"""How the work of `kernels.hadamard` is cut: the ways there are, and the best one that was measured for each size.

Which one is best depends on what becomes of a row. A map moves as many bytes as a copy and waits for memory; codes are
half as many bytes and as much arithmetic, so more programs on an SM pay; and a grid that needs all of a row holds it in
registers until then.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import triton

from spinfold.kernels.grids import Grid

__all__ = [
    "FEW",
    "MEASURED",
    "Kind",
    "Tiling",
    "best_tiling",
    "depths_of",
    "heights_of",
    "kind_of",
    "padded",
    "tilings",
]

Kind = Literal["map", "groups", "rows", "group codes", "row codes", "row bytes", "few"]
"""What becomes of a row: the map alone; numbers on grids of groups, or of the row; the codes of either, those of a row
packed or a byte each; or anything, of up to `FEW` rows.
"""
_LIKE: dict[Kind, Kind] = {
    "row bytes": "row codes",
    "row codes": "rows",
    "rows": "map",
    "group codes": "groups",
    "groups": "map",
}
"""Whose tiling is taken where a kind has none."""

_MEMORY = 227 * 1024
"""Bytes of shared memory that a program can have on an H100."""

FEW = 64
"""Up to so many rows, the time of one counts rather than how many run at once."""


class Tiling(NamedTuple):
    """How the work is cut: b, parts of the columns in the right product (1, or 2 if b is a power of two), rows of a
    tile of the result, warps of a program, rows in flight, programs per SM, registers of a thread at most: fewer let
    more programs run on an SM at once; whether the left product takes both parts at once, which saves instructions and
    costs registers; whether H_aᵀ is bits in registers (`kernels.signs`), which costs instructions and leaves shared
    memory to more programs; rows of the last tile at least: 16 save products, 64 are shared out over the warps as those
    of other tiles are; whether rows beyond those in flight are brought to the cache; and whether a program that has one
    row in flight takes the next one when it is ready (`kernels.turns`), not one that was dealt out before.
    """

    columns: int
    parts: int
    rows: int
    num_warps: int
    num_stages: int
    programs: int
    registers: int = 255
    at_once: bool = False
    bits: bool = False
    rest: int = 16
    ahead: bool = False
    turns: bool = False


def kind_of(grid: Grid | None, packed: bool) -> Kind:
    """What becomes of rows that go onto a grid, or onto none."""
    if grid is None:
        return "map"
    if grid.width == 0 or grid.by_row:
        return "rows" if not packed else "row codes" if grid.bits == 4 else "row bytes"
    return "group codes" if packed else "groups"


def best_tiling(
    orders: tuple[int, ...],
    width: int = 0,
    num_rows: int = 1024,
    num_bytes: int = 2,
    memory: int = _MEMORY,
    *,
    kind: Kind = "map",
) -> Tiling | None:
    """How rows of a Hadamard map with factors of these `orders` are cut, for groups of `width` neighbours.

    `num_bytes` is the size of a number, `memory` that of the shared memory a program can have. None if there is no way:
    then there is no kernel for these rows.
    """
    size = math.prod(orders)
    measured = _measured(size, "few" if num_rows <= FEW else kind), _measured(size, "map")
    found = [tiling for tiling in measured if tiling is not None]  # where a map fits, so does what comes behind it
    found += sorted((_usual(columns, size) for columns in _cuts(orders)), key=lambda tiling: _work(tiling, size))
    if width & (width - 1):  # a tile divides into powers of two only
        return None
    found.sort(key=lambda tiling: width > 0 and tiling.columns // tiling.parts % width > 0)
    return next(filter(None, (_within(memory, tiling, size, num_bytes) for tiling in found)), None)


def _measured(size: int, kind: Kind) -> Tiling | None:
    known = MEASURED.get(size, {})
    while kind not in known and kind in _LIKE:
        kind = _LIKE[kind]
    return known.get(kind)


def depths_of(height: int) -> tuple[int, ...]:
    """Powers of two from 16 on that cover the rows of X."""
    whole = -(-height // 16) * 16
    return tuple(1 << bit for bit in reversed(range(4, whole.bit_length())) if whole >> bit & 1)


def heights_of(height: int, rows: int, rest: int) -> tuple[int, ...]:
    """Tiles of `rows` rows of the result, and one for what is left: of `rest`, of 64 as the tensor cores like them
    best, or a whole one.
    """
    whole, left = divmod(height, rows)
    last = min(rest, rows) if left <= rest else min(rows, 64) if left <= 64 else rows
    return (rows,) * whole + (last,) * (left > 0)


def padded(tiling: Tiling, size: int) -> tuple[int, int, int]:
    """Rows and columns of H_aᵀ as it is stored, and rows of H_b."""
    height = size // tiling.columns
    columns = max(16, triton.next_power_of_2(tiling.columns))
    return sum(heights_of(height, tiling.rows, tiling.rest)), sum(depths_of(height)), columns


def _within(memory: int, tiling: Tiling, size: int, num_bytes: int) -> Tiling | None:
    """The tiling with as many rows in flight as shared memory holds beside both matrices, an fp32 row's two pieces, and
    room to reorder a tile of the result. An fp32 row may take all registers, which were counted for 16 bits.
    """
    height, depth, columns = padded(tiling, size)
    part = columns // tiling.parts
    matrices = 2 * (part**2 + (0 if tiling.bits else height * depth))
    beside = matrices + num_bytes * part * tiling.rows + 4 * depth * columns * (num_bytes == 4)
    num_stages = min(tiling.num_stages, (memory - beside) // (num_bytes * columns * depth))
    registers = 255 if num_bytes == 4 else tiling.registers
    return tiling._replace(num_stages=num_stages, registers=registers) if num_stages > 0 else None


def tilings(orders: tuple[int, ...]) -> list[Tiling]:
    """All that are worth a measurement: the two cuts with least work, each in several ways, and those measured best."""
    size = math.prod(orders)
    cuts = sorted(_cuts(orders), key=lambda columns: _work(_usual(columns, size), size))[:2]
    found = [
        _within(
            _MEMORY, Tiling(columns, parts, rows, num_warps, num_stages, programs, 255, at_once, bits, rest), size, 2
        )
        for columns in cuts
        for parts, at_once in (((1, False), (2, False), (2, True)) if columns == 128 else ((1, False),))
        for rows in (16, 32, 64, 128)
        for num_warps in {rows // 16, 4}
        for num_stages in (1, 2)
        for programs in (1, 2, 3, 4, 6, 8, 12, 16)
        for bits in (False, True)
        for rest in (16, 64)
        if rows < max(32, 2 * size // columns)
        and programs * num_warps <= 32
        and (not bits or (rows >= 64 and size // columns > 64 and depths_of(size // columns)[0] <= 128))
        and (rest == 16 or (rows >= 64 and 0 < size // columns % rows <= 16))
    ]
    found += [_within(_MEMORY, tiling, size, 2) for tiling in MEASURED.get(size, {}).values()]
    return sorted({tiling for tiling in found if tiling is not None})


def _cuts(orders: tuple[int, ...]) -> list[int]:
    """b for every way to see H_{k_1} ⊗ … as H_a ⊗ H_b: it is a product of the last factors.

    Powers of two come apart into twos, which is what Sylvester's matrices are made of.
    """
    factors = [f for order in orders for f in ([2] * (order.bit_length() - 1) if order & (order - 1) == 0 else [order])]
    cuts = (math.prod(factors[index:]) for index in range(len(factors) + 1))
    return [columns for columns in cuts if 16 <= columns <= 128 and math.prod(orders) // columns <= 256]


def _usual(columns: int, size: int) -> Tiling:
    """A tiling with 16 rows for each warp, and as many programs as registers allow."""
    rows = min(64, max(16, triton.next_power_of_2(size // columns)))
    return Tiling(columns, 1, rows, rows // 16, 2, 192 // rows)


def _work(tiling: Tiling, size: int) -> float:
    """A measure of what a row costs: multiplications, and numbers that are moved."""
    height, depth, columns = padded(tiling, size)
    return height * columns * (depth + columns + 300)


_TAKEN_5120 = Tiling(64, 1, 64, 4, 1, 4, 128, bits=True, rest=64, turns=True)
_CODES_5120 = Tiling(64, 1, 64, 4, 2, 5, 96, ahead=True)
_TAKEN_14336 = Tiling(128, 2, 128, 8, 1, 2, 128, True, True, turns=True)
_TAKEN_18944 = Tiling(128, 2, 64, 4, 1, 2, 255, True, True, turns=True)

MEASURED: dict[int, dict[Kind, Tiling]] = {
    576: {"map": Tiling(48, 1, 16, 1, 2, 16, ahead=True), "few": Tiling(48, 1, 16, 4, 1, 1)},
    1536: {
        "map": Tiling(32, 1, 16, 1, 2, 24),
        "rows": Tiling(32, 1, 32, 1, 2, 16, 104),
        "few": Tiling(32, 1, 64, 4, 1, 1),
    },
    3072: {
        "map": Tiling(64, 1, 16, 1, 2, 16),
        "row bytes": Tiling(64, 1, 64, 4, 1, 5, 96, bits=True),
        "few": Tiling(64, 1, 64, 4, 1, 1, bits=True),
    },
    4096: {"map": Tiling(64, 1, 64, 4, 2, 16), "few": Tiling(64, 1, 64, 4, 1, 1, bits=True)},
    5120: {
        "map": _TAKEN_5120,
        "groups": _TAKEN_5120,
        "rows": _TAKEN_5120,
        "group codes": _CODES_5120,
        "row codes": _CODES_5120,
        "row bytes": _TAKEN_5120,
        "few": Tiling(64, 1, 128, 8, 1, 1, bits=True),
    },
    8192: {"map": Tiling(128, 2, 64, 4, 2, 16), "few": Tiling(64, 1, 128, 8, 1, 1, bits=True)},
    9728: {
        "map": Tiling(128, 2, 64, 4, 1, 3, 168, True, True, 64, turns=True),
        "groups": Tiling(128, 2, 64, 4, 2, 3, 168, True, rest=64, ahead=True),
        "rows": Tiling(128, 2, 64, 4, 1, 2, 255, True, True, 64, turns=True),
        "group codes": Tiling(128, 2, 64, 4, 2, 3, 168, ahead=True),
        "row codes": Tiling(128, 2, 64, 4, 2, 3, 168, True, ahead=True),
        "few": Tiling(128, 2, 128, 8, 1, 1, 255, True, True),
    },
    11008: {
        "map": Tiling(64, 1, 64, 4, 1, 2, bits=True, turns=True),
        "groups": Tiling(64, 1, 64, 4, 1, 2, bits=True),
        "rows": Tiling(64, 1, 64, 4, 1, 3, 168, bits=True, turns=True),
        "group codes": Tiling(64, 1, 64, 4, 1, 4, 128, bits=True, turns=True),
        "row codes": Tiling(64, 1, 64, 4, 1, 3, 168, bits=True),
        "few": Tiling(64, 1, 64, 4, 1, 1, bits=True),
    },
    14336: {
        "map": _TAKEN_14336,
        "groups": _TAKEN_14336,
        "rows": _TAKEN_14336,
        "group codes": Tiling(128, 2, 128, 8, 2, 2, 128, True, ahead=True),
        "row codes": Tiling(128, 2, 128, 8, 2, 2, 128, True, ahead=True),
        "row bytes": _TAKEN_14336,
        "few": Tiling(128, 2, 128, 8, 1, 1, 255, True, True),
    },
    18944: {
        "map": _TAKEN_18944,
        "groups": _TAKEN_18944,
        "rows": Tiling(128, 2, 64, 4, 1, 4, 255, True),
        "group codes": Tiling(128, 2, 64, 4, 1, 3, 168, True, True),
        "row codes": _TAKEN_18944._replace(turns=False),
        "few": Tiling(128, 2, 256, 16, 1, 1, 255, True, True),
    },
}
"""The best of `tilings`, with fewer registers or rows brought ahead where that helps, on an H100, by size and kind
(`benchmarks/transforms.py`). What has none of its own takes that of what is most like it.
"""
