"""Positions of tokens within their pieces."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def restarting(segment_ids: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """0-based positions that restart wherever the segment changes."""
    places = jax.lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    starts = jnp.where(segment_ids != before, places, 0)
    return places - jax.lax.cummax(starts, axis=1)
