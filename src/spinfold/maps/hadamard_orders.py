"""Which Hadamard matrices we can build, and how a size splits into a Kronecker product of them.

A Hadamard matrix of order n has entries ±1 and H Hᵀ = n I. It is not symmetric in general.

    Sylvester         2^k                                H_2 ⊗ … ⊗ H_2
    Paley I           q + 1,    q ≡ 3 (mod 4)            I + [[0, 1], [-1, Q]]
    Paley II          2(q + 1), q ≡ 1 (mod 4)            C ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]]
    Goethals–Seidel   4m, m in `_FIRST_ROWS`             four circulant blocks
    Kronecker         a product of the orders above

q is a prime power, Q_ab = χ(a - b) over GF(q) with χ the quadratic character, C = [[0, 1], [1, Q]].
Sources: Paley, J. Math. Phys. 12 (1933); Goethals & Seidel, Canad. J. Math. 19 (1967).

Shapes: N order, Q elements of a field, K digits of an element in base p.
"""

from __future__ import annotations

from functools import cache, lru_cache
from itertools import product
from math import log2

import numpy as np
import numpy.typing as npt

from spinfold.errors import SpinfoldError

__all__ = ["factorise", "hadamard_matrix", "is_base_order"]

Signs = npt.NDArray[np.int8]

# A dense factor of order k costs k multiplications per channel: beyond 1024 a Hadamard map is no longer cheap.
_LARGEST_BASE_ORDER = 1024
_LARGEST_SYLVESTER_FACTOR = 128

# First rows a, b, c, d of four circulants of order m, most significant bit first, 1 for +1 and 0 for -1.
# Their periodic autocorrelations add up to zero at every shift but 0. Found by meeting in the middle over
# symmetric sequences (23, 29) and sequences fixed by the multipliers {1, 16, 22} of Z_39, ±{1, 6, 36} of Z_43.
_FIRST_ROWS: dict[int, tuple[int, int, int, int]] = {
    23: (0x74F3CB, 0x722113, 0x5B9276, 0x62BF51),
    29: (0x1589691A, 0x1FC59A3F, 0x1B89691D, 0x1E3A65C7),
    39: (0x57119A76E8, 0x68684F5CA0, 0x604F67D32D, 0x56100A74E0),
    43: (0x4E429B6509C, 0x7BC713238F7, 0x5657E85FA9A, 0x5C2D9FE6D0E),
}


