"""Checksums of arrays, computed where they lie and equal on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, UInt, UInt32

from flaxpretrain.shapes import Shaped


def _bits(x: Shaped[Array, "..."]) -> UInt[Array, "..."]:
    if jnp.issubdtype(x.dtype, jnp.bool_):
        return x.astype(jnp.uint8)
    size = min(x.dtype.itemsize, 4)  # a number of 8 bytes gives two of 4
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * size}"))


def _checksum(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """The sum of all bits times odd weights by position, modulo 2 ** 32.

    Sums of integers do not depend on their order, so neither does this on the sharding; and a
    single changed number always changes it, an odd weight being invertible modulo 2 ** 32.
    """
    bits = _bits(x).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = position * jnp.uint32(size % 2**32) + index
    weights = position * jnp.uint32(0x9E3779B1) | jnp.uint32(1)
    return jnp.sum(bits * weights, dtype=jnp.uint32)


def _stacked(leaves: list[Array]) -> UInt32[Array, "leaves"]:
    return jnp.stack([_checksum(x) for x in leaves])


def checksums(leaves: dict[str, Array | np.ndarray]) -> dict[str, int]:
    """The checksum of every array, by its name."""
    if not leaves:
        return {}
    arrays = [jnp.asarray(leaf) for leaf in leaves.values()]
    shardings = [a.sharding for a in arrays if isinstance(a.sharding, NamedSharding)]
    # Replicated, so that every process of a pod can read them.
    out = NamedSharding(shardings[0].mesh, P()) if shardings else None
    sums = np.asarray(jax.jit(_stacked, out_shardings=out)(arrays))
    return dict(zip(leaves, (int(s) for s in sums), strict=True))
