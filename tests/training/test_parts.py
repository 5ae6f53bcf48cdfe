"""Parameters in parts over `fsdp`: the other families' steps, too, are those of one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxpretrain.analysis import hlo
from flaxpretrain.config import Mesh, Phase
from flaxpretrain.data.noising import SpanCorruption
from flaxpretrain.models.albert import AlbertConfig
from flaxpretrain.objectives.causal_lm import CausalLM
from flaxpretrain.objectives.span_denoising import SpanDenoising
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import assemble, framing_of
from flaxpretrain.training.state import is_stacked, named_leaves
from tests import toys
from tests.tolerances import FLOAT32_REORDERED

VOCABULARY = dataclasses.replace(toys.VOCABULARY, sentinels=tuple(range(299, 279, -1)))
LENGTH, ROWS = 32, 16
PHASE = Phase(steps=10, length=LENGTH, batch_size=ROWS)
PARTS = Mesh(data=2, fsdp=4)

DENOISING = SpanDenoising(noise=SpanCorruption())
FAMILIES = {
    "albert": dict(
        model=AlbertConfig(
            vocab_size=300,
            embedding_size=16,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    ),
    "electra": dict(model=toys.electra(), objective=toys.replaced_tokens()),
    "gpt2": dict(model=toys.gpt2(), objective=CausalLM()),
    "t5": dict(model=toys.t5(), objective=DENOISING),
    "bert, unrolled": dict(scan_layers=False, remat="dots"),
}


def a_step(family, mesh):
    """Parameters, the optimizer's moments and metrics after a step."""
    run = toys.run(**({"phases": (PHASE,), "mesh": mesh} | FAMILIES[family]))
    framing = framing_of(run, VOCABULARY, LENGTH)
    keys = np.random.default_rng(1).integers(0, 2**63, ROWS).astype(np.uint64)
    batch = dict(framing.examples(toys.rows(ROWS, framing.capacity), keys, 0))
    device_mesh = sharding.mesh_of(mesh, jax.devices()[: mesh.data * mesh.fsdp])
    with jax.set_mesh(device_mesh):
        assembly = assemble(run, device_mesh, 10)
        step, state = assembly.train_step(PHASE), assembly.initial_state()
        placed = sharding.to_device(batch, device_mesh, ROWS)
        state, metrics = step(state, placed)
        return jax.device_get((state.params, _moments(state.opt_state), metrics))


def _moments(opt_state):
    """What follows the gradients: unlike Adam's first step, it shows one that is too large."""
    return [leaf for leaf in jax.tree.leaves(opt_state) if jnp.issubdtype(leaf.dtype, jnp.floating)]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_step_on_parts_is_that_of_one_device(family):
    one, other = a_step(family, Mesh(data=1)), a_step(family, PARTS)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=FLOAT32_REORDERED, atol=FLOAT32_REORDERED)


@pytest.mark.parametrize(
    ("remat", "microbatches", "passes"), [("full", 1, 2), ("full", 2, 2), ("save_all", 1, 1)]
)
def test_layers_are_gathered_once_a_pass_that_saves_nothing_of_them(remat, microbatches, passes):
    """By bytes of the compiled program; activations stay where they are."""
    phase = dataclasses.replace(PHASE, microbatches=microbatches)
    run = toys.run(phases=(phase,), mesh=PARTS, remat=remat)
    mesh = sharding.mesh_of(PARTS)
    with jax.set_mesh(mesh):
        assembly = assemble(run, mesh, 10)
        batch = assembly.batch_spec(phase, VOCABULARY)
        text = assembly.train_step(phase).lower(assembly.state, batch).compile().as_text()
    moved = hlo.totals(hlo.parse(text)).collective_bytes
    layers = tables = whole = 0
    for name, leaf in named_leaves(assembly.state.params).items():
        if "fsdp" not in str(leaf.sharding.spec):
            whole += 4 * leaf.size
        elif is_stacked(name):
            layers += 4 * leaf.size
        else:
            tables += 4 * leaf.size
    # XLA takes the gathering of tables out of the loop over microbatches.
    gathered = moved.pop("all-gather")
    assert gathered == pytest.approx(microbatches * passes * layers + tables, rel=0.02)
    # What is in parts is summed over `fsdp` a microbatch, and then over `data` once.
    scattered = moved.pop("reduce-scatter")
    assert scattered == pytest.approx(microbatches * (layers + tables), rel=0.02)
    assert moved.pop("all-reduce") == pytest.approx((layers + tables) / 4 + whole, rel=0.02)
    assert not moved
