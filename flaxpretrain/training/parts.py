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

from flaxpretrain.models.partition import InParts
from flaxpretrain.training.state import is_stacked, map_named


def spec_of(sharding: NamedSharding) -> P:
    """The spec of a sharding."""
    return sharding.spec


def cut_along(sharding: NamedSharding, axis: str) -> int | None:
    """The dimension that lies in parts over a mesh axis of more than one device, if any."""
    if sharding.mesh.shape[axis] == 1:
        return None
    for dimension, axes in enumerate(sharding.spec):
        if axes == axis or (isinstance(axes, tuple) and axis in axes):
            return dimension
    return None


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
        if isinstance(value, InParts) and not is_stacked(name):
            return value.whole()
        return value

    return map_named(leaf, params, is_leaf=lambda value: isinstance(value, InParts))


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
    mesh = jax.tree.leaves(shardings)[0].mesh
    if update_shardings is None and mesh.shape["fsdp"] == 1:
        narrow = jax.tree.map(lambda g: g.astype(dtype), grads)
        grads, sums = jax.lax.psum((narrow, sums), "data")
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), sums
    one = functools.partial(_sum_of_one, dtype=dtype)
    grads = jax.tree.map(one, grads, shardings, update_shardings or shardings)
    return grads, jax.lax.psum(sums, rows_over(mesh.shape))


def _sum_of_one(
    grad: Array, sharding: NamedSharding, update: NamedSharding, *, dtype: Any
) -> Array:
    """The sum of one gradient, or the part of it that its update's sharding leaves here."""
    sizes, narrow = sharding.mesh.shape, grad.astype(dtype)
    summed = cut_along(sharding, "fsdp") is not None
    dimension = cut_along(update, "data")
    if dimension is None:
        axes = "data" if summed else rows_over(sizes)
        if summed and sizes["data"] == 1:
            return grad
        return jax.lax.psum(narrow, axes).astype(jnp.float32)
    if not summed and sizes["fsdp"] > 1:
        narrow = jax.lax.psum(narrow, "fsdp")
    scattered = jax.lax.psum_scatter(narrow, "data", scatter_dimension=dimension, tiled=True)
    return scattered.astype(jnp.float32)


def rows_over(sizes: Any) -> str | tuple[str, ...]:
    """The mesh axes over which rows lie, as collectives and specs name them."""
    return "data" if sizes["fsdp"] == 1 else ("data", "fsdp")
