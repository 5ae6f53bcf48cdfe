"""Two networks in one train step: the same anywhere, the original's update, and resumable."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxpretrain.config import Phase
from flaxpretrain.errors import UserError
from flaxpretrain.objectives.detection import Contrast, Detect
from flaxpretrain.objectives.generators import Scaled, Sized, TwoTower
from flaxpretrain.objectives.sharing import Disentangled
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import assemble
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.loop import train
from flaxpretrain.training.metrics import read_metrics
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import Constant, WarmupTimesDecay
from flaxpretrain.training.state import map_named, named_leaves
from tests import toys
from tests.tolerances import FLOAT32_REORDERED
from tests.training.resuming import as_it_was

LENGTH, ROWS = 32, 16
DEBERTA = dict(
    sharing=Disentangled(),
    generator=Scaled(width=1.0, depth=0.5),
    task=Detect(head_kind="deberta"),
    separate_optimizers=True,
)


def toy(objective=None, **changes):
    config = toys.electra(num_hidden_layers=1)
    return toys.run(model=config, objective=objective or toys.replaced_tokens(), **changes)


def steps(run, mesh=(1, 1, 1), microbatches=1, count=2):
    """States before and after, and the metrics of the last step."""
    phase = Phase(steps=10, length=LENGTH, batch_size=ROWS, microbatches=microbatches)
    device_mesh = sharding.make_mesh(*mesh, devices=jax.devices()[: int(np.prod(mesh))])
    with jax.set_mesh(device_mesh):
        assembly = assemble(run, device_mesh, 10)
        step, state = assembly.train_step(phase), assembly.initial_state()
        before = jax.device_get(state.params)
        batch = toys.batch(run.objective, ROWS, LENGTH)
        placed = sharding.to_device(batch, device_mesh, ROWS)
        for _ in range(count):
            state, metrics = step(state, placed)
        return before, jax.device_get(state.params), jax.device_get(metrics)


# One head, which no tensor axis divides.
NARROW = Sized(hidden_size=16, num_attention_heads=1, intermediate_size=32)
OBJECTIVES = {
    "electra": toys.replaced_tokens(generator=NARROW),
    "electric": toys.replaced_tokens(generator=TwoTower(tower=NARROW), task=Contrast()),
}


@functools.cache
def reference(name):
    """One device, one microbatch."""
    return steps(toy(OBJECTIVES[name]))


@pytest.mark.parametrize(
    ("name", "mesh", "microbatches"),
    [
        ("electra", (8, 1, 1), 1),
        ("electra", (2, 2, 2), 2),
        ("electric", (2, 2, 2), 2),
    ],
)
def test_eight_devices_and_microbatches_equal_one(name, mesh, microbatches):
    _, params, metrics = steps(toy(OBJECTIVES[name]), mesh, microbatches)
    _, expected, expected_metrics = reference(name)
    for name, leaf in named_leaves(params).items():
        np.testing.assert_allclose(
            leaf, named_leaves(expected)[name], rtol=FLOAT32_REORDERED, atol=FLOAT32_REORDERED
        )
    # The same tokens were sampled everywhere.
    assert metrics.sums["replaced_share"] == expected_metrics.sums["replaced_share"]


def test_a_generator_that_the_mesh_does_not_divide_is_named():
    run = toy(toys.replaced_tokens(generator=Sized(intermediate_size=63)))
    mesh = sharding.make_mesh(4, 1, 2)
    with pytest.raises(UserError, match="generator/.*feed_forward.* 63 is not divisible") as error:
        assemble(run, mesh, 10)
    assert "\n" not in str(error.value)


def test_a_step_is_the_originals_adam_without_bias_correction():
    """google-research/electra model/optimization.py; update 2 has rate lr (1 - 1/10) / 2."""
    run = toy(
        optimizer=AdamW(1e-2, bias_correction=False, clip_norm=1.0),
        schedule=WarmupTimesDecay(warmup_steps=2),
    )
    before, after, _ = steps(run)
    model = assemble(run, sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]), 10).model
    batch = jax.tree.map(jnp.asarray, toys.batch(run.objective, ROWS, LENGTH))

    def loss(params, key):
        sums = run.objective.loss(model, params, batch, key)
        return sum(c * sums[t].total / sums[t].weight for t, c in run.objective.terms.items())

    first, second = (
        jax.jit(jax.grad(loss))(before, jax.random.fold_in(jax.random.key(0), n)) for n in (0, 1)
    )

    def clipped(gradients):
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradients)))
        return jax.tree.map(lambda g: np.asarray(g, np.float64) / max(norm, 1.0), gradients)

    def expected(name, param, g1, g2):
        m, v = 0.9 * 0.1 * g1 + 0.1 * g2, 0.999 * 0.001 * g1**2 + 0.001 * g2**2
        update = m / (np.sqrt(v) + 1e-6)
        if "norm" not in name and "bias" not in name:
            update = update + 0.01 * param
        # The first update has rate 0, so that both gradients are at the same parameters.
        return param - 1e-2 * (1 - 1 / 10) * (1 / 2) * update

    wanted = map_named(expected, before, clipped(first), clipped(second))
    for name, leaf in named_leaves(after).items():
        np.testing.assert_allclose(leaf, named_leaves(wanted)[name], atol=2e-5, err_msg=name)


def test_two_optimizers_step_together_each_with_its_own_clipping():
    run = toy(
        toys.replaced_tokens(**DEBERTA),
        optimizer={"generator": AdamW(0.0), "discriminator": AdamW(1e-2)},
        schedule=Constant(),
    )
    before, after, _ = steps(run, count=1)
    moved = {
        name.split("/")[0]
        for name, leaf in named_leaves(after).items()
        if np.any(leaf != named_leaves(before)[name])
    }
    assert moved == {"discriminator", "head"}


def test_a_run_stopped_and_resumed_is_the_run_in_one_go(tmp_path):
    data = toys.dataset(tmp_path / "data")
    values = dict(
        model=toys.electra(num_hidden_layers=1),
        objective=toys.replaced_tokens(),
        evaluations=(FixedNoise(batch_size=8, every_steps=4),),
    )

    run = toys.packed_run(str(data), steps=8, schedule=Constant(), **values)
    train(run, tmp_path / "whole", quiet=True)
    train(run, as_it_was(tmp_path / "whole", tmp_path / "parts", step=4), quiet=True)
    whole, parts = (
        {
            row["step"]: row["loss"]
            for row in read_metrics(tmp_path / folder / "metrics.jsonl")
            if "loss" in row
        }
        for folder in ("whole", "parts")
    )
    assert whole == parts and len(whole) == 8
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert {"loss/masked_lm", "loss/discriminator", "masked_lm_accuracy", "disc_recall"} <= (
        rows[0].keys()
    )
    evaluated = [row for row in rows if "validation/disc_auc" in row]
    assert [row["step"] for row in evaluated] == [4, 8]
    assert {"validation/disc_loss", "validation/masked_lm_loss"} <= evaluated[0].keys()
