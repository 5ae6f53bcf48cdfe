"""What a decoder keeps of the tokens it has read, so that each new one costs one token's work.

All shapes are fixed when decoding begins: a row has room for so many tokens, and which of its slots
hold one is said by segments, as everywhere.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Kept(NamedTuple):
    """Keys and values of one attention layer."""

    key: Float[Array, "B H S K"]
    value: Float[Array, "B H S K"]

    def written(self, key: Array, value: Array, place: Int[Array, ""]) -> "Kept":
        """The same with the keys and values of more tokens from slot `place` on."""
        start = (0, 0, place, 0)
        return Kept(
            jax.lax.dynamic_update_slice(self.key, key.astype(self.key.dtype), start),
            jax.lax.dynamic_update_slice(self.value, value.astype(self.value.dtype), start),
        )


class Memory(NamedTuple):
    """What all layers of a decoder keep of rows that have `place` slots filled.

    kept: of each layer, for the decoder's own tokens.
    segment_ids: of the slots; 0 for padding and where there is no token yet.
    source: of each layer, for an encoder's tokens; rows of the decoder that lie side by side may
        share those of one source.
    source_segment_ids: of an encoder's tokens.
    """

    kept: tuple[Kept, ...]
    segment_ids: Int[Array, "B S"]
    place: Int[Array, ""]
    source: tuple[Kept, ...] = ()
    source_segment_ids: Int[Array, "R T"] | None = None

    def noted(self, segment_ids: Int[Array, "B L"]) -> "Memory":
        """The same with the segments of more tokens, whose keys and values are yet to come."""
        noted = jax.lax.dynamic_update_slice(self.segment_ids, segment_ids, (0, self.place))
        return self._replace(segment_ids=noted)

    def advanced(self, kept: tuple[Kept, ...], tokens: int) -> "Memory":
        """The same after so many more tokens."""
        return self._replace(kept=kept, place=self.place + tokens)

    def picked(self, rows: Int[Array, "B"]) -> "Memory":
        """Other rows in the decoder, or in another order; the sources stay where they are."""
        kept, segment_ids = jax.tree.map(lambda x: x[rows], (self.kept, self.segment_ids))
        return self._replace(kept=kept, segment_ids=segment_ids)


def remember(
    layers: Sequence[Any],
    rows: int,
    room: int,
    encoded: Float[Array, "R T D"] | None = None,
    encoded_segment_ids: Int[Array, "R T"] | None = None,
) -> Memory:
    """The memory of rows with room for so many tokens, before the first.

    `layers` are those of a decoder, `functional.apart`. What they look up of an encoder's tokens is
    computed here, once.
    """
    kept = []
    for layer in layers:
        kernel = layer.attention.query.kernel[...]
        empty = jnp.zeros((rows, kernel.shape[1], room, kernel.shape[2]), kernel.dtype)
        kept.append(Kept(empty, empty))
    source = () if encoded is None else tuple(x.cross_attention.keep(encoded) for x in layers)
    nobody = jnp.zeros((rows, room), jnp.int32)
    return Memory(tuple(kept), nobody, jnp.zeros((), jnp.int32), source, encoded_segment_ids)
