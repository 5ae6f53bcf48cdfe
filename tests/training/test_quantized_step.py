"""Steps with matrix products in 8 bits: what is compiled, what they learn, what is refused."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from flaxpretrain.analysis import hlo, topology
from flaxpretrain.config import Mesh, Phase, Precision
from flaxpretrain.errors import UserError
from flaxpretrain.hardware import MATMULS
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import assemble
from flaxpretrain.training.loop import train
from flaxpretrain.training.metrics import read_metrics
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import Constant
from tests import toys
from tests.tolerances import EIGHT_BITS_ELSEWHERE, EIGHT_BITS_NETWORK, EIGHT_BITS_TRAINED

pytest.importorskip("qwix")

ROWS, LENGTH, STEPS = 8, 32, 100
PRODUCTS = 4
"""With parameters, of a layer of BERT: query, key and value at once, out, up, down."""


@pytest.fixture(autouse=True)
def promoted():
    """Qwix multiplies sums in int32 by scales, and relies on JAX's standard promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def quantized(matmul: str, **changes):
    """A run without dropout, whose layers multiply in a format."""
    precision = Precision(matmul=matmul, compute=changes.pop("compute", "float32"))
    model = toys.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return toys.run(**(dict(precision=precision, guard=None, model=model) | changes))


@functools.cache
def compiled(matmul: str):
    """The compiled step of one device, its assembly, mesh and a batch."""
    phase = Phase(steps=STEPS, length=LENGTH, batch_size=ROWS)
    run = quantized(matmul, phases=(phase,), optimizer=AdamW(5e-3))
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        assembly = assemble(run, mesh, STEPS)
        batch = sharding.to_device(toys.batch(run.objective, ROWS, LENGTH), mesh, ROWS)
        step = assembly.train_step(phase).lower(assembly.state, batch).compile()
    return step, assembly, mesh, batch


@functools.cache
def learnt(matmul: str) -> list[float]:
    """The losses of all steps on one batch."""
    step, assembly, mesh, batch = compiled(matmul)
    losses = []
    with jax.set_mesh(mesh):
        state = assembly.initial_state()
        for _ in range(STEPS):
            state, metrics = step(state, batch)
            losses.append(float(metrics.figures["loss"]))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state.params))
    return losses


def products(text: str) -> list[tuple[str, ...]]:
    """Types of the result and of both sides of all matrix products of a compiled program."""
    found = []
    for instructions in hlo.parse(text).computations.values():
        types = {i.name: i.shapes[0].dtype for i in instructions if i.shapes}
        for each in instructions:
            if each.opcode in ("dot", "convolution"):
                found.append((types[each.name], *(types[n] for n in each.operand_names[:2])))
    return found


@pytest.mark.parametrize(("matmul", "passes"), [("default", 0), ("int8", 3), ("int8_forward", 1)])
def test_the_compiled_step_multiplies_whole_numbers(matmul, passes):
    text = compiled(matmul)[0].as_text()
    found = products(text)
    whole = [sides for result, *sides in found if result == "s32"]
    assert len(whole) == passes * PRODUCTS < len(found)
    # XLA:CPU may widen them just before.
    assert all(set(sides) in ({"s8"}, {"s32"}) for sides in whole)
    assert ("s8[" in text) == bool(whole)


@pytest.mark.parametrize("matmul", MATMULS[1:])
def test_a_run_learns_as_without(matmul):
    mine, full = learnt(matmul), learnt("default")
    assert full[-1] < 0.05 * full[0], "the run without learns nothing to compare with"
    assert mine != full
    np.testing.assert_allclose(mine, full, rtol=EIGHT_BITS_TRAINED)


def a_step(**changes):
    """Loss and norm of the gradient of one step on eight devices."""
    phase = Phase(steps=STEPS, length=LENGTH, batch_size=ROWS)
    run = quantized("int8", phases=(phase,), **changes)
    mesh = sharding.mesh_of(run.mesh)
    with jax.set_mesh(mesh):
        assembly = assemble(run, mesh, STEPS)
        batch = sharding.to_device(toys.batch(run.objective, ROWS, LENGTH), mesh, ROWS)
        _, metrics = assembly.train_step(phase)(assembly.initial_state(), batch)
        return [float(metrics.figures[name]) for name in ("loss", "grad_norm")]


def test_the_gradient_of_a_step_is_near_that_of_float32_products():
    def norm(matmul):
        step, assembly, mesh, batch = compiled(matmul)
        with jax.set_mesh(mesh):
            return float(step(assembly.initial_state(), batch)[1].figures["grad_norm"])

    for matmul, bound in EIGHT_BITS_NETWORK.items():
        assert abs(norm(matmul) / norm("default") - 1) < bound


@pytest.mark.parametrize(
    "changes",
    [
        dict(mesh=Mesh(data=2, fsdp=2, tensor=2)),
        dict(mesh=Mesh(data=4, context=2), scan_layers=False, remat="dots"),
    ],
    ids=["fsdp and tensor", "context, unrolled, remat"],
)
def test_other_meshes_and_ways_to_compute_give_the_same_step(changes):
    np.testing.assert_allclose(a_step(**changes), a_step(), rtol=EIGHT_BITS_ELSEWHERE)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    data = str(toys.dataset(tmp_path / "data"))
    run = toys.packed_run(data, steps=6, precision=Precision(matmul="int8"), schedule=Constant())
    train(dataclasses.replace(run, phases=(_phase(4),)), tmp_path / "w", quiet=True)
    train(run, tmp_path / "w", quiet=True)
    train(run, tmp_path / "whole", quiet=True)
    assert losses(tmp_path / "w") == losses(tmp_path / "whole") != {}
    other = dataclasses.replace(run, precision=Precision())
    with pytest.raises(UserError, match='precision.matmul: "int8" -> "default"'):
        train(other, tmp_path / "w", quiet=True)


def _phase(steps):
    return Phase(steps=steps, length=32, batch_size=8)


def losses(workdir):
    rows = read_metrics(workdir / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def libtpu():
    """The compiler for TPUs, ready."""
    pytest.importorskip("libtpu")
    topology.prepare_environment()


@pytest.mark.tpu
def test_a_device_without_such_units_is_one_clear_line(libtpu):
    run = quantized("fp8", mesh=Mesh())
    with pytest.raises(UserError, match="TPU v5e is stated for fp8: set it to int8 or default"):
        topology.assembled_for(run, "v5e:2x2")


@pytest.mark.tpu
def test_a_step_for_a_tpu_multiplies_8_bits_in_both_passes(libtpu):
    phase = Phase(steps=1, length=128, batch_size=8)
    model = toys.bert(hidden_size=128, num_attention_heads=2, intermediate_size=256)
    model = dataclasses.replace(
        model, attention_probs_dropout_prob=0.0, max_position_embeddings=128
    )
    run = quantized("int8", compute="bfloat16", model=model, phases=(phase,), remat="dots")
    report, text = topology.compile_step(run, "v5e:2x2", 0)
    assert report.fits and report.matmul == "int8" and report.attention == "rows"
    found = products(text)
    narrow = [each for each in found if each[1:] == ("s8", "s8")]
    assert len(narrow) == 3 * PRODUCTS < len(found)
