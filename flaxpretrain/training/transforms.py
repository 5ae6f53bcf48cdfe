"""Gradient transformations that optax lacks, and optax's made to act on one layer at a time.

Layers are stacked on axis 0 of the leaves below "layers". Whatever looks at a whole tensor (trust
ratios, root mean squares, factored moments, orthogonalisation) must look at one layer's tensor,
or its result depends on how the layers happen to be stored.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from flaxpretrain.training.schedules import Schedule
from flaxpretrain.training.state import is_stacked, leaf_name, map_named

VECTORS = r"bias|norm"
"""Names of parameters that act elementwise, whatever their number of axes."""

OUTPUT_PROJECTIONS = r"(^|/)(out|output)(/|$)"
"""Names of kernels whose leading axes are all inputs, such as attention's [H, K, D]."""


def matching(pattern: str, wanted: bool = True) -> Callable[[PyTree], PyTree]:
    """A mask for optax: which leaves' names contain (or, `wanted` False, lack) the regex."""
    regex = re.compile(pattern) if pattern else re.compile(r"(?!)")
    return lambda tree: map_named(lambda name, _: bool(regex.search(name)) == wanted, tree)


def input_axes(name: str, ndim: int) -> int:
    """How many leading axes of one layer's parameter are the inputs of its matrix; 0: no matrix.

    Attention's q, k and v kernels [D, H, K] are matrices D x HK, its output [H, K, D] is HK x D.
    """
    if ndim < 2 or re.search(VECTORS, name):
        return 0
    return ndim - 1 if re.search(OUTPUT_PROJECTIONS, name) else 1


