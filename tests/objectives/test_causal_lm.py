"""Causal LM: its sums against numpy on the model's own logits, and what it may not depend on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxpretrain.errors import UserError
from flaxpretrain.models.functional import cast, model_of
from flaxpretrain.objectives.causal_lm import CausalLM
from flaxpretrain.objectives.objective import Sum
from flaxpretrain.training.assembly import check_interface
from tests import toys
from tests.data.test_framing import random_rows
from tests.tolerances import GRADIENTS_FLOAT32, REMAT_FLOAT32

OBJECTIVE = CausalLM(terms={"causal_lm": 1.0, "z_loss": 1e-2})
MODEL = model_of(toys.gpt2().build)


def batch_of(objective, rows=5, length=16):
    framing = objective.framing(toys.VOCABULARY, length)
    packed = random_rows(rows, length, specials=1)
    packed["ids"] = packed["ids"] % 290 + 5
    packed["document_ends"] = np.arange(packed["piece_lengths"].size).reshape(rows, -1) % 3 > 0
    made = framing.examples(packed, np.arange(rows, dtype=np.uint64), 0)
    return {name: jnp.asarray(array) for name, array in made.items()}


BATCH = batch_of(OBJECTIVE)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: 3 * x, jax.jit(MODEL.init)(jax.random.key(0)))


@functools.cache
def compiled(settings, dropout):
    objective = CausalLM(terms=dict(settings[0]), within_documents=settings[1])

    def loss(params, batch):
        return objective.loss(MODEL, params, batch, jax.random.key(7) if dropout else None)

    return jax.jit(loss)


def jitted(objective, params, batch, dropout=False):
    """The objective's sums."""
    settings = (tuple(objective.terms.items()), objective.within_documents)
    return compiled(settings, dropout)(params, batch)


def test_the_sums_are_those_of_the_full_logits_at_the_labels(params):
    module = MODEL.bind(params)
    hidden = module.embed(BATCH["input_ids"], BATCH["segment_ids"], BATCH["position_ids"])
    logits = np.asarray(
        module.logits(module.decode_causally(hidden, BATCH["segment_ids"])), np.float64
    )[..., : toys.VOCABULARY.size]
    log_z = np.log(np.exp(logits).sum(-1))
    labels, weights = np.asarray(BATCH["labels"]), np.asarray(BATCH["label_weights"])
    nats = log_z - np.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    sums = jitted(OBJECTIVE, params, BATCH)
    np.testing.assert_allclose(sums["causal_lm"].total, (nats * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["z_loss"].total, (log_z**2 * weights).sum(), rtol=1e-5)
    right = (logits.argmax(-1) == labels) * weights
    assert sums["causal_lm_accuracy"].total == right.sum()
    assert {float(s.weight) for s in sums.values()} == {float(weights.sum())}
    weights_of_terms = OBJECTIVE.weights(BATCH)
    assert {name: float(w) for name, w in weights_of_terms.items()} == dict.fromkeys(
        OBJECTIVE.terms, float(weights.sum())
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_chunks_change_neither_the_sums_nor_the_gradients(params, dtype):
    params = cast(params, dtype)

    def run(objective):
        def total(params):
            sums = objective.loss(MODEL, params, BATCH, None)
            terms = (c * sums[n].total / sums[n].weight for n, c in objective.terms.items())
            return sum(terms, jnp.float32(0)) / 10, sums

        return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    whole, chunked = run(OBJECTIVE), run(dataclasses.replace(OBJECTIVE, chunks=4))
    scale = 1 if dtype == jnp.float32 else 2**16  # the ratio of their precisions
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), rtol=1e-5, atol=scale * REMAT_FLOAT32
        ),
        chunked,
        whole,
    )


def test_the_z_loss_is_computed_where_it_is_a_term_only(params):
    assert "z_loss" not in jitted(CausalLM(), params, BATCH)


def test_rows_of_parts_add_up_to_the_whole_even_with_dropout(params):
    whole = jitted(OBJECTIVE, params, BATCH, dropout=True)
    parts = [
        jitted(OBJECTIVE, params, {n: a[part] for n, a in BATCH.items()}, dropout=True)
        for part in (slice(0, 2), slice(2, 5))
    ]
    for name, (total, weight) in whole.items():
        np.testing.assert_allclose(total, sum(p[name].total for p in parts), rtol=1e-5)
        assert weight == sum(p[name].weight for p in parts)


