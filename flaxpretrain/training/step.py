"""The train step and the evaluation step: pure functions of arrays, jitted once a shape.

On a mesh of `data` and `fsdp` each device computes on its own rows and accumulates its gradients
over the microbatches alone, and one sum over the `data` axis ends the step; `training.parts` has
how they gather and sum. Meshes with tensor or context axes are the partitioner's altogether: XLA's
partial manual mode still aborts on gathers and scatters of sharded tables.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree, Shaped

from flaxpretrain.errors import UserError
from flaxpretrain.models.functional import Execution, Model, cast, executing
from flaxpretrain.objectives.objective import Objective, Sum
from flaxpretrain.training.loss_scale import loss_scale, unscaled, update_figures
from flaxpretrain.training.optimizers import learning_rate
from flaxpretrain.training.parts import gather_outside_layers, in_parts, reduced, spec_of
from flaxpretrain.training.sharding import ROW_AXES, batch_sharding
from flaxpretrain.training.state import TrainState

Sums = dict[str, Sum]
DEFAULT_EXECUTION = Execution()
Arrays = Mapping[str, Shaped[Array, "B ..."]]


class StepMetrics(NamedTuple):
    """What a step reports: the objective's sums over the batch, and scalars of the step."""

    sums: Sums
    figures: dict[str, Shaped[Array, ""]]


def check_divisible(batch_size: int, microbatches: int, mesh: Mesh) -> None:
    """Raises UserError unless every device gets the same number of rows of every microbatch."""
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (microbatches * groups):
        raise UserError(
            f"batch_size {batch_size} is not divisible by microbatches * data * fsdp = "
            f"{microbatches} * {mesh.shape['data']} * {mesh.shape['fsdp']} = "
            f"{microbatches * groups}: change batch_size, microbatches or the mesh"
        )


def strided_microbatches(batch: Arrays, count: int) -> dict[str, Shaped[Array, "A b ..."]]:
    """Splits the rows so that microbatch a holds the rows a, a + A, a + 2A, ...

    Blocks of consecutive rows would live on few devices each and cost twice the FLOPs.
    """

    def split(x: Array) -> Array:
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    return {name: split(x) for name, x in batch.items()}


def _weighted(total: Array, weight: Array) -> Array:
    """`total / weight`, and 0 where nothing was measured."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)


def combine(objective: Objective, sums: Sums, weights: Mapping[str, Array]) -> Array:
    """The scalar loss: the objective's terms, each divided by its global weight."""
    terms = [c * _weighted(sums[t].total, weights[t]) for t, c in objective.terms.items()]
    return jnp.sum(jnp.stack(terms))


def check_reduction(dtype: Any, mesh: Mesh) -> None:
    """Raises UserError unless the partitioner sums gradients in this format: in float32 only."""
    if dtype != jnp.float32:
        raise UserError(
            f"precision.reduce: gradients are summed in {jnp.dtype(dtype)} only on a mesh without "
            f"tensor and context axes; got {dict(mesh.shape)}: set precision.reduce to float32"
        )


def over_microbatches(
    gradient: Callable[[Arrays], tuple[PyTree, Sums]], micros: Arrays, count: int
) -> tuple[PyTree, Sums]:
    """Gradients and sums over all microbatches [A, b, ...], added up one after the other."""
    first = jax.tree.map(lambda x: x[0], micros)
    if count == 1:
        # No loop of one: XLA:TPU would inline it and then run the layers' backward loop twice.
        return gradient(first)

    def accumulate(total: PyTree, micro: Arrays) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, gradient(micro)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, first))
    return jax.lax.scan(accumulate, zeros, micros)[0]


def make_train_step(
    objective: Objective,
    model: Model,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    shardings: PyTree[NamedSharding],
    *,
    microbatches: int = 1,
    compute_dtype: Any = jnp.float32,
    reduce_dtype: Any = jnp.float32,
    execution: Execution = DEFAULT_EXECUTION,
    update_shardings: PyTree[NamedSharding] | None = None,
) -> Callable[[TrainState, Arrays], tuple[TrainState, StepMetrics]]:
    """`train_step(state, batch)`, to be jitted with the state donated.

    Parameters lie by `shardings`; gradients are summed over devices in `reduce_dtype`. With
    `update_shardings` each parameter's update is computed in these slices, and gathered after; None
    where the update lies as the parameter does.

    Raises:
        UserError: another `reduce_dtype` than float32 on a mesh whose sums the partitioner makes.
    """
    by_rows = mesh.shape["data"] * mesh.shape["fsdp"] == mesh.size
    if not by_rows:
        check_reduction(reduce_dtype, mesh)

    def local_sums(
        params: PyTree,
        batch: Arrays,
        key: Array,
        weights: Mapping[str, Array],
        scale: Array | None,
    ) -> tuple[PyTree, Sums]:
        def scaled_loss(params: PyTree, micro: Arrays) -> tuple[Array, Sums]:
            if by_rows:
                params = in_parts(params, shardings, reduce_dtype)
            params = gather_outside_layers(cast(params, compute_dtype))
            with executing(execution):
                sums = objective.loss(model, params, micro, key)
            loss = combine(objective, sums, weights)
            return loss if scale is None else loss * scale, sums

        micros = strided_microbatches(batch, microbatches)
        if not by_rows:
            spec = P(None, ROW_AXES)
            micros = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec), micros)
        gradient = jax.grad(scaled_loss, has_aux=True)
        return over_microbatches(functools.partial(gradient, params), micros, microbatches)

    def reduced_sums(*arguments: Any) -> tuple[PyTree, Sums]:
        if not by_rows:
            return local_sums(*arguments)
        places = jax.tree.map(spec_of, shardings)
        ends = jax.tree.map(spec_of, update_shardings or shardings)
        return jax.shard_map(
            lambda *local: reduced(*local_sums(*local), shardings, update_shardings, reduce_dtype),
            mesh=mesh,
            in_specs=(places, spec_of(batch_sharding(mesh)), P(), P(), P()),
            out_specs=(ends, P()),
            check_vma=False,  # gradients stay unreduced on purpose until the one sum
        )(*arguments)

    def sliced(tree: PyTree) -> PyTree:
        if update_shardings is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, update_shardings)

    def train_step(state: TrainState, batch: Arrays) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(state.key, state.step)
        weights = objective.weights(batch)
        scale = loss_scale(state.opt_state)
        grads, sums = reduced_sums(state.params, batch, key, weights, scale)
        grads = unscaled(grads, scale)
        loss = combine(objective, sums, weights)
        with jax.named_scope("optimizer"):
            grads, old = sliced(grads), sliced(state.params)
            updates, opt_state = optimizer.update(grads, state.opt_state, old, value=loss)
            params = optax.apply_updates(old, updates)
            grad_norm = optax.tree.norm(grads)
        figures = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate(state.opt_state),
            "tokens": objective.tokens(batch),
        } | update_figures(opt_state)
        new_state = TrainState(state.step + 1, params, opt_state, state.key)
        return new_state, StepMetrics(sums, figures)

    return train_step


def make_eval_step(
    objective: Objective,
    model: Model,
    *,
    compute_dtype: Any = jnp.float32,
    execution: Execution = DEFAULT_EXECUTION,
) -> Callable[[PyTree, Arrays], Sums]:
    """`eval_step(params, batch)`: the sums of a batch, without dropout."""

    def eval_step(params: PyTree, batch: Arrays) -> Sums:
        with executing(execution):
            return objective.loss(model, cast(params, compute_dtype), batch, None)

    return eval_step
