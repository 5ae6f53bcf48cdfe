"""Parts of every transformer: dense layers, norms, activations, dropout and initialisers."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key, UInt

from flaxpretrain.errors import UserError
from flaxpretrain.models.functional import execution, kept
from flaxpretrain.models.partition import flat
from flaxpretrain.models.quantization import matmul


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


def padded(x: Array, axis: int, multiple: int, fill: int = 0) -> Array:
    """`x` with more entries along an axis, up to a multiple of so many."""
    more = -x.shape[axis] % multiple
    if not more:
        return x
    widths = [(0, more if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill)


def lean(function: Callable[..., Array]) -> Callable[..., Array]:
    """The same function, which keeps nothing but its arguments for the backward pass.

    For chains of elementwise operations, whose intermediate results cost more to write and to read
    again than to compute twice. Unlike a remat policy it leaves the matrix products alone.
    """
    # Inside a scan the loop itself keeps XLA from undoing it; side by side it would find both.
    return jax.checkpoint(function, prevent_cse=not execution().scan)


def column_sums(rows: Float[Array, "*N F"]) -> Float[Array, "F"]:
    """The sum over all rows, in float32: as a matrix product where that is faster.

    XLA:CPU turns the sum over rows into one over batch and length, which was 10 times slower; on
    TPUs the vector unit takes 30 times what the matrix unit takes.
    """

    def product(x: Array) -> Array:
        ones = jnp.ones((8, len(x)), x.dtype)  # of one row XLA makes a sum again
        exact = None if x.dtype != jnp.float32 else jax.lax.Precision.HIGHEST
        total = jnp.matmul(ones, x, precision=exact, preferred_element_type=jnp.float32)
        return total[0]

    if rows.ndim > 2:  # rows in parts over the mesh's `context` stay so
        return jnp.sum(rows, axis=range(rows.ndim - 1), dtype=jnp.float32)
    return jax.lax.platform_dependent(
        rows,
        cpu=lambda x: (jnp.ones(x.shape[:1], x.dtype) @ x).astype(jnp.float32),
        tpu=product,
        default=lambda x: jnp.sum(x, axis=0, dtype=jnp.float32),
    )


def place_of_largest(scores: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """`argmax` over the last axis: the first place of several that are largest.

    XLA:CPU makes one core go through the scores one by one for an argmax, and compute them with it.
    All cores make the scores, their maximum, and the first place that has it.
    """
    if execution().platform != "cpu":
        return jnp.argmax(scores, axis=-1)
    scores = kept(jax.lax.stop_gradient(scores))
    places = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    # Where a score is NaN none is below, and the place stays one of V.
    below = scores < jnp.max(scores, axis=-1, keepdims=True)
    return jnp.min(jnp.where(below, scores.shape[-1], places), axis=-1)


def row_products(rows: Float[Array, "*N D"], vector: Float[Array, "D"]) -> Float[Array, "*N 1"]:
    """The inner product of every row with a vector, in float32; on TPUs by the matrix unit too."""

    def product(x: Array, vector: Array) -> Array:
        exact = None if x.dtype != jnp.float32 else jax.lax.Precision.HIGHEST
        columns = jnp.broadcast_to(vector.astype(x.dtype)[:, None], (len(vector), 8))
        return jnp.matmul(x, columns, precision=exact, preferred_element_type=jnp.float32)[..., :1]

    return jax.lax.platform_dependent(
        rows,
        vector,
        tpu=product,
        default=lambda x, v: jnp.sum(
            x.astype(jnp.float32) * trailing(v, x), axis=-1, keepdims=True
        ),
    )


@jax.custom_vjp
def add_bias(rows: Float[Array, "*N F"], bias: Float[Array, "F"]) -> Float[Array, "*N F"]:
    """A bias added to every row."""
    return rows + jnp.expand_dims(bias, range(rows.ndim - 1))


def _bias_saving(rows: Array, bias: Array) -> tuple[Array, Array]:
    return add_bias(rows, bias), bias


def _bias_gradients(bias: Array, gradient: Array) -> tuple[Array, Array]:
    return gradient, column_sums(gradient).astype(bias.dtype)


add_bias.defvjp(_bias_saving, _bias_gradients)


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
        y = matmul(flat(x), kernel)
        if self.bias is not None:
            y = add_bias(y, self.bias[...])
        return y.reshape(*x.shape[:-1], kernel.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(
    rows: Float[Array, "*N D"], scale: Float[Array, "D"], bias: Float[Array, "D"], epsilon: float
) -> Float[Array, "*N D"]:
    return _layer_norm_saving(rows, scale, bias, epsilon)[0]


def _layer_norm_saving(
    rows: Array, scale: Array, bias: Array, epsilon: float
) -> tuple[Array, tuple[Array, ...]]:
    """What is normalised, and two numbers a row.

    bfloat16's own rounding of a row shifts its variance more than the difference of float32 moments
    does, so both are taken in one pass; finer formats take a second one.
    """
    wide = rows.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    if rows.dtype == jnp.bfloat16:
        square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        variance = jnp.maximum(square - jnp.square(mean), 0.0)
    else:
        variance = jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + epsilon)
    normal = (wide - mean) * inverse
    return (normal * trailing(scale, wide) + trailing(bias, wide)).astype(rows.dtype), (
        rows,
        scale,
        mean,
        inverse,
    )


def _layer_norm_gradients(
    epsilon: float, saved: tuple[Array, ...], gradient: Array
) -> tuple[Array, Array, Array]:
    rows, scale, mean, inverse = saved
    normal = (rows.astype(jnp.float32) - mean) * inverse
    toward = gradient.astype(jnp.float32)
    along = (toward * normal).astype(rows.dtype)
    level, slope = (row_products(x, scale) / len(scale) for x in (gradient, along))
    back = (inverse * (toward * trailing(scale, toward) - level - normal * slope)).astype(
        rows.dtype
    )
    sums = (column_sums(x).astype(scale.dtype) for x in (along, gradient))
    return back, *sums  # pyright: ignore[reportReturnType]


_layer_norm.defvjp(_layer_norm_saving, _layer_norm_gradients)


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
        rows = flat(x)
        return _layer_norm(rows, self.scale[...], self.bias[...], self.epsilon).reshape(x.shape)  # pyright: ignore[reportAttributeAccessIssue]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(
    rows: Float[Array, "*N D"], scale: Float[Array, "D"], epsilon: float
) -> Float[Array, "*N D"]:
    return _rms_norm_saving(rows, scale, epsilon)[0]


def _rms_norm_saving(rows: Array, scale: Array, epsilon: float) -> tuple[Array, tuple[Array, ...]]:
    wide = rows.astype(jnp.float32)
    square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(square + epsilon)
    return (wide * inverse * trailing(scale, wide)).astype(rows.dtype), (rows, scale, inverse)


def _rms_norm_gradients(
    epsilon: float, saved: tuple[Array, ...], gradient: Array
) -> tuple[Array, Array]:
    rows, scale, inverse = saved
    normal, toward = rows.astype(jnp.float32) * inverse, gradient.astype(jnp.float32)
    along = (toward * normal).astype(rows.dtype)
    slope = row_products(along, scale) / len(scale)
    back = (inverse * (toward * trailing(scale, toward) - normal * slope)).astype(rows.dtype)
    return back, column_sums(along).astype(scale.dtype)


_rms_norm.defvjp(_rms_norm_saving, _rms_norm_gradients)


class RMSNorm(nnx.Module):
    """Division by the root mean square, in float32, returned in the dtype of its input.

    Reference: https://arxiv.org/abs/1910.07467.
    """

    def __init__(self, width: int, *, epsilon: float):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """`x / sqrt(mean(x^2) + epsilon) * scale`."""
        rows = flat(x)
        return _rms_norm(rows, self.scale[...], self.epsilon).reshape(x.shape)  # pyright: ignore[reportAttributeAccessIssue]


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
    """
    words = _word_bits(jax.random.key_data(keys).astype(jnp.uint32), shape)
    return words ^ (words >> 15)


