"""TensorFlow checkpoints ("bundles", `model.ckpt-1000.index` and `.data-...`) without TensorFlow.

The index is a sorted table of LevelDB's kind, whose values are small protocol buffers; the data
files hold the bytes of the tensors end to end. Checksums are verified.

Reference: tensorflow/core/util/tensor_bundle/tensor_bundle.h, tensorflow/core/lib/io/format.cc and
tensorflow/core/protobuf/tensor_bundle.proto of tensorflow/tensorflow, version 1.15.
"""

import dataclasses
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flaxpretrain.conversion.crc32c import crc32c, unmasked
from flaxpretrain.data.protobuf import fields, varint
from flaxpretrain.errors import UserError

_MAGIC = 0xDB4775248B80FB57
_FOOTER, _TRAILER = 48, 5
_TYPES: Mapping[int, Any] = {
    1: np.float32,
    2: np.float64,
    3: np.int32,
    4: np.uint8,
    6: np.int8,
    9: np.int64,
    10: np.bool_,
    14: ml_dtypes.bfloat16,
    19: np.float16,
}
"""tensorflow.DataType, as far as it has a counterpart in numpy."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies: so many bytes of a data file, or slices that have entries of their own.

    slices: for each slice, (start, length) on every axis; length -1 is the whole axis.
    """

    kind: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int
    slices: tuple[tuple[tuple[int, int], ...], ...]


class Bundle:
    """A TensorFlow checkpoint that is open for reading."""

    def __init__(self, prefix: Path) -> None:
        """Reads the index.

        Raises:
            UserError: no such checkpoint, a damaged index, or one of a big-endian machine.
        """
        self.prefix = prefix
        self.index = prefix.with_name(prefix.name + ".index")
        if not self.index.is_file():
            raise UserError(
                f"{prefix} is no prefix of a TensorFlow checkpoint: there is no file {self.index}; "
                "give the path without .index or .data-..., such as models/x/model.ckpt-1000"
            )
        try:
            values = dict(_table(self.index.read_bytes()))
            header = dict(fields(values.pop(b"")))
            self._entries = {key: _entry(value) for key, value in values.items()}
        except (_Damaged, IndexError, KeyError, ValueError, struct.error) as error:
            raise UserError(
                f"{self.index} is no index of a checkpoint, or damaged ({error})"
            ) from None
        self._shards = int(header.get(1, 0))
        if header.get(2, 0):
            raise UserError(
                f"{self.index}: written on a big-endian machine, which is not supported"
            )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The names of all tensors, in order, with their shapes."""
        return {
            # Slices have keys that begin with a zero byte.
            key.decode(): entry.shape
            for key, entry in self._entries.items()
            if not key.startswith(b"\0")
        }

    def read(self, name: str) -> np.ndarray:
        """A tensor by its name.

        Raises:
            KeyError: there is none of this name.
            UserError: a data file or slice is missing or damaged, or holds what is no numbers.
        """
        entry = self._entries[name.encode()]
        if not entry.slices:
            return self._read(name, entry)
        whole = None
        for extents in entry.slices:
            found = self._entries.get(_slice_key(name, extents))
            if found is None:
                raise UserError(f"{self.index} is damaged: it lacks a slice of {name}")
            part = self._read(name, found)
            if whole is None:
                whole = np.empty(entry.shape, part.dtype)
            place = tuple(
                slice(None) if length < 0 else slice(start, start + length)
                for start, length in extents
            )
            whole[place] = part
        assert whole is not None
        return whole

    def _read(self, name: str, entry: Entry) -> np.ndarray:
        dtype = _TYPES.get(entry.kind)
        if dtype is None:
            raise UserError(
                f"{self.index}: {name} is of TensorFlow's type {entry.kind}, no numbers"
            )
        data = f"{self.prefix.name}.data-{entry.shard:05d}-of-{self._shards:05d}"
        path = self.prefix.with_name(data)
        if not path.is_file():
            raise UserError(f"{path} is missing; the index names it")
        with path.open("rb") as file:
            file.seek(entry.offset)
            content = file.read(entry.size)
        if len(content) < entry.size or crc32c(content) != unmasked(entry.checksum):
            raise UserError(
                f"{path} is damaged: the checksum of {name} does not fit; copy it again"
            )
        return np.frombuffer(content, np.dtype(dtype).newbyteorder("<")).reshape(entry.shape)


class _Damaged(Exception):
    """What is wrong with the bytes of an index."""


def _table(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a sorted table, in order."""
    if len(content) < _FOOTER or struct.unpack("<Q", content[-8:])[0] != _MAGIC:
        raise _Damaged("its last bytes are not those of a table")
    footer = content[-_FOOTER:]
    _, at = _handle(footer, 0)  # of a meta block, which is empty
    blocks, _ = _handle(footer, at)
    for _, handle in _block(content, blocks):
        yield from _block(content, _handle(handle, 0)[0])


