"""The batch of a step is a pure function of dataset, seeds and step, whoever makes it and when."""

import subprocess
import sys
import threading
import time
import traceback
from itertools import islice

import numpy as np
import pytest

from flaxpretrain.config import Phase
from flaxpretrain.data.framing import MaskedFraming
from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.pipeline import (
    Pipeline,
    Share,
    digest,
    dump,
    evaluation_batches,
    prefetch,
    replay,
    resolve,
)
from flaxpretrain.data.rows import Blocks, Documents
from flaxpretrain.data.vocabulary import Vocabulary
from flaxpretrain.errors import UserError
from tests.data.streams import VOCABULARY, make_split

LENGTHS = np.random.default_rng(3).integers(1, 60, 60)
LAYOUTS = pytest.mark.parametrize("layout", [Blocks(), Documents()], ids=["blocks", "documents"])


def framing_of(length):
    return MaskedFraming(vocabulary=VOCABULARY, length=length, masking=TokenMasking(rate=0.3))


@pytest.fixture
def split(tmp_path):
    return make_split(tmp_path / "data", LENGTHS, shard_bytes=500)


def pipeline_of(split, layout, *phases, **changes):
    phases = phases or (Phase(length=32, batch_size=8, steps=100),)
    seeds = {"order_seed": 1, "noise_seed": 2}
    return Pipeline(split, layout, framing_of, phases, **(seeds | changes))


def equal(a, b):
    return a.keys() == b.keys() and all((a[n] == b[n]).all() for n in a)


def joined(batches):
    return {n: np.concatenate([b[n] for b in batches]) for n in batches[0]}


def texts(batch):
    """The original text of each row, as a tuple."""
    ids = batch["input_ids"].copy()
    row, slot = np.nonzero(batch["masked_weights"])
    ids[row, batch["masked_positions"][row, slot]] = batch["masked_labels"][row, slot]
    return [tuple(line[line != VOCABULARY.pad]) for line in ids]


@LAYOUTS
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_the_shares_of_all_hosts_are_the_global_batch(split, layout, hosts):
    pipeline = pipeline_of(split, layout)
    for step in (0, 7, 29):
        parts = [pipeline.batch(step, Share(host, hosts)) for host in range(hosts)]
        assert equal(joined(parts), pipeline.batch(step))


@LAYOUTS
def test_a_batch_is_what_its_spec_says(split, layout):
    pipeline = pipeline_of(split, layout)
    batch = pipeline.batch(3)
    assert {n: (a.shape, a.dtype) for n, a in batch.items()} == pipeline.spec(3)


def test_word_starts_come_to_framings_that_ask_for_them(split):
    seen = []

    class Noting(MaskedFraming):
        def examples(self, rows, keys, step):
            seen.append(rows)
            return super().examples(rows, keys, step)

    class Asking(Noting):
        reads_word_starts = True

    for kind in (Noting, Asking):
        pipeline = Pipeline(
            split,
            Blocks(),
            lambda n, kind=kind: kind(vocabulary=VOCABULARY, length=n, masking=TokenMasking()),
            (Phase(length=32, batch_size=4, steps=1),),
            order_seed=0,
            noise_seed=0,
        )
        pipeline.batch(0)
    without, asked = seen
    assert "word_starts" not in without
    assert asked["word_starts"].shape == asked["ids"].shape and asked["word_starts"].any()


@LAYOUTS
def test_an_epoch_holds_every_row_once_and_the_next_in_another_order(split, layout):
    pipeline = pipeline_of(split, layout, Phase(length=32, batch_size=1, epochs=2.0))
    rows = pipeline.plans[32].rows_per_epoch
    assert pipeline.steps == 2 * rows
    tokens = [[t for s in range(e, e + rows) for t in texts(pipeline.batch(s))] for e in (0, rows)]
    count = [sum(len([i for i in t if i > 4]) for t in epoch) for epoch in tokens]
    assert count == [split.tokens, split.tokens]
    assert tokens[0] != tokens[1]
    if isinstance(layout, Blocks):
        assert sorted(tokens[0]) == sorted(tokens[1])


@LAYOUTS
def test_a_batch_may_straddle_epochs_and_hold_many(split, layout):
    small = pipeline_of(split, layout, Phase(length=32, batch_size=1, steps=300))
    large = pipeline_of(split, layout, Phase(length=32, batch_size=100, steps=3))
    assert small.plans[32].rows_per_epoch < 100
    for step in range(3):
        alone = joined([small.batch(s) for s in range(100 * step, 100 * (step + 1))])
        assert equal(large.batch(step), alone)


def test_order_and_noise_have_seeds_of_their_own(split):
    base = pipeline_of(split, Blocks()).batch(0)
    noise = pipeline_of(split, Blocks(), noise_seed=9).batch(0)
    order = pipeline_of(split, Blocks(), order_seed=9).batch(0)
    assert texts(base) == texts(noise) and not equal(base, noise)
    assert texts(base) != texts(order)


