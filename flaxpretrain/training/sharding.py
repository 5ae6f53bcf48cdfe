"""The devices of a run, and where each array lies on them.

Axes: `data` (rows), `fsdp` (rows, and slices of the state), `context` (tokens of a row), `tensor`
(slices of the layers). The optimizer's state may lie in slices over `data` as well. Axis types are
Auto on purpose: the partitioner places what no rule names. Parameters follow rules beside their
architecture, pairs of a regex of parameter names and the mesh axis of each dimension.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree, Shaped

from flaxpretrain import config
from flaxpretrain.errors import UserError
from flaxpretrain.shapes import Batch
from flaxpretrain.training.state import is_stacked, map_named, named_leaves

AXES = ("data", "fsdp", "context", "tensor")
"""From the one that communicates least to the one whose devices must be neighbours.

A mesh has `context` only where several devices share a row.
"""

ROW_AXES = ("data", "fsdp")
"""Rows of a batch lie along both axes that do not split the layers."""

ROWS = P(ROW_AXES)

REPLICATION_LIMIT = 16 * 2**20
"""Bytes that a replicated tensor may have on a mesh that could split it."""

REPLICATED = "replicated"
"""In the place of a rule's dimensions: a whole copy on every device on purpose, however large."""

Axis = str | tuple[str, ...] | None
Rules = Sequence[tuple[str, tuple[Axis, ...] | str]]


