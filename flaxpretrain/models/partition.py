"""Where activations lie on the surrounding mesh, as far as that is not left to the partitioner.

Models know the names of mesh axes and nothing else of the mesh: rows lie over `data` and `fsdp`,
heads over `tensor`, the tokens of a row over `context`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeGuard

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree

CONTEXT = "context"
"""The mesh axis over which the tokens of a row lie."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("part",),
    meta_fields=("axis", "dtype", "reduce_dtype"),
)
@dataclasses.dataclass(frozen=True)
class InParts:
    """A device's part of a parameter, inside a `shard_map` over the mesh's `fsdp`.

    part: what lies here.
    axis: along which it is cut, counted from the last, -1.
    dtype: to gather and compute in.
    reduce_dtype: to sum gradients in over the devices, each of which gets its part of the sum.
    """

    part: Array
    axis: int
    dtype: Any
    reduce_dtype: Any

    def whole(self) -> Array:
        """The parameter, gathered from the devices that have its parts."""
        return _gather(self.part, self.axis, self.dtype, self.reduce_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(part: Array, axis: int, dtype: Any, reduce_dtype: Any) -> Array:
    return jax.lax.all_gather(part.astype(dtype), "fsdp", axis=part.ndim + axis, tiled=True)


def _gather_saving(part: Array, axis: int, dtype: Any, reduce_dtype: Any) -> tuple[Array, Array]:
    return _gather(part, axis, dtype, reduce_dtype), part[:0]


def _gather_gradients(
    axis: int, dtype: Any, reduce_dtype: Any, empty: Array, gradient: Array
) -> tuple[Array]:
    summed = jax.lax.psum_scatter(
        gradient.astype(reduce_dtype),
        "fsdp",
        scatter_dimension=gradient.ndim + axis,
        tiled=True,
    )
    return (summed.astype(empty.dtype),)


_gather.defvjp(_gather_saving, _gather_gradients)


def is_in_parts(leaf: Any) -> TypeGuard[InParts]:
    """Whether a leaf of a tree of parameters is one that lies in parts."""
    return isinstance(leaf, InParts)


def gathered(params: PyTree) -> PyTree:
    """Parameters with those that lie `InParts` gathered: of a layer as it begins, and no sooner."""
    return jax.tree.map(
        lambda leaf: leaf.whole() if is_in_parts(leaf) else leaf, params, is_leaf=is_in_parts
    )


def context_size() -> int:
    """Into how many parts the surrounding mesh cuts the tokens of a row."""
    return _size(CONTEXT)


def undivided() -> bool:
    """Whether the surrounding mesh leaves each token's heads, and each row, on one device."""
    return _size("tensor") == 1 and context_size() == 1


def divides(count: int) -> bool:
    """Whether each device of the surrounding mesh's `tensor` axis gets as many of so many parts."""
    return count % _size("tensor") == 0


def _size(axis: str) -> int:
    """Of an axis of the surrounding mesh that is left to the partitioner."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if axis in mesh.manual_axes else mesh.shape.get(axis, 1)


def over_context(x: Array, axis: int = 1) -> Array:
    """`x` with this axis, of tokens, over the mesh's `context`, where it divides them.

    Other axes lie as the partitioner likes.
    """
    return _placed(x, axis, CONTEXT) if x.shape[axis] % context_size() == 0 else x


def whole_rows(x: Array, axis: int) -> Array:
    """`x` with all tokens, along this axis, on every device of the mesh's `context`."""
    return _placed(x, axis, None)


def flat(x: Array) -> Array:
    """`x` [..., D] as rows of D; as it is where tokens lie in parts, which that would gather."""
    return x.reshape(-1, x.shape[-1]) if context_size() == 1 else x


def _placed(x: Array, axis: int, over: str | None) -> Array:
    if context_size() == 1:
        return x
    free = PartitionSpec.UNCONSTRAINED
    spec = PartitionSpec(*(over if i == axis else free for i in range(x.ndim)))
    return jax.lax.with_sharding_constraint(x, spec)


def on_each_device(
    function: Callable[..., Array], layout: str, heads: int, length: int, *, arrays: int = 3
) -> Callable[..., Array]:
    """Maps an attention kernel over the axes of the surrounding mesh that are still automatic.

    Rows lie over `data` and `fsdp`, heads over `tensor` where it divides them; else each device of
    that axis computes them all, as for a small generator with a single head. Queries lie over
    `context`, keys and values are gathered there. Its arguments are so many `arrays`, the query
    first, and the segments of both sides.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = [axis for axis in mesh.axis_names if axis not in mesh.manual_axes]
    if not free:
        return function
    rows = tuple(axis for axis in ("data", "fsdp") if axis in free) or None
    split = "tensor" in free and heads % mesh.shape["tensor"] == 0
    axes = {"B": rows, "H": "tensor" if split else None}
    tokens = CONTEXT if context_size() > 1 and length % context_size() == 0 else None
    key = PartitionSpec(*(axes.get(letter) for letter in layout))
    query = PartitionSpec(*((axes | {"L": tokens}).get(letter) for letter in layout))
    return jax.shard_map(
        function,
        in_specs=(
            query,
            *(key for _ in range(arrays - 1)),
            PartitionSpec(rows, tokens),
            PartitionSpec(rows),
        ),
        out_specs=query,
        axis_names=set(free),
        check_vma=False,
    )
