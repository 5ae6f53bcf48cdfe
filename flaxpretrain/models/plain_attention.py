"""Attention within segments in plain XLA: one that can do all, and one for CPUs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from flaxpretrain.models.layers import drop, dropout, lean

NEVER = -1e30
"""Score of a pair of tokens that may not look at each other: finite, so no row becomes NaN."""


def may_attend(
    segment_ids: Int[Array, "B L"],
    key_segment_ids: Int[Array, "B S"],
    *,
    causal: bool = False,
    window: int | None = None,
    prefix: Bool[Array, "B S"] | None = None,
) -> Bool[Array, "B 1 L S"]:
    """Which token (of L) may attend which (of S): see `attend`.

    Padding (segment 0) attends padding, so that every softmax has something to sum over.
    """
    allowed = segment_ids[:, None, :, None] == key_segment_ids[:, None, None, :]
    if causal or window is not None:
        places, key_places = (jnp.arange(ids.shape[1]) for ids in (segment_ids, key_segment_ids))
        before = (places[:, None] - key_places[None])[None, None]
        if causal:
            reached = before >= 0
            allowed &= reached if prefix is None else reached | prefix[:, None, None, :]
        if window is not None:
            allowed &= jnp.abs(before) <= window
    return allowed


def _scores(
    query: Float[Array, "B H L K"],
    key: Float[Array, "B H S K"],
    segment_ids: Int[Array, "B L"],
    key_segment_ids: Int[Array, "B S"],
    bias: Float[Array, "#B H L S"] | None = None,
    **who: Any,
) -> Float[Array, "B H L S"]:
    """Scores in float32, `NEVER` where a token may not look; `who` as `may_attend` has it."""
    scores = jnp.einsum("BHLK,BHSK->BHLS", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores += bias.astype(jnp.float32)
    return jnp.where(may_attend(segment_ids, key_segment_ids, **who), scores, NEVER)


def xla_attention(
    query: Float[Array, "B H L K"],
    key: Float[Array, "B H S K"],
    value: Float[Array, "B H S K"],
    segment_ids: Int[Array, "B L"],
    key_segment_ids: Int[Array, "B S"],
    *,
    causal: bool = False,
    window: int | None = None,
    prefix: Bool[Array, "B S"] | None = None,
    bias: Float[Array, "#B H L S"] | None = None,
    rate: float = 0.0,
    keys: Key[Array, "B"] | None = None,
) -> Float[Array, "B H L K"]:
    """Softmax attention in plain XLA, the softmax in float32; the only one that can do all.

    As with the flash kernels, the backward pass finds query, key and value saved and nothing else.
    """

    def context(query: Array, key: Array, value: Array, bias: Array | None) -> Array:
        scores = _scores(
            query,
            key,
            segment_ids,
            key_segment_ids,
            bias,
            causal=causal,
            window=window,
            prefix=prefix,
        )
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        return jnp.einsum("BHLS,BHSK->BHLK", dropout(weights, rate, keys), value)

    return lean(context)(query, key, value, bias)


def cpu_attention(
    query: Float[Array, "B H L K"],
    key: Float[Array, "B H S K"],
    value: Float[Array, "B H S K"],
    segment_ids: Int[Array, "B L"],
    key_segment_ids: Int[Array, "B S"],
    *,
    causal: bool = False,
    window: int | None = None,
    prefix: None = None,
    bias: None = None,
    rate: float = 0.0,
    keys: Key[Array, "B"] | None = None,
) -> Float[Array, "B H L K"]:
    """The same without prefix and bias, with fewer passes over the scores.

    The backward pass finds the output and each softmax's maximum and sum saved, so that it never
    goes over the scores of a token to sum anything: what it needs beside them is the inner product
    of the token's output and that output's gradient. XLA:CPU goes through memory for every sum.

    Reference: FlashAttention-2, https://arxiv.org/abs/2307.08691, section 3.1.2.
    """
    words = None
    if keys is not None and rate > 0.0:
        words = jax.random.key_data(keys).astype(jnp.uint32)
    options = (causal, window, rate)
    return _attended(options, query, key, value, segment_ids, key_segment_ids, words)


_Options = tuple[bool, int | None, float]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attended(
    options: _Options,
    query: Float[Array, "B H L K"],
    key: Float[Array, "B H S K"],
    value: Float[Array, "B H S K"],
    segment_ids: Int[Array, "B L"],
    key_segment_ids: Int[Array, "B S"],
    words: UInt[Array, "B W"] | None,
) -> Float[Array, "B H L K"]:
    return _saving(options, query, key, value, segment_ids, key_segment_ids, words)[0]


def _saving(options: _Options, *arguments: Any) -> tuple[Array, Any]:
    query, key, value, segment_ids, key_segment_ids, words = arguments
    causal, window, _ = options
    scores = _scores(query, key, segment_ids, key_segment_ids, causal=causal, window=window)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = _thinned(options, weights.astype(value.dtype), words)
    context = jnp.einsum("BHLS,BHSK->BHLK", weights, value) / total.astype(value.dtype)
    return context, (arguments, context, highest, total)


def _gradients(
    options: _Options, saved: Any, toward: Float[Array, "B H L K"]
) -> tuple[Array, Array, Array, None, None, None]:
    arguments, context, highest, total = saved
    query, key, value, segment_ids, key_segment_ids, words = arguments
    causal, window, _ = options
    if words is not None:  # else XLA would keep the forward pass's bits for this
        words = jax.lax.optimization_barrier(words)
    scores = _scores(query, key, segment_ids, key_segment_ids, causal=causal, window=window)
    weights = jnp.exp(scores - highest) * (1.0 / total)
    wide = toward.astype(jnp.float32)
    level = jnp.sum(wide * context.astype(jnp.float32), axis=-1, keepdims=True)
    along = jnp.einsum("BHLK,BHSK->BHLS", toward, value, preferred_element_type=jnp.float32)
    along = (weights * (_thinned(options, along, words) - level)).astype(query.dtype)
    weights = _thinned(options, weights.astype(value.dtype), words)
    # Sums over the tokens that ask, of the transposes: XLA:CPU is a third faster at these.
    value_gradient = jnp.swapaxes(jnp.einsum("BHLK,BHLS->BHKS", toward, weights), 2, 3)
    key_gradient = jnp.swapaxes(jnp.einsum("BHLK,BHLS->BHKS", query, along), 2, 3)
    query_gradient = jnp.einsum("BHLS,BHSK->BHLK", along, key)
    return query_gradient, key_gradient, value_gradient, None, None, None


_attended.defvjp(_saving, _gradients)


def _thinned(options: _Options, weights: Array, words: Array | None) -> Array:
    """Dropout, the same whenever the words are."""
    return weights if words is None else drop(options[2], weights, words)
