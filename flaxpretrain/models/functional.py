"""Modules as functions of their parameters: the only file that splits or merges NNX modules.

Modules describe parameters and the forward pass; every transform (`jit`, `grad`, `scan`) is plain
JAX over nested dicts of arrays.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key, PyTree

from flaxpretrain.errors import UserError
from flaxpretrain.models.partition import gathered, is_in_parts, over_context

ATTENTION_CONTEXT = "attention_context"
"""Name under which attention's output is kept by the policies that save it."""

LAYER_PRODUCT = "layer_product"
"""Name of a product of 8 bits, scaled back: what policies keep in place of its wider sum."""

Policy = Callable[..., Any]

_POLICIES = jax.checkpoint_policies
_SAVE_ATTENTION = _POLICIES.save_only_these_names(ATTENTION_CONTEXT)
_SAVE_PRODUCTS = _POLICIES.save_only_these_names(LAYER_PRODUCT)
_SAVE_BOTH = _POLICIES.save_only_these_names(LAYER_PRODUCT, ATTENTION_CONTEXT)

_ONTO_HOST = {"offload_src": "device", "offload_dst": "pinned_host"}


def _offload_names(*names: str) -> Policy:
    return _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=(), names_which_can_be_offloaded=names, **_ONTO_HOST
    )


def _by_primitive(dots: Policy, names: Policy) -> Policy:
    """One policy for matrix products but those of 8 bits, which have names, another for names."""

    def policy(prim: Any, *args: Any, **params: Any) -> Any:
        if prim.name == "dot_general" and args[0].dtype.itemsize == 1:
            return False
        return (names if prim.name == "name" else dots)(prim, *args, **params)

    return policy


REMAT_POLICIES: dict[str, Policy | None] = {
    "none": None,
    "full": _POLICIES.nothing_saveable,
    "dots": _by_primitive(_POLICIES.dots_saveable, _SAVE_BOTH),
    "dots_no_batch": _by_primitive(_POLICIES.dots_with_no_batch_dims_saveable, _SAVE_PRODUCTS),
    "save_attention": _SAVE_ATTENTION,
    "dots_save_attention": _by_primitive(_POLICIES.dots_with_no_batch_dims_saveable, _SAVE_BOTH),
    "offload_dots": _by_primitive(
        _POLICIES.offload_dot_with_no_batch_dims(**_ONTO_HOST),
        _offload_names(ATTENTION_CONTEXT, LAYER_PRODUCT),
    ),
    "offload_attention": _offload_names(ATTENTION_CONTEXT),
}
"""What the backward pass finds saved, by name.

`none` saves everything, `full` only each layer's input. The `dots` policies save the results of
matrix products, `dots` attention's output among them, which spares the kernel's second forward
pass (`dots_no_batch`: not those between activations, such as attention scores and its output);
`save_attention` saves attention's output, which spares a flash kernel's second forward pass.
`offload_dots` and `offload_attention` move what `dots_save_attention` and `save_attention` save to
the host's memory, and back in the backward pass: device memory for transfers.
"""


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model runs on the hardware at hand; never what it computes, but for `matmul`.

    attention: name of an attention backend (`flaxpretrain.models.attention.BACKENDS`).
    remat: name of a policy in `REMAT_POLICIES`, applied per layer.
    scan: one compiled layer in a loop; False unrolls the layers, for more speed and longer
        compilation.
    matmul: number format of the layers' products with parameters, one of
        `flaxpretrain.hardware.MATMULS`; see `flaxpretrain.models.quantization`.
    platform: what jax calls the platform of the devices, where XLA needs another form of
        something to be fast there. Only `cpu` does.
    """

    attention: str = "xla"
    remat: str = "none"
    scan: bool = True
    matmul: str = "default"
    platform: str | None = None

    def __post_init__(self):
        if self.remat not in REMAT_POLICIES:
            raise UserError(
                f"remat: expected one of {', '.join(REMAT_POLICIES)}, got {self.remat!r}"
            )


_DEFAULT = Execution()
_EXECUTION: contextvars.ContextVar[Execution] = contextvars.ContextVar(
    "execution", default=_DEFAULT
)
_MATMUL: contextvars.ContextVar[str] = contextvars.ContextVar("matmul", default="default")


@contextlib.contextmanager
def executing(execution: Execution) -> Iterator[None]:
    """Traces every model inside the block the given way. Enter it inside the jitted function."""
    with _set(_EXECUTION, execution):
        yield


@contextlib.contextmanager
def _set(variable: contextvars.ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def execution() -> Execution:
    """How models are traced here."""
    return _EXECUTION.get()


def multiplying(matmul: str) -> contextlib.AbstractContextManager[None]:
    """Traces products with parameters inside the block in one of `hardware.MATMULS`."""
    return _set(_MATMUL, matmul)


def layer_matmul() -> str:
    """Number format of the products with parameters traced here: `default` outside of layers."""
    return _MATMUL.get()


@dataclasses.dataclass(frozen=True)
class Model:
    """A network as pure functions over plain nested dicts of arrays; see `model_of`."""

    build: Callable[[nnx.Rngs], nnx.Module]

    def init(self, key: Key[Array, ""]) -> PyTree[Array]:
        """Fresh parameters, a nested dict; may be jitted."""
        return nnx.to_pure_dict(nnx.split(self.build(nnx.Rngs(key)))[1])

    def abstract(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the parameters, without allocating any."""
        return nnx.to_pure_dict(self._described[1])

    def bind(self, params: PyTree) -> nnx.Module:
        """The module that holds these parameters, to be used inside a trace."""
        return nnx.merge(self._described[0], nnx.State(params))

    @functools.cached_property
    def _described(self) -> tuple[Any, Any]:
        return nnx.split(nnx.eval_shape(lambda: self.build(nnx.Rngs(0))))


