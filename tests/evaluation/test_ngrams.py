"""Unigram and bigram models: counted by hand, summing to one, scored where the model is scored."""

import collections
import math

import numpy as np
import pytest

from flaxpretrain.data.rows import Blocks, Documents
from flaxpretrain.data.store import open_dataset
from flaxpretrain.data.store_writer import write_dataset
from flaxpretrain.errors import UserError
from flaxpretrain.evaluation import ngrams
from flaxpretrain.evaluation.fixed_masks import FixedMasks, baselines
from tests import toys

VOCABULARY = toys.VOCABULARY


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("counted") / "toy"
    return open_dataset(toys.dataset(folder, documents=120))


@pytest.fixture(scope="module")
def counted(data):
    return ngrams.fit(data.split("train"), data.vocabulary)


def split_of(folder, *documents):
    write_dataset(folder, VOCABULARY, {"train": [[list(d)] for d in documents]})
    return open_dataset(folder).split("train")


def test_unigrams_have_one_added_to_every_count_of_text(tmp_path):
    model = ngrams.fit(split_of(tmp_path / "d", [7, 7, 8], [7, 9]), VOCABULARY)
    regular = VOCABULARY.size - len(VOCABULARY.special_ids)
    expected = -np.log(np.array([4, 2, 1]) / (5 + regular))
    np.testing.assert_allclose(model.unigram_nats(np.array([7, 8, 200])), expected)


def test_bigrams_do_not_cross_documents(tmp_path):
    model = ngrams.fit(split_of(tmp_path / "d", [7, 8], [9, 7], [9, 7]), VOCABULARY)
    pairs = dict(zip(model.pairs.tolist(), model.pair_counts.tolist(), strict=True))
    assert pairs == {7 * 300 + 8: 1, 9 * 300 + 7: 2}


def test_bigrams_follow_the_formula(counted):
    by_left = collections.defaultdict(collections.Counter)
    for pair, count in zip(counted.pairs.tolist(), counted.pair_counts.tolist(), strict=True):
        by_left[pair // counted.size][pair % counted.size] = count
    left = max(by_left, key=lambda token: sum(by_left[token].values()))
    followers, d = by_left[left], counted.discount
    for word in (*list(followers)[:3], 299):
        share = max(followers[word] - d, 0) + d * len(followers) * counted.unigram[word]
        expected = -math.log(share / sum(followers.values()))
        one = counted.bigram_nats(np.array([left]), np.array([word]), np.array([True]))
        np.testing.assert_allclose(one, expected)


def test_probabilities_sum_to_one(counted):
    labels = np.arange(counted.size)
    with np.errstate(divide="ignore"):
        unigram = np.exp(-counted.unigram_nats(labels))
        np.testing.assert_allclose(unigram.sum(), 1)
        for left in (4, 5, 100, 299):  # 4 is never a left neighbour
            context = np.full_like(labels, left)
            nats = counted.bigram_nats(context, labels, np.ones(len(labels), bool))
            np.testing.assert_allclose(np.exp(-nats).sum(), 1)
    assert unigram[list(VOCABULARY.special_ids)].sum() == 0


def test_an_unknown_or_masked_left_neighbour_leaves_the_unigram(counted):
    labels = np.array([10, 20])
    unknown = counted.bigram_nats(np.array([9, 4]), labels, np.array([False, True]))
    np.testing.assert_allclose(unknown, counted.unigram_nats(labels))


def test_the_discount_follows_what_held_out_text_shows(tmp_path):
    generator = np.random.default_rng(0)
    regular = split_of(tmp_path / "regular", [5, 6, 7] * 300)
    random = split_of(tmp_path / "random", generator.integers(5, 300, 900).tolist())
    assert ngrams.fit(regular, VOCABULARY).discount < 0.1
    assert ngrams.fit(random, VOCABULARY).discount > 0.9


def test_unknown_tokens_do_not_decide_the_discount(tmp_path):
    """They are never masked and have no chance, so held-out text with some would cost infinity."""
    ids = np.random.default_rng(0).integers(5, 300, 900)
    ids[::7] = VOCABULARY.unk
    assert ngrams.fit(split_of(tmp_path / "d", ids.tolist()), VOCABULARY).discount > 0.9


def test_a_part_of_a_large_split_is_enough(data):
    few = ngrams.fit(data.split("train"), data.vocabulary, max_tokens=500)
    assert few.pair_counts.sum() < 500
    assert np.isclose(few.unigram.sum(), 1)


def test_shards_are_counted_as_one_text(data, tmp_path):
    offsets = data.split("train").document_offsets
    ids, _ = data.split("train").gather(offsets[:-1], np.diff(offsets), int(np.diff(offsets).max()))
    documents = [row[:n].tolist() for row, n in zip(ids, np.diff(offsets), strict=True)]
    write_dataset(tmp_path / "d", VOCABULARY, {"train": [[d] for d in documents]}, shard_bytes=400)
    cut = open_dataset(tmp_path / "d").split("train")
    assert len(cut.shards) > 3
    whole, parts = (ngrams.fit(split, VOCABULARY) for split in (data.split("train"), cut))
    np.testing.assert_array_equal(whole.pairs, parts.pairs)
    np.testing.assert_array_equal(whole.pair_counts, parts.pair_counts)
    np.testing.assert_array_equal(whole.unigram, parts.unigram)


def test_neighbours_of_masked_positions_are_known_only_where_they_are_shown():
    #        [CLS]  10    11    12   [SEP] [CLS]  13   [SEP]
    batch = {
        "input_ids": np.array([[2, 10, 4, 4, 3, 2, 4, 3]]),
        "segment_ids": np.array([[1, 1, 1, 1, 1, 2, 2, 2]]),
        "masked_positions": np.array([[2, 3, 6, 0]]),
        "masked_labels": np.array([[11, 12, 13, 0]]),
        "masked_weights": np.array([[1, 1, 1, 0]], np.float32),
    }
    left, labels, known = ngrams._masked(batch, ngrams.is_text(VOCABULARY))
    assert labels.tolist() == [11, 12, 13]
    assert known.tolist() == [True, False, False]  # shown; masked itself; [CLS]
    assert left[0] == 10


@pytest.mark.parametrize("layout", [Blocks(), Documents()])
def test_the_score_is_that_of_the_masked_positions(data, counted, layout):
    settings = FixedMasks(objective=toys.masked_lm(rate=0.3), layout=layout, length=32)
    nats = baselines(data, settings)
    labels = np.concatenate(
        [b["masked_labels"][b["masked_weights"] > 0] for b in settings.batches(data, 7)]
    )
    assert nats.positions == len(labels)
    np.testing.assert_allclose(nats.unigram, counted.unigram_nats(labels).mean())
    assert nats.bigram < nats.unigram - 0.5


def test_a_batch_without_masks_is_refused(counted):
    with pytest.raises(UserError, match="masked_positions"):
        ngrams.score(counted, [{"input_ids": np.zeros((1, 4), np.int32)}], VOCABULARY)
    with pytest.raises(UserError, match="no masked positions"):
        ngrams.score(counted, [], VOCABULARY)


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(UserError, match="too few to count"):
        ngrams.fit(split_of(tmp_path / "d", [7]), VOCABULARY)
