"""Positions of tokens within their pieces."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def restarting(segment_ids: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """0-based positions that restart wherever the segment changes."""
    places = jax.lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    starts = jnp.where(segment_ids != before, places, 0)
    return places - jax.lax.cummax(starts, axis=1)


def relative_buckets(
    distance: Int[Array, "..."], buckets: int, farthest: int, *, causal: bool
) -> Int[Array, "..."]:
    """Which bucket a distance, the attended token's place less the attending one's, falls into.

    Half of the buckets are of one distance each, the others grow by a factor up to `farthest`;
    unless `causal`, half of all are for tokens before and half for tokens after.

    Reference: T5, https://arxiv.org/abs/1910.10683, section 2.1; mesh_tensorflow/transformer/
    transformer_layers.py, _relative_position_bucket.
    """
    if causal:
        first, apart = jnp.zeros_like(distance), jnp.maximum(-distance, 0)
    else:
        buckets //= 2
        first, apart = jnp.where(distance > 0, buckets, 0), jnp.abs(distance)
    exact = buckets // 2
    ratio = jnp.maximum(apart, 1).astype(jnp.float32) / exact
    grown = jnp.log(ratio) / math.log(farthest / exact) * (buckets - exact)
    far = jnp.minimum(exact + grown.astype(jnp.int32), buckets - 1)
    return first + jnp.where(apart < exact, apart, far)


def relative_bias(
    table: Float[Array, "R H"], length: int, key_length: int, *, farthest: int, causal: bool
) -> Float[Array, "1 H L S"]:
    """What T5 adds to the attention scores of tokens at places 0 to L - 1 to those at 0 to S - 1.

    It depends on their distance alone, so that it holds in packed rows too, and every diagonal is
    one number. The matrix is made of those numbers by repeating them and reading rows of one less:
    a lookup of each pair would cost a scatter of all pairs in the backward pass.
    """
    period = length + key_length
    places = jnp.arange(period, dtype=jnp.int32)
    distance = jnp.where(places < key_length, places, places - period)
    buckets = relative_buckets(distance, table.shape[0], farthest, causal=causal)
    diagonals = jnp.take(table, buckets, axis=0).T
    repeated = jnp.tile(diagonals, (1, length))[:, : length * (period - 1)]
    return repeated.reshape(-1, length, period - 1)[None, :, :, :key_length]


def relative_bias_from(
    table: Float[Array, "R H"],
    place: Int[Array, ""],
    length: int,
    key_length: int,
    *,
    farthest: int,
) -> Float[Array, "1 H L S"]:
    """`relative_bias` of a causal row for the tokens at `place` to `place + L - 1`.

    One lookup a pair, which costs nothing where there is no backward pass.
    """
    places = place + jnp.arange(length, dtype=jnp.int32)
    distance = jnp.arange(key_length, dtype=jnp.int32)[None] - places[:, None]
    buckets = relative_buckets(distance, table.shape[0], farthest, causal=True)
    return jnp.moveaxis(jnp.take(table, buckets, axis=0), -1, 0)[None]