def _word_bits(words: UInt[Array, "B W"], shape: tuple[int, ...]) -> UInt[Array, "..."]:
    """The bits of `row_bits` but for the last step, which the highest 15 bits do not feel.

    The last axis has a constant a place, the axes before it a word a place that the key makes;
    their sum is mixed. So no element multiplies more than twice.

    Reference: the mixing function is lowbias32, https://github.com/skeeto/hash-prospector, with
    the second word of the key added before its second multiplication.
    """
    column = (-1, *(1,) * (len(shape) - 1))
    first, second = words[:, 0].reshape(column), words[:, -1].reshape(column)
    before = jax.lax.iota(jnp.uint32, math.prod(shape[1:-1])).reshape(1, *shape[1:-1], 1)
    mixed = _mixed(before * jnp.uint32(0x9E3779B9) + first, second)
    # Made once a token, and not again for each of its numbers.
    mixed = jax.lax.optimization_barrier(mixed ^ (mixed >> 15))
    places = np.arange(1, shape[-1] + 1, dtype=np.uint32)
    last = _mixed(places * np.uint32(0x9E3779B9), np.uint32(0))
    return _mixed(mixed + trailing(jnp.asarray(last), mixed), np.uint32(0))


def _mixed(x: Any, more: Any) -> Any:
    x = (x ^ (x >> 16)) * np.uint32(0x21F0AAAD)
    return ((x ^ (x >> 15)) + more) * np.uint32(0xD35A2D97)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def drop(rate: float, x: Float[Array, "B ..."], words: UInt[Array, "B W"]) -> Array:
    """Dropout by the words of each row's key: what `dropout` does where there is any."""
    kept = _word_bits(words, x.shape) >= jnp.uint32(round(rate * 2**32))
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros((), x.dtype))


def _dropped_saving(rate: float, x: Array, words: Array) -> tuple[Array, Array]:
    return drop(rate, x, words), words


def _dropped_gradients(rate: float, words: Array, gradient: Array) -> tuple[Array, None]:
    """The bits are computed again, from words that XLA does not know for the same ones."""
    return drop(rate, gradient, jax.lax.optimization_barrier(words)), None


drop.defvjp(_dropped_saving, _dropped_gradients)


def dropout(
    x: Float[Array, "B ..."], rate: float, keys: Key[Array, "B"] | None
) -> Float[Array, "B ..."]:
    """Zeroes a share `rate` of the elements and scales the rest to keep the mean.

    The elements of a row are chosen by the row's key alone, so a row loses the same ones on any
    mesh and in any microbatch. No keys, no dropout.
    """
    if keys is None or rate == 0.0:
        return x
    return drop(rate, x, jax.random.key_data(keys).astype(jnp.uint32))


def take(table: Float[Array, "V D"], ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """Rows of an embedding table."""
    return jnp.take(table, ids, axis=0)