@LAYOUTS
def test_dynamic_noise_is_new_in_every_epoch_and_static_noise_comes_again(split, layout):
    def epoch_of(duplication, epoch):
        pipeline = pipeline_of(
            split, layout, Phase(length=32, batch_size=1, epochs=7.0), duplication=duplication
        )
        rows = pipeline.plans[32].rows_per_epoch
        made = [pipeline.batch(s) for s in range(epoch * rows, (epoch + 1) * rows)]
        return sorted(tuple(b["input_ids"][0]) for b in made), [texts(b)[0] for b in made]

    assert epoch_of(None, 0)[0] != epoch_of(None, 3)[0]
    assert epoch_of(3, 0)[0] == epoch_of(3, 3)[0] != epoch_of(3, 1)[0]
    # The same rows with the same masks, but in another order.
    assert epoch_of(3, 0)[1] != epoch_of(3, 3)[1]


def test_phases_change_length_and_batch_size_and_each_length_goes_on_where_it_stopped(split):
    phases = (
        Phase(length=16, batch_size=4, steps=3),
        Phase(length=32, batch_size=2, steps=2),
        Phase(length=16, batch_size=8, steps=5),
    )
    pipeline = pipeline_of(split, Blocks(), *phases)
    assert pipeline.steps == 10
    shapes = [pipeline.batch(s)["input_ids"].shape for s in (0, 2, 3, 4, 5, 9)]
    assert shapes == [(4, 16), (4, 16), (2, 32), (2, 32), (8, 16), (8, 16)]
    assert [pipeline.position(s)[::2] for s in (0, 2, 3, 4, 5, 9)] == [
        (0, 0),
        (0, 8),
        (1, 0),
        (1, 2),
        (2, 12),
        (2, 44),
    ]
    alone = pipeline_of(split, Blocks(), Phase(length=16, batch_size=4, steps=20))
    assert equal(pipeline.batch(5), joined([alone.batch(3), alone.batch(4)]))
    assert pipeline.epoch(5) == 12 / pipeline.plans[16].rows_per_epoch


@pytest.mark.parametrize("step", [-1, 100])
def test_a_step_outside_all_phases_is_an_error(split, step):
    with pytest.raises(ValueError, match="outside the 100 steps"):
        pipeline_of(split, Blocks()).batch(step)


