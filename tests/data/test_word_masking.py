"""Masks of words, n-grams and spans: each equals its plain form row by row, and keeps its law."""

import dataclasses

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from flaxpretrain.config import Phase
from flaxpretrain.data.framing import MaskedFraming
from flaxpretrain.data.mask_schedule import ScheduledMasking
from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.pipeline import Pipeline, Share
from flaxpretrain.data.randomness import row_keys
from flaxpretrain.data.rows import Blocks, Documents
from flaxpretrain.data.span_masking import SpanMasking
from flaxpretrain.data.word_masking import (
    LongWordMasking,
    NgramMasking,
    WindowMasking,
    WordBernoulliMasking,
    WordMasking,
)
from flaxpretrain.errors import UserError
from tests.data import plain_masks
from tests.data.plain_masks import words_of_row
from tests.data.streams import DIGITS, VOCABULARY, drawn, make_split, recognisable, undrawn

PLAIN = {
    WordMasking: plain_masks.ngrams,
    NgramMasking: plain_masks.ngrams,
    WindowMasking: plain_masks.windows,
    LongWordMasking: plain_masks.long_words,
    WordBernoulliMasking: plain_masks.bernoulli_words,
    SpanMasking: plain_masks.spans,
}
MASKINGS = [
    WordMasking(),
    WordMasking(rate=0.6, max_predictions=9),
    WordMasking(rate=1.0, mask_share=1.0, random_share=0.0),
    NgramMasking(),
    NgramMasking(rate=0.4, weights=(0.4, 0.3, 0.2, 0.1)),
    NgramMasking(rate=0.9, weights=(0.0, 0.0, 1.0)),
    WindowMasking(),
    WindowMasking(rate=0.5, weights=(1.0,)),
    LongWordMasking(most=1.0),
    LongWordMasking(most=1.0, rate=0.5, long_word=2, weights=(0.2, 0.16, 0.64)),
    WordBernoulliMasking(),
    WordBernoulliMasking(rate=0.7, mask_share=0.8, random_share=0.1),
    SpanMasking(),
    SpanMasking(rate=0.5, geometric_p=0.5, longest=3),
    SpanMasking(rate=1.0),
]
EVERY = pytest.mark.parametrize("masking", MASKINGS, ids=repr)


def keys_of(rows, seed=0):
    return row_keys(seed, np.zeros(rows, np.int64), np.arange(rows))


def rows_of(seed=0, rows=40, length=48, new_word=0.6, unknown=0.05):
    """Packed pieces of random words in [CLS] and [SEP], an [UNK] here and there, then padding."""
    random = np.random.default_rng(seed)
    ids = np.full((rows, length), VOCABULARY.pad, np.int32)
    real = np.zeros(rows, np.int64)
    for row in range(rows):
        while real[row] < length - 2 and random.random() < 0.9:
            size = random.integers(1, length - real[row] - 1)
            piece = np.where(random.random(size) < unknown, VOCABULARY.unk, recognisable(size))
            ids[row, real[row] : real[row] + size + 2] = [VOCABULARY.cls, *piece, VOCABULARY.sep]
            real[row] += size + 2
    # What stands at special tokens means nothing.
    starts = random.random((rows, length)) < new_word
    return ids, ~np.isin(ids, VOCABULARY.special_ids), real, starts


def mask(masking, seed=0, key_seed=None, **shape):
    ids, eligible, real, starts = rows_of(seed, **shape)
    keys = keys_of(len(ids), seed if key_seed is None else key_seed)
    masked = masking.apply(keys, ids.copy(), eligible, real, VOCABULARY, word_starts=starts)
    return ids, eligible, real, starts, keys, masked


def places(masked, row):
    return masked.positions[row][masked.weights[row] > 0].tolist()


@EVERY
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("new_word", [0.35, 0.75, 1.0])
def test_a_batch_is_masked_as_the_plain_form_masks_each_row_alone(masking, seed, new_word):
    ids, eligible, real, starts, keys, masked = mask(masking, seed, new_word=new_word)
    plain = PLAIN[type(masking)]
    for row in range(len(ids)):
        wanted = plain(masking, keys[row : row + 1], eligible[row], starts[row], int(real[row]))
        if len(wanted) <= masked.positions.shape[1]:
            assert places(masked, row) == wanted


