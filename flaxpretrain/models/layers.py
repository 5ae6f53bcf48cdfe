"""Parts of every transformer: dense layers, norms, activations, dropout and initialisers."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key, UInt

from flaxpretrain.errors import UserError
from flaxpretrain.models.partition import flat


def truncated_normal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float) -> nnx.Param:
    """A float32 parameter drawn from a normal cut at two standard deviations.

    `stddev` is that of the normal before the cut, as in google-research/bert modeling.py
    (create_initializer); Transformers draws from the uncut normal.
    """
    return nnx.Param(stddev * jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape))


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float) -> nnx.Param:
    """A float32 parameter drawn from a normal."""
    return nnx.Param(stddev * jax.random.normal(rngs.params(), shape))


def sinusoidal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float) -> nnx.Param:
    """A float32 table of sines and cosines, a row a position, scaled to a standard deviation.

    Reference: https://arxiv.org/abs/1706.03762, section 3.5, with the sines before the cosines.
    `rngs` gives nothing: the table is always the same.
    """
    rows, width = shape
    half = -(-width // 2)
    angles = np.arange(rows)[:, None] / 10_000 ** (np.arange(half) / half)
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :width]
    return nnx.Param(jnp.asarray(stddev * 2**0.5 * waves, jnp.float32))


Initializer = Callable[[nnx.Rngs, tuple[int, ...], float], nnx.Param]
"""Makes a parameter of a shape and a standard deviation."""


def zeros(shape: tuple[int, ...]) -> nnx.Param:
    """A float32 parameter of zeros."""
    return nnx.Param(jnp.zeros(shape))


def trailing(vector: Array, like: Array) -> Array:
    """`vector` with leading axes of size 1, to be added to `like`."""
    return vector.reshape((1,) * (like.ndim - vector.ndim) + vector.shape)


def lean(function: Callable[..., Array]) -> Callable[..., Array]:
    """The same function, which keeps nothing but its arguments for the backward pass.

    For chains of elementwise operations, whose intermediate results cost more to write and to read
    again than to compute twice. Unlike a remat policy it leaves the matrix products alone.
    """
    return jax.checkpoint(function, prevent_cse=False)


@jax.custom_vjp
def add_bias(rows: Float[Array, "*N F"], bias: Float[Array, "F"]) -> Float[Array, "*N F"]:
    """A bias added to every row."""
    return rows + jnp.expand_dims(bias, range(rows.ndim - 1))


def _bias_gradients(_: None, gradient: Array) -> tuple[Array, Array]:
    """The gradient of the bias on the CPU is a product: XLA:CPU's sum took twice the layer's own.

    It turns the sum over rows into one over batch and length, which was 10 times slower.
    """
    if gradient.ndim > 2:
        return gradient, jnp.sum(gradient, axis=range(gradient.ndim - 1))
    summed = jax.lax.platform_dependent(
        gradient,
        cpu=lambda g: jnp.ones(g.shape[:1], g.dtype) @ g,
        default=lambda g: jnp.sum(g, axis=0),
    )
    return gradient, summed


add_bias.defvjp(lambda rows, bias: (add_bias(rows, bias), None), _bias_gradients)


class Dense(nnx.Module):
    """`x @ kernel + bias`, or without a bias."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rngs: nnx.Rngs,
        *,
        stddev: float,
        bias: bool = True,
        initial: Initializer = truncated_normal,
    ):
        self.kernel = initial(rngs, (inputs, outputs), stddev)
        self.bias = zeros((outputs,)) if bias else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        """Over one flat axis of rows: XLA:CPU runs the backward pass of that 1.4 times faster."""
        kernel = self.kernel[...]
        y = flat(x) @ kernel
        if self.bias is not None:
            y = add_bias(y, self.bias[...])
        return y.reshape(*x.shape[:-1], kernel.shape[1])


class LayerNorm(nnx.Module):
    """Layer normalisation in float32, returned in the dtype of its input.

    Reference: https://arxiv.org/abs/1607.06450.
    """

    def __init__(self, width: int, *, epsilon: float):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.bias = zeros((width,))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """`(x - mean) / sqrt(variance + epsilon) * scale + bias`."""

        def normalised(x: Array, scale: Array, bias: Array) -> Array:
            wide = x.astype(jnp.float32)
            centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
            variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
            normal = centred * jax.lax.rsqrt(variance + self.epsilon)
            return (normal * trailing(scale, wide) + trailing(bias, wide)).astype(x.dtype)

        return lean(normalised)(x, self.scale[...], self.bias[...])


