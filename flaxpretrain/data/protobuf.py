"""Reads the wire format of protocol buffers, as far as files of other programs need it.

Reference: https://protobuf.dev/programming-guides/encoding.
"""

import struct
from collections.abc import Iterator
from typing import Any


def varint(content: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, low bits first, and where reading goes on.

    Raises:
        IndexError: the bytes end before the number does.
    """
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a message's fields: whole numbers, or bytes.

    A 32-bit or 64-bit field gives a whole number, whatever it stands for; `as_float` reads one of
    32 bits as a float.

    Raises:
        ValueError: a field of a wire type that these files do not have, or one that is cut off.
        IndexError: the message is cut off.
    """
    at = 0
    while at < len(message):
        tag, at = varint(message, at)
        if tag & 7 == 0:
            value, at = varint(message, at)
        elif tag & 7 == 2:
            length, at = varint(message, at)
            value, at = message[at : at + length], at + length
        elif tag & 7 in (1, 5):
            size = 4 if tag & 7 == 5 else 8
            value, at = int.from_bytes(message[at : at + size], "little"), at + size
        else:
            raise ValueError(f"a field of wire type {tag & 7}")
        if at > len(message):
            raise ValueError(f"field {tag >> 3} is cut off")
        yield tag >> 3, value


def as_float(value: int) -> float:
    """The float whose 32 bits are this number."""
    return struct.unpack("<f", value.to_bytes(4, "little"))[0]


def as_signed(value: int) -> int:
    """The signed number that a varint of 64 bits stands for."""
    return value - (1 << 64) if value >> 63 else value
