"""The denoising loss: its value, what counts in it, packing, chunks, and what it works with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxpretrain.data.denoisers import ul2
from flaxpretrain.data.infilling import BartNoise, FusedMasks
from flaxpretrain.data.noising import SpanCorruption
from flaxpretrain.data.pairs import SourceTarget
from flaxpretrain.data.randomness import row_keys
from flaxpretrain.errors import UserError
from flaxpretrain.models.functional import model_of
from flaxpretrain.objectives.span_denoising import SpanDenoising
from flaxpretrain.training.assembly import check_interface, random_batch
from tests import toys
from tests.tolerances import GRADIENTS_FLOAT32, LOSS_REORDERED

VOCABULARY = dataclasses.replace(toys.VOCABULARY, sentinels=tuple(range(299, 259, -1)))
LENGTH = 24
T5 = SpanDenoising(noise=SpanCorruption(), target_length=16)
MODELS = {
    "t5": toys.t5(num_layers=1),
    "bart": toys.bart(encoder_layers=1, decoder_layers=1),
}


def params_of(config):
    model = model_of(config.build)
    return model, jax.jit(model.init)(jax.random.key(0))


def batch_of(objective, lengths, seed=0):
    """Rows of pieces of these lengths."""
    framing = objective.framing(VOCABULARY, LENGTH)
    pieces = np.zeros((len(lengths), max(1, *map(len, lengths))), np.int32)
    for row, each in enumerate(lengths):
        pieces[row, : len(each)] = each
    generator = np.random.default_rng(seed)
    shape = (len(lengths), framing.capacity)
    rows = {
        "ids": generator.choice(VOCABULARY.regular_ids(), shape).astype(np.int32),
        "word_starts": np.ones(shape, bool),
        "sentence_starts": np.zeros(shape, bool),
        "piece_lengths": pieces,
    }
    keys = row_keys(seed, np.zeros(len(lengths), np.int64), np.arange(len(lengths)))
    return jax.tree.map(jnp.asarray, framing.examples(rows, keys, 0))


def loss(objective, model, params, batch):
    return jax.jit(lambda b: objective.loss(model, params, b, None))(batch)


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_cross_entropy_of_the_targets(name):
    model, params = params_of(MODELS[name])
    objective = dataclasses.replace(T5, terms={"denoising": 1.0, "z_loss": 1e-4})
    batch = batch_of(objective, [(20,), (7,), ()])
    sums = loss(objective, model, params, batch)

    @jax.jit
    def logits_of(params, batch):
        module = model.bind(params)
        segments, targets = batch["segment_ids"], batch["decoder_segment_ids"]
        hidden = module.embed(batch["input_ids"], segments, batch["position_ids"])
        encoded = module.encode(hidden, segments)
        hidden = module.embed_decoder(
            batch["decoder_input_ids"], targets, batch["decoder_position_ids"]
        )
        return module.logits(module.decode(hidden, targets, encoded, segments))

    logits = np.asarray(logits_of(params, batch))
    counts = np.asarray(batch["label_weights"]) > 0
    logits, labels = logits[counts].astype(np.float64), np.asarray(batch["labels"])[counts]
    log_z = np.log(np.exp(logits).sum(axis=-1))
    nats = log_z - np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    assert float(sums["denoising"].total) == pytest.approx(nats.sum(), rel=LOSS_REORDERED)
    assert float(sums["z_loss"].total) == pytest.approx((log_z**2).sum(), rel=LOSS_REORDERED)
    right = (logits.argmax(axis=-1) == labels).sum()
    assert float(sums["denoising_accuracy"].total) == right
    assert all(float(s.weight) == len(labels) for s in sums.values())
    assert {n: float(w) for n, w in objective.weights(batch).items()} == {
        "denoising": len(labels),
        "z_loss": len(labels),
    }
    means = objective.summarize(sums)
    assert means["perplexity"] == pytest.approx(np.exp(nats.mean()), rel=LOSS_REORDERED)


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_row_scores_and_teaches_as_its_pieces_alone(name):
    """And rows without text not at all."""
    model, params = params_of(MODELS[name])

    @jax.jit
    def loss_and_gradient(params, batch):
        def total(params):
            found = T5.loss(model, params, batch, None)["denoising"]
            return found.total, found

        (_, found), gradient = jax.value_and_grad(total, has_aux=True)(params)
        return found, gradient

    batch = batch_of(T5, [(6, 5, 4), ()])
    packed, packed_gradient = loss_and_gradient(params, batch)
    batch = jax.device_get(batch)
    alone = {n: np.zeros((3, *a.shape[1:]), a.dtype) for n, a in batch.items()}
    for piece in range(3):
        for side in ("", "decoder_"):
            here = batch[f"{side}segment_ids"][0] == piece + 1
            names = ["input_ids", "position_ids", "segment_ids"]
            arrays = [side + n for n in names] + ["labels", "label_weights"] * bool(side)
            for array in arrays:
                alone[array][piece, : here.sum()] = batch[array][0][here]
    apart, apart_gradient = loss_and_gradient(params, alone)
    assert float(packed.weight) == float(apart.weight)
    assert float(packed.total) == pytest.approx(float(apart.total), rel=LOSS_REORDERED)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(apart_gradient))
    for one, other in zip(
        jax.tree.leaves(packed_gradient), jax.tree.leaves(apart_gradient), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=0, atol=GRADIENTS_FLOAT32 * largest)


def test_chunks_change_neither_the_loss_nor_its_gradient():
    model, params = params_of(MODELS["t5"])
    batch = batch_of(T5, [(20,), (9, 4)])

    def total(objective):
        return jax.jit(
            jax.value_and_grad(lambda p: objective.loss(model, p, batch, None)["denoising"].total)
        )(params)

    whole, gradient = total(T5)
    part, part_gradient = total(dataclasses.replace(T5, chunks=4))
    assert float(part) == pytest.approx(float(whole), rel=LOSS_REORDERED)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(part_gradient), strict=True):
        assert float(jnp.abs(a - b).max()) <= LOSS_REORDERED * largest


@pytest.mark.parametrize(
    "noise",
    [BartNoise(), FusedMasks(), ul2(examples_per_row=2), SourceTarget()],
    ids=lambda n: type(n).__name__,
)
def test_every_noise_makes_batches_that_train(noise):
    objective = SpanDenoising(noise=noise)
    config = MODELS["bart"]
    model, params = params_of(config)
    framing = objective.framing(VOCABULARY, LENGTH)
    spec = {
        n: jax.ShapeDtypeStruct(s.shape, jnp.dtype(s.dtype)) for n, s in framing.spec(4).items()
    }
    batch = jax.tree.map(jnp.asarray, random_batch(spec, framing))
    assert {n: (a.shape, a.dtype) for n, a in batch.items()} == {
        n: (s.shape, s.dtype) for n, s in spec.items()
    }
    sums = loss(objective, model, params, batch)
    means = objective.summarize(sums)
    assert abs(means["denoising"] - np.log(300)) < 0.5
    assert 0 <= means["denoising_accuracy"] < 0.2 and "z_loss" not in sums
    assert objective.flops(config, spec) == 4 * config.flops_per_row(LENGTH, framing.target_length)
    tokens = np.count_nonzero(batch["segment_ids"]) + np.count_nonzero(batch["label_weights"])
    assert int(objective.tokens(batch)) == tokens


def test_chunks_that_do_not_divide_the_targets_are_named():
    with pytest.raises(UserError, match="5 do not divide targets of 16 positions evenly"):
        dataclasses.replace(T5, chunks=5).framing(VOCABULARY, LENGTH)
    with pytest.raises(UserError, match="objective.chunks must be positive; got 0"):
        dataclasses.replace(T5, chunks=0)


def test_a_model_without_a_decoder_is_refused():
    run = toys.run(objective=T5)
    with pytest.raises(UserError, match="needs a model with embed_decoder, decode"):
        check_interface(run, model_of(toys.bert().build))