class RMSNorm(nnx.Module):
    """Division by the root mean square, in float32, returned in the dtype of its input.

    Reference: https://arxiv.org/abs/1910.07467.
    """

    def __init__(self, width: int, *, epsilon: float):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """`x / sqrt(mean(x^2) + epsilon) * scale`."""

        def normalised(x: Array, scale: Array) -> Array:
            wide = x.astype(jnp.float32)
            square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
            return (wide * jax.lax.rsqrt(square + self.epsilon) * trailing(scale, wide)).astype(
                x.dtype
            )

        return lean(normalised)(x, self.scale[...])


def _gelu(x: Array) -> Array:
    # With erf, one polynomial: jax.nn.gelu takes erfc, whose branches cost XLA:CPU 2.6 times more.
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


def _gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def _quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _squared_relu(x: Array) -> Array:
    return jnp.square(jax.nn.relu(x))


def _gelu_10(x: Array) -> Array:
    return jnp.clip(_gelu(x), -10.0, 10.0)


def _leaky_relu(x: Array) -> Array:
    return jax.nn.leaky_relu(x, 0.01)


def _laplace(x: Array) -> Array:
    return 0.5 * (1.0 + jax.lax.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


def _sqrt_softplus(x: Array) -> Array:
    return jnp.sqrt(jax.nn.softplus(x))


def _identity(x: Array) -> Array:
    return x


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_10": _gelu_10,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": jax.nn.hard_swish,
    "laplace": _laplace,
    "leaky_relu": _leaky_relu,
    "linear": _identity,
    "mish": jax.nn.mish,
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
    "relu2": _squared_relu,
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "sqrtsoftplus": _sqrt_softplus,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
"""Activations by the names of Transformers' configurations (transformers/activations.py)."""


def activation(name: str) -> Callable[[Array], Array]:
    """The activation of this name; raises UserError for an unknown one."""
    if name not in ACTIVATIONS:
        raise UserError(f"hidden_act: expected one of {', '.join(ACTIVATIONS)}; got {name!r}")
    return ACTIVATIONS[name]


def row_bits(keys: Key[Array, "B"], shape: tuple[int, ...]) -> UInt[Array, "..."]:
    """32 random bits an element of `shape` [B, ...], a function of the row's key and its place.

    A hash of the place instead of `jax.random.bits`: XLA fuses it into whatever uses the bits, no
    matter how the array is sharded, and it takes a small part of Threefry's instructions.

    Reference: the mixing function is lowbias32, https://github.com/skeeto/hash-prospector, with
    the two words of the key added before its first and its second multiplication.
    """
    words = jax.random.key_data(keys).astype(jnp.uint32)
    column = (-1, *(1,) * (len(shape) - 1))
    first, second = words[:, 0].reshape(column), words[:, -1].reshape(column)
    places = jax.lax.iota(jnp.uint32, math.prod(shape[1:])).reshape(1, *shape[1:])
    mixed = places * jnp.uint32(0x9E3779B9) + first
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x21F0AAAD)
    mixed = ((mixed ^ (mixed >> 15)) + second) * jnp.uint32(0xD35A2D97)
    return mixed ^ (mixed >> 15)


def dropout(
    x: Float[Array, "B ..."], rate: float, keys: Key[Array, "B"] | None
) -> Float[Array, "B ..."]:
    """Zeroes a share `rate` of the elements and scales the rest to keep the mean.

    The elements of a row are chosen by the row's key alone, so a row loses the same ones on any
    mesh and in any microbatch. No keys, no dropout.
    """
    if keys is None or rate == 0.0:
        return x

    def dropped(x: Array) -> Array:
        kept = row_bits(keys, x.shape) >= jnp.uint32(round(rate * 2**32))
        return jnp.where(kept, x / (1.0 - rate), jnp.zeros((), x.dtype))

    return lean(dropped)(x)


def take(table: Float[Array, "V D"], ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """Rows of an embedding table."""
    return jnp.take(table, ids, axis=0)
