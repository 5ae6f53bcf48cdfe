"""Rows in parts over `context`: an encoder-decoder computes what one device does.

Its decoder is causal, its scores have a bias, and it attends to another row; the other parts of a
step on such a mesh are tested with an encoder, in test_step.py.
"""

import functools

import jax
import numpy as np
import pytest

from flaxpretrain.config import Phase
from flaxpretrain.data.noising import SpanCorruption
from flaxpretrain.errors import UserError
from flaxpretrain.models.functional import model_of
from flaxpretrain.objectives.span_denoising import SpanDenoising
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import assemble, framing_of, random_batch, stand_in_vocabulary
from flaxpretrain.training.step import combine
from tests import toys
from tests.tolerances import FLOAT32_REORDERED

PHASE = Phase(steps=2, length=32, batch_size=4)


def run(target_length):
    noise = SpanDenoising(noise=SpanCorruption(), target_length=target_length)
    return toys.run(model=toys.t5(num_layers=1), objective=noise, phases=(PHASE,))


def test_four_devices_to_a_row_equal_one():
    toy = run(target_length=16)
    objective, framing = toy.objective, framing_of(toy, stand_in_vocabulary(toy), PHASE.length)
    model = model_of(functools.partial(objective.build, toy.model))
    params = jax.device_get(model.init(jax.random.key(0)))
    spec = framing.spec(PHASE.batch_size).items()
    batch = random_batch({n: jax.ShapeDtypeStruct(*array) for n, array in spec}, framing)

    def loss(params, batch):
        sums = objective.loss(model, params, batch, None)
        return combine(objective, sums, objective.weights(batch))

    def loss_and_gradient(context):
        mesh = sharding.make_mesh(1, devices=jax.devices()[:context], context=context)
        with jax.set_mesh(mesh):
            placed = sharding.to_device(batch, mesh, PHASE.batch_size)
            return jax.device_get(jax.jit(jax.value_and_grad(loss))(params, placed))

    one, parts = loss_and_gradient(1), loss_and_gradient(4)
    for mine, other in zip(jax.tree.leaves(one), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(other, mine, rtol=FLOAT32_REORDERED, atol=FLOAT32_REORDERED)


def test_targets_that_cannot_be_cut_are_refused():
    mesh = sharding.make_mesh(1, devices=jax.devices()[:4], context=4)
    with pytest.raises(UserError, match="decoder_segment_ids of 18 positions are not divisible by"):
        assemble(run(target_length=18), mesh, 2)
