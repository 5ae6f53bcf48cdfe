"""Rows hold the whole stream, each token once an epoch, and documents never mix in a piece."""

import numpy as np
import pytest

from flaxpretrain.data.rows import Blocks, Documents, WholeBlocks
from flaxpretrain.data.views import read_views
from flaxpretrain.errors import UserError
from tests.data.streams import make_split, recognisable

LENGTHS = [3, 30, 1, 12, 25, 8, 8, 2, 61, 5, 14]
TEXT = recognisable(sum(LENGTHS))
OPENS = TEXT % 3 > 0
SHARDS = pytest.mark.parametrize(
    "shard_bytes", [1 << 26, 80, 1], ids=["one shard", "some shards", "a shard a document"]
)


def all_views(plan, seed=0, epoch=0):
    index = np.arange(plan.rows_per_epoch)
    return plan.views(seed, np.full_like(index, epoch), index)


@SHARDS
@pytest.mark.parametrize("longest", [1, 9, 40])
def test_views_read_the_stream_wherever_its_shards_end(tmp_path, shard_bytes, longest):
    split = make_split(tmp_path, LENGTHS, shard_bytes=shard_bytes)
    random = np.random.default_rng(longest)
    lengths = random.integers(0, longest + 1, 50)
    starts = random.integers(0, split.tokens - longest + 1, 50)
    found = read_views(split, starts, lengths)
    ids, word_starts = found["ids"], found["word_starts"]
    only_ids = read_views(split, starts, lengths, word_starts=False)
    assert only_ids.keys() == {"ids"} and (only_ids["ids"] == ids).all()
    where = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)])
    assert ids.dtype == np.int32 and ids.tolist() == TEXT[where].tolist()
    first_of_document = np.isin(where, split.document_offsets)
    assert word_starts.tolist() == (OPENS[where] | first_of_document).tolist()


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (160, 10), (169, 1)])
def test_a_view_that_leaves_the_stream_is_an_error(tmp_path, start, length):
    split = make_split(tmp_path, LENGTHS)
    assert split.tokens == 169
    with pytest.raises(IndexError, match="169 tokens"):
        read_views(split, np.array([start]), np.array([length]))


@SHARDS
@pytest.mark.parametrize("length", [3, 10, 170, 500])
def test_blocks_end_to_end_are_the_stream(tmp_path, shard_bytes, length):
    split = make_split(tmp_path, LENGTHS, shard_bytes=shard_bytes)
    plan = Blocks().plan(split, length, 2)
    index = np.arange(plan.rows_per_epoch)
    rows = plan.rows(0, np.zeros_like(index), index)
    kept = np.arange(length - 2) < rows["piece_lengths"]
    assert rows["ids"][kept].tolist() == TEXT.tolist()
    assert (rows["ids"][~kept] == 0).all() and not rows["word_starts"][~kept].any()
    assert (rows["piece_lengths"][:-1] == length - 2).all()
    assert plan.real_tokens_per_epoch == split.tokens + 2 * len(index)
    assert plan.padding_share == pytest.approx(1 - (kept.sum(1) + 2).sum() / (len(index) * length))


@pytest.mark.parametrize("length", [3, 10, 15, 171])  # 169 tokens: 1, 8, 13 and 169 a row
def test_whole_blocks_are_blocks_but_for_a_short_last_one(tmp_path, length):
    split = make_split(tmp_path, LENGTHS)
    plan, padded = (layout.plan(split, length, 2) for layout in (WholeBlocks(), Blocks()))
    assert plan.rows_per_epoch == split.tokens // (length - 2)
    assert plan.padding_share == 0
    index, epoch = np.arange(plan.rows_per_epoch), np.zeros(plan.rows_per_epoch, int)
    rows, others = plan.rows(0, epoch, index), padded.rows(0, epoch, index)
    assert all((rows[name] == others[name]).all() for name in rows)


def test_text_that_fills_no_whole_block_is_named(tmp_path):
    with pytest.raises(UserError, match="has 4 tokens, which do not fill a row of 8: use Blocks"):
        WholeBlocks().plan(make_split(tmp_path, [4]), 10, 2)


