"""Length buckets: a text a row, rows as short as serves, as many tokens in every batch."""

import functools

import numpy as np
import pytest

from flaxpretrain.config import Phase, parse, render
from flaxpretrain.data.buckets import BucketPipeline, LengthBuckets
from flaxpretrain.data.framing import MaskedFraming
from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.pipeline import Share, digest, evaluation_batches
from flaxpretrain.data.rows import Documents, PaddedDocuments
from flaxpretrain.data.sentence_pairs import SentencePairs
from flaxpretrain.errors import UserError
from tests.data.streams import VOCABULARY, make_split
from tests.data.test_sentence_pairs import VOCABULARY as PAIRED
from tests.data.test_sentence_pairs import documents_of, split_of

LENGTHS = np.random.default_rng(5).integers(1, 90, 300)
BUCKETS = LengthBuckets((8, 16))
PAIRS = LengthBuckets((32,), SentencePairs(negatives="swapped", most=1))


def framing_of(length, vocabulary=VOCABULARY):
    return MaskedFraming(vocabulary=vocabulary, length=length, masking=TokenMasking(rate=0.3))


def pipeline_of(split, *phases, layout=BUCKETS, framing_of=framing_of, **options):
    seeds = {"order_seed": 1, "noise_seed": 2}
    phases = phases or (Phase(length=32, batch_size=8, steps=60),)
    return BucketPipeline(split, layout, framing_of, phases, **(seeds | options))


@pytest.fixture
def split(tmp_path):
    return make_split(tmp_path / "data", LENGTHS, shard_bytes=2000)


@pytest.fixture
def pairs(tmp_path):
    return split_of(tmp_path / "pairs", documents_of(count=60))


def originals(batch):
    """The text of each row as it was before it was masked."""
    ids = batch["input_ids"].copy()
    row, slot = np.nonzero(batch["masked_weights"])
    ids[row, batch["masked_positions"][row, slot]] = batch["masked_labels"][row, slot]
    return [tuple(line[line != VOCABULARY.pad].tolist()) for line in ids]


def test_every_batch_has_as_many_tokens_and_no_row_would_fit_a_shorter_length(split):
    pipeline = pipeline_of(split)
    seen = set()
    for step in range(60):
        batch, shape = pipeline.batch(step), pipeline.shape(step)
        rows, length = batch["input_ids"].shape
        assert (rows, length) == (shape.batch_size, shape.length) and rows * length == 8 * 32
        assert {n: (a.shape, a.dtype) for n, a in batch.items()} == pipeline.spec(step)
        real = (batch["segment_ids"] > 0).sum(axis=1)
        shorter = {8: 0, 16: 8, 32: 16}[length]
        assert batch["segment_ids"].max() == 1 and (real > shorter).all()
        seen.add(length)
    assert seen == {8, 16, 32}


def test_every_token_comes_once_in_an_epoch_of_each_bucket(split):
    pipeline = pipeline_of(split, Phase(length=32, batch_size=1, epochs=2.0))
    texts = {8: [], 16: [], 32: []}
    for step in range(pipeline.steps):
        texts[pipeline.shape(step).length] += originals(pipeline.batch(step))
    plans = pipeline.plans[32].plans
    first = [texts[n][: plan.rows_per_epoch] for n, plan in plans.items()]
    second = [texts[n][plan.rows_per_epoch :] for n, plan in plans.items()]
    assert sum(len(text) - 2 for rows in first for text in rows) == split.tokens
    # Lengths take turns, so that their epochs end together, but for the last batches.
    for again, once in zip(second, first, strict=True):
        assert len(again) > 0.9 * len(once) and again != once[: len(again)]
        assert not set(again[: len(once)]) - set(once)


def test_the_order_of_lengths_is_spread_evenly(split):
    pipeline = pipeline_of(split, Phase(length=32, batch_size=2, steps=400))
    lengths = np.array([pipeline.shape(step).length for step in range(400)])
    for length, share in zip((8, 16, 32), pipeline.plans[32].shares, strict=True):
        places = np.flatnonzero(lengths == length)
        assert (
            abs(len(places) - 400 * share) <= 1 and np.diff(places).max() <= np.ceil(1 / share) + 1
        )


def test_padding_is_what_the_plan_says_and_less_than_without_buckets(split):
    plan = BUCKETS.plan_buckets(split, framing_of, 32)
    pipeline = pipeline_of(split, Phase(length=32, batch_size=1, epochs=1.0))
    real, positions = 0, 0
    for step in range(pipeline.steps):
        batch = pipeline.batch(step)
        real, positions = (
            real + (batch["segment_ids"] > 0).sum(),
            positions + batch["input_ids"].size,
        )
    assert 1 - real / positions == pytest.approx(plan.padding_share, abs=0.02)
    alone = PaddedDocuments().plan(split, 32, 2)
    assert plan.real_tokens_per_epoch == alone.real_tokens_per_epoch
    assert plan.padding_share < 0.6 * alone.padding_share
    assert Documents().plan(split, 32, 2).padding_share < plan.padding_share
    assert sum(p.rows_per_epoch for p in plan.plans.values()) == alone.rows_per_epoch
    assert len(plan.notes()) == 3 and plan.notes()[0].startswith("rows of 8: ")