@EVERY
@hypothesis.given(seed=strategies.integers(0, 2**32), new_word=strategies.sampled_from([0.3, 0.8]))
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True, database=None)
def test_what_every_word_mask_holds(masking, seed, new_word):
    ids, eligible, real, starts, keys, masked = mask(masking, seed, new_word=new_word, rows=12)
    assert masked.positions.shape[1] == masking.slots(ids.shape[1])
    restored = masked.input_ids.copy()
    for row in range(len(ids)):
        chosen = places(masked, row)
        assert chosen == sorted(set(chosen)) and eligible[row, chosen].all()
        restored[row, chosen] = masked.labels[row][: len(chosen)]
        row_words, _ = words_of_row(eligible[row], starts[row])
        cut = [w for w in row_words if 0 < len(set(w) & set(chosen)) < len(w)]
        # A span may end within a word where the budget does.
        assert len(cut) <= isinstance(masking, SpanMasking)
        if hasattr(masking, "budgets"):
            assert len(chosen) <= max(1, round(masking.rate * real[row]))
    assert (restored == ids).all()
    changed = masked.input_ids[masked.input_ids != ids]
    assert np.isin(changed, [*VOCABULARY.regular_ids(), VOCABULARY.mask]).all()
    # The same rows in other batches, in another order.
    order = np.random.default_rng(seed).permutation(len(ids))
    for part in np.array_split(order, 3):
        alone = masking.apply(
            keys[part], ids[part], eligible[part], real[part], VOCABULARY, word_starts=starts[part]
        )
        for ours, theirs in zip(alone, masked, strict=True):
            np.testing.assert_array_equal(ours, theirs[part])


@EVERY
def test_rows_without_text_are_left_alone(masking):
    ids = np.array([[2, 3, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [2, 1, 1, 1, 1, 3]], np.int32)
    nothing = np.zeros(ids.shape, bool)
    masked = masking.apply(
        keys_of(3), ids.copy(), nothing, np.array([2, 0, 6]), VOCABULARY, word_starts=~nothing
    )
    assert (masked.input_ids == ids).all() and not masked.weights.any()


def full_rows(masking, rows, sizes, key_seed=0):
    """Rows of one piece whose words have these sizes, over and over."""
    length = 128
    starts = np.zeros(length, bool)
    starts[(np.cumsum([1, *np.resize(sizes, length)])[:-1]).clip(max=length - 1)] = True
    ids = np.tile(recognisable(length).astype(np.int32), (rows, 1))
    eligible = np.ones(ids.shape, bool)
    eligible[:, [0, -1]] = False
    return masking.apply(
        keys_of(rows, key_seed),
        ids,
        eligible,
        np.full(rows, length),
        VOCABULARY,
        word_starts=np.tile(starts, (rows, 1)),
    )


def runs_of(masked, row):
    """Lengths of the runs of masked neighbours."""
    chosen = np.array(places(masked, row))
    return np.diff(np.flatnonzero(np.diff(chosen, prepend=-9, append=10**6) != 1)).tolist()


@pytest.mark.parametrize(("masking", "share"), [(WordMasking(), 0.15), (NgramMasking(), 0.15)])
def test_words_fill_the_budget_and_are_alike_likely(masking, share):
    rows = 4000
    masked = full_rows(masking, rows, [1, 2, 1, 3])
    assert masked.weights.sum(1).mean() == pytest.approx(19, abs=0.05)
    counts = np.bincount(masked.positions[masked.weights > 0], minlength=128)[1:120]
    # Not at the borders of the row, where fewer n-grams begin.
    inner = counts[8:112].reshape(-1, 1).mean(1) / rows
    assert inner.mean() == pytest.approx(19 / 126, rel=0.02)
    assert inner.std() < 0.03


def test_ngrams_of_single_tokens_follow_their_weights_early_in_the_draw():
    """With a small budget n-grams seldom meet, so their lengths are those drawn."""
    masked = full_rows(NgramMasking(rate=0.05, max_predictions=3, weights=(6, 3, 2)), 6000, [1])
    first = np.array([runs_of(masked, row) == [3] for row in range(6000)]).mean()
    # n = 3 at once, or n = 1 and its neighbours: the former dominates.
    assert 2 / 11 < first < 2 / 11 + 0.06


def test_deberta_windows_hide_one_ngram_in_each():
    masking = WindowMasking(rate=0.15)
    masked = full_rows(masking, 2000, [1])
    lengths = np.concatenate([runs_of(masked, row) for row in range(2000)])
    # Windows of 6 n words hide n of them: a sixth, stopped at the budget of 15 %.
    assert masked.weights.sum(1).mean() == pytest.approx(19, abs=0.7)
    shares = np.bincount(lengths, minlength=4)[1:4] / len(lengths)
    assert shares == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.05)


