"""Offsets of many shards behave as the one array that they stand for, and are never joined."""

import numpy as np
import pytest

from flaxpretrain.data.offsets import AT_ONCE, ShardedOffsets, portions

RANDOM = np.random.default_rng(0)
SHARDS = pytest.mark.parametrize("shards", [1, 2, 7])


def make(shards, empty=()):
    """Offsets in shards, and the array they stand for."""
    local, starts, whole, end = [], [], [], 0
    for number in range(shards):
        count = 0 if number in empty else int(RANDOM.integers(1, 9))
        borders = np.concatenate([[0], np.cumsum(RANDOM.integers(1, 5, count))])
        local.append(borders)
        starts.append(end)
        whole.append(borders[:-1] + end)
        end += int(borders[-1])
    return ShardedOffsets(local, starts), np.concatenate([*whole, [end]])


@SHARDS
def test_slices_and_numbers_give_the_elements(shards):
    offsets, whole = make(shards)
    assert len(offsets) == len(whole)
    for begin in range(len(whole) + 1):
        for end in range(len(whole) + 2):
            assert offsets[begin:end].tolist() == whole[begin:end].tolist()
    assert offsets[-3:-1].tolist() == whole[-3:-1].tolist()
    assert np.asarray(offsets).tolist() == whole.tolist()
    index = RANDOM.integers(0, len(whole), (5, 3))
    found = offsets[index]
    assert found.dtype == np.int64 and found.tolist() == whole[index].tolist()


@SHARDS
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_search_finds_what_numpy_finds(shards, side):
    offsets, whole = make(shards)
    values = np.arange(-2, whole[-1] + 3)
    assert offsets.searchsorted(values, side).tolist() == whole.searchsorted(values, side).tolist()
    table = RANDOM.integers(0, whole[-1] + 1, (4, 2))
    assert (offsets.searchsorted(table, side=side) == whole.searchsorted(table, side=side)).all()


@pytest.mark.parametrize("empty", [(0,), (2,), (1, 2), (4,)])
def test_empty_shards_hold_nothing(empty):
    offsets, whole = make(5, empty)
    assert np.asarray(offsets).tolist() == whole.tolist()
    assert offsets[np.arange(len(whole))].tolist() == whole.tolist()
    values = np.arange(whole[-1] + 2)
    for side in ("left", "right"):
        found = offsets.searchsorted(values, side)
        assert found.tolist() == whole.searchsorted(values, side).tolist()


def test_portions_are_all_documents_in_turn_and_bounded():
    documents = np.arange(0, 5 * AT_ONCE, 2)
    sentences = np.arange(0, 5 * AT_ONCE - 1)
    for found, most in (
        (list(portions(documents)), AT_ONCE),
        (list(portions(documents, sentences)), AT_ONCE // 2),
    ):
        first, last = np.array(found).T
        assert first[0] == 0 and last[-1] == len(documents) - 1
        assert (first[1:] == last[:-1]).all() and (last - first <= most).all()
    assert list(portions(np.zeros(1, int))) == []


def test_a_document_of_many_sentences_is_a_portion_of_its_own():
    sentences = np.arange(3 * AT_ONCE + 3)
    documents = np.array([0, 1, 3 * AT_ONCE + 1, 3 * AT_ONCE + 2])
    assert list(portions(documents, sentences)) == [(0, 2), (2, 3)]
