"""Random numbers are functions of (seed, epoch, row, stream, counter), and look random."""

import numpy as np
import pytest

from flaxpretrain.data import randomness
from flaxpretrain.data.randomness import (
    Stream,
    bits,
    choose,
    fold,
    integers,
    noise_key,
    permute,
    row_keys,
    uniform,
    words,
)
from tests.data.streams import chi_square


def keys_of(rows, seed=0, epoch=0):
    return row_keys(seed, np.full(rows, epoch), np.arange(rows))


def test_the_counter_is_the_one_of_splitmix64():
    """The published first outputs of SplitMix64 seeded with 1234567."""
    state = 1234567 + randomness._GOLDEN * np.arange(1, 6, dtype=np.uint64)
    assert randomness._mix(state).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_the_numbers_never_change():
    """Other numbers would silently reorder and remask every dataset of every resumed run."""
    keys = row_keys(17, np.array([0, 0, 1]), np.array([0, 1, 0]))
    assert keys.tolist() == GOLDEN_KEYS
    assert words(keys, 3, 3).tolist() == GOLDEN_WORDS
    assert permute(np.arange(10), 10, keys[:1]).tolist() == GOLDEN_PERMUTATION


def test_a_number_depends_on_nothing_but_its_own_row():
    keys = keys_of(50)
    some = np.array([3, 41, 7])
    assert (bits(keys, 1, 20)[some] == bits(keys[some], 1, 20)).all()
    assert (bits(keys, 1, 20)[:, :5] == bits(keys, 1, 5)).all()
    assert (words(keys, 1, 21)[:, :4] == words(keys, 1, 4)).all()


@pytest.mark.parametrize(
    "other", [dict(seed=1), dict(epoch=1), dict(seed=-1), dict(seed=2**70 + 1)]
)
def test_seed_and_epoch_change_every_number(other):
    assert not np.intersect1d(bits(keys_of(50), 1, 20), bits(keys_of(50, **other), 1, 20)).size


def test_streams_and_rows_share_no_numbers():
    keys = keys_of(100)
    everything = np.concatenate([bits(keys, stream, 50).ravel() for stream in range(8)])
    assert len(np.unique(everything)) == everything.size
    assert len(set(Stream)) == len(Stream)


def test_folding_distinct_values_gives_distinct_keys():
    assert len(np.unique(fold(np.zeros(10_000, np.uint64), np.arange(10_000)))) == 10_000


def test_uniform_numbers_fill_the_unit_interval_evenly():
    numbers = uniform(keys_of(1000), 1, 200)
    assert numbers.dtype == np.float32
    assert 0 <= numbers.min() and numbers.max() < 1
    assert abs(chi_square(np.histogram(numbers, 100, (0, 1))[0])) < 4
    assert abs(numbers.mean() - 0.5) < 5 / np.sqrt(12 * numbers.size)


@pytest.mark.parametrize("high", [1, 2, 3, 100])
def test_integers_are_even_over_their_range(high):
    numbers = integers(keys_of(500), 1, 200, high)
    assert numbers.min() >= 0 and numbers.max() < high
    if high > 1:
        assert abs(chi_square(np.bincount(numbers.ravel(), minlength=high))) < 4


def test_every_bit_of_a_word_is_fair_and_independent_of_its_neighbour():
    drawn = words(keys_of(2000), 1, 64)
    single = (drawn[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    assert np.abs(single.mean((0, 1)) - 0.5).max() < 5 * 0.5 / np.sqrt(drawn.size)
    across = (single[:, 1:] == single[:, :-1]).mean((0, 1))
    assert np.abs(across - 0.5).max() < 5 * 0.5 / np.sqrt(drawn.size)


def test_the_noise_key_is_a_pair_of_words_and_differs_by_row():
    pairs = noise_key(keys_of(1000))
    assert pairs.dtype == np.uint32 and pairs.shape == (1000, 2)
    assert len(np.unique(pairs, axis=0)) == 1000


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 1000, 12345, 65537])
def test_a_permutation_hits_every_index_once(size):
    for key in keys_of(3):
        image = permute(np.arange(size), size, np.array([key]))
        assert (np.sort(image) == np.arange(size)).all()


