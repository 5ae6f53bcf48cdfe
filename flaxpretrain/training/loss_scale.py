"""Dynamic loss scaling: keeps small gradients of float16 from becoming zero.

The loss is multiplied by a scale before the backward pass and the gradients are divided by it
after. The scale is as large as it can be: it falls whenever gradients overflow, whose update the
guard skips, and grows after a while without.

Reference: https://arxiv.org/abs/1710.03740, sections 3.2 and 4.1; torch.amp.GradScaler for the
numbers.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree, Shaped

from flaxpretrain.training.guard import skip_figures


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossScaling:
    """How the scale moves.

    initial: the first scale. factor: what it is multiplied by, or divided by after an overflow.
    growth_steps: steps in a row with finite gradients after which it grows. least, most: its ends.
    """

    initial: float = 2.0**16
    factor: float = 2.0
    growth_steps: int = 2000
    least: float = 1.0
    most: float = 2.0**24


class LossScaleState(NamedTuple):
    """The scale of the next step, finite steps since it last moved, and what is scaled for."""

    inner: PyTree
    scale: Float[Array, ""]
    finite_in_a_row: Int[Array, ""]


def loss_scaled(
    inner: optax.GradientTransformation, scaling: LossScaling
) -> optax.GradientTransformationExtraArgs:
    """`inner`, a guarded optimizer, with a loss scale beside its state that follows the gradients.

    It is given gradients that are divided by the scale already.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> LossScaleState:
        return LossScaleState(inner.init(params), jnp.float32(scaling.initial), jnp.int32(0))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        finite = jnp.isfinite(optax.tree.norm(updates))
        grows = state.finite_in_a_row + 1 >= scaling.growth_steps
        grown = jnp.where(grows, state.scale * scaling.factor, state.scale)
        scale = jnp.where(finite, grown, state.scale / scaling.factor)
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        return updates, LossScaleState(
            inner=inner_state,
            scale=jnp.clip(scale, scaling.least, scaling.most),
            finite_in_a_row=jnp.where(finite & ~grows, state.finite_in_a_row + 1, 0),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def loss_scale(opt_state: PyTree) -> Float[Array, ""] | None:
    """The scale of the next step; None where there is none."""
    return opt_state.scale if isinstance(opt_state, LossScaleState) else None


def unscaled(grads: PyTree, scale: Float[Array, ""] | None) -> PyTree:
    """Gradients of the loss from those of the loss times `scale`."""
    return grads if scale is None else jax.tree.map(lambda g: g / scale, grads)


def update_figures(opt_state: PyTree) -> dict[str, Shaped[Array, ""]]:
    """What is reported of an update: the next step's `loss_scale` and the guard's figures."""
    if not isinstance(opt_state, LossScaleState):
        return skip_figures(opt_state)
    return {"loss_scale": opt_state.scale} | skip_figures(opt_state.inner)