def test_an_empty_row_and_labels_without_weight_count_for_nothing(params):
    assert BATCH["segment_ids"][0].sum() == 0
    unused = BATCH["label_weights"] == 0
    changed = BATCH | {"labels": jnp.where(unused, 9, BATCH["labels"])}
    with_row, without = (
        jitted(OBJECTIVE, params, batch)
        for batch in (changed, {n: a[1:] for n, a in BATCH.items()})
    )
    for name in with_row:
        np.testing.assert_allclose(with_row[name].total, without[name].total, rtol=1e-6)
        assert with_row[name].weight == without[name].weight


def test_another_document_of_the_row_matters_only_across_documents(params):
    across = batch_of(CausalLM(within_documents=False))
    inside = BATCH["segment_ids"]
    row = int(np.argmax(np.asarray(inside).max(axis=1)))
    assert inside[row].max() > 1
    later = {n: a[row : row + 1] for n, a in BATCH.items()}
    for batch, depends in (
        (later, False),
        ({n: a[row : row + 1] for n, a in across.items()}, True),
    ):
        weights = jnp.where(inside[row : row + 1] == 2, batch["label_weights"], 0.0)
        batch = batch | {"label_weights": weights}
        other = batch | {"input_ids": jnp.where(inside[row : row + 1] == 1, 7, batch["input_ids"])}
        totals = [jitted(CausalLM(), params, b)["causal_lm"].total for b in (batch, other)]
        assert (totals[0] != totals[1]) == depends


def test_a_packed_row_teaches_what_its_documents_teach_alone(params):
    row = int(np.argmax(np.asarray(BATCH["segment_ids"]).max(axis=1)))
    packed = {name: np.asarray(array[row : row + 1]) for name, array in BATCH.items()}
    documents = int(packed["segment_ids"].max())
    alone = {n: np.zeros((documents, *a.shape[1:]), a.dtype) for n, a in packed.items()}
    for number in range(documents):
        here = packed["segment_ids"][0] == number + 1
        for name in ("input_ids", "position_ids", "labels", "label_weights"):
            alone[name][number, : here.sum()] = packed[name][0][here]
        alone["segment_ids"][number, : here.sum()] = 1

    @jax.jit
    def gradient(params, batch):
        return jax.grad(lambda p: OBJECTIVE.loss(MODEL, p, batch, None)["causal_lm"].total)(params)

    assert documents > 1
    here, apart = gradient(params, packed), gradient(params, alone)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(apart))
    for one, other in zip(jax.tree.leaves(here), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=GRADIENTS_FLOAT32 * largest)


def test_the_summary_is_of_means_the_perplexity_and_bits_per_byte(tmp_path):
    from flaxpretrain.data.store import open_dataset

    split = open_dataset(toys.dataset(tmp_path / "data", documents=8)).split("train")
    figures = OBJECTIVE.summarize({"causal_lm": Sum(np.float64(6), np.float64(3))})
    assert figures == {"causal_lm": 2.0, "perplexity": pytest.approx(np.exp(2))}
    split.bytes = 4321
    nats = 2.0 * (split.tokens + split.documents)
    expected = {"bits_per_byte": pytest.approx(nats / np.log(2) / 4321)}
    assert OBJECTIVE.per_text(figures, split) == expected
    split.bytes = 0  # of a dataset made without text
    assert OBJECTIVE.per_text(figures, split) == OBJECTIVE.per_text({}, split) == {}


def test_chunks_must_divide_the_row():
    with pytest.raises(UserError, match="objective.chunks: 3 do not divide rows of 16"):
        CausalLM(chunks=3).framing(toys.VOCABULARY, 16)
    with pytest.raises(UserError, match="objective.chunks must be positive"):
        CausalLM(chunks=0)


@pytest.mark.parametrize("model", [toys.bert(), toys.t5()], ids=["bert", "t5"])
def test_a_model_that_sees_what_follows_is_refused(model):
    run = toys.run(model=model, objective=CausalLM())
    with pytest.raises(UserError, match="CausalLM needs a model with decode_causally"):
        check_interface(run, model_of(model.build))
