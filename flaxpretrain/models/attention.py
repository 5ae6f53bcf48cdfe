"""Attention within segments: one function in front of several backends."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key

from flaxpretrain.errors import UserError
from flaxpretrain.models.functional import ATTENTION_CONTEXT, executing, execution
from flaxpretrain.models.layers import dropout, trailing, truncated_normal, zeros

NEVER = -1e30
"""Score of a pair of tokens that may not look at each other: finite, so no row becomes NaN."""


def same_segment(segment_ids: Int[Array, "B L"]) -> Array:
    """Which tokens may attend which, [B, 1, L, L]: those of the same segment.

    Padding (segment 0) attends padding, so every softmax has something to sum over.
    """
    return segment_ids[:, None, :, None] == segment_ids[:, None, None, :]


def xla_attention(
    query: Float[Array, "B H L K"],
    key: Float[Array, "B H L K"],
    value: Float[Array, "B H L K"],
    segment_ids: Int[Array, "B L"],
    *,
    rate: float = 0.0,
    keys: Key[Array, "B"] | None = None,
) -> Float[Array, "B H L K"]:
    """Softmax attention in plain XLA, the softmax in float32; the only one with dropout."""
    scores = jnp.einsum("BHLK,BHSK->BHLS", query, key).astype(jnp.float32)
    scores = jnp.where(same_segment(segment_ids), scores, NEVER)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    weights = dropout(weights, rate, keys)
    return jnp.einsum("BHLS,BHSK->BHLK", weights, value)


@dataclasses.dataclass(frozen=True)
class Backend:
    """A way to compute attention.

    layout: order in which it takes and returns query, key and value, in einsum letters.
    """

    layout: str
    function: Callable[..., Array]
    has_dropout: bool = False


BACKENDS: dict[str, Backend] = {
    "xla": Backend("BHLK", xla_attention, has_dropout=True),
}


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Traces attention inside the block with this backend; raises UserError for an unknown one.

    A backend is never guessed from the machine: a program may be compiled for another one.
    """
    if name not in BACKENDS:
        raise UserError(f"attention: expected one of {', '.join(BACKENDS)}; got {name!r}")
    with executing(dataclasses.replace(execution(), attention=name)):
        yield


def attend(
    query: Float[Array, "B ..."],
    key: Float[Array, "B ..."],
    value: Float[Array, "B ..."],
    segment_ids: Int[Array, "B L"],
    *,
    backend: str,
    rate: float = 0.0,
    keys: Key[Array, "B"] | None = None,
) -> Float[Array, "B ..."]:
    """Each token's mean of the values of its own segment, weighted by a softmax.

    Arrays are in the backend's layout; the query is already scaled. Raises UserError where
    dropout is asked of a backend without it.
    """
    chosen = BACKENDS[backend]
    if keys is None or rate == 0.0:
        context = chosen.function(query, key, value, segment_ids)
    elif chosen.has_dropout:
        context = chosen.function(query, key, value, segment_ids, rate=rate, keys=keys)
    else:
        raise UserError(
            f"attention_probs_dropout_prob: the {backend!r} attention has no dropout; "
            f"set it to 0 (got {rate}) or choose attention='xla'"
        )
    return checkpoint_name(context, ATTENTION_CONTEXT)


class Heads(nnx.Module):
    """A projection to heads: kernel [D, H, K]."""

    def __init__(self, width: int, heads: int, size: int, rngs: nnx.Rngs, *, stddev: float):
        self.kernel = truncated_normal(rngs, (width, heads, size), stddev)
        self.bias = zeros((heads, size))


class Merge(nnx.Module):
    """A projection from heads: kernel [H, K, D]."""

    def __init__(self, heads: int, size: int, width: int, rngs: nnx.Rngs, *, stddev: float):
        self.kernel = truncated_normal(rngs, (heads, size, width), stddev)
        self.bias = zeros((width,))


class SelfAttention(nnx.Module):
    """Multi-head attention of a row to itself.

    Reference: https://arxiv.org/abs/1706.03762, section 3.2.2.
    """

    def __init__(
        self, width: int, heads: int, rngs: nnx.Rngs, *, stddev: float, dropout_rate: float
    ):
        size = width // heads
        self.query = Heads(width, heads, size, rngs, stddev=stddev)
        self.key = Heads(width, heads, size, rngs, stddev=stddev)
        self.value = Heads(width, heads, size, rngs, stddev=stddev)
        self.out = Merge(heads, size, width, rngs, stddev=stddev)
        self.dropout_rate = dropout_rate

    def __call__(
        self,
        x: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"],
        keys: Key[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """The attended and projected rows; dropout on the attention weights only."""
        name = execution().attention
        layout = BACKENDS[name].layout
        query, key, value = self.project(x, layout)
        query = query / math.sqrt(query.shape[-1])
        context = attend(
            query, key, value, segment_ids, backend=name, rate=self.dropout_rate, keys=keys
        )
        y = jnp.einsum(f"{layout},HKD->BLD", context, self.out.kernel[...])
        return y + trailing(self.out.bias[...], y)

    def project(self, x: Float[Array, "B L D"], layout: str) -> list[Array]:
        """Query, key and value by one matrix product, each in the given layout."""
        parts = (self.query, self.key, self.value)
        kernel = jnp.stack([part.kernel[...] for part in parts])
        fused = jnp.einsum(f"BLD,SDHK->S{layout}", x, kernel)
        return [y + _placed(part.bias[...], layout) for y, part in zip(fused, parts, strict=True)]


def _placed(bias: Float[Array, "H K"], layout: str) -> Array:
    """A bias of heads with size 1 for the axes of the layout that it lacks."""
    heads, size = bias.shape
    return bias.reshape(*({"H": heads, "K": size}.get(letter, 1) for letter in layout))
