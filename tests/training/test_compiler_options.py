"""Compiler options for several devices: each generation's compiler takes its own, users win."""

import jax
import pytest

from flaxpretrain.analysis import topology
from flaxpretrain.config import Mesh
from flaxpretrain.hardware import overlap_options
from flaxpretrain.training import sharding
from flaxpretrain.training.compiler_options import accepted, compiler_options
from flaxpretrain.training.jax_settings import nothing_cached
from tests import toys

UNKNOWN = {"xla_tpu_no_such_option": True}
SLICES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


@pytest.fixture(scope="module")
def libtpu():
    """The compiler for TPUs, ready."""
    pytest.importorskip("libtpu")
    topology.prepare_environment()


@pytest.mark.tpu
@pytest.mark.parametrize("name", SLICES)
def test_the_compiler_takes_all_options_of_its_generation_and_no_others(libtpu, name):
    device = topology.devices_of(name)[0]
    options = overlap_options(device.device_kind)
    assert options and accepted(options, device) == options
    assert accepted(options | UNKNOWN, device) == options


@pytest.mark.tpu
def test_a_whole_step_compiles_with_them(libtpu):
    run = toys.run(mesh=Mesh(data=2, fsdp=2), attention="xla")
    assembly = topology.assembled_for(run, "v5e:2x2")
    phase = run.phases[0]
    options = compiler_options(assembly.mesh, {})
    assert options == overlap_options("TPU v5 lite")
    with jax.set_mesh(assembly.mesh), nothing_cached():
        batch = assembly.batch_spec(phase, toys.VOCABULARY)
        assembly.train_step(phase, options).lower(assembly.state, batch).compile()


@pytest.mark.tpu
def test_the_compiler_is_asked_inside_the_run_s_mesh_of_several_devices_too(libtpu):
    mesh = sharding.mesh_of(Mesh(), topology.devices_of("v5e:2x2"))
    with jax.set_mesh(mesh):
        assert compiler_options(mesh, {}) == overlap_options("TPU v5 lite")


@pytest.mark.tpu
@pytest.mark.parametrize("variable", ["LIBTPU_INIT_ARGS", "XLA_FLAGS"])
def test_what_the_user_s_flags_say_is_left_to_them(libtpu, variable):
    mesh = sharding.mesh_of(Mesh(), topology.devices_of("v5p:2x2x1"))
    flags = "--xla_other=1 --xla_tpu_enable_data_parallel_all_reduce_opt=false"
    assert compiler_options(mesh, {variable: flags}) == {
        "xla_tpu_data_parallel_opt_different_sized_ops": True,
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
    }


def test_xla_knows_the_options_for_gpus():
    # The compiler for CPUs reads all of XLA's own options, those for GPUs among them.
    device = jax.devices()[0]
    options = overlap_options("NVIDIA H100 80GB HBM3")
    assert options and accepted(options, device) == options
    assert accepted({"xla_gpu_no_such_option": True}, device) == {}


def test_one_device_and_cpus_have_none():
    assert compiler_options(sharding.mesh_of(Mesh(data=1), jax.devices()[:1])) == {}
    assert compiler_options(sharding.mesh_of(Mesh(), jax.devices())) == {}
