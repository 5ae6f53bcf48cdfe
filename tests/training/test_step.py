"""The train step: one result, whatever the mesh, the microbatches and the remat policy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxpretrain.config import Mesh, Phase, Precision
from flaxpretrain.errors import UserError
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import assemble, remat_policy
from flaxpretrain.training.step import strided_microbatches
from tests import toys
from tests.tolerances import BFLOAT16_SUMS, FLOAT32_REORDERED

LENGTH, ROWS = 32, 16


ONE = Mesh(data=1)


def one_step(mesh=ONE, microbatches=1, rows=ROWS, **changes):
    """Parameters and metrics after two steps of the toy run on a mesh."""
    phase = Phase(steps=10, length=LENGTH, batch_size=rows, microbatches=microbatches)
    run = toys.run(phases=(phase,), mesh=mesh, **changes)
    count = mesh.data * mesh.fsdp * mesh.tensor * mesh.context
    device_mesh = sharding.mesh_of(mesh, jax.devices()[:count])
    with jax.set_mesh(device_mesh):
        assembly = assemble(run, device_mesh, 10)
        step, state = assembly.train_step(phase), assembly.initial_state()
        batch = toys.batch(run.objective, rows, LENGTH)
        placed = sharding.to_device(batch, device_mesh, rows)
        for _ in range(2):
            state, metrics = step(state, placed)
        return jax.device_get((state.params, metrics))


@functools.cache
def reference():
    """The same on one device, in one piece."""
    return one_step()


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=FLOAT32_REORDERED, atol=FLOAT32_REORDERED)


MESHES = {
    "data": Mesh(data=8),
    "fsdp": Mesh(data=1, fsdp=8),
    "data and fsdp": Mesh(data=2, fsdp=4),
    "data and fsdp, optimizer sharded": Mesh(data=2, fsdp=4, shard_optimizer=True),
    "three axes": Mesh(data=2, fsdp=2, tensor=2),
    "tensor": Mesh(data=1, fsdp=2, tensor=4),
    "context": Mesh(data=1, context=8),
    "all axes": Mesh(data=1, fsdp=2, tensor=2, context=2),
    "data, optimizer sharded": Mesh(data=8, shard_optimizer=True),
    "all but context, optimizer sharded": Mesh(data=2, fsdp=2, tensor=2, shard_optimizer=True),
}


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_eight_devices_equal_one(mesh):
    assert_same(one_step(mesh), reference())


@pytest.mark.parametrize(
    ("microbatches", "mesh"),
    [(4, ONE), (2, MESHES["three axes"]), (2, MESHES["data"]), (2, MESHES["context"])],
)
def test_microbatches_equal_the_whole_batch_with_dropout_on(microbatches, mesh):
    assert_same(one_step(mesh, microbatches), reference())


@pytest.mark.parametrize("remat", ["full", "dots", "offload_dots"])
def test_remat_equals_none(remat):
    assert_same(one_step(remat=remat), reference())


def test_what_goes_to_the_host_s_memory_comes_back_on_several_devices():
    assert_same(one_step(MESHES["data"], remat="offload_dots"), reference())
    assert_same(one_step(MESHES["fsdp"], remat="offload_attention"), reference())


def test_a_scan_rematerialises_unless_it_is_asked_to_save_all():
    def policy(**changes):
        return remat_policy(toys.run(**changes))

    assert policy(remat="auto") == "dots"
    assert policy(remat="auto", scan_layers=False) == policy(remat="save_all") == "none"
    assert policy(remat="full", scan_layers=False) == "full"


@pytest.mark.parametrize(
    ("remat", "message"),
    [
        ("none", "remat none with scan_layers: .*remat=dots or remat=full.*remat=save_all"),
        ("some", "remat: expected one of auto, save_all, none, full.*; got 'some'"),
    ],
)
def test_a_scan_without_remat_is_refused_and_so_is_an_unknown_policy(remat, message):
    with pytest.raises(UserError, match=message):
        one_step(remat=remat)


def test_unrolled_layers_equal_scanned_ones():
    assert_same(one_step(remat="none", scan_layers=False), reference())


def test_the_loss_is_the_sum_over_the_weight_not_a_mean_of_means():
    _, metrics = reference()
    total, weight = metrics.sums["masked_lm"]
    assert weight > 0
    np.testing.assert_allclose(metrics.figures["loss"], total / weight, rtol=1e-6)


def test_tokens_are_real_input_tokens():
    _, metrics = reference()
    batch = toys.batch(toys.masked_lm(), ROWS, LENGTH)
    assert metrics.figures["tokens"] == np.sum(batch["segment_ids"] > 0)


def test_a_batch_without_targets_changes_nothing_but_the_step_and_is_finite():
    run = toys.run(optimizer=toys.AdamW(1e-3, weight_decay=0.0))
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        assembly = assemble(run, mesh, 6)
        state = assembly.initial_state()
        before = jax.device_get(state.params)
        batch = toys.batch(run.objective, 8, LENGTH)
        batch["masked_weights"] = np.zeros_like(batch["masked_weights"])
        placed = sharding.to_device(batch, mesh, 8)
        state, metrics = assembly.train_step(run.phases[0])(state, placed)
    assert metrics.figures["loss"] == 0 and state.step == 1
    assert_same(before, jax.device_get(state.params))


def test_microbatches_are_strided():
    batch = {"x": jnp.arange(6)[:, None]}
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        split = jax.jit(lambda b: strided_microbatches(b, 2))(batch)["x"][..., 0]
    assert split.tolist() == [[0, 2, 4], [1, 3, 5]]


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    phase = Phase(steps=1, length=LENGTH, batch_size=12, microbatches=2)
    run = toys.run(phases=(phase,))
    mesh = sharding.make_mesh(4, 1, 1, devices=jax.devices()[:4])
    with jax.set_mesh(mesh), pytest.raises(UserError, match="12 is not divisible by .* = 8"):
        assemble(run, mesh, 1).train_step(phase)


def test_bfloat16_steps_stay_near_float32_and_keep_float32_weights():
    params, metrics = one_step(precision=Precision(compute="bfloat16"))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    np.testing.assert_allclose(metrics.figures["loss"], reference()[1].figures["loss"], rtol=0.01)


@pytest.mark.parametrize("mesh", [Mesh(data=8), Mesh(data=2, fsdp=4)], ids=["data", "fsdp"])
def test_gradients_summed_in_bfloat16_are_near_those_of_float32(mesh):
    _, metrics = one_step(mesh, precision=Precision(reduce="bfloat16"))
    norms = [m.figures["grad_norm"] for m in (metrics, reference()[1])]
    assert norms[0] != norms[1]
    np.testing.assert_allclose(*norms, rtol=BFLOAT16_SUMS)


def test_sums_that_the_partitioner_makes_stay_float32():
    with pytest.raises(UserError, match="precision.reduce: gradients are summed in bfloat16 only"):
        one_step(Mesh(data=2, fsdp=2, tensor=2), precision=Precision(reduce="bfloat16"))
