"""Where the documents or sentences of a split begin, over all its shards.

Offsets are memory maps of files, and there may be more of them than memory has room for: what
looks at all of them does so a portion at a time.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from flaxpretrain.shapes import Int, Numpy

AT_ONCE = 1 << 16
"""Documents, or sentences, of a portion."""


class ShardedOffsets:
    """The offsets of several shards as one ascending array of int64; nothing is copied."""

    def __init__(self, shards: Sequence[Int[Numpy, " _"]], starts: Sequence[int]) -> None:
        """Offsets within each shard, its end included, and where each shard starts in the split."""
        self._shards = tuple(shards)
        self._starts = np.array(starts, np.int64)
        """In tokens."""
        counts = np.array([len(shard) - 1 for shard in shards], np.int64)
        self._length = int(counts.sum()) + 1
        self._first = np.cumsum(counts) - counts
        """Number of the first offset of each shard."""

    def __len__(self) -> int:
        return self._length

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """All of them, in memory."""
        return self[:].astype(dtype or np.int64, copy=False)

    def __getitem__(self, index: slice | Int[Numpy, "..."] | Sequence[int]) -> Int[Numpy, "..."]:
        """The offsets of a slice without step, or of any numbers from 0 on."""
        if isinstance(index, slice):
            begin, end, _ = index.indices(self._length)
            return self[np.arange(begin, end)] if begin >= end else self._slice(begin, end)
        index = np.asarray(index, np.int64)
        flat = index.ravel()
        found = np.empty(flat.shape, np.int64)
        shard = self._first.searchsorted(flat, side="right") - 1
        for number, here in _grouped(shard):
            local = flat[here] - self._first[number]
            found[here] = self._shards[number][local] + self._starts[number]
        return found.reshape(index.shape)

    def searchsorted(
        self, values: Int[Numpy, "*N"], side: Literal["left", "right"] = "left"
    ) -> Int[Numpy, "*N"]:
        """How many offsets are below each value; with "right", how many are not above it."""
        values = np.asarray(values, np.int64)
        flat = values.ravel()
        found = np.empty(flat.shape, np.int64)
        # The last shard that starts below: those before it count whole, those after it not at all.
        shard = np.maximum(self._starts.searchsorted(flat, side=side) - 1, 0)
        for number, here in _grouped(shard):
            local = self._shards[number].searchsorted(flat[here] - self._starts[number], side=side)
            found[here] = local + self._first[number]
        return found.reshape(values.shape)

    def _slice(self, begin: int, end: int) -> Int[Numpy, " N"]:
        last = len(self._shards) - 1
        ends = np.append(self._first[1:], self._length)
        parts = []
        for number in range(int(self._first.searchsorted(begin, side="right")) - 1, last + 1):
            first = int(self._first[number])
            local = self._shards[number][
                max(begin - first, 0) : min(end, int(ends[number])) - first
            ]
            parts.append(local + self._starts[number])
            if end <= ends[number]:
                break
        return np.concatenate(parts).astype(np.int64, copy=False)


Offsets = np.ndarray | ShardedOffsets
"""What takes a slice or whole numbers, knows its length, and searches a sorted array."""


def portions(documents: Offsets, sentences: Offsets | None = None) -> Iterator[tuple[int, int]]:
    """Consecutive ranges [first, last) of documents: the bound of what is in memory together.

    Of `AT_ONCE` documents each or, with `sentences`, of about as many sentences.
    """
    last = len(documents) - 1
    if sentences is None:
        borders = np.arange(0, last, AT_ONCE)
    else:
        borders = documents.searchsorted(sentences[np.arange(0, len(sentences), AT_ONCE)])
    return itertools.pairwise(np.unique(np.append(np.minimum(borders, last), last)).tolist())


def _grouped(numbers: Int[Numpy, " N"]) -> Iterator[tuple[int, Int[Numpy, " M"]]]:
    """Each number that there is, ascending, and where it stands."""
    order = np.argsort(numbers, kind="stable")
    found, begins = np.unique(numbers[order], return_index=True)
    return zip(found.tolist(), np.split(order, begins[1:]), strict=bool(len(found)))


__all__ = ["AT_ONCE", "Offsets", "ShardedOffsets", "portions"]
