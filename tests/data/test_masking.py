"""Masks: how many tokens each family hides, which ones, and what stands there instead."""

import math

import numpy as np
import pytest

from flaxpretrain.data.masking import BernoulliMasking, DrawnMasking, TokenMasking
from flaxpretrain.data.randomness import row_keys
from flaxpretrain.data.vocabulary import Vocabulary
from flaxpretrain.errors import UserError
from tests.data.streams import DIGITS, VOCABULARY, chi_square, drawn, recognisable, undrawn

MASKINGS = [
    TokenMasking(),
    TokenMasking(rate=0.4, mask_share=0.5, random_share=0.5),
    TokenMasking(count="fairseq"),
    TokenMasking(count="exact", rate=0.25),
    TokenMasking(count="electra", mask_share=0.85, random_share=0.0),
    TokenMasking(rate=0.3, max_predictions=5),
    TokenMasking(rate=1.0, mask_share=1.0, random_share=0.0),
    BernoulliMasking(),
    BernoulliMasking(rate=0.9),
]
EVERY = pytest.mark.parametrize("masking", MASKINGS, ids=repr)


def keys_of(rows, seed=0):
    return row_keys(seed, np.zeros(rows, np.int64), np.arange(rows))


def masked_rows(masking, rows=200, length=64, seed=0):
    """Text in [CLS] and [SEP], of random lengths, with an [UNK] here and there."""
    random = np.random.default_rng(seed)
    real = random.integers(2, length + 1, rows)
    ids = np.full((rows, length), VOCABULARY.pad, np.int32)
    for row, n in enumerate(real):
        ids[row, 1 : n - 1] = recognisable(n - 2)
        ids[row, 1 : n - 1][random.random(n - 2) < 0.1] = VOCABULARY.unk
        ids[row, 0], ids[row, n - 1] = VOCABULARY.cls, VOCABULARY.sep
    eligible = ~np.isin(ids, VOCABULARY.special_ids)
    masked = masking.apply(keys_of(rows, seed), ids.copy(), eligible, real, VOCABULARY)
    return ids, eligible, real, masked


@EVERY
@pytest.mark.parametrize("seed", range(5))
def test_masked_positions_are_distinct_eligible_text_and_the_rest_is_untouched(masking, seed):
    ids, eligible, _, masked = masked_rows(masking, seed=seed)
    rows, slots = np.nonzero(masked.weights)
    positions = masked.positions[rows, slots]
    assert eligible[rows, positions].all()
    assert len(np.unique(rows * ids.shape[1] + positions)) == len(rows)
    assert (masked.labels[rows, slots] == ids[rows, positions]).all()
    restored = masked.input_ids.copy()
    restored[rows, positions] = masked.labels[rows, slots]
    assert (restored == ids).all()


@EVERY
def test_slots_are_ascending_first_used_then_zero(masking):
    ids, _, _, masked = masked_rows(masking)
    used = masked.weights > 0
    assert set(np.unique(masked.weights)) <= {0.0, 1.0}
    assert masked.positions.shape[1] == masking.slots(ids.shape[1])
    assert (used[:, 1:] <= used[:, :-1]).all()
    assert (np.diff(masked.positions, axis=1)[used[:, 1:]] > 0).all()
    assert (masked.positions[~used] == 0).all() and (masked.labels[~used] == 0).all()


@EVERY
def test_what_replaces_a_token_is_the_mask_or_text_never_another_special(masking):
    ids, _, _, masked = masked_rows(masking, rows=2000)
    changed = masked.input_ids[masked.input_ids != ids]
    allowed = [*VOCABULARY.regular_ids(), VOCABULARY.mask]
    assert np.isin(changed, allowed).all()


