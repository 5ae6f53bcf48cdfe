"""Rows in parts over `context`: decoders and encoder-decoders compute what one device does."""

import jax
import numpy as np
import pytest

from flaxpretrain.config import Data, Mesh, Phase
from flaxpretrain.data.noising import SpanCorruption
from flaxpretrain.data.rows import Documents
from flaxpretrain.errors import UserError
from flaxpretrain.objectives.causal_lm import CausalLM
from flaxpretrain.objectives.span_denoising import SpanDenoising
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import assemble, framing_of, random_batch, stand_in_vocabulary
from tests import toys
from tests.tolerances import FLOAT32_REORDERED

PHASE = Phase(steps=2, length=32, batch_size=4)
RUNS = {
    "causal": toys.run(
        model=toys.gpt2(n_layer=1),
        objective=CausalLM(),
        data=Data(layout=Documents()),
        phases=(PHASE,),
    ),
    "encoder-decoder": toys.run(
        model=toys.t5(num_layers=1),
        objective=SpanDenoising(noise=SpanCorruption(), target_length=16),
        phases=(PHASE,),
    ),
}


def one_step(run, settings):
    mesh = sharding.mesh_of(settings, jax.devices()[: settings.data * settings.context])
    vocabulary = stand_in_vocabulary(run)
    with jax.set_mesh(mesh):
        assembly = assemble(run, mesh, 2)
        batch = random_batch(
            assembly.batch_spec(PHASE, vocabulary), framing_of(run, vocabulary, PHASE.length)
        )
        placed = sharding.to_device(batch, mesh, PHASE.batch_size)
        state, metrics = assembly.train_step(PHASE)(assembly.initial_state(), placed)
        return jax.device_get((state.params, metrics))


@pytest.mark.parametrize("name", RUNS)
def test_four_devices_to_a_row_equal_one(name):
    ones, parts = (one_step(RUNS[name], Mesh(data=1, context=size)) for size in (1, 4))
    for one, other in zip(jax.tree.leaves(ones), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(other, one, rtol=FLOAT32_REORDERED, atol=FLOAT32_REORDERED)


def test_targets_that_cannot_be_cut_are_refused():
    run = toys.run(
        model=toys.t5(), objective=SpanDenoising(noise=SpanCorruption(), target_length=18)
    )
    mesh = sharding.make_mesh(1, devices=jax.devices()[:4], context=4)
    with pytest.raises(UserError, match="decoder_segment_ids of 18 positions are not divisible by"):
        assemble(run, mesh, 2)