def test_spans_have_the_mean_length_of_the_paper_before_they_meet():
    masking = SpanMasking(rate=0.02)
    assert np.dot(np.arange(1, 11), masking.weights) / sum(masking.weights) == pytest.approx(
        3.797, abs=1e-3
    )
    masked = full_rows(SpanMasking(rate=0.08), 3000, [1])
    lengths = np.concatenate([runs_of(masked, row) for row in range(3000)])
    # ceil(.08 * 126) = 11 tokens: the last span is cut there.
    assert masked.weights.sum(1).tolist() == [11.0] * 3000
    assert 2.5 < lengths.mean() < 3.797


def test_a_span_shares_one_fate():
    ids, eligible, _, _, _, masked = mask(SpanMasking(rate=0.3), rows=400, unknown=0.0)
    fates = []
    for row in range(400):
        chosen = places(masked, row)
        kinds = [
            "mask"
            if masked.input_ids[row, p] == VOCABULARY.mask
            else "kept"
            if masked.input_ids[row, p] == ids[row, p]
            else "random"
            for p in chosen
        ]
        begin = 0
        for length in runs_of(masked, row) if chosen else []:
            fate = set(kinds[begin : begin + length])
            # A random token is the original one now and then.
            assert len(fate) == 1 or fate == {"kept", "random"}
            fates.append(max(fate))
            begin += length
    assert np.mean([fate == "mask" for fate in fates]) == pytest.approx(0.8, abs=0.05)
    assert np.mean([fate == "random" for fate in fates]) == pytest.approx(0.1, abs=0.04)


def test_course_words_are_masked_independently_with_their_rate():
    masked = full_rows(WordBernoulliMasking(), 4000, [2])
    assert set(np.unique(masked.weights.sum(1) % 2)) == {0.0}
    counts = masked.weights.sum(1) / 2
    assert counts.mean() == pytest.approx(63 * 0.2, abs=0.25)
    assert counts.std() == pytest.approx((63 * 0.2 * 0.8) ** 0.5, rel=0.06)


def test_words_that_overflow_the_slots_are_left_out_whole():
    masking = WordBernoulliMasking(rate=0.3)
    masked = full_rows(masking, 500, [12])
    slots = masking.slots(128)
    assert masked.weights.sum(1).max() <= slots < 128
    assert set(np.unique(masked.weights.sum(1) % 12)) <= {0.0, 6.0}


@pytest.mark.parametrize("masking", [WordMasking(), NgramMasking()], ids=repr)
def test_a_word_longer_than_the_budget_stays_and_others_are_masked_in_its_place(masking):
    alone = full_rows(masking, 50, [126])
    assert not alone.weights.any()
    assert (alone.input_ids == recognisable(128).astype(np.int32)).all()
    beside = full_rows(masking, 50, [60, *[1] * 66])
    assert (beside.weights.sum(1) > 0).all()
    assert beside.positions[beside.weights > 0].min() > 60


def test_long_chinese_words_always_begin_an_ngram():
    masked = full_rows(LongWordMasking(rate=0.1, weights=(1.0,)), 300, [1, 4])
    starts = np.arange(2, 126, 5)
    hidden = np.zeros((300, 128), bool)
    for row in range(300):
        hidden[row, places(masked, row)] = True
    assert masked.positions.shape[1] == 64
    # 4 of 5 tokens are in long words, more than there is room for: those kept are whole.
    long_words = hidden[:, starts[:, None] + np.arange(4)][..., :]
    assert set(long_words.sum(-1).ravel().tolist()) <= {0, 2, 4}


def test_the_vocabulary_head_has_room_for_the_highest_rate_of_a_schedule():
    schedule = ScheduledMasking(masking=WordMasking(), rates=((0, 0.5), (100, 0.1)))
    ids, eligible, real, starts = rows_of(unknown=0.0)
    assert schedule.slots(48) == 24 and schedule.reads_word_starts
    for step, rate in ((0, 0.5), (50, 0.3), (100, 0.1), (10**6, 0.1)):
        ours = schedule.apply(keys_of(40), ids.copy(), eligible, real, VOCABULARY, starts, step)
        plain = WordMasking(rate=rate).apply(
            keys_of(40), ids.copy(), eligible, real, VOCABULARY, starts
        )
        assert ours.positions.shape == (40, 24)
        np.testing.assert_array_equal(ours.input_ids, plain.input_ids)
        np.testing.assert_array_equal(ours.weights.sum(1), plain.weights.sum(1))
        np.testing.assert_array_equal(ours.labels[:, : plain.labels.shape[1]], plain.labels)
    assert schedule.with_rate(0.2) == WordMasking(rate=0.2)
    jump = ScheduledMasking(masking=TokenMasking(), rates=((0, 0.3), (9, 0.3), (9, 0.15)))
    assert (jump.rate(8), jump.rate(10)) == (0.3, 0.15) and not jump.reads_word_starts


