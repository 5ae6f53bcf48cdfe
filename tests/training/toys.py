"""A toy model's parameters, stacked and as a list of layers, and its optimizer states."""

import jax
import jax.numpy as jnp
import numpy as np

from flaxpretrain.training.state import TrainState

LAYERS, WIDTH, HEADS, SIZE, FEED, VOCABULARY = 3, 8, 2, 4, 16, 32

SHAPES = {
    "embeddings": {"table": (VOCABULARY, WIDTH)},
    "layers": {
        "attention": {
            "query": {"kernel": (LAYERS, WIDTH, HEADS, SIZE), "bias": (LAYERS, HEADS, SIZE)},
            "out": {"kernel": (LAYERS, HEADS, SIZE, WIDTH), "bias": (LAYERS, WIDTH)},
        },
        "feed": {"kernel": (LAYERS, WIDTH, FEED)},
        "norm": {"scale": (LAYERS, WIDTH)},
    },
    "head": {"kernel": (WIDTH, WIDTH), "bias": (WIDTH,)},
}


def random_tree(seed: int, scale: float = 1.0) -> dict:
    """Arrays of the toy's shapes; layers differ in scale, so that mixing them shows."""
    generator = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> jax.Array:
        values = generator.normal(size=shape) * scale
        if shape[0] == LAYERS:
            values *= 2.0 ** np.arange(LAYERS).reshape(-1, *[1] * (len(shape) - 1))
        return jnp.asarray(values, jnp.float32)

    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def unstacked(tree: dict) -> dict:
    """The same tree with every layer a subtree of its own, none of them a stack."""
    layers = {
        f"layer_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], tree["layers"]) for i in range(LAYERS)
    }
    return {name: value for name, value in tree.items() if name != "layers"} | layers


def toy_state(optimizer, seed: int = 0, step: int = 0) -> TrainState:
    """A training state of the toy."""
    params = random_tree(seed)
    return TrainState(jnp.int32(step), params, optimizer.init(params), jax.random.key(seed))