@EVERY
def test_rows_without_eligible_tokens_are_left_alone_and_weigh_nothing(masking):
    ids = np.array([[2, 3, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [2, 1, 1, 1, 1, 3]], np.int32)
    real = np.array([2, 0, 6])
    masked = masking.apply(keys_of(3), ids.copy(), np.zeros((3, 6), bool), real, VOCABULARY)
    assert (masked.input_ids == ids).all() and not masked.weights.any()


@EVERY
def test_the_shares_of_masks_random_and_kept_tokens_are_those_asked_for(masking):
    ids, _, _, masked = masked_rows(masking, rows=6000)
    rows, slots = np.nonzero(masked.weights)
    now = masked.input_ids[rows, masked.positions[rows, slots]]
    kept = now == masked.labels[rows, slots]
    is_mask = now == VOCABULARY.mask
    # Counted shares round row by row, which moves a share by up to half a token of some twelve.
    slack = 0.04 if getattr(masking, "count", "") == "exact" else 0.0
    bound = 5 * 0.5 / math.sqrt(len(rows)) + slack
    assert abs(is_mask.mean() - masking.mask_share) < bound
    assert abs((~is_mask & ~kept).mean() - masking.random_share) < bound + 0.002


def test_random_replacements_are_even_over_the_text_tokens():
    masking = TokenMasking(rate=0.5, mask_share=0.0, random_share=1.0)
    _, _, _, masked = masked_rows(masking, rows=4000)
    rows, slots = np.nonzero(masked.weights)
    counts = np.bincount(masked.input_ids[rows, masked.positions[rows, slots]], minlength=500)
    assert counts[list(VOCABULARY.special_ids)].sum() == 0
    assert abs(chi_square(counts[VOCABULARY.regular_ids()])) < 4


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", ["bert", "exact", "electra"])
def test_the_count_is_the_rounded_rate_between_one_and_the_slots(count, seed):
    masking = TokenMasking(rate=0.2, count=count, max_predictions=10)
    _, eligible, real, masked = masked_rows(masking, seed=seed)
    expected = [
        min(max(round(0.2 * n), 1), 10, e) for n, e in zip(real, eligible.sum(1), strict=True)
    ]
    assert masked.weights.sum(1).tolist() == expected


def test_fairseq_counts_have_the_exact_mean_and_vary_by_one():
    rows, length = 20_000, 50
    masking = TokenMasking(rate=0.15, count="fairseq")
    ids = np.tile(recognisable(length).astype(np.int32), (rows, 1))
    eligible = np.ones_like(ids, bool)
    masked = masking.apply(keys_of(rows), ids, eligible, np.full(rows, length), VOCABULARY)
    counts = masked.weights.sum(1)
    assert set(counts.tolist()) == {7.0, 8.0}
    assert counts.mean() == pytest.approx(7.5, abs=5 * 0.5 / math.sqrt(rows))


def test_exact_shares_are_counted_in_every_row():
    rows, length = 500, 100
    masking = TokenMasking(rate=0.25, count="exact")
    ids = np.tile(recognisable(length).astype(np.int32), (rows, 1))
    masked = masking.apply(
        keys_of(rows), ids.copy(), np.ones_like(ids, bool), np.full(rows, length), VOCABULARY
    )
    assert (masked.weights.sum(1) == 25).all()
    # 25 positions: round(20.0) masks, round(22.5) - 20 = 2 random, 3 kept.
    assert ((masked.input_ids == VOCABULARY.mask).sum(1) == 20).all()
    changed = (masked.input_ids != ids).sum(1)
    assert changed.max() == 22 and (changed == 22).mean() > 0.98
    where = np.nonzero(masked.input_ids == VOCABULARY.mask)[1]
    assert abs(chi_square(np.bincount(where, minlength=length))) < 4


@pytest.mark.parametrize(
    ("masking", "length", "slots"),
    [
        (TokenMasking(), 128, 19),
        (TokenMasking(), 512, 77),
        (TokenMasking(max_predictions=20), 128, 20),
        (TokenMasking(max_predictions=20), 8, 8),
        (TokenMasking(), 2, 1),
        (TokenMasking(count="fairseq"), 512, 77),
        (TokenMasking(count="fairseq", rate=0.25), 512, 128),
        (TokenMasking(count="exact", rate=0.25), 128, 32),
        (TokenMasking(count="electra"), 128, 19),
        (TokenMasking(count="electra"), 512, 79),
        (TokenMasking(count="electra", rate=0.25), 512, 130),
        (BernoulliMasking(rate=1.0), 64, 64),
    ],
)
def test_the_number_of_slots_follows_from_rate_and_length(masking, length, slots):
    assert masking.slots(length) == slots


@pytest.mark.parametrize("length", [1, 8, 128, 512, 4096])
@pytest.mark.parametrize("rate", [0.01, 0.15, 0.5, 0.95])
def test_bernoulli_slots_overflow_less_than_once_in_a_billion_rows(rate, length):
    slots = BernoulliMasking(rate=rate).slots(length)

    def above(bound):
        return sum(
            math.exp(
                math.lgamma(length + 1)
                - math.lgamma(k + 1)
                - math.lgamma(length - k + 1)
                + k * math.log(rate)
                + (length - k) * math.log(1 - rate)
            )
            for k in range(bound + 1, length + 1)
        )

    assert above(slots) < 1e-9
    assert slots == 1 or above(slots - 1) >= 1e-9


def test_bernoulli_rows_that_overflow_keep_a_random_subset(monkeypatch):
    monkeypatch.setattr("flaxpretrain.data.masking._OVERFLOW", 1.0)
    masking = BernoulliMasking(rate=0.4999, mask_share=1.0, random_share=0.0)
    monkeypatch.setattr(BernoulliMasking, "slots", lambda self, length: 5)
    ids = np.tile(recognisable(20).astype(np.int32), (4000, 1))
    masked = masking.apply(
        keys_of(4000), ids, np.ones_like(ids, bool), np.full(4000, 20), VOCABULARY
    )
    assert masked.weights.sum(1).max() == 5
    where = np.nonzero(masked.input_ids == VOCABULARY.mask)[1]
    assert abs(chi_square(np.bincount(where, minlength=20))) < 4


def test_bernoulli_masks_each_token_alone_with_the_rate():
    rows, length, rate = 4000, 100, 0.15
    ids = np.tile(recognisable(length).astype(np.int32), (rows, 1))
    masked = BernoulliMasking(rate=rate).apply(
        keys_of(rows), ids, np.ones_like(ids, bool), np.full(rows, length), VOCABULARY
    )
    counts = masked.weights.sum(1)
    spread = math.sqrt(length * rate * (1 - rate))
    assert counts.mean() == pytest.approx(length * rate, abs=5 * spread / math.sqrt(rows))
    assert counts.std() == pytest.approx(spread, rel=0.06)


@pytest.mark.hf
def test_bernoulli_masks_are_those_of_the_transformers_collator():
    """Rate, its spread over rows, and the shares of the fates, each within five deviations."""
    torch = pytest.importorskip("torch")
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(5, 500))]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    ids, _, _, ours = masked_rows(BernoulliMasking(), rows=4000)
    torch.manual_seed(0)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    theirs = collator([{"input_ids": row} for row in ids.tolist()])
    hidden = theirs["labels"].numpy() >= 0
    now = theirs["input_ids"].numpy()
    our_hidden = np.zeros_like(hidden)
    rows, slots = np.nonzero(ours.weights)
    our_hidden[rows, ours.positions[rows, slots]] = True

    def figures(hidden, now):
        eligible = ~np.isin(ids, VOCABULARY.special_ids)
        assert not hidden[~eligible].any()
        is_mask = now[hidden] == VOCABULARY.mask
        kept = now[hidden] == ids[hidden]
        excess = hidden.sum(1) - 0.15 * eligible.sum(1)
        variance = excess @ excess / (0.15 * 0.85 * eligible.sum())
        return [hidden[eligible].mean(), is_mask.mean(), kept.mean(), variance]

    number = hidden.sum()
    share_bound = 5 * 0.5 * math.sqrt(2 / number)
    bounds = [share_bound * 0.15, share_bound, share_bound, 5 * math.sqrt(2 * 2 / len(ids))]
    difference = np.abs(np.subtract(figures(our_hidden, ours.input_ids), figures(hidden, now)))
    assert (difference < bounds).all()


