"""The vocabulary head of decoders: a product with the words' own embeddings, or with a kernel."""

from typing import TypeVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flaxpretrain.errors import UserError
from flaxpretrain.models.attention import NEVER
from flaxpretrain.models.layers import Initializer, add_bias, normal, zeros
from flaxpretrain.models.partition import flat, over_context

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
    added = jnp.zeros(kernel.shape[1]) if bias is None else bias.astype(jnp.float32)
    logits = add_bias(logits, jnp.where(jnp.arange(kernel.shape[1]) < vocab_size, added, NEVER))
    return logits.reshape(*hidden.shape[:-1], -1)


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
        kernel = words.T if self.kernel is None else self.kernel[...]
        bias = None if self.bias is None else self.bias[...]
        return vocabulary_logits(hidden, kernel, self.vocab_size, bias)