@SHARDS
@pytest.mark.parametrize(("length", "specials"), [(3, 2), (12, 2), (12, 0), (33, 1), (200, 3)])
def test_documents_lose_and_repeat_no_token(tmp_path, shard_bytes, length, specials):
    split = make_split(tmp_path, LENGTHS, shard_bytes=shard_bytes)
    plan = Documents().plan(split, length, specials)
    for epoch in range(3):
        starts, lengths = all_views(plan, epoch=epoch)
        seen = np.zeros(split.tokens, int)
        for start, size in zip(starts.ravel(), lengths.ravel(), strict=True):
            seen[start : start + size] += 1
        assert (seen == 1).all()
        assert ((lengths + specials) * (lengths > 0)).sum(1).max() <= length


def test_a_piece_lies_within_one_document_and_long_documents_are_cut_at_capacity(tmp_path):
    split = make_split(tmp_path, LENGTHS)
    starts, lengths = all_views(Documents().plan(split, 12, 2))
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    document = np.searchsorted(split.document_offsets, starts, side="right")
    assert (document == np.searchsorted(split.document_offsets, starts + lengths)).all()
    # 61 tokens: six pieces of ten, and one of one.
    assert np.sort(lengths[document == 9]).tolist() == [1, 10, 10, 10, 10, 10, 10]


def test_rows_of_documents_hold_the_text_of_their_views_back_to_back(tmp_path):
    split = make_split(tmp_path, LENGTHS, shard_bytes=80)
    plan = Documents().plan(split, 24, 2)
    index = np.arange(plan.rows_per_epoch)
    starts, lengths = plan.views(5, np.zeros_like(index), index)
    rows = plan.rows(5, np.zeros_like(index), index)
    assert rows["piece_lengths"].dtype == np.int32
    assert rows["piece_lengths"].tolist() == lengths.tolist()
    for row in index:
        pieces = zip(starts[row], lengths[row], strict=True)
        text = np.concatenate([TEXT[a : a + n] for a, n in pieces])
        assert rows["ids"][row, : len(text)].tolist() == text.tolist()
        assert (rows["ids"][row, len(text) :] == 0).all()


def test_each_epoch_packs_other_documents_together_and_a_seed_repeats_itself(tmp_path):
    split = make_split(tmp_path, np.random.default_rng(0).integers(1, 20, 400))
    plan = Documents().plan(split, 40, 2)
    first = all_views(plan)[0]
    assert (first == all_views(plan)[0]).all()
    for other in (all_views(plan, epoch=1)[0], all_views(plan, seed=1)[0]):
        assert (first != other)[first > 0].mean() > 0.8


def test_a_row_is_the_same_alone_and_among_others(tmp_path):
    plan = Documents().plan(make_split(tmp_path, LENGTHS), 24, 2)
    starts, lengths = all_views(plan, epoch=3)
    alone = plan.views(0, np.array([3]), np.array([2]))
    assert (alone[0] == starts[2:3]).all() and (alone[1] == lengths[2:3]).all()


def test_documents_without_tokens_are_no_pieces(tmp_path):
    split = make_split(tmp_path, [4, 0, 0, 5])
    _, lengths = all_views(Documents().plan(split, 20, 2))
    assert lengths.tolist() == [[5, 4]]


def test_an_empty_split_is_named(tmp_path):
    split = make_split(tmp_path, [])
    for layout in (Blocks(), Documents()):
        with pytest.raises(UserError, match="split 'train' .* is empty"):
            layout.plan(split, 16, 2)


@pytest.mark.parametrize("layout", [Blocks(), Documents()])
def test_a_length_without_room_for_text_is_named(tmp_path, layout):
    with pytest.raises(UserError, match="length 2 leaves no room .* 3 or more"):
        layout.plan(make_split(tmp_path, [9]), 2, 2)


def test_articles_of_wikipedia_are_packed_with_little_padding(tmp_path, test_data):
    """Lengths in words: no tokenizer is needed to have the shape of their distribution."""
    text = (test_data / "en_wikipedia_2018" / "train.txt").read_text(encoding="utf-8")
    articles = [len(article.split()) for article in text.split("\n\n")]
    split = make_split(tmp_path, [n for n in articles if n])
    for length in (128, 512):
        assert Documents().plan(split, length, 2).padding_share < 0.03