def model_of(build: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """The functions of the module that `build` constructs."""
    return Model(build)


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` modules as one, whose every array has a leading layer axis."""
    keys = jax.random.split(rngs.params(), count)
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return nnx.merge(graph, jax.vmap(lambda key: nnx.split(make(nnx.Rngs(key)))[1])(keys))


def layer(layers: nnx.Module, index: int) -> nnx.Module:
    """One module of a stack."""
    graph, state = nnx.split(layers)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[index], state))


def apart(layers: nnx.Module) -> tuple[Any, ...]:
    """The modules of a stack one by one, for loops over tokens: sliced once, before the loop."""
    count = jax.tree.leaves(nnx.split(layers)[1])[0].shape[0]
    return tuple(layer(layers, index) for index in range(count))


def scan(
    layers: nnx.Module,
    apply: Callable[..., Array],
    x: Array,
    keys: Key[Array, "B"] | None = None,
    *,
    each: PyTree | None = None,
    remat: str | None = None,
    start: int = 0,
    stop: int | None = None,
) -> Array:
    """Applies layers `start` to `stop` of a stack in turn: `x = apply(layer, x, layer_keys)`.

    Each layer gets keys of its own, by its number, and where `each` is given, its own part of
    that as a fourth argument: arrays whose leading axis counts layers. Remat policy and looping
    are those of the surrounding `executing` block unless `remat` names another policy.
    """
    way = execution() if remat is None else dataclasses.replace(execution(), remat=remat)
    graph, state = nnx.split(layers)
    count = jax.tree.leaves(state)[0].shape[0]
    numbers = jnp.arange(count, dtype=jnp.uint32)[start:stop]
    state, more = jax.tree.map(lambda leaf: leaf[start:stop], (state, each))

    def body(x, inputs):
        state, number, more = inputs
        further = () if each is None else (more,)
        with multiplying(way.matmul):
            layer = nnx.merge(graph, gathered(state))
            x = apply(layer, over_context(x), fold(keys, number), *further)
        return over_context(x), None

    if way.remat != "none":
        # Inside a scan the loop itself keeps XLA from undoing the rematerialisation.
        body = jax.checkpoint(body, policy=REMAT_POLICIES[way.remat], prevent_cse=not way.scan)
    if way.scan:
        return jax.lax.scan(body, x, (state, numbers, more))[0]
    for i in range(numbers.shape[0]):
        x, _ = body(kept(x), jax.tree.map(lambda leaf, i=i: leaf[i], (state, numbers, more)))
    return x


def kept(x: Array) -> Array:
    """`x`, which XLA:CPU then does not compute again for each of its uses.

    It fuses a sum of residuals into whatever reads it, and with it the sums of the layers before.
    jax 0.10's takes the barrier away before it fuses, so there it has no effect.
    """
    return jax.lax.optimization_barrier(x) if execution().platform == "cpu" else x


def fold(keys: Key[Array, "B"] | None, number: Any) -> Key[Array, "B"] | None:
    """Keys for the part of a network that has this number; None stays None."""
    if keys is None:
        return None
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)


def cast(params: PyTree, dtype: Any) -> PyTree:
    """Parameters in the dtype to compute in; those of modules named `*norm` keep theirs.

    Norms compute in float32 whatever they are given, so rounding their scale would gain nothing.
    """

    def leaf(path: tuple[Any, ...], value: Any) -> Any:
        if any(str(getattr(entry, "key", entry)).endswith("norm") for entry in path):
            return value
        if is_in_parts(value):
            return dataclasses.replace(value, dtype=dtype)
        return value.astype(dtype) if jnp.issubdtype(value.dtype, jnp.floating) else value

    return jax.tree_util.tree_map_with_path(leaf, params, is_leaf=is_in_parts)
