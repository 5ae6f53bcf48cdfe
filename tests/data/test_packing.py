"""Packing places every piece exactly once, fills rows well, and never looks at single pieces."""

import time

import numpy as np
import pytest

from flaxpretrain.data.packing import pack


def histogram_of(lengths, capacity):
    return np.bincount(lengths, minlength=capacity + 1)


def rows_of(packing):
    return packing.slots(np.arange(packing.rows))


@pytest.mark.parametrize("specials", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_every_piece_has_one_slot_and_every_row_fits(seed, specials):
    random = np.random.default_rng(seed)
    length = int(random.integers(specials + 1, 80))
    capacity = length - specials
    pieces = random.integers(1, capacity + 1, random.integers(1, 300))
    if seed % 2:
        pieces = np.minimum(pieces, random.integers(1, capacity + 1, len(pieces)))
    histogram = histogram_of(pieces, capacity)
    lengths, number = rows_of(pack(histogram, length, specials))
    assert ((lengths + specials) * (lengths > 0)).sum(1).max() <= length
    assert (lengths.sum(1) > 0).all()
    for size in range(1, capacity + 1):
        assert np.sort(number[lengths == size]).tolist() == list(range(histogram[size]))


def test_pieces_stand_longest_first_and_empty_slots_last():
    lengths, _ = rows_of(pack(histogram_of([9, 3, 3, 2, 7, 1, 1], 20), 20, 2))
    assert (np.diff(lengths, axis=1) <= 0).all()


@pytest.mark.parametrize(
    ("pieces", "rows"),
    [
        ([8, 8, 8], [[8], [8], [8]]),
        ([6, 4, 6, 4], [[6, 4], [6, 4]]),
        ([5, 5, 5], [[5, 5], [5]]),
        ([7, 5, 4, 3, 1], [[5, 4, 1], [7, 3]]),
        ([3, 3, 3, 3, 3, 3, 1, 1], [[3, 3, 3, 1], [3, 3, 3, 1]]),
        ([10, 1], [[1], [10]]),
    ],
)
def test_a_piece_goes_into_the_fullest_row_that_has_room(pieces, rows):
    lengths, _ = rows_of(pack(histogram_of(pieces, 10), 10, 0))
    assert sorted([n for n in row if n] for row in lengths.tolist()) == sorted(rows)


def test_many_random_pieces_waste_almost_nothing():
    random = np.random.default_rng(0)
    pieces = np.minimum(random.lognormal(4.5, 1.2, 20_000).astype(int) + 1, 510)
    packing = pack(histogram_of(pieces, 510), 512, 2)
    assert 1 - (pieces + 2).sum() / (packing.rows * 512) < 0.005


def test_the_time_does_not_depend_on_how_many_pieces_there_are():
    begin = time.perf_counter()
    packing = pack(np.full(511, 10**12), 512, 2)
    assert time.perf_counter() - begin < 5
    assert packing.rows * 512 >= 10**12 * sum(n + 2 for n in range(511))
    lengths, number = packing.slots(np.array([packing.rows - 1]))
    assert lengths.sum() > 0 and number.max() < 10**12


@pytest.mark.parametrize("histogram", [np.zeros(5, int), np.eye(1, 11, 10, dtype=int)[0]])
def test_no_piece_or_one_longer_than_a_row_is_an_error(histogram):
    with pytest.raises(ValueError, match="pieces must have 1 to 8 tokens"):
        pack(histogram, 10, 2)
