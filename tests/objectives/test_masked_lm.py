"""Masked LM: its sums against numpy on the model's own logits, and what it may not depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxpretrain.models.functional import model_of
from flaxpretrain.objectives.objective import Sum
from tests import toys

OBJECTIVE = toys.masked_lm()
MODEL = model_of(functools.partial(OBJECTIVE.build, toys.bert()))
BATCH = toys.batch(OBJECTIVE, count=6, length=32)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


@functools.partial(jax.jit, static_argnames="dropout")
def loss(params, batch, dropout=False):
    """The objective's sums."""
    return OBJECTIVE.loss(MODEL, params, batch, jax.random.key(7) if dropout else None)


def on_device(batch):
    return {name: jnp.asarray(array) for name, array in batch.items()}


def test_the_loss_is_the_cross_entropy_of_the_full_logits_at_the_masked_positions(params):
    module = MODEL.bind(params)
    batch = on_device(BATCH)
    hidden = module.embed(batch["input_ids"], batch["segment_ids"], batch["position_ids"])
    hidden = module.encode(hidden, batch["segment_ids"])
    logits = np.asarray(module.logits(hidden), np.float64)[..., : toys.VOCABULARY.size]
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total, right = 0.0, 0
    for row in range(6):
        for position, label, weight in zip(
            BATCH["masked_positions"][row],
            BATCH["masked_labels"][row],
            BATCH["masked_weights"][row],
            strict=True,
        ):
            total -= weight * log_probabilities[row, position, label]
            right += weight * (logits[row, position].argmax() == label)
    sums = loss(params, batch)
    np.testing.assert_allclose(sums["masked_lm"].total, total, rtol=1e-5)
    assert sums["masked_lm_accuracy"].total == right
    assert sums["masked_lm"].weight == BATCH["masked_weights"].sum()


def test_the_sums_of_the_parts_are_the_sums_of_the_whole_even_with_dropout(params):
    whole = loss(params, on_device(BATCH), dropout=True)
    parts = [
        loss(params, on_device({n: a[i : i + 3] for n, a in BATCH.items()}), dropout=True)
        for i in (0, 3)
    ]
    for name, (total, weight) in whole.items():
        np.testing.assert_allclose(total, sum(p[name].total for p in parts), rtol=1e-5)
        assert weight == sum(p[name].weight for p in parts)


def test_dropout_changes_the_loss_and_its_absence_does_not(params):
    batch = on_device(BATCH)
    assert loss(params, batch)["masked_lm"].total == loss(params, batch)["masked_lm"].total
    assert (
        loss(params, batch, dropout=True)["masked_lm"].total
        != loss(params, batch)["masked_lm"].total
    )


def test_an_empty_row_counts_for_nothing(params):
    assert BATCH["segment_ids"][-1].sum() == 0
    with_row = loss(params, on_device(BATCH))
    without = loss(params, on_device({n: a[:-1] for n, a in BATCH.items()}))
    np.testing.assert_allclose(with_row["masked_lm"].total, without["masked_lm"].total, rtol=1e-6)
    assert with_row["masked_lm"].weight == without["masked_lm"].weight


def test_unused_slots_count_for_nothing(params):
    batch = on_device(BATCH)
    changed = dict(batch)
    unused = BATCH["masked_weights"] == 0
    assert unused.any()
    changed["masked_labels"] = jnp.where(unused, 9, batch["masked_labels"])
    assert loss(params, changed)["masked_lm"] == loss(params, batch)["masked_lm"]


def test_weights_come_from_the_batch_alone():
    assert OBJECTIVE.weights(on_device(BATCH))["masked_lm"] == BATCH["masked_weights"].sum()


def test_the_summary_is_of_means_and_the_perplexity():
    summary = OBJECTIVE.summarize(
        {
            "masked_lm": Sum(np.float64(6), np.float64(3)),
            "masked_lm_accuracy": Sum(np.float64(1), np.float64(4)),
            "nothing": Sum(np.float64(0), np.float64(0)),
        }
    )
    assert summary == {
        "masked_lm": 2.0,
        "masked_lm_accuracy": 0.25,
        "perplexity": pytest.approx(np.exp(2)),
    }
