"""Mixtures: seqio's rates, turns evenly spread, batches that depend on steps and weights alone."""

import dataclasses

import numpy as np
import pytest

from flaxpretrain.config import Phase, parse, render
from flaxpretrain.data.framing import MaskedFraming
from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.mixed_pipeline import MixedPipeline, mixed_plan
from flaxpretrain.data.mixing import (
    MixedData,
    Mixing,
    Part,
    Turns,
    held_out,
    mixed_metadata,
    open_mixed,
    prolonged,
)
from flaxpretrain.data.pipeline import Share
from flaxpretrain.data.rows import Blocks, Documents
from flaxpretrain.errors import UserError
from tests import toys
from tests.data.streams import VOCABULARY, make_split
from tests.data.test_pipeline import equal, joined, texts

SIZES = {"wiki": 90, "books": 30, "news": 6}


def framing_of(name, length):
    rate = 0.3 if name == "books" else 0.1
    masking = TokenMasking(rate=rate, max_predictions=10, count="exact")
    return MaskedFraming(vocabulary=VOCABULARY, length=length, masking=masking)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    random = np.random.default_rng(5)
    folder = tmp_path_factory.mktemp("mixture")
    found = {}
    for name, count in SIZES.items():
        lengths = random.integers(1, 60, count)
        ids = random.choice(VOCABULARY.regular_ids(), lengths.sum())
        found[name] = make_split(folder / name, lengths, shard_bytes=900, ids=ids)
    return found


def mixture(weights=(3, 2, 1), layouts=(None, None, None), **changes):
    parts = tuple(
        Part(name=name, folder=name, weight=weight, layout=layout)
        for name, weight, layout in zip(SIZES, weights or [None] * 3, layouts, strict=True)
    )
    return MixedData(layout=Blocks(), parts=parts, **changes)


def pipeline_of(splits, data, *phases, **changes):
    phases = phases or (Phase(length=32, batch_size=12, steps=200),)
    seeds = {"order_seed": 1, "noise_seed": 2}
    return MixedPipeline(splits, data, framing_of, phases, **(seeds | changes))


def test_rates_are_clipped_first_then_tempered():
    """As mixing_rate_num_examples of seqio: min(scale * n, K) ** (1 / T)."""
    mixing = Mixing(None, (1.0, 1.0, 3.0), 100, 2.0)
    np.testing.assert_allclose(mixing.rates(np.array([400.0, 25.0, 3.0])), [10.0, 5.0, 3.0])
    plain = Mixing(None, (1.0,) * 3, None, 1.0)
    np.testing.assert_allclose(plain.rates(np.array([400.0, 25.0, 3.0])), [400.0, 25.0, 3.0])


def test_an_example_of_a_packed_row_counts_for_its_part_of_it(splits):
    packed = pipeline_of(splits, mixture(None, (Blocks(), Documents(), Documents())))
    plans = [stream.plans[32] for stream in packed.streams.values()]
    assert plans[1].examples_per_epoch > plans[1].rows_per_epoch
    # Without a limit every dataset lasts as long as the others.
    epochs = packed.epochs(200)
    assert max(epochs.values()) < 1.02 * min(epochs.values()) + 0.05
    shares = Mixing(None, (1.0,) * 3, 40, 1.0).shares(plans)
    seen = shares * [plan.examples_per_epoch / plan.rows_per_epoch for plan in plans]
    rates = np.minimum([plan.examples_per_epoch for plan in plans], 40)
    np.testing.assert_allclose(seen / seen.sum(), rates / rates.sum())


@pytest.mark.parametrize("shares", [[0.5, 0.3, 0.2], [1.0], [0.999, 0.001, 0.0], [1 / 3] * 3])
def test_turns_have_their_shares_in_every_stretch(shares):
    turns = Turns(np.array(shares))
    rows = np.arange(Turns.CYCLE - 500, Turns.CYCLE + 500)
    part, number = turns.at(rows)
    for index, share in enumerate(shares):
        mine = number[part == index]
        np.testing.assert_array_equal(np.diff(mine), 1)
        assert abs(len(mine) - 1000 * share) <= len(shares) + 1
    for row in (0, 1, 77, Turns.CYCLE, Turns.CYCLE * 3 + 11):
        before = turns.before(row)
        assert before.sum() == row
        part, number = turns.at(np.array([row]))
        assert before[part[0]] == number[0]


def test_a_share_that_would_never_have_its_turn_is_refused():
    with pytest.raises(UserError, match="1e-08 of the rows is below one of 65,536"):
        Turns(np.array([1 - 1e-8, 1e-8]))


