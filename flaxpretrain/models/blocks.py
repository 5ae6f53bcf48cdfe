"""How much of the scores attention kernels hold at once, by kind of TPU: the one table of it."""

import dataclasses
import re

import jax


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes in tokens, multiples of 128; a row shorter than a block is one block.

    splash: queries, and keys, of a block of splash attention; of longer rows the largest common
        divisor is taken.
    scores: pairs of query and key whose scores of one head `row_attention` holds in float32.
    """

    splash: int
    scores: int


BLOCKS: tuple[tuple[str, Blocks], ...] = (
    # Cores of 16 MiB of vector memory for a kernel by default; 1 MiB of scores, four times held.
    (r"TPU v4", Blocks(splash=512, scores=512 * 512)),
    (r"TPU v5 ?lite|TPU v5e", Blocks(splash=512, scores=512 * 512)),
    (r"TPU v5p?$", Blocks(splash=512, scores=512 * 512)),
    # Matrix units of 256 x 256 take twice the work before they wait for the softmax.
    (r"TPU v6 ?lite|TPU v6e", Blocks(splash=1024, scores=512 * 512)),
    (r"TPU ?v?7x?", Blocks(splash=1024, scores=512 * 512)),
)
"""By a pattern of `jax.Device.device_kind`; the first that is found counts."""

ELSEWHERE = Blocks(splash=512, scores=512 * 512)
"""Where no mesh says what the program is for, and in interpret mode on the CPU."""


def blocks() -> Blocks:
    """The sizes for the devices of the surrounding mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = "" if device is None else device.device_kind
    return next((b for pattern, b in BLOCKS if re.search(pattern, kind)), ELSEWHERE)
