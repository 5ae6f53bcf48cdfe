"""Splash attention, the flash kernel of TPUs that comes with JAX, for rows of any length.

Reference: jax/experimental/pallas/ops/tpu/splash_attention; https://arxiv.org/abs/2205.14135.
"""

import math
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from flaxpretrain.models.blocks import blocks
from flaxpretrain.models.functional import ATTENTION_CONTEXT
from flaxpretrain.models.layers import padded

SPLASH_BLOCK = 128
"""Splash attention works on blocks of a multiple of this many tokens; shorter rows are padded."""


def splash_attention(
    query: Float[Array, "B H L K"],
    key: Float[Array, "B H S K"],
    value: Float[Array, "B H S K"],
    segment_ids: Int[Array, "B L"],
    key_segment_ids: Int[Array, "B S"],
    *,
    causal: bool = False,
    window: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B H L K"]:
    """The flash kernel of TPUs, which skips the blocks that a causal mask or a window rules out.

    Reference: jax/experimental/pallas/ops/tpu/splash_attention; https://arxiv.org/abs/2205.14135.
    """
    # Imported here: Pallas takes a second to load, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length = query.shape[2]
    query, key, value = (padded(x, 2, SPLASH_BLOCK) for x in (query, key, value))
    segments = splash.SegmentIds(
        *(padded(ids, 1, SPLASH_BLOCK, -1) for ids in (segment_ids, key_segment_ids))
    )
    shape = (query.shape[2], key.shape[2])
    if window is not None:
        mask = masks.LocalMask(shape, (window, 0 if causal else window), 0)
    else:
        mask = (masks.CausalMask if causal else masks.FullMask)(shape)
    block, key_block = (math.gcd(size, blocks().splash) for size in shape)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * query.shape[1]),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=key_block,
            block_q_dkv=block,
            block_kv_dkv=key_block,
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION_CONTEXT,
        interpret=interpret,
    )

    def row(query: Array, key: Array, value: Array, segments: Any) -> Array:
        return kernel(query, key, value, segments)  # pyright: ignore[reportReturnType]

    return jax.vmap(row)(query, key, value, segments)[:, :, :length]
