"""Evaluation on fixed noise: one figure, whatever the batch size and the devices."""

import functools

import jax
import numpy as np
import pytest

from flaxpretrain.config import Data
from flaxpretrain.data.rows import Documents
from flaxpretrain.data.store import open_dataset
from flaxpretrain.errors import UserError
from flaxpretrain.objectives.objective import Sum
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import assemble
from flaxpretrain.training.evaluate import FixedNoise, add_on_host, fixed_noise_pass
from flaxpretrain.training.session import Session
from tests import toys
from tests.tolerances import EVALUATION_ANYWHERE


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toys.dataset(tmp_path_factory.mktemp("data") / "toy", documents=240)


@functools.cache
def session(folder, mesh=(1, 1, 1), length=32):
    """The toy run, opened at step 0 on a mesh."""
    run = toys.run(data=Data(layout=Documents(), folder=str(folder)))
    devices = jax.devices()[: int(np.prod(mesh))]
    device_mesh = sharding.make_mesh(*mesh, devices=devices)
    with jax.set_mesh(device_mesh):
        assembly = assemble(run, device_mesh, 6)
        state = assembly.initial_state()
    dataset = open_dataset(folder)
    return Session(run, folder, dataset, run.phases, assembly, state, 0, print)


def figures(folder, mesh=(1, 1, 1), **changes):
    opened = session(folder, mesh)
    with jax.set_mesh(opened.assembly.mesh):
        return FixedNoise(**({"batch_size": 64} | changes)).run(opened)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=EVALUATION_ANYWHERE)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (8, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("batch_size", [3, 8, 64])
def test_the_figures_depend_neither_on_batch_size_nor_on_devices(data, mesh, batch_size):
    reference = figures(data)
    assert set(reference) == {"masked_lm", "masked_lm_accuracy", "perplexity"}
    assert_same(figures(data, mesh, batch_size=batch_size), reference)


def test_every_row_counts_once(data):
    opened = session(data)
    masked = 0
    for batch_size in (5, 64):
        batches = list(rows_of(opened, batch_size))
        assert all(len(batch["input_ids"]) == batch_size for batch in batches)
        counted = sum(batch["masked_weights"].sum() for batch in batches)
        assert masked in (0, counted)
        masked = counted
    assert masked > 50


def rows_of(opened, batch_size):
    from flaxpretrain.data.pipeline import evaluation_batches

    framing = opened.run.objective.framing(opened.dataset.vocabulary, 32)
    split, layout = opened.dataset.split("validation"), opened.run.data.layout
    return evaluation_batches(split, layout, framing, batch_size, 0)


def test_the_seed_fixes_the_masks(data):
    assert figures(data) == figures(data)
    assert figures(data, seed=1)["masked_lm"] != figures(data)["masked_lm"]


def test_fewer_rows_and_other_noise_give_other_figures_that_are_as_stable(data):
    few = figures(data, max_rows=7)
    assert few != figures(data)
    assert_same(few, figures(data, (8, 1, 1), max_rows=7, batch_size=3))
    other = toys.masked_lm(rate=0.4)
    assert_same(figures(data, objective=other), figures(data, objective=other, batch_size=3))
    assert figures(data, objective=other) != figures(data)


def test_another_length_is_evaluated_with_the_same_weights(data):
    assert figures(data, length=16) != figures(data)


def test_sums_are_added_in_float64():
    large, small = np.float32(2**24), np.float32(1)
    total = {}
    for value in (large, small, small):
        total = add_on_host(total, {"x": Sum(value, small)})
    assert total["x"].total == 2**24 + 2 and total["x"].weight == 3


def test_sums_may_be_arrays_and_join_late():
    total = add_on_host({}, {"histogram": Sum(np.arange(3), 1)})
    total = add_on_host(total, {"histogram": Sum(np.arange(3), 1), "late": Sum(2.0, 1)})
    assert total["histogram"].total.tolist() == [0, 2, 4] and total["late"].total == 2


def test_a_split_without_rows_is_refused(data):
    opened = session(data)
    step = opened.eval_step()
    with pytest.raises(UserError, match="no rows"):
        fixed_noise_pass(step, opened.state.params, [], 8, opened.assembly.mesh)
    with pytest.raises(UserError, match="no split 'test'; it has train, validation"):
        figures(data, split="test")