def full_rows(masking, rows=1920, length=128):
    """Full rows of distinct text tokens; the slots' positions are all used."""
    ids = np.tile(np.arange(length, dtype=np.int32) + 1000, (rows, 1))
    eligible = np.ones(ids.shape, bool)
    eligible[:, [0, -1]] = False
    real = np.full(rows, length)
    vocabulary = Vocabulary(size=2000, pad=0, mask=4, special_ids=(0, 4))
    return masking.apply(keys_of(rows), ids, eligible, real, vocabulary)


def test_draws_with_replacement_have_the_statistics_measured_on_the_original():
    masked = full_rows(DrawnMasking())
    assert masked.positions.shape[1] == 19 and masked.weights.all()
    distinct = np.array([len(set(row)) for row in masked.positions])
    assert distinct.mean() / 19 == pytest.approx(0.930, abs=0.004)
    hidden = (masked.input_ids == 4).sum()
    assert distinct.sum() / (1920 * 128) == pytest.approx(0.138, abs=0.001)
    assert hidden / distinct.sum() == pytest.approx(0.859, abs=0.006)


def test_distinct_draws_hide_all_that_the_rate_asks_for():
    masked = full_rows(TokenMasking(count="electra", mask_share=0.85, random_share=0.0))
    assert all(len(set(row)) == 19 for row in masked.positions)
    assert (masked.input_ids == 4).mean() == pytest.approx(0.85 * 19 / 128, abs=0.002)