def golden(masking, text, bars):
    """A row of digits; its words begin under the bars."""
    ids = undrawn(text)[None].astype(np.int32)
    starts = np.array([[c == "|" for c in bars.ljust(len(text))]])
    masked = masking.apply(
        keys_of(1), ids.copy(), ids < 10, (ids != DIGITS.pad).sum(1), DIGITS, word_starts=starts
    )
    return drawn(masked.input_ids[0])


TEXT, BARS = "<31415926535><8979323846>...", " || |  ||  |  | || |  | "


def test_golden_rows():
    """The same keys must hide the same words for ever."""
    hide = dict(mask_share=1.0, random_share=0.0)
    rows = [
        golden(masking, TEXT, BARS)
        for masking in (
            WordMasking(rate=0.3, **hide),
            NgramMasking(rate=0.3, **hide),
            WindowMasking(rate=0.3, **hide),
            LongWordMasking(rate=0.3, long_word=3, **hide),
            WordBernoulliMasking(rate=0.4),
            SpanMasking(rate=0.3, **hide),
        )
    ]
    assert [TEXT, BARS, *rows] == GOLDEN


@pytest.mark.parametrize("layout", [Blocks(), Documents()], ids=["blocks", "documents"])
def test_any_number_of_hosts_masks_the_same_batches(layout, tmp_path):
    split = make_split(tmp_path, [40, 7, 90, 33, 1, 120])
    schedule = ScheduledMasking(masking=NgramMasking(), rates=((0, 0.5), (4, 0.1)))
    pipeline = Pipeline(
        split,
        layout,
        lambda length: MaskedFraming(vocabulary=VOCABULARY, length=length, masking=schedule),
        (Phase(steps=6, length=24, batch_size=8),),
        order_seed=1,
        noise_seed=2,
    )
    for step in (0, 5):
        whole = pipeline.batch(step)
        parts = [pipeline.batch(step, Share(host, 4)) for host in range(4)]
        for name, array in whole.items():
            joined = np.concatenate([part[name] for part in parts])
            np.testing.assert_array_equal(array, joined)
    assert pipeline.batch(0)["masked_weights"].sum() > 3 * whole["masked_weights"].sum()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NgramMasking(weights=()), "masking.weights are chances .* got \\(\\)"),
        (lambda: NgramMasking(weights=(1.0, 0.0)), "masking.weights"),
        (lambda: WindowMasking(weights=(-1.0, 1.0)), "masking.weights"),
        (lambda: WordMasking(max_predictions=0), "masking.max_predictions must be positive"),
        (lambda: LongWordMasking(most=0.0), "masking.most must be above 0"),
        (lambda: LongWordMasking(long_word=0), "masking.long_word must be positive"),
        (lambda: SpanMasking(geometric_p=1.0), "masking.geometric_p must be between 0 and 1"),
        (lambda: ScheduledMasking(masking=WordMasking(), rates=()), "masking.rates are pairs"),
        (
            lambda: ScheduledMasking(masking=WordMasking(), rates=((5, 0.1), (4, 0.2))),
            "steps ascending",
        ),
        (
            lambda: ScheduledMasking(masking=WordMasking(), rates=((0, 1.5),)),
            "masking.rate must be above 0 and at most 1; got 1.5",
        ),
    ],
)
def test_impossible_numbers_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_masking_is_a_frozen_value():
    for masking in MASKINGS:
        assert dataclasses.replace(masking) == masking and hash(masking) == hash(masking)


GOLDEN = [
    "<31415926535><8979323846>...",
    " || |  ||  |  | || |  | ",
    "<_14____653_><__79323846>...",
    "<_14____6535><___9323846>...",
    "<_1415926535><897_______>...",
    "<_14________><__793___46>...",
    "<_14________><__7__23846>...",
    "<3_______535><8979323846>...",
]
