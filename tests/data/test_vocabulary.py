"""A vocabulary knows its special ids, wherever they lie."""

import pickle

import numpy as np
import pytest

from flaxpretrain.data.vocabulary import Vocabulary
from flaxpretrain.errors import UserError

BETO_LIKE = Vocabulary(size=10, mask=0, pad=1, unk=3, cls=4, sep=5)


def test_special_ids_hold_every_named_id_sorted():
    vocabulary = Vocabulary(size=20, pad=0, eos=1, sentinels=(19, 18), special_ids=(5,))
    assert vocabulary.special_ids == (0, 1, 5, 18, 19)


def test_regular_ids_are_all_the_others():
    assert BETO_LIKE.regular_ids().tolist() == [2, 6, 7, 8, 9]
    assert BETO_LIKE.regular_ids() is BETO_LIKE.regular_ids()
    with pytest.raises(ValueError, match="read-only"):
        BETO_LIKE.regular_ids()[0] = 1


def test_regular_and_special_ids_make_up_the_vocabulary():
    both = np.concatenate([BETO_LIKE.regular_ids(), np.array(BETO_LIKE.special_ids)])
    assert sorted(both.tolist()) == list(range(10))


def test_an_id_of_zero_is_there():
    BETO_LIKE.require("mask", "pad", "cls", "sep")


def test_a_missing_token_is_named():
    with pytest.raises(UserError, match="no bos and no sentinels token"):
        BETO_LIKE.require("mask", "bos", "sentinels")


def test_survives_json_and_pickle():
    vocabulary = Vocabulary(size=20, pad=0, eos=1, sentinels=(19, 18))
    assert Vocabulary.from_json(vocabulary.to_json()) == vocabulary
    assert pickle.loads(pickle.dumps(vocabulary)) == vocabulary
    assert hash(vocabulary) == hash(Vocabulary.from_json(vocabulary.to_json()))


def test_an_unknown_field_is_named():
    with pytest.raises(UserError, match="padding"):
        Vocabulary.from_json({"size": 3, "padding": 0})


def test_an_id_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="10"):
        Vocabulary(size=10, pad=10)
