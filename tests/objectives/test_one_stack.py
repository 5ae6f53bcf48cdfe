"""Encoder-decoders' tasks by a decoder alone, and by a T5 whose sides share their layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxpretrain.data.noising import SpanCorruption
from flaxpretrain.errors import UserError
from flaxpretrain.models.functional import model_of
from flaxpretrain.objectives.prefix_lm import PrefixLM
from flaxpretrain.objectives.shared_stack import SharedStack
from flaxpretrain.objectives.span_denoising import SpanDenoising
from tests import toys
from tests.objectives.test_span_denoising import batch_of
from tests.tolerances import LOSS_REORDERED

TASK = SpanDenoising(noise=SpanCorruption(), target_length=16)
ROWS = [(8, 6), (15,), ()]


def params_of(model):
    params = jax.jit(model.init)(jax.random.key(0))
    return jax.tree.map(lambda x: x if x.ndim < 3 else 3 * x, params)


@pytest.mark.parametrize("sees_source", [True, False])
def test_a_decoder_reads_sources_and_says_targets_as_if_each_pair_were_a_row(sees_source):
    objective = PrefixLM(task=TASK, sees_source=sees_source)
    model = model_of(toys.gpt2().build)
    params, batch = params_of(model), batch_of(objective, ROWS)
    sums = jax.jit(lambda b: objective.loss(model, params, b, None))(batch)
    module, nats, right = model.bind(params), 0.0, 0
    for row, segment in ((0, 1), (0, 2), (1, 1)):
        source = batch["input_ids"][row][batch["segment_ids"][row] == segment]
        target = batch["decoder_segment_ids"][row] == segment
        inputs, labels = batch["decoder_input_ids"][row][target], batch["labels"][row][target]
        ids = jnp.concatenate([source, inputs])[None]
        ones = jnp.ones_like(ids)
        prefix = (jnp.arange(ids.shape[1]) < len(source))[None] if sees_source else None
        hidden = module.decode_causally(module.embed(ids, ones), ones, prefix=prefix)
        logits = module.logits(hidden)[0, len(source) :]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
        nats -= float(jnp.sum(chosen))
        right += int(jnp.sum(jnp.argmax(logits, axis=1) == labels))
    np.testing.assert_allclose(sums["denoising"].total, nats, rtol=LOSS_REORDERED)
    assert sums["denoising_accuracy"].total == right
    assert sums["denoising"].weight == np.sum(batch["label_weights"])


def test_shared_layers_are_those_of_a_t5_with_the_same_layers_twice():
    config = toys.t5(dropout_rate=0.0)
    objective = SharedStack(task=TASK)
    shared = model_of(lambda rngs: objective.build(config, rngs))
    params, batch = params_of(shared), batch_of(objective, ROWS)
    sums = jax.jit(lambda b: objective.loss(shared, params, b, None))(batch)
    config, whole = objective.parts(config, params)["model"]
    model = model_of(config.build)
    assert jax.tree.structure(whole) == jax.tree.structure(model.abstract())
    expected = jax.jit(lambda b: TASK.loss(model, whole, b, None))(batch)
    np.testing.assert_allclose(
        sums["denoising"].total, expected["denoising"].total, rtol=LOSS_REORDERED
    )
    assert objective.flops(config, _shapes(batch)) == TASK.flops(config, _shapes(batch))


def _shapes(batch):
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}


def test_a_decoder_of_as_many_layers_costs_as_much_as_both_sides():
    sizes = dict(vocab_size=1024)
    t5 = toys.t5(**sizes, d_model=64, d_kv=16, d_ff=256)
    gpt2 = toys.gpt2(**sizes, n_embd=64)
    batch = _shapes(batch_of(TASK, ROWS))
    ratio = PrefixLM(task=TASK).flops(gpt2, batch) / TASK.flops(t5, batch)
    assert 0.8 < ratio < 1.2


@pytest.mark.parametrize("config", [toys.bart(), toys.t5(num_decoder_layers=3)])
def test_only_a_t5_of_two_equal_sides_shares_its_layers(config):
    with pytest.raises(UserError, match="T5Config with as many layers"):
        model_of(lambda rngs: SharedStack(task=TASK).build(config, rngs)).abstract()


def test_terms_are_those_asked_for():
    objective = PrefixLM(task=TASK, terms={"denoising": 1.0, "z_loss": 1e-4})
    batch = batch_of(objective, ROWS)
    assert objective.weights(batch).keys() == {"denoising", "z_loss"}
    assert dataclasses.replace(objective, sees_source=False) != objective