@cache
def factorise(n: int) -> tuple[int, ...] | None:
    """Orders k_1, …, k_f of known base matrices with product n, or None if there are none.

    The choice has the smallest largest factor, then the smallest sum: applying H_{k_1} ⊗ … ⊗ H_{k_f}
    costs n·Σk multiplications. Factors that are powers of two come last and are at most 128.
    """
    if n < 1:
        raise ValueError(f"an order is a positive integer, not {n}")
    if _is_power_of_two(n):
        return _split_power_of_two(n)
    splits = []
    for order in range(12, min(n, _LARGEST_BASE_ORDER) + 1, 4):
        if n % order or _is_power_of_two(order) or not is_base_order(order):
            continue
        rest = factorise(n // order)
        if rest is not None:
            splits.append(tuple(sorted((order, *(k for k in rest if k > 1)), key=lambda k: (_is_power_of_two(k), k))))
    return min(splits, key=lambda orders: (max(orders), sum(orders), orders), default=None)


def is_base_order(n: int) -> bool:
    """Is there a construction other than a Kronecker product (powers of two count as one)?"""
    if _is_power_of_two(n):
        return True
    if n % 4 or n > _LARGEST_BASE_ORDER:
        return False
    return n // 4 in _FIRST_ROWS or _prime_power(n - 1) is not None or _paley_two_field(n) is not None


@lru_cache(maxsize=64)
def hadamard_matrix(n: int) -> Signs:
    """The Hadamard matrix of order n as a read-only `(N, N)` array of ±1, unnormalised.

    Raises SpinfoldError if no construction here reaches n.
    """
    if _is_power_of_two(n):
        matrix = _sylvester(n)
    elif is_base_order(n):
        matrix = _base_matrix(n)
    else:
        orders = factorise(n)
        if orders is None:
            raise SpinfoldError(
                f"No Hadamard matrix of order {n} is available.",
                "Neither Sylvester, Paley, the stored orders, nor a Kronecker product of them reaches it.",
                "Use the Hadamard map: it falls back to equal diagonal blocks of the largest order that divides it.",
            )
        matrix = np.ones((1, 1), dtype=np.int8)
        for order in orders:
            matrix = np.kron(matrix, hadamard_matrix(order))
    matrix.flags.writeable = False
    return matrix


def _base_matrix(n: int) -> Signs:
    if n // 4 in _FIRST_ROWS:
        return _goethals_seidel(n // 4)
    field = _prime_power(n - 1)
    if field is not None:
        return _paley_one(*field)
    field = _paley_two_field(n)
    assert field is not None
    return _paley_two(*field)


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def _split_power_of_two(n: int) -> tuple[int, ...]:
    """As few factors of at most 128 as possible, as equal as possible."""
    exponent = n.bit_length() - 1
    count = max(1, -(-exponent // int(log2(_LARGEST_SYLVESTER_FACTOR))))
    return tuple(1 << (exponent + i) // count for i in range(count))


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k = 1
    while p**k < q:
        k += 1
    return (p, k) if p**k == q else None


def _paley_two_field(n: int) -> tuple[int, int] | None:
    return _prime_power(n // 2 - 1) if (n // 2 - 1) % 4 == 1 else None


# ── constructions ────────────────────────────────────────────────────────────────────────────────────────


def _sylvester(n: int) -> Signs:
    """H_ij = (-1)^(number of ones in i AND j)."""
    index = np.arange(n)
    common = index[:, None] & index
    parity = np.zeros_like(common)
    while common.any():
        parity ^= common & 1
        common >>= 1
    return (1 - 2 * parity).astype(np.int8)


def _paley_one(p: int, k: int) -> Signs:
    """Q is skew because χ(-1) = -1, so (I + S)(I + S)ᵀ = I + SSᵀ = (q + 1) I."""
    skew = _bordered(_jacobsthal(p, k), corner_column=-1)
    return skew + np.eye(len(skew), dtype=np.int8)


def _paley_two(p: int, k: int) -> Signs:
    """Q is symmetric; the two 2 x 2 matrices anticommute in the sense K Lᵀ + L Kᵀ = 0, so the cross terms cancel."""
    conference = _bordered(_jacobsthal(p, k), corner_column=1)
    on_signs = np.array([[1, 1], [1, -1]], dtype=np.int8)
    on_diagonal = np.array([[1, -1], [-1, -1]], dtype=np.int8)
    return np.kron(conference, on_signs) + np.kron(np.eye(len(conference), dtype=np.int8), on_diagonal)


def _goethals_seidel(m: int) -> Signs:
    """The array for circulants A, B, C, D with AAᵀ + BBᵀ + CCᵀ + DDᵀ = 4m I; R reverses the columns."""
    shift = (np.arange(m) - np.arange(m)[:, None]) % m
    rows = (np.array([int(bit) for bit in f"{word:0{m}b}"], dtype=np.int8) for word in _FIRST_ROWS[m])
    a, b, c, d = ((2 * row - 1)[shift] for row in rows)
    br, cr, dr = b[:, ::-1], c[:, ::-1], d[:, ::-1]
    btr, ctr, dtr = b.T[:, ::-1], c.T[:, ::-1], d.T[:, ::-1]
    return np.block([[a, br, cr, dr], [-br, a, dtr, -ctr], [-cr, -dtr, a, btr], [-dr, ctr, -btr, a]])


def _bordered(q_QQ: Signs, corner_column: int) -> Signs:
    """[[0, 1], [corner_column, Q]]."""
    matrix = np.zeros((len(q_QQ) + 1,) * 2, dtype=np.int8)
    matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1, corner_column, q_QQ
    return matrix


def _jacobsthal(p: int, k: int) -> Signs:
    """Q_ab = χ(a - b), an element of GF(p^k) being numbered by its digits in base p."""
    place_K = p ** np.arange(k)
    digits_QK = np.arange(p**k)[:, None] // place_K % p
    difference_QQ = (digits_QK[:, None] - digits_QK) % p @ place_K
    return np.asarray(_quadratic_character(p, k)[difference_QQ])


def _quadratic_character(p: int, k: int) -> Signs:
    """χ(0) = 0, and χ(g^i) = (-1)^i for a generator g of the multiplicative group of GF(p^k).

    Take g = x modulo x^k - Σ c_i x^i, for the first (c_i) that makes x run through all p^k - 1 non-zero
    elements: then the quotient is a field and no multiplication other than by x is needed.
    """
    size = p**k
    one = (1,) + (0,) * (k - 1)
    for coefficients in product(range(p), repeat=k):
        character = np.zeros(size, dtype=np.int8)
        element = one
        for power in range(size - 1):
            character[sum(digit * p**i for i, digit in enumerate(element))] = (-1) ** power
            shifted = (0, *element[:-1])
            element = tuple((digit + element[-1] * c) % p for digit, c in zip(shifted, coefficients, strict=True))
            if element == one or not any(element):
                break
        if element == one and power == size - 2:
            return character
    raise AssertionError(f"every finite field has a generator: is {p} prime?")