def test_a_batch_holds_the_rows_of_every_part_by_weight(splits):
    pipeline = pipeline_of(splits, mixture())
    batch = joined([pipeline.batch(step) for step in range(20)])
    assert {n: (a.shape[1:], a.dtype) for n, a in batch.items()} == {
        n: (spec.shape[1:], spec.dtype) for n, spec in pipeline.spec(0).items()
    }
    known = {name: _rows(split) for name, split in splits.items()}
    owners = [[name for name in SIZES if row in known[name]] for row in texts(batch)]
    counts = {name: sum(name in owner for owner in owners) for name in SIZES}
    assert counts == {"wiki": 120, "books": 80, "news": 40} and all(len(o) == 1 for o in owners)
    # Framings differ: books are masked at three times the rate.
    masked = batch["masked_weights"].sum(axis=1)
    of_books = np.array([owner == ["books"] for owner in owners])
    assert masked[of_books].mean() > 2 * masked[~of_books].mean()


def _rows(split):
    """The framed text of every row of a split in blocks of 30, as tuples."""
    stream, _ = split.gather(np.array([0]), np.array([split.tokens]), split.tokens)
    cls, sep = VOCABULARY.cls, VOCABULARY.sep
    blocks = [stream[0, i : i + 30] for i in range(0, split.tokens, 30)]
    return {(cls, *block.tolist(), sep) for block in blocks}