def _handle(content: bytes, at: int) -> tuple[tuple[int, int], int]:
    """Offset and size of a block, and where reading goes on."""
    offset, at = varint(content, at)
    size, at = varint(content, at)
    return (offset, size), at


def _block(content: bytes, handle: tuple[int, int]) -> Iterator[tuple[bytes, bytes]]:
    """Entries of a block; a key is told by how much of it the last one shares."""
    start, size = handle
    end = start + size
    block, trailer = content[start:end], content[end : end + _TRAILER]
    if len(trailer) < _TRAILER:
        raise _Damaged("it was cut off")
    kind, checksum = struct.unpack("<BI", trailer)
    if crc32c(block + trailer[:1]) != unmasked(checksum):
        raise _Damaged("a checksum does not fit")
    if kind:
        raise _Damaged(f"compressed blocks, kind {kind}, which TensorFlow does not write here")
    restarts = struct.unpack("<I", block[-4:])[0]
    end, at, key = size - 4 * (restarts + 1), 0, b""
    while at < end:
        shared, at = varint(block, at)
        fresh, at = varint(block, at)
        length, at = varint(block, at)
        key = key[:shared] + block[at : at + fresh]
        at += fresh
        yield key, block[at : at + length]
        at += length


def _entry(message: bytes) -> Entry:
    """A BundleEntryProto."""
    values: dict[int, Any] = {}
    shape: tuple[int, ...] = ()
    slices = []
    for number, value in fields(message):
        if number == 2:  # TensorShapeProto, whose field 2 are dimensions, of which field 1 the size
            shape = tuple(int(dict(fields(d)).get(1, 0)) for n, d in fields(value) if n == 2)
        elif number == 7:  # TensorSliceProto, whose field 1 are extents: 1 the start, 2 the length
            extents = (dict(fields(e)) for n, e in fields(value) if n == 1)
            slices.append(tuple((int(e.get(1, 0)), int(e.get(2, -1))) for e in extents))
        else:
            values[number] = value
    kind, shard, offset, size, checksum = (int(values.get(n, 0)) for n in (1, 3, 4, 5, 6))
    return Entry(kind, shape, shard, offset, size, checksum, tuple(slices))


def _slice_key(name: str, extents: tuple[tuple[int, int], ...]) -> bytes:
    """The key of a slice's entry.

    Reference: EncodeTensorNameSlice of tensorflow/core/util/saved_tensor_slice_util.cc, in the
    encoding of tensorflow/core/lib/strings/ordered_code.cc.
    """
    rank = len(extents)
    numbers = b"".join(_ordered(number) for extent in extents for number in extent)
    # Names, being UTF-8, hold none of the two bytes that would have to be escaped.
    return b"\0" + name.encode() + b"\0\1" + (bytes([1, rank]) if rank else b"\0") + numbers


def _ordered(number: int) -> bytes:
    """A signed number as bytes that sort like it: the leading ones tell how many follow."""
    magnitude, length = ~number if number < 0 else number, 1
    while magnitude >> (7 * length - 1):
        length += 1
    plain = number.to_bytes(length, "big", signed=True)
    return bytes([plain[0] ^ (0xFF << (8 - length) & 0xFF)]) + plain[1:]
