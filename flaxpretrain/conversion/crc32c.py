"""CRC-32C (Castagnoli) of long byte strings in numpy, many places of the string at once.

The register is a linear function of the bytes over GF(2), so that parts of a string can be worked
through side by side and put together afterwards.

Reference: RFC 3720, section 12.1; the masking is that of tensorflow/core/lib/hash/crc32c.h.
"""

import functools

import numpy as np

from flaxpretrain.shapes import Numpy, UInt

_POLYNOMIAL = 0x82F63B78
_ONES = 0xFFFFFFFF
_MASK_DELTA = 0xA282EAD8
_MOST_LANES_BITS = 12


def crc32c(content: bytes) -> int:
    """The checksum of a byte string."""
    size = len(content)
    lanes = 1 << min(_MOST_LANES_BITS, max(size.bit_length() - 4, 0) // 2)
    words = -(-max(size, 1) // (4 * lanes))
    # Zero bytes in front leave a register of zeros as it is.
    padded = np.zeros(4 * lanes * words, np.uint8)
    padded[len(padded) - size :] = np.frombuffer(content, np.uint8)
    low, high = _tables()
    state = np.zeros(lanes, np.uint32)
    for column in padded.view("<u4").reshape(lanes, words).T:
        state ^= column
        state = low[state & np.uint32(0xFFFF)] ^ high[state >> np.uint32(16)]
    span = 4 * words
    while len(state) > 1:
        state = _over_zeros(state[0::2], span) ^ state[1::2]
        span *= 2
    begun = _over_zeros(np.array([_ONES], np.uint32), size)
    return int(state[0] ^ begun[0]) ^ _ONES


def unmasked(checksum: int) -> int:
    """The CRC-32C that TensorFlow stored as `checksum`."""
    rotated = (checksum - _MASK_DELTA) & _ONES
    return (rotated >> 17 | rotated << 15) & _ONES


def _over_zero(state: UInt[Numpy, " N"]) -> UInt[Numpy, " N"]:
    """Registers after one more zero byte."""
    for _ in range(8):
        state = state >> np.uint32(1) ^ (state & np.uint32(1)) * np.uint32(_POLYNOMIAL)
    return state


def _over_zeros(state: UInt[Numpy, " N"], count: int) -> UInt[Numpy, " N"]:
    """Registers after `count` more zero bytes, by squaring the map of one."""
    image = _over_zero(np.uint32(1) << np.arange(32, dtype=np.uint32))
    while count:
        if count & 1:
            state = _mapped(image, state)
        image = _mapped(image, image)
        count >>= 1
    return state


def _mapped(image: UInt[Numpy, " I"], state: UInt[Numpy, " N"]) -> UInt[Numpy, " N"]:
    """The linear map that sends bit i to `image[i]`."""
    result = np.zeros_like(state)
    for bit in range(32):
        result ^= (state >> np.uint32(bit) & np.uint32(1)) * image[bit]
    return result


@functools.cache
def _tables() -> tuple[UInt[Numpy, " T"], UInt[Numpy, " T"]]:
    """What four bytes make of the lower and of the upper half of a register."""
    half = np.arange(1 << 16, dtype=np.uint32)
    return _over_zeros(half, 4), _over_zeros(half << np.uint32(16), 4)
