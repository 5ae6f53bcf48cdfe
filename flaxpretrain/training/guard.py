"""A wrapper that skips updates whose loss or gradient cannot be trusted."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from flaxpretrain.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guard:
    """When an update is skipped.

    Always: when the loss or the global norm of the gradients is not finite. Besides, once `window`
    losses were accepted: when the loss exceeds their mean by `spike_factor` standard deviations,
    the deviation taken as at least `least_deviation` of the mean so that a flat curve does not
    make every wiggle a spike.

    The defaults err on the side of training: of normally distributed losses one in a billion lies 6
    deviations high, and a level that stays high, as when rows get longer or masks denser, is
    accepted after `max_spikes` skips in a row; the window then starts anew.

    max_consecutive: updates in a row without a finite loss after which the run gives up.
    """

    window: int = 128
    spike_factor: float | None = 6.0
    least_deviation: float = 0.01
    max_spikes: int = 8
    max_consecutive: int = 20

    def __post_init__(self) -> None:
        """Raises UserError on numbers that cannot be."""
        for name in ("window", "max_spikes", "max_consecutive"):
            if getattr(self, name) < 1:
                raise UserError(f"guard.{name} must be at least 1; got {getattr(self, name)}")
        for name in ("spike_factor", "least_deviation"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"guard.{name} must be positive; got {value}")


def guard_of(run: Any) -> Guard | None:
    """The guard of a run; in float16 there always is one, for gradients that overflow."""
    if run.guard is None and run.precision.compute == "float16":
        return Guard(spike_factor=None)
    return run.guard


class GuardState(NamedTuple):
    """The guard's own figures beside the state of what it guards, which a skip leaves alone."""

    inner: PyTree
    losses: Float[Array, "window"]
    accepted: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_total: Int[Array, ""]
    spikes_in_a_row: Int[Array, ""]
    not_finite_in_a_row: Int[Array, ""]


def guarded(
    inner: optax.GradientTransformation, guard: Guard
) -> optax.GradientTransformationExtraArgs:
    """`inner`, whose update takes `value=loss` and may be skipped.

    A skipped update is zero and leaves the inner state, its count and so the schedule, as they
    were; the train step's own step, and with it the data, advance all the same.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> GuardState:
        losses = jnp.zeros(guard.window, jnp.float32)
        # Five arrays, not one five times: a buffer can be donated once only.
        counts = (jnp.int32(0) for _ in range(5))
        return GuardState(inner.init(params), losses, *counts)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        loss = jnp.asarray(extra["value"], jnp.float32)
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(updates))
        high = finite & _is_spike(guard, state, loss)
        # A level that stays high is no spike but the new level.
        settled = high & (state.spikes_in_a_row >= guard.max_spikes)
        skip = ~finite | (high & ~settled)

        proposed, inner_state = inner.update(updates, state.inner, params, **extra)

        def unless_skipped(new: Array, old: Array) -> Array:
            return jnp.where(skip, old, new)

        updates = jax.tree.map(lambda u: unless_skipped(u, jnp.zeros_like(u)), proposed)
        inner_state = jax.tree.map(unless_skipped, inner_state, state.inner)
        count = jnp.where(settled, 0, state.accepted)
        entered = state.losses.at[count % guard.window].set(loss)
        return updates, GuardState(
            inner=inner_state,
            losses=unless_skipped(entered, state.losses),
            accepted=unless_skipped(count + 1, state.accepted),
            skipped=skip.astype(jnp.int32),
            skipped_total=state.skipped_total + skip.astype(jnp.int32),
            spikes_in_a_row=jnp.where(skip & finite, state.spikes_in_a_row + 1, 0),
            not_finite_in_a_row=jnp.where(finite, 0, state.not_finite_in_a_row + 1),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_spike(guard: Guard, state: GuardState, loss: Float[Array, ""]) -> Array:
    if guard.spike_factor is None:
        return jnp.bool_(False)
    mean, deviation = jnp.mean(state.losses), jnp.std(state.losses)
    deviation = jnp.maximum(deviation, guard.least_deviation * jnp.abs(mean))
    full = state.accepted >= guard.window
    return full & (loss > mean + guard.spike_factor * deviation)


def skip_figures(opt_state: PyTree) -> dict[str, Int[Array, ""]]:
    """Whether the last update was skipped, and counts; empty for a state without a guard.

    `skipped_in_a_row` counts updates without a finite loss or gradient, those that
    `Guard.max_consecutive` limits.
    """
    if not isinstance(opt_state, GuardState):
        return {}
    return {
        "skipped": opt_state.skipped,
        "skipped_total": opt_state.skipped_total,
        "skipped_in_a_row": opt_state.not_finite_in_a_row,
    }
