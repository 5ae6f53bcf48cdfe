"""The vocabulary head of decoders: a product with the words' own embeddings, or with a kernel."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flaxpretrain.errors import UserError
from flaxpretrain.models.layers import Initializer, add_bias, normal, zeros
from flaxpretrain.models.partition import flat, over_context
from flaxpretrain.models.plain_attention import NEVER

Part = TypeVar("Part")


def present(part: Part | None, head: str) -> Part:
    """The part of a network; raises UserError where the configuration left it out."""
    if part is None:
        raise UserError(f"model.heads: this objective needs {head!r} among them")
    return part


def vocabulary_logits(
    hidden: Float[Array, "*B D"],
    kernel: Float[Array, "D V"],
    vocab_size: int,
    bias: Float[Array, "V"] | None = None,
) -> Float[Array, "*B V"]:
    """Scores in float32; those of the padded vocabulary's extra tokens are hugely negative."""
    rows = flat(hidden if hidden.ndim < 3 else over_context(hidden))
    logits = jnp.matmul(rows, kernel, preferred_element_type=jnp.float32)
    logits = add_bias(logits, _added(kernel.shape[1], vocab_size, bias))
    return logits.reshape(*hidden.shape[:-1], -1)


def _added(size: int, vocab_size: int, bias: Float[Array, "V"] | None) -> Float[Array, "V"]:
    """What is added to the products: the bias, and what rules out tokens that are padding."""
    added = jnp.zeros(size) if bias is None else bias.astype(jnp.float32)
    return jnp.where(jnp.arange(size) < vocab_size, added, NEVER)


FEW_ROWS = 64
"""So many rows of one token at most are scored as generation scores them."""


def tied_logits(
    hidden: Float[Array, "*B D"],
    words: Float[Array, "V D"],
    vocab_size: int,
    bias: Float[Array, "V"] | None = None,
) -> Float[Array, "*B V"]:
    """`vocabulary_logits` by the table of the words.

    XLA:CPU multiplies a few rows by a transposed table 11 times slower than the table by a few
    columns, so generation gets the latter; the barrier keeps XLA from turning it around again.
    """
    if hidden.ndim != 3 or hidden.shape[1] != 1 or not 1 < len(hidden) <= FEW_ROWS:
        return vocabulary_logits(hidden, words.T, vocab_size, bias)
    columns = jnp.matmul(words, hidden[:, 0].T, preferred_element_type=jnp.float32)
    logits = jax.lax.optimization_barrier(columns).T
    return (logits + _added(len(words), vocab_size, bias)[None])[:, None]


class LanguageHead(nnx.Module):
    """Logits of the next token: no parameters where the kernel is tied to the words' embeddings.

    `bias`: whether there is one, by token.
    """

    def __init__(
        self,
        width: int,
        padded_vocab_size: int,
        vocab_size: int,
        rngs: nnx.Rngs,
        *,
        tied: bool,
        stddev: float,
        bias: bool = False,
        initial: Initializer = normal,
    ):
        self.kernel = None if tied else initial(rngs, (width, padded_vocab_size), stddev)
        self.bias = zeros((padded_vocab_size,)) if bias else None
        self.vocab_size = vocab_size

    def __call__(
        self, hidden: Float[Array, "*B D"], words: Float[Array, "V D"]
    ) -> Float[Array, "*B V"]:
        """Scores in float32 of every token of the padded vocabulary."""
        bias = None if self.bias is None else self.bias[...]
        if self.kernel is None:
            return tied_logits(hidden, words, self.vocab_size, bias)
        return vocabulary_logits(hidden, self.kernel[...], self.vocab_size, bias)