def test_a_position_drawn_twice_has_one_label_and_is_hidden_if_either_draw_says_so():
    ids, eligible, _, masked = masked_rows(DrawnMasking(rate=0.5, mask_share=0.5))
    rows, slots = np.nonzero(masked.weights)
    positions = masked.positions[rows, slots]
    assert eligible[rows, positions].all()
    assert (masked.labels[rows, slots] == ids[rows, positions]).all()
    seen = masked.input_ids[rows, positions]
    assert set(np.unique(seen[seen != masked.labels[rows, slots]])) == {VOCABULARY.mask}
    twice = masked.positions[:, 1:] == masked.positions[:, :-1]
    twice &= masked.weights[:, 1:] > 0
    hidden = np.take_along_axis(masked.input_ids, masked.positions[:, 1:], 1) == VOCABULARY.mask
    assert hidden[twice].mean() > 0.7 > hidden[masked.weights[:, 1:] > 0].mean()


def test_a_row_without_text_has_no_draws():
    ids = np.full((1, 16), VOCABULARY.cls, np.int32)
    nothing = np.zeros(ids.shape, bool)
    masked = DrawnMasking().apply(keys_of(1), ids.copy(), nothing, np.array([2]), VOCABULARY)
    assert not masked.weights.any() and not masked.positions.any()
    assert (masked.input_ids == ids).all()


def test_golden_rows():
    """The same keys must hide the same tokens for ever."""
    texts = ["<31415926535897932384>", "<2718281828>..........", "<16180>339887>........"]
    ids = np.array([undrawn(t) for t in texts], np.int32)
    eligible = ids < 10
    real = (ids != DIGITS.pad).sum(1)
    masking = TokenMasking(rate=0.3, mask_share=0.5, random_share=0.3)
    masked = masking.apply(keys_of(3), ids.copy(), eligible, real, DIGITS)
    lines = []
    for row, text in enumerate(texts):
        targets, weights = [" "] * len(text), [" "] * len(text)
        for position, label, weight in zip(
            masked.positions[row], masked.labels[row], masked.weights[row], strict=True
        ):
            if weight:
                targets[position], weights[position] = str(label), f"{weight:.0f}"
        lines += [text, drawn(masked.input_ids[row]), "".join(targets), "".join(weights)]
    assert [line.rstrip() for line in lines] == GOLDEN


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rate=0.0), "masking.rate must be above 0 .* got 0.0"),
        (dict(rate=1.5), "masking.rate .* got 1.5"),
        (dict(mask_share=0.95), "sum to at most 1; got 0.95 and 0.1"),
        (dict(random_share=-0.1), "masking.random_share must be at least 0"),
        (dict(count="brt"), "masking.count must be one of bert, fairseq, exact, electra"),
        (dict(max_predictions=0), "masking.max_predictions must be positive; got 0"),
    ],
)
def test_impossible_numbers_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        TokenMasking(**changes)


GOLDEN = [
    "<31415926535897932384>",
    "<3_51_92_535897932_84>",
    "  14 59 6        23",
    "  11 11 1        11",
    "<2718281828>..........",
    "<2713281_68>..........",
    "  7 8   82",
    "  1 1   11",
    "<16180>339887>........",
    "<16_8_>33_887>........",
    "   1 0   9 8",
    "   1 1   1 1",
]