def test_every_row_comes_once_an_epoch(splits):
    pipeline = pipeline_of(splits, mixture())
    stream = pipeline.streams["books"]
    rows = stream.plans[32].rows_per_epoch
    steps = -(-rows // 4)  # a third of 12 rows a step
    batch = joined([pipeline.batch(step) for step in range(steps)])
    seen = [row for row in texts(batch) if row in _rows(splits["books"])]
    assert len(set(seen)) == len(_rows(splits["books"]))
    assert pipeline.epochs(steps)["books"] == pytest.approx(steps * 4 / rows, abs=0.1)


@pytest.mark.parametrize("hosts", [2, 3])
def test_the_shares_of_all_hosts_are_the_global_batch(splits, hosts):
    pipeline = pipeline_of(splits, mixture())
    for step in (0, 7, 150):
        parts = [pipeline.batch(step, Share(host, hosts)) for host in range(hosts)]
        assert equal(joined(parts), pipeline.batch(step))


def test_parts_have_their_own_order_and_noise(splits):
    same = {"a": splits["wiki"], "b": splits["wiki"]}
    parts = (Part(name="a", folder="a", weight=1), Part(name="b", folder="b", weight=1))
    pipeline = pipeline_of(same, MixedData(layout=Blocks(), parts=parts))
    one, other = (pipeline.streams[name].take(32, np.arange(8), 0) for name in "ab")
    assert texts(one) != texts(other)
    assert not (one["noise_key"] == other["noise_key"]).any()


def test_a_part_of_weight_zero_gives_no_row(splits):
    pipeline = pipeline_of(splits, mixture((1, 0, 1)))
    assert pipeline.epochs(200)["books"] == 0
    assert pipeline.shares(0) == {"wiki": 0.5, "books": 0.0, "news": 0.5}


def test_changed_weights_go_on_where_each_part_stood(splits):
    first, second = mixture((3, 2, 1)), mixture((1, 0, 1))
    history = prolonged((), first.mixing(), 0)
    history = prolonged(history, second.mixing(), 50)
    assert [step for step, _ in history] == [0, 50]
    old, new = pipeline_of(splits, first), pipeline_of(splits, second, history=history)
    assert all(equal(old.batch(step), new.batch(step)) for step in (0, 49))
    assert old.epochs(50) == new.epochs(50)
    before, after = new.epochs(49), new.epochs(51)
    assert after["books"] == old.epochs(50)["books"] and after["wiki"] > before["wiki"]
    # No row of wiki is left out or taken twice at the change.
    rows = new.streams["wiki"].plans[32].rows_per_epoch
    batch = joined([new.batch(step) for step in range(45, 55)])
    of_wiki = [row for row in texts(batch) if row in _rows(splits["wiki"])]
    count = round((new.epochs(55)["wiki"] - new.epochs(45)["wiki"]) * rows)
    assert len(of_wiki) >= count and count > 20
    # It counts the steps alone, not how often a run was stopped.
    again = prolonged(history, second.mixing(), 120)
    assert again == history
    assert prolonged(history, first.mixing(), 50) == prolonged((), first.mixing(), 0)


def test_phases_of_two_lengths_and_a_change_of_weights_count_every_row(splits):
    phases = (
        Phase(length=16, batch_size=8, steps=30),
        Phase(length=32, batch_size=12, steps=30),
        Phase(length=16, batch_size=6, steps=30),
    )
    history = ((0, mixture((3, 2, 1)).mixing()), (40, mixture((1, 1, 1)).mixing()),
               (70, mixture((3, 2, 1)).mixing()))  # fmt: skip
    pipeline = pipeline_of(splits, mixture(), *phases, history=history)
    taken = {(n, length): [] for n in SIZES for length in (16, 32)}
    for name, stream in pipeline.streams.items():
        take = stream.take

        def recording(length, number, step, take=take, name=name):
            taken[name, length] += number.tolist()
            return take(length, number, step)

        stream.take = recording
    for step in range(90):
        pipeline.batch(step)
    for (name, length), numbers in taken.items():
        assert numbers == list(range(len(numbers))), (name, length)
    rows = {length: {n: s.plans[length].rows_per_epoch for n, s in pipeline.streams.items()}
            for length in (16, 32)}  # fmt: skip
    for name, epochs in pipeline.epochs(90).items():
        expected = sum(len(taken[name, length]) / rows[length][name] for length in (16, 32))
        assert epochs == pytest.approx(expected)


def test_tokens_and_epochs_are_those_of_the_mean_row(splits):
    data = mixture((1, 1, 2))
    pipeline = pipeline_of(splits, data, Phase(length=32, batch_size=10, epochs=2))
    plans = [stream.plans[32] for stream in pipeline.streams.values()]
    total = sum(plan.rows_per_epoch for plan in plans)
    assert pipeline.steps == -(-2 * total // 10) and pipeline.epoch(pipeline.steps - 1) < 2
    plan = mixed_plan(data.mixing(), plans)
    assert plan.rows_per_epoch == total and 0 <= plan.padding_share < 0.2
    notes = pipeline.notes(0)
    assert notes[2].startswith("news: 50.0% of the rows") and notes[2].endswith("is repeated")


def test_tasks_with_other_arrays_do_not_share_a_batch(splits):
    def framings(name, length):
        masking = TokenMasking(rate=0.3 if name == "books" else 0.1)
        return MaskedFraming(vocabulary=VOCABULARY, length=length, masking=masking)

    phases = (Phase(length=32, batch_size=12, steps=10),)
    with pytest.raises(UserError, match="wiki and books do not go into one batch: .*masked_pos"):
        MixedPipeline(splits, mixture(), framings, phases, order_seed=0, noise_seed=0)


def test_mistakes_in_a_mixture_are_named():
    one = Part(name="a", folder="a", weight=1)
    for parts, more, message in [
        ((), {}, "one part or more"),
        ((one, one), {}, "different names"),
        ((one, Part(name="b", folder="b")), {}, "every part a weight or none.*a 1, b None"),
        ((dataclasses.replace(one, weight=0),), {}, "all weights are 0"),
        ((one,), {"limit": 0}, "data.limit"),
        ((one,), {"temperature": 0.0}, "data.temperature"),
    ]:
        with pytest.raises(UserError, match=message):
            MixedData(layout=Blocks(), parts=parts, **more)
    for changes in ({"name": "a/b"}, {"weight": -1.0}, {"scale": 0.0}):
        with pytest.raises(UserError):
            dataclasses.replace(one, **changes)
    data = mixture(None, limit=1 << 19, temperature=2.0)
    assert parse(render(data)) == data
    assert Mixing.parse(render(data.mixing())) == data.mixing()


def test_datasets_are_opened_as_one(tmp_path):
    for name in ("a", "b"):
        toys.dataset(tmp_path / name, documents=20)
    parts = tuple(Part(name=name, folder=name) for name in ("a", "b"))
    data = MixedData(layout=Blocks(), folder=str(tmp_path), parts=parts)
    dataset = open_mixed(data)
    dataset.verify()
    assert sorted(dataset.splits) == ["a/train", "a/validation", "b/train", "b/validation"]
    assert data.folder_in(tmp_path / "x") == dataset.folder == tmp_path / "a"
    found = held_out(data, dataset, "validation")
    assert [(held.label, held.split) for held in found] == [
        ("a", "a/validation"), ("b", "b/validation"),
    ]  # fmt: skip
    assert [held.label for held in held_out(data, dataset, "b/validation")] == [""]
    with pytest.raises(UserError, match="no split 'dev'; it has a/train"):
        held_out(data, dataset, "dev")


def test_metadata_of_several_datasets_say_no_more_than_is_known():
    one = {"splits": {"train": 1}, "sources": [1], "licence": "CC0-1.0", "language": "en"}
    two = {"splits": {"train": 2}, "sources": [2], "licence": "MIT", "language": "es"}
    two["attribution"] = "Ann"
    both = mixed_metadata({"a": one, "b": two})
    assert both["splits"] == {"a/train": 1, "b/train": 2} and both["sources"] == [1, 2]
    assert both["licence"] == "CC0-1.0 AND MIT" and both["language"] == ["en", "es"]
    assert both["attribution"] == "Ann"
    assert mixed_metadata({"a": one, "b": one})["language"] == "en"
    assert mixed_metadata({"a": one, "b": two | {"licence": None}})["licence"] is None


def test_datasets_of_different_tokenizers_are_refused(tmp_path):
    toys.dataset(tmp_path / "a", documents=20)
    toys.dataset(tmp_path / "b", documents=20)
    text = (tmp_path / "b" / "dataset.json").read_text()
    where = text.index('"fingerprint": "') + 16
    (tmp_path / "b" / "dataset.json").write_text(text[:where] + "x" + text[where + 1 :])
    parts = tuple(Part(name=name, folder=str(tmp_path / name)) for name in ("a", "b"))
    with pytest.raises(UserError, match="b .* was made with another tokenizer than a"):
        open_mixed(MixedData(layout=Blocks(), parts=parts))
