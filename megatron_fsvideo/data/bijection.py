"""A shuffle that is computed, not stored: the position at any place of it, in constant time and memory.

The permutation of 0..n-1 is a Feistel network over two digits, with additions modulo the digits' ranges instead of
exclusive ors, so that its domain has at most sqrt(n) numbers too many (Black and Rogaway, "Ciphers with arbitrary
finite domains", 2002, section 5). A number that falls outside is put through again until it falls inside (their section
4, "cycle walking"). The round function is the finaliser of SplitMix64 (Steele et al. 2014).
"""

from math import isqrt

import numpy as np

# The smallest domains need more rounds than large ones before every permutation is about equally likely.
_ROUNDS = 12


def shuffled_positions(places: np.ndarray, size: int, key: int) -> np.ndarray:
    """Which of `size` things stand at these places of the shuffle `key`.

    Args:
        places: integers in 0..size-1, of one dimension.
        size: at most 2^62.
        key: 64 bits that choose the permutation.

    Returns:
        int64, as many as `places`; different places give different positions.
    """
    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)
    keys = _mix(np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key))
    positions = _encrypt(np.asarray(places).astype(np.uint64), rows, columns, keys)
    while (outside := positions >= size).any():
        positions[outside] = _encrypt(positions[outside], rows, columns, keys)
    return positions.astype(np.int64)


def _encrypt(values: np.ndarray, rows: int, columns: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of 0..rows*columns-1."""
    row, column = np.divmod(values, np.uint64(columns))
    for number, key in enumerate(keys):
        # One bit is dropped so that the sum does not wrap around, which would map two numbers to one.
        if number % 2:
            column = (column + (_mix(row ^ key) >> np.uint64(1))) % np.uint64(columns)
        else:
            row = (row + (_mix(column ^ key) >> np.uint64(1))) % np.uint64(rows)
    return row * np.uint64(columns) + column


def _mix(values: np.ndarray) -> np.ndarray:
    """64 bits that depend on all 64 of each value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
