"""The computed shuffle: a permutation of every size, different for every key, and uniform as far as counts can tell."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from megatron_fsvideo.data.bijection import shuffled_positions


def test_every_size_is_permuted():
    for size in (*range(1, 301), 4096, 65537, 1_000_003):
        positions = shuffled_positions(np.arange(size), size, key=size)
        assert positions.dtype == np.int64
        assert np.array_equal(np.sort(positions), np.arange(size)), size


def test_places_can_be_asked_for_one_by_one_and_in_any_order():
    whole = shuffled_positions(np.arange(1000), 1000, key=5)
    places = np.array([999, 0, 500, 500])
    assert np.array_equal(shuffled_positions(places, 1000, key=5), whole[places])
    assert [int(shuffled_positions(np.array([k]), 1000, key=5)[0]) for k in range(20)] == whole[:20].tolist()


def test_places_of_a_huge_shuffle_are_different():
    size = 10**15 + 37
    for places in (np.arange(2000), np.arange(size - 2000, size)):
        positions = shuffled_positions(places, size, key=1)
        assert 0 <= positions.min() and positions.max() < size and len(np.unique(positions)) == 2000
        # Means of 2,000 uniform numbers spread by size / sqrt(12 x 2,000).
        assert positions.mean() / size == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_order_of_a_few_things_is_equally_likely(size):
    count = 3000
    found = Counter(tuple(shuffled_positions(np.arange(size), size, key).tolist()) for key in range(count))
    orders = list(permutations(range(size)))
    expected = count / len(orders)
    chi_square = sum((found[order] - expected) ** 2 / expected for order in orders)
    degrees = len(orders) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5, found


@pytest.mark.parametrize("size", [9, 37, 100])
def test_places_positions_and_neighbours_are_uniform(size):
    count = 1200
    shuffles = np.stack([shuffled_positions(np.arange(size), size, 7919 * key) for key in range(count)])
    expected = count / size
    counts = np.stack([np.bincount(column, minlength=size) for column in shuffles.T])  # place x position
    steps = np.bincount(((shuffles[:, 1:] - shuffles[:, :-1]) % size).flatten(), minlength=size)[1:]
    for table, mean, degrees in (
        (counts, expected, (size - 1) ** 2),
        (steps, count, size - 2),  # how far apart neighbours in the shuffle are, around the circle
    ):
        chi_square = ((table - mean) ** 2 / mean).sum()
        assert abs(chi_square - degrees) < 5 * (2 * degrees) ** 0.5


def test_keys_give_unrelated_shuffles():
    size = 5000
    shuffles = [shuffled_positions(np.arange(size), size, key) for key in (0, 1, 2, 2**62 + 1, 2**63 - 1)]
    for k, first in enumerate(shuffles):
        assert abs(np.corrcoef(np.arange(size), first)[0, 1]) < 0.06
        for second in shuffles[:k]:
            # Two random shuffles agree in one place on average.
            assert (first == second).sum() < 8
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.06