@pytest.mark.parametrize("hosts", [2, 4])
def test_a_batch_is_a_pure_function_of_the_step_on_any_number_of_hosts(split, hosts):
    whole, other = pipeline_of(split), pipeline_of(split)
    for step in (41, 3, 40, 0):
        batch = whole.batch(step)
        parts = [other.batch(step, Share(host, hosts)) for host in range(hosts)]
        for name, array in batch.items():
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), array)
    assert digest(whole.batch(7)) != digest(pipeline_of(split, order_seed=5).batch(7))
    noise = pipeline_of(split, noise_seed=5).batch(7)
    assert originals(noise) == originals(whole.batch(7))
    assert (noise["input_ids"] != whole.batch(7)["input_ids"]).any()


def test_phases_go_on_where_their_length_stopped(split):
    phases = (
        Phase(length=32, batch_size=4, steps=9),
        Phase(length=16, batch_size=4, steps=5),
        Phase(length=32, batch_size=8, steps=30),
    )
    pipeline = pipeline_of(split, *phases)
    single = pipeline_of(split, Phase(length=32, batch_size=1, steps=2000))
    stream = {8: [], 16: [], 32: []}
    for step in range(2000):
        stream[single.shape(step).length] += originals(single.batch(step))
    texts = {8: [], 16: [], 32: []}
    for step in (*range(9), *range(14, 44)):
        texts[pipeline.shape(step).length] += originals(pipeline.batch(step))
    for length, rows in texts.items():
        assert rows and rows == stream[length][: len(rows)]
    # The second phase has the lengths up to its own.
    assert {pipeline.shape(step).length for step in range(9, 14)} <= {8, 16}
    assert pipeline.epoch(14) == pytest.approx(9 * 4 * 32 / pipeline.plans[32].positions)


def test_pairs_keep_their_labels_in_rows_as_short_as_serves(pairs):
    phase = Phase(length=64, batch_size=4, epochs=1.0)
    framing = functools.partial(framing_of, vocabulary=PAIRED)
    pipeline = pipeline_of(pairs, phase, layout=PAIRS, framing_of=framing)
    labels, lengths = [], set()
    for step in range(pipeline.steps):
        batch = pipeline.batch(step)
        rows, length = batch["input_ids"].shape
        assert rows * length == 4 * 64 and batch["pair_labels"].shape == (rows, 1)
        real = (batch["segment_ids"] > 0).sum(axis=1)
        assert (batch["input_ids"][np.arange(rows), real - 1] == PAIRED.sep).all()
        assert (batch["token_type_ids"].max(axis=1) == batch["pair_weights"][:, 0]).all()
        labels += batch["pair_labels"][batch["pair_weights"] > 0].tolist()
        lengths.add(length)
    assert lengths == {32, 64} and 0.3 < np.mean(labels) < 0.9


def test_evaluation_reads_every_row_at_one_length(split):
    batches = evaluation_batches(split, BUCKETS, framing_of(32), 16, seed=0)
    texts = [text for batch in batches for text in originals(batch) if text]
    assert sum(len(text) - 2 for text in texts) == split.tokens


def test_static_noise_comes_again(split):
    def epoch_of(epoch):
        # One bucket only, so that its epochs are those of the phase.
        layout = LengthBuckets((32,))
        phase = Phase(length=32, batch_size=1, epochs=4.0)
        pipeline = pipeline_of(split, phase, layout=layout, duplication=2)
        rows = pipeline.plans[32].rows_per_epoch
        steps = range(epoch * rows, (epoch + 1) * rows)
        return sorted(tuple(pipeline.batch(step)["input_ids"][0].tolist()) for step in steps)

    assert epoch_of(0) == epoch_of(2) != epoch_of(1)


def test_the_value_survives_the_workdirs_record():
    assert parse(render(PAIRS)) == PAIRS


@pytest.mark.parametrize(
    ("lengths", "layout", "message"),
    [
        ((), PaddedDocuments(), "positive and ascending"),
        ((16, 8), PaddedDocuments(), "positive and ascending"),
        ((8,), Documents(), "a row of its own"),
        ((8,), SentencePairs(), r"SentencePairs\(most=1\)"),
    ],
)
def test_impossible_values_are_named(lengths, layout, message):
    with pytest.raises(UserError, match=message):
        LengthBuckets(lengths, layout)


def test_a_length_that_does_not_divide_the_longest_is_named(split):
    with pytest.raises(UserError, match="12 does not divide the phase's length 32"):
        pipeline_of(split, layout=LengthBuckets((12,)))


def test_a_bucket_that_would_never_have_its_turn_is_named(tmp_path):
    split = make_split(tmp_path / "d", [1, *[62] * 10_000])
    with pytest.raises(UserError, match="only 1 texts want rows of 4 tokens.*leave 4 out"):
        pipeline_of(split, Phase(length=64, batch_size=4, steps=1), layout=LengthBuckets((4,)))
