"""Parameters in parts over `fsdp`, and gradients summed over devices, inside a `shard_map`.

A device gathers a layer's parameters when it needs them, in the backward pass anew unless remat
saves all, and the gather's own gradient leaves it its part of the sum over `fsdp`. What lies whole,
and the axis `data`, are summed after the last microbatch. Left to the partitioner, activations went
from device to device where parameters should, products were cut into slices narrower than a matrix
unit, and every microbatch paid for a reduction of all gradients.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from flaxpretrain.models.partition import InParts, gathered, is_in_parts
from flaxpretrain.training.sharding import ROW_AXES, axes_of
from flaxpretrain.training.state import is_stacked, map_named


def spec_of(sharding: NamedSharding) -> P:
    """The spec of a sharding, without axes of one device, which cut nothing."""
    cutting = [
        tuple(axis for axis in axes_of(axes) if sharding.mesh.shape[axis] > 1)
        for axes in sharding.spec
    ]
    return P(*(axes or None for axes in cutting))


def cut_along(sharding: NamedSharding, axis: str) -> int | None:
    """The dimension that lies in parts over a mesh axis of more than one device, if any."""
    return next((i for i, axes in enumerate(spec_of(sharding)) if axis in axes_of(axes)), None)


def in_parts(
    params: PyTree[Array], shardings: PyTree[NamedSharding], reduce_dtype: Any
) -> PyTree[Array | InParts]:
    """A device's parts of the parameters, to be gathered when they are needed."""

    def leaf(name: str, value: Array, sharding: NamedSharding) -> Array | InParts:
        dimension = cut_along(sharding, "fsdp")
        if dimension is None:
            return value
        return InParts(value, dimension - value.ndim, value.dtype, reduce_dtype)

    return map_named(leaf, params, shardings)


def gather_outside_layers(params: PyTree[Array | InParts]) -> PyTree[Array | InParts]:
    """The parameters, all but those of layers gathered; these `functional.scan` gathers in turn."""

    def leaf(name: str, value: Array | InParts) -> Array | InParts:
        return value if is_stacked(name) else gathered(value)

    return map_named(leaf, params, is_leaf=is_in_parts)


def reduced(
    grads: PyTree[Array],
    sums: PyTree[Array],
    shardings: PyTree[NamedSharding],
    update_shardings: PyTree[NamedSharding] | None,
    dtype: Any,
) -> tuple[PyTree[Array], PyTree[Array]]:
    """Sums over the devices that share a batch: of gradients, the part that this device updates.

    Gradients travel in `dtype`; they are float32 before and after. Those of parameters in parts are
    summed over `fsdp` already.
    """
    one = functools.partial(_sum_of_one, dtype=dtype)
    grads = jax.tree.map(one, grads, shardings, update_shardings or shardings)
    return grads, jax.lax.psum(sums, ROW_AXES)


def _sum_of_one(
    grad: Array, sharding: NamedSharding, update: NamedSharding, *, dtype: Any
) -> Array:
    """The sum of one gradient, or the part of it that its update's sharding leaves here."""
    sizes = sharding.mesh.shape
    summed = cut_along(sharding, "fsdp") is not None  # over `fsdp`, by the gather's gradient
    if summed and sizes["data"] == 1:
        return grad
    dimension, narrow = cut_along(update, "data"), grad.astype(dtype)
    if dimension is None:
        return jax.lax.psum(narrow, "data" if summed else ROW_AXES).astype(jnp.float32)
    narrow = jax.lax.psum_scatter(narrow, "data", scatter_dimension=dimension, tiled=True)
    if not summed and sizes["fsdp"] > 1:
        narrow = jax.lax.psum(narrow, "fsdp")
    return narrow.astype(jnp.float32)