def test_tokens_and_epochs_become_steps_rounded_up(split):
    plan = Blocks().plan(split, 32, 2)
    real, rows = plan.real_tokens_per_epoch, plan.rows_per_epoch
    phases = (
        Phase(length=32, batch_size=4, tokens=real),
        Phase(length=32, batch_size=4, tokens=1),
        Phase(length=32, batch_size=4, epochs=2.5, microbatches=2),
        Phase(length=32, batch_size=4, steps=7),
    )
    resolved = resolve(phases, lambda length: plan)
    assert [p.steps for p in resolved] == [-(-rows // 4), 1, -(-int(2.5 * rows + 0.5) // 4), 7]
    assert all(p.tokens is None and p.epochs is None for p in resolved)
    assert resolved[2].microbatches == 2
    assert resolve(resolved, lambda length: plan) == resolved


@LAYOUTS
def test_the_batches_of_a_dataset_never_change(tmp_path, layout):
    """In no process, on no machine: a resumed run would train on other data."""
    split = make_split(tmp_path, LENGTHS, shard_bytes=500)
    pipeline = pipeline_of(split, layout)
    assert digest(pipeline.batch(41))[:16] == GOLDEN[type(layout).__name__]


def test_importing_the_pipeline_imports_neither_jax_nor_torch():
    program = (
        "import sys, flaxpretrain.data.pipeline; "
        "print([m for m in ('jax', 'torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(("batch_size", "hosts"), [(8, 3), (6, 4)])
def test_a_batch_size_that_hosts_cannot_share_is_named(split, batch_size, hosts):
    pipeline = pipeline_of(split, Blocks(), Phase(length=32, batch_size=batch_size, steps=2))
    with pytest.raises(UserError, match=f"batch_size {batch_size} is not divisible .* {hosts}"):
        pipeline.batch(0, Share(0, hosts))


def test_an_empty_split_a_small_length_and_no_mask_token_are_named(tmp_path, split):
    with pytest.raises(UserError, match="split 'train' of the dataset is empty"):
        pipeline_of(make_split(tmp_path / "empty", []), Blocks())
    with pytest.raises(UserError, match="length 2 leaves no room"):
        pipeline_of(split, Blocks(), Phase(length=2, batch_size=1, steps=1))
    bare = Vocabulary(size=500, pad=0, cls=2, sep=3)
    with pytest.raises(UserError, match="no mask token"):
        Pipeline(
            split,
            Blocks(),
            lambda length: MaskedFraming(vocabulary=bare, length=length, masking=TokenMasking()),
            (Phase(length=16, batch_size=1, steps=1),),
            order_seed=0,
            noise_seed=0,
        )
    with pytest.raises(UserError, match="data.duplication must be positive or None; got 0"):
        pipeline_of(split, Blocks(), duplication=0)


# Prefetching.


def prefetching():
    return [t for t in threading.enumerate() if t.name == "prefetch"]


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_prefetched_batches_are_the_batches_from_any_start(split, ahead):
    pipeline = pipeline_of(split, Documents())
    for start in (0, 37):
        made = list(pipeline.iterate(start, start + 6, Share(1, 2), ahead))
        assert len(made) == 6
        for step, batch in enumerate(made, start):
            assert equal(batch, pipeline.batch(step, Share(1, 2)))
    assert not prefetching()


def test_the_thread_works_ahead_as_far_as_it_may_and_no_farther():
    made = []
    batches = prefetch(iter(lambda: made.append(1) or {}, None), 3)
    next(batches)
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 4
    batches.close()
    assert not prefetching()


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_stopping_early_leaves_no_thread(split, taken):
    batches = pipeline_of(split, Blocks()).iterate(0, 100)
    assert len(list(islice(batches, taken))) == taken
    del batches
    assert not prefetching()


def test_an_error_in_the_thread_is_raised_here_with_its_traceback():
    def broken():
        yield {"a": np.zeros(1)}
        raise RuntimeError("bad shard")

    batches = prefetch(broken(), 2)
    assert next(batches)["a"].shape == (1,)
    with pytest.raises(RuntimeError, match="bad shard") as caught:
        next(batches)
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "broken" in frames
    assert not prefetching()


# Evaluation.


@LAYOUTS
@pytest.mark.parametrize("limit", [None, 5, 10_000])
def test_evaluation_sees_the_same_rows_at_any_batch_size(split, layout, limit):
    framing = framing_of(32)

    def rows_at(batch_size, share=None):
        batches = list(evaluation_batches(split, layout, framing, batch_size, 7, limit, rows=share))
        assert all(
            len(b["input_ids"]) == batch_size // (share.count if share else 1) for b in batches
        )
        return batches

    count = min(layout.plan(split, 32, 2).rows_per_epoch, limit or 10_000)
    one = joined(rows_at(1))
    assert len(one["input_ids"]) == count
    for batch_size in (3, 8, 64):
        several = joined(rows_at(batch_size))
        assert equal({n: a[:count] for n, a in several.items()}, one)
        for name in ("masked_weights", "segment_ids", "input_ids"):
            assert (several[name][count:] == 0).all()
    halves = [rows_at(8, Share(host, 2)) for host in range(2)]
    together = joined([joined(list(pair)) for pair in zip(*halves, strict=True)])
    assert equal({n: a[:count] for n, a in together.items()}, one)


@LAYOUTS
def test_evaluation_covers_the_split_once_in_order(split, layout):
    batches = list(evaluation_batches(split, layout, framing_of(32), 4, 0))
    text = [i for t in texts(joined(batches)) for i in t if i > 4]
    assert len(text) == split.tokens
    if isinstance(layout, Blocks):
        assert (np.diff(text) % 7 == 0).any()
        plan = layout.plan(split, 32, 2)
        index = np.arange(plan.rows_per_epoch)
        rows = plan.rows(0, np.zeros_like(index), index)
        assert text == rows["ids"][np.arange(30) < rows["piece_lengths"]].tolist()


def test_limited_evaluation_takes_rows_from_all_over_the_split(split):
    whole = texts(joined(list(evaluation_batches(split, Blocks(), framing_of(16), 1, 0))))
    some = texts(joined(list(evaluation_batches(split, Blocks(), framing_of(16), 1, 0, 20))))
    places = [whole.index(text) for text in some]
    assert places == sorted(set(places)) and len(places) == 20
    assert places[-1] > len(whole) // 2


def test_impossible_batch_sizes_of_evaluation_are_named(split):
    with pytest.raises(UserError, match="must be positive; got 0 and None"):
        evaluation_batches(split, Blocks(), framing_of(16), 0, 0)


# Dump and replay.


def test_a_dumped_batch_is_replayed_to_the_bit(split, tmp_path):
    batch = pipeline_of(split, Blocks()).batch(5)
    dump(batch, tmp_path / "batch.npz")
    again = replay(tmp_path / "batch.npz")
    assert equal(again, batch) and digest(again) == digest(batch)
    assert {n: a.dtype for n, a in again.items()} == {n: a.dtype for n, a in batch.items()}
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["batch.npz"]


def test_a_damaged_or_missing_dump_is_named(split, tmp_path):
    path = tmp_path / "batch.npz"
    with pytest.raises(UserError, match="batch.npz is not a file"):
        replay(path)
    dump(pipeline_of(split, Blocks()).batch(5), path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:2000] + b"!!" + whole[2002:], b"hello"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="batch.npz is no dumped batch, or damaged"):
            replay(path)


def test_arrays_that_do_not_match_their_digest_are_named(split, tmp_path):
    batch = pipeline_of(split, Blocks()).batch(5)
    path = tmp_path / "batch.npz"
    with path.open("wb") as file:
        np.savez(file, digest=np.array(digest(batch)), **(batch | {"noise_key": np.zeros(3)}))
    with pytest.raises(UserError, match="do not match the digest"):
        replay(path)


GOLDEN = {"Blocks": "72dc00cd9102a550", "Documents": "f08d16f903b0848f"}