def _matrix(name: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """One layer's parameter as a matrix, or as a vector when it is none."""
    axes = input_axes(name, x.ndim)
    if axes:
        inputs = 1
        for size in x.shape[:axes]:
            inputs *= size
        return x.reshape(inputs, -1)
    return x.reshape(-1) if x.ndim else x


def per_layer(
    inner: optax.GradientTransformation, matrices: bool = False
) -> optax.GradientTransformation:
    """`inner` applied to every leaf alone, and to every layer of a stack alone.

    With `matrices`, `inner` sees kernels as matrices (`input_axes`) and biases as vectors. The
    state is a tree shaped like the parameters whose leaves are states of `inner`.
    """

    def view(name: str, x: Array) -> Array:
        return _matrix(name, x) if matrices else x

    def init_leaf(name: str, param: Array) -> Any:
        def init(x: Array) -> Any:
            return inner.init(view(name, x))

        return jax.vmap(init)(param) if is_stacked(name) else init(param)

    def update_leaf(name: str, update: Array, state: Any, param: Array) -> tuple[Array, Any]:
        def one(update: Array, state: Any, param: Array) -> tuple[Array, Any]:
            new: Any
            new, state = inner.update(view(name, update), state, view(name, param))
            return new.reshape(update.shape), state

        return (jax.vmap(one) if is_stacked(name) else one)(update, state, param)

    def init_fn(params: Any) -> Any:
        return map_named(init_leaf, params)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        paths, tree = jax.tree_util.tree_flatten_with_path(updates)
        results = [
            update_leaf(leaf_name(path), update, leaf_state, param)
            for (path, update), leaf_state, param in zip(
                paths, tree.flatten_up_to(state), tree.flatten_up_to(params), strict=True
            )
        ]
        return tree.unflatten([r[0] for r in results]), tree.unflatten([r[1] for r in results])

    return optax.GradientTransformation(init_fn, update_fn)


def scale_by_adam(
    b1: float, b2: float, eps: float, bias_correction: bool = True
) -> optax.GradientTransformation:
    """optax's Adam, or BERT's without bias correction: `m / (sqrt(v) + eps)`.

    Reference: google-research/bert optimization.py, AdamWeightDecayOptimizer.
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    if bias_correction:
        return adam

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(optax.safe_increment(state.count), mu, nu)

    return optax.GradientTransformation(adam.init, update_fn)


def scale_by_stable_adam(
    b1: float, b2: float, eps: float, weight_decay: float, decayed: Callable[[PyTree], PyTree]
) -> optax.GradientTransformation:
    """Adam plus decoupled decay, both divided per layer by `max(1, rms(g / sqrt(v)))`.

    `v` is the bias-corrected second moment, at least eps squared. Decay is included because the
    clipped rate multiplies it too.

    Reference: Wortsman et al. 2023, section 3.5 (https://arxiv.org/abs/2304.13013);
    warner-benjamin/optimi optimi/stableadamw.py, _single_param_stableadamw.
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        directions, state = adam.update(updates, state)
        second = optax.tree.bias_correction(state.nu, b2, state.count)

        def clipped(
            name: str, direction: Array, grad: Array, v: Array, param: Array, decay: bool
        ) -> Array:
            axes = tuple(range(1 if is_stacked(name) else 0, grad.ndim))
            squares = jnp.square(grad) / jnp.maximum(v, eps**2)
            rms = jnp.sqrt(jnp.mean(squares, axis=axes, keepdims=True))
            if decay:
                direction = direction + weight_decay * param
            return direction / jnp.maximum(rms, 1.0)

        return map_named(clipped, directions, updates, second, params, decayed(params)), state

    return optax.GradientTransformation(adam.init, update_fn)


def scale_by_depth(decay: float, offset: int, embeddings: str) -> optax.GradientTransformation:
    """Multiplies updates by `decay ** (n + offset - depth)`: lower layers learn more slowly.

    n is the number of layers. Embeddings (regex) have depth 0, layer i (from 0) depth i + 1, and
    everything else is a head with factor 1. With offset 1 the last layer has `decay ** 1`; with
    offset 2 it has `decay ** 2`, as google-research/electra does by a mistake that its authors
    kept so that results stay comparable.

    Reference: google-research/electra model/optimization.py, _get_layer_lrs.
    """

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        leaves, _ = jax.tree_util.tree_flatten_with_path(updates)
        stacks = [leaf.shape[0] for path, leaf in leaves if is_stacked(leaf_name(path))]
        deepest = max(stacks, default=0)

        def scaled(name: str, update: Array) -> Array:
            if is_stacked(name):
                count = update.shape[0]
                factors = decay ** (count + offset - jnp.arange(1.0, count + 1))
                return update * factors.reshape(count, *[1] * (update.ndim - 1))
            return update * decay ** (deepest + offset) if re.search(embeddings, name) else update

        return map_named(scaled, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


class RateState(NamedTuple):
    """The optimizer's own count of updates, and the learning rate of the next one."""

    count: Int[Array, ""]
    learning_rate: Float[Array, ""]


def scale_by_rate(
    peak: float, schedule: Schedule, total_steps: int
) -> optax.GradientTransformation:
    """Multiplies by minus the learning rate; the state names the next rate, to be logged.

    The count is of updates made: a step that the guard skips does not advance it.
    """

    def state_at(count: Any) -> RateState:
        return RateState(count, jnp.float32(peak) * schedule.factor(count, total_steps))

    def init_fn(params: Any) -> Any:
        return state_at(jnp.int32(0))

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # Not the rate in the state: a resumed run may have another number of steps.
        rate = state_at(state.count).learning_rate
        updates = jax.tree.map(lambda u: u * -rate, updates)
        return updates, state_at(optax.safe_increment(state.count))

    return optax.GradientTransformation(init_fn, update_fn)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner` with gradients, moments and arithmetic in float32 whatever the parameters are.

    Inside, JAX's standard promotion of dtypes holds: optax counts in int32 and relies on it.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return inner.init(optax.tree.cast(params, jnp.float32))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        dtypes = jax.tree.map(lambda p: p.dtype, params)
        with jax.numpy_dtype_promotion("standard"):
            updates = optax.tree.cast(updates, jnp.float32)
            params = optax.tree.cast(params, jnp.float32)
            updates, state = inner.update(updates, state, params, **extra)
        return jax.tree.map(lambda u, dtype: u.astype(dtype), updates, dtypes), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
