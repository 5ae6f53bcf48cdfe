"""Meshes, rules, rows of processes: on eight fake devices, and on two real processes."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from flaxpretrain.errors import UserError
from flaxpretrain.training.optimizers import Adafactor, AdamW, Muon, make_optimizer
from flaxpretrain.training.schedules import Constant
from flaxpretrain.training.sharding import (
    batch_sharding,
    make_mesh,
    process_rows,
    state_shardings,
    to_device,
)
from flaxpretrain.training.state import TrainState, named_leaves
from tests import toys
from tests.training.toys import random_tree, toy_state

ROOT = Path(__file__).parents[2]
PROGRAM = "tests.training.one_of_two_processes"

RULES = (
    ("embeddings/table$", ("tensor", "fsdp")),
    ("attention/query/kernel$", (None, "fsdp", "tensor", None)),
    ("attention/out/kernel$", (None, "tensor", None, "fsdp")),
    ("attention/query/bias$", (None, "tensor", None)),
    ("layers/.*/kernel$", (None, "fsdp", "tensor")),
    ("layers/.*(bias|scale)$", (None, None)),
    ("head/kernel$", (None, ("fsdp", "tensor"))),
    ("bias$", (None,)),
)


def abstract(optimizer_value=None) -> TrainState:
    value = optimizer_value or AdamW(0.1)
    optimizer = make_optimizer(value, Constant(), 1, random_tree(0))
    return jax.eval_shape(lambda: toy_state(optimizer))


def specs(state: TrainState, rules=RULES, sizes=(2, 2, 2), shard_optimizer=False) -> dict[str, P]:
    mesh = make_mesh(*sizes)
    shardings = state_shardings(state, rules, mesh, shard_optimizer=shard_optimizer)
    return {name: s.spec for name, s in named_leaves(shardings).items()}


# Meshes.


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 2, 4), (1, 2, 4))],
)
def test_one_size_may_be_the_rest(sizes, expected):
    mesh = make_mesh(*sizes)
    assert tuple(mesh.shape.values()) == expected
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_one_device_is_a_mesh_too():
    assert make_mesh(devices=jax.devices()[:1]).shape == {"data": 1, "fsdp": 1, "tensor": 1}


def test_context_may_be_the_rest_and_is_there_only_where_it_is_asked_for():
    assert make_mesh(2, context=-1).shape == {"data": 2, "fsdp": 1, "context": 4, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (16, 1, 1), (0, 1, 8)])
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes):
    with pytest.raises(UserError, match="does not fit 8 devices"):
        make_mesh(*sizes)


@pytest.mark.tpu
def test_on_two_tpu_slices_only_data_crosses_them(monkeypatch):
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4", num_slices=2)
    mesh = make_mesh(-1, 4, 1, topology.devices, context=2)
    assert tuple(mesh.shape.values()) == (4, 4, 2, 1)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert [set(row.flat) for row in slices] == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match="mesh.data is 1, which is not divisible by the 2"):
        make_mesh(1, 16, 2, topology.devices)


# Rules.


def test_parameters_follow_the_first_rule_and_the_optimizers_state_follows_them():
    found = specs(abstract())
    kernel = P(None, "fsdp", "tensor", None)
    assert found["params/layers/attention/query/kernel"] == kernel
    assert found["params/embeddings/table"] == P("tensor", "fsdp")
    moments = [n for n in found if n.endswith(("mu/layers/attention/query/kernel",))]
    assert len(moments) == 1 and found[moments[0]] == kernel
    assert found["step"] == found["key"] == P()
    assert all(found[n] == P() for n in found if n.endswith(("count", "learning_rate")))


def test_factored_moments_are_replicated_and_muons_momentum_is_not():
    factored = specs(abstract(Adafactor(0.1, min_factored=1)))
    assert {factored[n] for n in factored if "/v_row" in n or "/v_col" in n} == {P()}
    momentum = specs(abstract(Muon(0.1)))
    followers = [n for n in momentum if n.endswith("mu/layers/attention/out/kernel")]
    assert [momentum[n] for n in followers] == [P(None, "tensor", None, "fsdp")]


def test_a_state_can_be_made_where_it_lies():
    optimizer = make_optimizer(AdamW(0.1), Constant(), 1, random_tree(0))
    shardings = state_shardings(abstract(), RULES, make_mesh(2, 2, 2))
    state = jax.jit(lambda: toy_state(optimizer), out_shardings=shardings)()
    kernel = state.params["layers"]["attention"]["query"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 4, 1, 4)


def test_without_rules_the_largest_divisible_dimension_is_split_but_never_the_layers():
    params = {
        "layers": {
            "wide": jnp.ones((8, 4, 6)),
            "odd": jnp.ones((8, 3, 5)),
            "bias": jnp.ones((8, 4)),
        },
        "table": jnp.ones((10, 4)),
    }
    state = TrainState(jnp.int32(0), params, (), jax.random.key(0))
    found = specs(state, rules=(), sizes=(2, 2, 2))
    assert found["params/layers/wide"] == P(None, None, "fsdp")
    assert found["params/layers/odd"] == found["params/layers/bias"] == P()
    assert found["params/table"] == P("fsdp")


@pytest.mark.parametrize(
    ("rules", "sizes", "message"),
    [
        (RULES[1:], (2, 2, 2), "parameter embeddings/table (32, 8) is claimed by no sharding rule"),
        ((("table$", (None,)), *RULES), (2, 2, 2), "names 1 dimensions, but embeddings/table has"),
        (RULES, (1, 1, 8), "kernel (3, 2, 4, 8): its 2 heads are not divisible by mesh tensor = 8"),
        ((("table$", "everywhere"), *RULES), (2, 2, 2), "each dimension, or 'replicated'; got"),
        ((("table$", ("model", None)), *RULES), (2, 2, 2), "no mesh axis 'model'; known: data"),
    ],
)
def test_rules_that_do_not_fit_are_answered_with_the_parameters_name(rules, sizes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        specs(abstract(), rules, sizes)


def test_a_large_replicated_tensor_is_an_error_where_the_mesh_could_split_it():
    table = jax.ShapeDtypeStruct((4099, 1031), jnp.float32)  # 16.1 MiB, and two primes
    state = TrainState(jnp.int32(0), {"table": table}, (), jax.random.key(0))
    with pytest.raises(UserError, match=r"params/table .*16 MiB\) would be replicated"):
        specs(state, rules=(), sizes=(2, 2, 2))
    specs(state, rules=(), sizes=(8, 1, 1))  # nothing could be split there
    assert specs(state, rules=(("table", "replicated"),))["params/table"] == P()  # meant


def test_a_large_replicated_leaf_of_a_sharded_optimizer_is_an_error():
    table = {"table": jax.ShapeDtypeStruct((4099, 1031), jnp.float32)}
    state = TrainState(jnp.int32(0), table, {"mu": table}, jax.random.key(0))
    sizes = {"rules": (("table", (None, None)),), "sizes": (8, 1, 1)}
    specs(state, **sizes)
    with pytest.raises(UserError, match=r"opt_state/mu/table .* would be replicated"):
        specs(state, **sizes, shard_optimizer=True)


def test_a_sharded_optimizer_lies_over_data_too_and_the_parameters_stay():
    found = specs(abstract(), sizes=(4, 2, 1), shard_optimizer=True)
    plain = specs(abstract(), sizes=(4, 2, 1))
    assert {n: s for n, s in found.items() if n.startswith("params/")} == {
        n: s for n, s in plain.items() if n.startswith("params/")
    }
    moments = {n.split("mu/")[1]: s for n, s in found.items() if "/mu/" in n}
    # The largest part that is left, but never the layers' axis; vectors stay whole.
    assert moments["layers/feed/kernel"] == P(None, "fsdp", ("tensor", "data"))
    assert moments["embeddings/table"] == P(("tensor", "data"), "fsdp")
    assert moments["layers/norm/scale"] == P(None, None)
    assert moments["layers/attention/query/kernel"] == P(None, ("fsdp", "data"), "tensor")


# Rows.


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_a_batch_lies_by_rows_on_the_devices(sizes):
    mesh = make_mesh(*sizes)
    batch = {"ids": np.arange(32, dtype=np.int32).reshape(16, 2), "flag": np.arange(16)}
    assert process_rows(mesh, 16) == slice(0, 16)
    placed = to_device(batch, mesh, 16)
    for name, array in placed.items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.sharding == batch_sharding(mesh)


def test_rows_must_divide_by_the_groups_of_devices():
    with pytest.raises(UserError, match=r"batch_size 6 is not divisible by mesh data \* fsdp"):
        process_rows(make_mesh(2, 2, 2), 6)


# Several processes.


def test_two_processes_load_their_rows_and_share_checkpoints(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    toys.dataset(tmp_path / "toy")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", PROGRAM, address, str(index), str(tmp_path / "checkpoints")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()  # the one that waits for the other
    for index, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0 and f"fine {index}" in output, output
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