def mesh_of(settings: config.Mesh, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that a run asks for, of all devices or of those given; see `make_mesh`."""
    sizes = (settings.data, settings.fsdp, settings.tensor)
    return make_mesh(*sizes, devices=devices, context=settings.context)


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
    *,
    context: int = 1,
) -> Mesh:
    """The mesh of all devices, or of those given; one size may be -1, for the rest.

    On several TPU slices the `data` axis goes across slices, the others stay inside one.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
    asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    known = math.prod(size for size in sizes.values() if size != -1)
    rest = [axis for axis, size in sizes.items() if size == -1]
    if len(rest) == 1 and known > 0 and len(devices) % known == 0:
        sizes[rest[0]] = len(devices) // known
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"mesh {asked} does not fit {len(devices)} devices: the sizes must multiply to that "
            "number; -1 (at most once) takes what is left"
        )
    if sizes["context"] == 1:
        del sizes["context"]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    axes, types = tuple(sizes), (AxisType.Auto,) * len(sizes)
    if slices == 1:
        return jax.make_mesh(tuple(sizes.values()), axes, axis_types=types, devices=devices)
    if sizes["data"] % slices:
        raise UserError(
            f"mesh.data is {sizes['data']}, which is not divisible by the {slices} TPU slices; "
            "fsdp, context and tensor must fit inside one slice"
        )
    inside = sizes | {"data": sizes["data"] // slices}
    across = dict.fromkeys(axes, 1) | {"data": slices}
    grid = mesh_utils.create_hybrid_device_mesh(
        tuple(inside.values()), tuple(across.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, axes, axis_types=types)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every array of a batch: its leading axis over `data` and `fsdp`."""
    return NamedSharding(mesh, ROWS)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def state_shardings(
    state: PyTree, rules: Rules, mesh: Mesh, *, shard_optimizer: bool = False
) -> PyTree[NamedSharding]:
    """The sharding of every leaf of an abstract `TrainState`.

    Parameters follow the first rule whose regex occurs in their name; without any rules, each
    has its largest divisible dimension over `fsdp`, never the layers' axis. Leaves of the
    optimizer's state that are named and shaped like a parameter lie as its update does
    (`update_shardings`); others are replicated.

    Raises:
        UserError: a parameter that no rule claims, a rule that does not fit its parameter, or a
            large tensor that would be replicated without a rule that says so.
    """
    shapes = {name: leaf.shape for name, leaf in named_leaves(state.params).items()}
    specs = _param_specs(state.params, rules, mesh)
    updates = named_leaves(
        update_shardings(state.params, rules, mesh, shard_optimizer=shard_optimizer)
    )
    following = _followers({name: s.spec for name, s in updates.items()}, shapes)
    shardings = type(state)(
        step=replicated(mesh),
        params=map_named(lambda name, _: NamedSharding(mesh, specs[name]), state.params),
        opt_state=map_named(
            lambda name, leaf: NamedSharding(mesh, following(name, leaf)), state.opt_state
        ),
        key=replicated(mesh),
    )
    check_replication(state, shardings, rules, mesh, shard_optimizer=shard_optimizer)
    return shardings


def update_shardings(
    params: PyTree, rules: Rules, mesh: Mesh, *, shard_optimizer: bool = False
) -> PyTree[NamedSharding]:
    """Where the update of each parameter is computed: where it lies, or split over `data` as well.

    Vectors, biases of heads among them, are not divided further.
    """
    specs = _param_specs(params, rules, mesh)

    def place(name: str, leaf: Any) -> NamedSharding:
        spec = specs[name]
        if shard_optimizer:
            spec = _split_further(name, leaf.shape, spec, mesh)
        return NamedSharding(mesh, spec)

    return map_named(place, params)


def _param_specs(params: PyTree, rules: Rules, mesh: Mesh) -> dict[str, P]:
    leaves = named_leaves(params)
    return {name: _param_spec(name, leaf.shape, rules, mesh) for name, leaf in leaves.items()}


def _param_spec(name: str, shape: tuple[int, ...], rules: Rules, mesh: Mesh) -> P:
    if not rules:
        return _default_spec(name, shape, mesh)
    for pattern, dimensions in rules:
        if not re.search(pattern, name):
            continue
        if isinstance(dimensions, str):
            if dimensions != REPLICATED:
                raise UserError(
                    f"sharding rule {pattern!r}: expected a mesh axis for each dimension, or "
                    f"{REPLICATED!r}; got {dimensions!r}"
                )
            return P()
        if len(dimensions) != len(shape):
            raise UserError(
                f"sharding rule {pattern!r} names {len(dimensions)} dimensions, but {name} has "
                f"shape {shape}: correct the rule, or put a narrower one before it"
            )
        _check_dimensions(name, shape, dimensions, mesh)
        return P(*dimensions)
    raise UserError(
        f"parameter {name} {shape} is claimed by no sharding rule: add one to the rules beside "
        "its architecture"
    )


def axes_of(axis: Axis) -> tuple[str, ...]:
    """The mesh axes that split one dimension."""
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def _check_dimensions(
    name: str, shape: tuple[int, ...], dimensions: Sequence[Axis], mesh: Mesh
) -> None:
    for index, (size, axis) in enumerate(zip(shape, dimensions, strict=True)):
        for unknown in set(axes_of(axis)) - set(mesh.shape):
            raise UserError(
                f"sharding of {name}: no mesh axis {unknown!r}; known: {', '.join(mesh.shape)}"
            )
        parts = math.prod(mesh.shape[a] for a in axes_of(axis))
        if size % parts:
            heads = axis == "tensor" and re.search(r"attention/(query|key|value|out)/", name)
            what = f"its {size} heads are" if heads else f"dimension {index} of size {size} is"
            raise UserError(
                f"parameter {name} {shape}: {what} not divisible by mesh "
                f"{' * '.join(axes_of(axis))} = {parts}; change the mesh or the model's sizes"
            )


def _default_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The largest divisible dimension over `fsdp`; vectors are not worth the gathering."""
    return _split(name, shape, P(), "fsdp", mesh)


def _split_further(name: str, shape: tuple[int, ...], spec: P, mesh: Mesh) -> P:
    """The spec with `data` beside what splits the dimension that is still the largest."""
    if mesh.shape["data"] == 1 or name.endswith(("bias", "scale")):
        return spec
    return _split(name, shape, spec, "data", mesh)


def _split(name: str, shape: tuple[int, ...], spec: P, axis: str, mesh: Mesh) -> P:
    """The spec with `axis` on the largest dimension of a shard that it divides, layers excepted."""
    first = 1 if is_stacked(name) else 0
    if len(shape) - first < 2:
        return spec
    dimensions = [*spec, *[None] * (len(shape) - len(spec))]
    left = [
        size // math.prod(mesh.shape[a] for a in axes_of(axes))
        for size, axes in zip(shape, dimensions, strict=True)
    ]
    divisible = [i for i in range(first, len(shape)) if left[i] % mesh.shape[axis] == 0]
    if not divisible:
        return spec
    largest = max(divisible, key=lambda i: left[i])
    dimensions[largest] = (*axes_of(dimensions[largest]), axis)
    last = max(i for i, axes in enumerate(dimensions) if axes)
    return P(*dimensions[: last + 1])


def _followers(
    specs: Mapping[str, P], shapes: Mapping[str, tuple[int, ...]]
) -> Callable[[str, Any], P]:
    """The spec of a leaf of the optimizer's state: its parameter's, where the shapes agree."""

    def spec_of(name: str, leaf: Any) -> P:
        followed = followed_parameter(name, specs)
        if followed is None or leaf.shape != shapes[followed]:
            return P()
        return specs[followed]

    return spec_of


def followed_parameter(name: str, parameters: Collection[str]) -> str | None:
    """The parameter that a leaf of the optimizer's state belongs to, by their names."""
    parts = name.split("/")
    # The parameter's name is a run of parts of the leaf's; the longest one is the right one.
    for length in range(len(parts), 0, -1):
        for start in range(len(parts) - length + 1):
            candidate = "/".join(parts[start : start + length])
            if candidate in parameters:
                return candidate
    return None


def check_replication(
    state: PyTree, shardings: PyTree, rules: Rules, mesh: Mesh, *, shard_optimizer: bool = False
) -> None:
    """Raises UserError when a tensor over 16 MiB is replicated on a mesh that could split it.

    A rule that says `REPLICATED` means it; the optimizer's state of that parameter may be, too.
    """
    whole = {
        name
        for name in named_leaves(state.params)
        if next((d for p, d in rules if re.search(p, name)), None) == REPLICATED
    }
    splits = mesh.shape["fsdp"] * mesh.shape["tensor"] > 1
    splits_optimizer = splits or (shard_optimizer and mesh.shape["data"] > 1)
    for (name, leaf), sharding in zip(
        named_leaves(state).items(), jax.tree.leaves(shardings), strict=True
    ):
        if not (splits_optimizer if name.startswith("opt_state/") else splits):
            continue
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or followed_parameter(name, whole):
            continue
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        if sharding.is_fully_replicated and size > REPLICATION_LIMIT:
            axes = ", ".join(f"{axis}={parts}" for axis, parts in mesh.shape.items())
            raise UserError(
                f"{name} {leaf.shape} ({size / 2**20:.0f} MiB) would be replicated on every "
                f"device of a mesh with {axes}: give it a sharding rule ({REPLICATED!r} where that "
                "is meant), or sizes that the mesh divides"
            )


def process_rows(mesh: Mesh, batch_size: int) -> slice:
    """The rows of a global batch that this process must load.

    They are the smallest contiguous range that covers its devices' rows; processes whose devices
    differ along `tensor` or `context` only load the same rows.

    Raises:
        UserError: the batch is not divisible by data * fsdp.
    """
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % groups:
        raise UserError(
            f"batch_size {batch_size} is not divisible by mesh data * fsdp = "
            f"{mesh.shape['data']} * {mesh.shape['fsdp']} = {groups}"
        )
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    ranges = [index[0].indices(batch_size) for index in indices if index is not None]
    return slice(min(r[0] for r in ranges), max(r[1] for r in ranges))


def to_device(
    local: Batch, mesh: Mesh, global_batch_size: int
) -> dict[str, Shaped[Array, "rows ..."]]:
    """The global batch as device arrays, from this process's rows of it (`process_rows`)."""
    sharding, first = batch_sharding(mesh), process_rows(mesh, global_batch_size).start

    def put(array: np.ndarray) -> Array:
        def rows_of(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(global_batch_size)
            return array[start - first : stop - first]

        shape = (global_batch_size, *array.shape[1:])
        return jax.make_array_from_callback(shape, sharding, rows_of)

    return {name: put(array) for name, array in local.items()}
