"""Matrix products of layers with their parameters, in numbers of 8 bits where a run asks for them.

By Qwix (https://github.com/google/qwix): both sides are scaled to the format by their largest
numbers, a scale a token and one an output feature, multiplied in it, and scaled back; what flows on
is in the format that came. Parameters stay float32: they are quantized anew each step. Where the
backward pass is in 8 bits as well, so are both of its products, and it finds saved what the forward
pass quantized. Whatever is no such product stays as it is: embeddings, norms, attention's scores
and its sum of values, heads and logits.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from flaxpretrain.errors import UserError
from flaxpretrain.models.functional import LAYER_PRODUCT, layer_matmul

MISSING = (
    "precision.matmul: products in 8 bits need the package qwix: "
    'pip install "flaxpretrain[quantization]"'
)

_FORMATS: dict[str, tuple[Any, Any]] = {
    "int8": (jnp.int8, jnp.int8),
    # Gradients reach farther than they are exact: https://arxiv.org/abs/2209.05433, section 3.1.
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2),
}
"""Of activations and parameters, and of gradients."""


def matmul(x: Float[Array, "*B D"], kernel: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    """`x @ kernel`, of activations and parameters."""
    if layer_matmul() == "default":
        return x @ kernel
    return _dot(x, kernel, (x.ndim - 1,), (0,))


def einsum(
    equation: str, x: Float[Array, "..."], kernel: Float[Array, "..."]
) -> Float[Array, "..."]:
    """`jnp.einsum` of activations and parameters, whose letters in common are summed over."""
    if layer_matmul() == "default":
        return jnp.einsum(equation, x, kernel)
    operands, result = equation.split("->")
    left, right = operands.split(",")
    common = [letter for letter in left if letter in right]
    y = _dot(x, kernel, *(tuple(map(side.index, common)) for side in (left, right)))
    apart = [letter for letter in left + right if letter not in common]
    return jnp.transpose(y, [apart.index(letter) for letter in result])


def _dot(x: Array, kernel: Array, axes: tuple[int, ...], kernel_axes: tuple[int, ...]) -> Array:
    """The sum of products over some axes; what is left of `x` comes first."""
    config = _config(layer_matmul())
    y = library().dot_general_qt(x, kernel, ((axes, kernel_axes), ((), ())), config)
    return checkpoint_name(y, LAYER_PRODUCT)


@functools.cache
def library() -> Any:
    """Qwix's quantized product with gradients of its own.

    Its public entry, `quantize_model`, tells parameters from activations by looking for the arrays
    in the module that calls, and finds none where kernels lie side by side; MaxText imports this
    module for the same reason (src/maxtext/layers/quantizations.py).

    Raises:
        UserError: qwix is not installed.
    """
    try:
        from qwix._src.core import dot_general_qt
    except ImportError:
        raise UserError(MISSING) from None
    return dot_general_qt


@functools.cache
def _config(name: str) -> Any:
    kind, _, forward_alone = name.partition("_")
    forward, backward = _FORMATS[kind]
    return library().DotGeneralQtConfig(
        lhs_qtype=forward,
        rhs_qtype=forward,
        dlhs_grad_qtype=None if forward_alone else backward,
        drhs_grad_qtype=None if forward_alone else backward,
        use_original_residuals=bool(forward_alone),
    )
