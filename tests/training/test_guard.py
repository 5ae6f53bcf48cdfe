"""The guard: what it skips, what it leaves alone, and what it reports."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxpretrain.errors import UserError
from flaxpretrain.training.guard import Guard, guarded, skip_figures
from flaxpretrain.training.optimizers import AdamW, learning_rate, make_optimizer
from flaxpretrain.training.schedules import WarmupLinear

PARAMS = {"w": jnp.ones((3, 2))}
GRADS = {"w": jnp.full((3, 2), 0.5)}


class Run:
    """Feeds losses to a guarded AdamW, compiled once."""

    def __init__(self, **guard):
        inner = make_optimizer(AdamW(0.1), WarmupLinear(warmup_steps=2), 100, PARAMS)
        self.optimizer = guarded(inner, Guard(**guard))
        self.params, self.state = PARAMS, self.optimizer.init(PARAMS)
        self.update = jax.jit(self.optimizer.update)

    def step(self, loss: float, grads=GRADS) -> bool:
        """One step; whether it was skipped."""
        updates, self.state = self.update(grads, self.state, self.params, value=jnp.float32(loss))
        self.params = optax.apply_updates(self.params, updates)
        return bool(self.state.skipped)

    def figures(self) -> dict[str, int]:
        return {name: int(value) for name, value in skip_figures(self.state).items()}


def same(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b))


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_not_finite_changes_neither_parameters_nor_inner_state(bad):
    run = Run()
    assert not run.step(2.0)
    params, inner = run.params, run.state.inner
    grads = GRADS if bad == "loss" else {"w": GRADS["w"].at[0, 0].set(jnp.inf)}
    assert run.step(float("nan") if bad == "loss" else 2.0, grads)
    assert same(run.params, params) and same(run.state.inner, inner)
    assert run.figures() == {"skipped": 1, "skipped_total": 1, "skipped_in_a_row": 1}
    assert not run.step(2.0)
    assert run.figures() == {"skipped": 0, "skipped_total": 1, "skipped_in_a_row": 0}
    assert not same(run.params, params)


def test_the_schedule_counts_updates_made_and_the_rate_is_read_through_the_guard():
    run = Run()
    rates = [float(learning_rate(run.state))]
    for loss in (2.0, float("nan"), 2.0):
        run.step(loss)
        rates.append(float(learning_rate(run.state)))
    np.testing.assert_allclose(rates, [0.0, 0.05, 0.05, 0.098], rtol=1e-6)


def test_a_spike_is_skipped_once_the_window_is_full():
    run = Run(window=4, spike_factor=3.0)
    assert not any(run.step(loss) for loss in (9.0, 2.1, 50.0))  # the window is not full yet
    run = Run(window=4, spike_factor=3.0)
    for loss in (2.0, 2.2, 1.8, 2.0):
        assert not run.step(loss)
    mean, deviation = np.mean([2.0, 2.2, 1.8, 2.0]), np.std([2.0, 2.2, 1.8, 2.0])
    assert run.step(mean + 3.1 * deviation)
    assert not run.step(mean + 2.9 * deviation)
    assert run.figures()["skipped_in_a_row"] == 0  # spikes are finite


def test_a_skipped_loss_does_not_enter_the_window():
    run = Run(window=2, spike_factor=3.0, max_spikes=5)
    for loss in (2.0, 2.1, 30.0, 30.0):
        run.step(loss)
    np.testing.assert_allclose(sorted(np.asarray(run.state.losses)), [2.0, 2.1])


def test_a_flat_curve_does_not_make_every_wiggle_a_spike():
    run = Run(window=4, spike_factor=3.0, least_deviation=0.01)
    assert not any(run.step(loss) for loss in (2.0, 2.0, 2.0, 2.0, 2.05))
    assert run.step(2.2)


def test_a_level_that_stays_high_is_accepted_and_the_window_starts_anew():
    run = Run(window=4, spike_factor=3.0, max_spikes=3)
    for loss in (2.0, 2.1, 1.9, 2.0):
        run.step(loss)
    assert [run.step(8.0) for _ in range(6)] == [True, True, True, False, False, False]
    assert int(run.state.accepted) == 3
    assert not run.step(8.1)
    assert run.step(20.0)


def test_noisy_falling_losses_are_never_skipped_by_the_defaults():
    run = Run()
    generator = np.random.default_rng(0)
    losses = 2.0 + 8.0 * np.exp(-np.arange(600) / 60) + generator.normal(size=600) * 0.1
    assert not any(run.step(loss) for loss in losses)


def test_without_a_spike_factor_only_what_is_not_finite_is_skipped():
    run = Run(window=2, spike_factor=None)
    assert [run.step(loss) for loss in (1.0, 1.0, 1e9, float("inf"))] == [False] * 3 + [True]


def test_figures_of_a_state_without_guard_are_none():
    assert skip_figures(optax.sgd(1.0).init(PARAMS)) == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"window": 0}, "guard.window must be at least 1"), ({"spike_factor": -1.0}, "spike_factor")],
)
def test_impossible_numbers_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Guard(**fields)