def test_a_permutation_of_a_huge_range_is_evaluated_at_a_point():
    size = 10**12 + 39
    index = np.arange(size - 1000, size)
    image = permute(index, size, keys_of(1))
    assert len(np.unique(image)) == 1000 and image.min() >= 0 and image.max() < size
    assert image.mean() == pytest.approx(size / 2, rel=0.2)


def test_sizes_and_keys_may_differ_by_element():
    keys, sizes = keys_of(40), np.arange(1, 41)
    index = sizes // 2
    together = permute(index, sizes, keys)
    alone = [
        permute(index[i : i + 1], int(sizes[i]), keys[i : i + 1])[0] for i in range(len(sizes))
    ]
    assert together.tolist() == alone


@pytest.mark.parametrize("size", [2, 3, 5, 7, 12, 33])
def test_over_many_keys_an_index_lands_everywhere_alike(size):
    keys = keys_of(6000)
    for index in (0, size // 2, size - 1):
        image = permute(np.full(6000, index), size, keys)
        assert chi_square(np.bincount(image, minlength=size)) < 4


def test_over_many_keys_two_indices_land_on_every_pair_alike():
    keys = keys_of(20_000)
    first, second = (permute(np.full(20_000, i), 6, keys) for i in (2, 3))
    pairs = np.bincount(first * 6 + second, minlength=36).reshape(6, 6)
    assert (np.diag(pairs) == 0).all()
    assert chi_square(pairs[~np.eye(6, dtype=bool)]) < 5


def test_neighbours_do_not_stay_neighbours():
    image = permute(np.arange(10_000), 10_000, keys_of(1))
    assert (np.abs(np.diff(image)) == 1).mean() < 0.002
    assert abs(np.corrcoef(image[1:], image[:-1])[0, 1]) < 0.05


def test_an_index_outside_the_range_is_an_error():
    with pytest.raises(ValueError, match="range"):
        permute(np.array([5]), 5, keys_of(1))


@pytest.mark.parametrize("length", [1, 2, 17, 64, 9000])
def test_chosen_positions_are_distinct_ascending_and_eligible(length):
    keys = keys_of(30)
    eligible = uniform(keys, 99, length) < 0.5
    counts = integers(keys, 98, 1, length + 1)[:, 0]
    positions, used = choose(keys, 1, eligible, counts, slots=max(1, length // 2))
    allowed = np.minimum(np.minimum(counts, eligible.sum(1)), max(1, length // 2))
    assert (used.sum(1) == allowed).all()
    assert positions.dtype == np.int32 and (positions[~used] == 0).all()
    for row in range(30):
        mine = positions[row, used[row]]
        assert (np.diff(mine) > 0).all() and eligible[row, mine].all()
        assert used[row, : allowed[row]].all()


def test_every_subset_is_chosen_alike():
    rows = 20_000
    eligible = np.tile(np.array([1, 0, 1, 1, 1, 0, 1], bool), (rows, 1))
    positions, _ = choose(keys_of(rows), 1, eligible, np.full(rows, 2), slots=3)
    pairs = np.bincount(positions[:, 0] * 7 + positions[:, 1], minlength=49)
    assert (pairs > 0).sum() == 10
    assert chi_square(pairs[pairs > 0]) < 4


def test_long_rows_are_chosen_from_evenly():
    rows, length = 400, 1 << 14
    positions, used = choose(
        keys_of(rows), 1, np.ones((rows, length), bool), np.full(rows, 1000), slots=1000
    )
    assert used.all()
    assert chi_square(np.histogram(positions, 64, (0, length))[0]) < 4


GOLDEN_KEYS = [6148000501710616521, 11575300086028257709, 8471185700451516869]
GOLDEN_WORDS = [
    [1234043189, 3194686723, 491153451],
    [1819946617, 296844546, 1364281003],
    [306170661, 2066823989, 390605430],
]
GOLDEN_PERMUTATION = [4, 6, 1, 5, 8, 3, 0, 7, 9, 2]
