"""float16: near float32, with a loss scale that falls after an overflow and grows without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxpretrain.config import Phase, Precision
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import assemble
from flaxpretrain.training.guard import Guard, guarded
from flaxpretrain.training.loss_scale import LossScaling, loss_scaled
from flaxpretrain.training.step import StepMetrics
from tests import toys
from tests.tolerances import FLOAT16_STEP

ROWS, LENGTH = 8, 32


@functools.cache
def assembled(compute: str) -> tuple:
    """A run without a guard of its own, its step, its mesh and a batch."""
    phase = Phase(steps=4, length=LENGTH, batch_size=ROWS)
    precision = Precision(compute=compute)
    run = toys.run(phases=(phase,), precision=precision, guard=None, scan_layers=False)
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        assembly = assemble(run, mesh, 4)
        batch = sharding.to_device(toys.batch(run.objective, ROWS, LENGTH), mesh, ROWS)
        return assembly, assembly.train_step(phase), mesh, batch


def a_step(compute: str, scale: float | None = None) -> tuple:
    """Parameters before and after one step, and the state and metrics after it."""
    assembly, step, mesh, batch = assembled(compute)
    with jax.set_mesh(mesh):
        state = assembly.initial_state()
        if scale is not None:
            scaled = state.opt_state._replace(scale=jnp.float32(scale))
            state = jax.device_put(state._replace(opt_state=scaled), shardings(assembly.state))
        before = jax.device_get(state.params)
        state, metrics = step(state, batch)
        return before, jax.device_get(state.params), state, jax.device_get(metrics)


def shardings(abstract):
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def relative(one: StepMetrics, other: StepMetrics, name: str) -> float:
    return abs(one.figures[name] / other.figures[name] - 1)


def test_a_float16_step_is_near_float32_and_keeps_float32_weights():
    _, params, state, half = a_step("float16")
    full = a_step("float32")[3]
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    assert relative(half, full, "loss") < FLOAT16_STEP
    assert relative(half, full, "grad_norm") < FLOAT16_STEP
    assert half.figures["skipped"] == 0 and half.figures["loss_scale"] == 2.0**16
    assert state.opt_state.finite_in_a_row == 1


def test_a_step_whose_gradients_overflow_changes_the_scale_alone():
    before, after, state, metrics = a_step("float16", scale=2.0**60)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert np.isfinite(metrics.figures["loss"]) and not np.isfinite(metrics.figures["grad_norm"])
    assert metrics.figures["skipped"] == metrics.figures["skipped_in_a_row"] == 1
    assert metrics.figures["loss_scale"] < 2.0**60 and state.step == 1


def test_gradients_that_are_not_scaled_up_are_lost_where_they_are_small():
    full = a_step("float32")[3]
    lost = [relative(a_step("float16", scale=2.0**n)[3], full, "grad_norm") for n in (-20, 16)]
    assert lost[0] > 10 * FLOAT16_STEP and lost[1] < FLOAT16_STEP


def test_the_scale_grows_after_finite_steps_and_halves_after_others_within_its_ends():
    scaling = LossScaling(initial=8.0, growth_steps=3, least=2.0, most=16.0)
    optimizer = loss_scaled(guarded(optax.sgd(1.0), Guard(spike_factor=None)), scaling)
    params = {"w": jnp.ones(2)}
    state = optimizer.init(params)
    scales, updates = [], []
    for grad in [1.0] * 7 + [np.inf, np.nan, 1.0, np.inf, np.inf, np.inf] + [1.0] * 3:
        grads = {"w": jnp.full(2, grad)}
        update, state = optimizer.update(grads, state, params, value=jnp.float32(1.0))
        scales.append(float(state.scale))
        updates.append(float(update["w"][0]))
    assert scales == [8, 8, 16, 16, 16, 16, 16, 8, 4, 4, 2, 2, 2, 2, 2, 4]
    assert updates == [-1.0] * 7 + [0, 0, -1, 0, 0, 0] + [-1] * 3
    assert state.inner.skipped_total == 5
