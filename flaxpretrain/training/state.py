"""What a training step maps to itself, and names for the leaves of a tree."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Int, Key, PyTree

LAYERS = "layers"
"""Every leaf below a module of this name is a stack: axis 0 counts layers."""


class TrainState(NamedTuple):
    """All that a run needs to go on, besides its dataset and configuration.

    `params` are plain nested dicts, layers stacked on axis 0 under the name "layers"; `key` is the
    seed of dropout and never changes. The position in the data is `step`.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    key: Key[Array, ""]


def leaf_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf, its keys joined by "/": `encoder/layers/attention/query/kernel`."""
    return "/".join(str(_key(entry)) for entry in path)


def _key(entry: Any) -> Any:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return entry


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by name, in the tree's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {leaf_name(path): leaf for path, leaf in leaves}


def map_named(
    function: Callable[..., Any],
    tree: PyTree,
    *rest: PyTree,
    is_leaf: Callable[[Any], bool] | None = None,
) -> PyTree:
    """`jax.tree.map` whose function takes the leaf's name first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(leaf_name(path), *leaves), tree, *rest, is_leaf=is_leaf
    )


def is_stacked(name: str) -> bool:
    """Whether axis 0 of the leaf of this name counts layers."""
    return LAYERS in name.split("/")
