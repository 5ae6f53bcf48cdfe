"""What packing puts into rows, ordered by size, so that each item is found by its size and number.

The index is made in two passes over the items, some at a time, and lies on the disk where it is
large: the memory it takes does not grow with the dataset.
"""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from flaxpretrain.data.packing import Packing
from flaxpretrain.data.randomness import Keys, fold, permute
from flaxpretrain.data.scratch import zeros
from flaxpretrain.shapes import Int, Numpy

Items = Iterable[tuple[Int[Numpy, " N"], Int[Numpy, "N K"]]]
"""Sizes of some items, and what is kept of each."""


@dataclasses.dataclass(frozen=True, eq=False)
class SizeIndex:
    """Records of items, ordered by size; those of one size in their own order."""

    histogram: Int[Numpy, " C"]
    """Number of items of each size."""
    first: Int[Numpy, " C"]
    """Where the items of each size begin."""
    records: Int[Numpy, "P K"]

    def __len__(self) -> int:
        return len(self.records)

    def drawn(
        self, packing: Packing, row: Int[Numpy, " B"], keys: Keys
    ) -> tuple[Int[Numpy, " N"], Int[Numpy, " N"], Int[Numpy, " N"], Int[Numpy, " N"]]:
        """The items of rows of a packing: the row and slot of each, its size and its number here.

        `keys`, one a row, pick which items of a size take its slots; all rows of an epoch have the
        same.
        """
        sizes, number = packing.slots(row)
        at, slot = np.nonzero(sizes)
        size = sizes[at, slot]
        item = permute(number[at, slot], self.histogram[size], fold(keys[at], size))
        return at, slot, size, self.first[size] + item


def index_by_size(items: Callable[[], Items], sizes: int, columns: int) -> SizeIndex:
    """The index of items of sizes below `sizes`, whose records have `columns` numbers.

    Raises:
        UserError: there is no room for it on the disk.
    """
    histogram = np.zeros(sizes, np.int64)
    for size, _ in items():
        histogram += np.bincount(size, minlength=sizes)
    first = np.cumsum(histogram) - histogram
    records = zeros(int(histogram.sum()) * columns).reshape(-1, columns)
    free = first.copy()
    for size, record in items():
        order = np.argsort(size, kind="stable")
        counts = np.bincount(size, minlength=sizes)
        ordered = size[order]
        place = free[ordered] + np.arange(len(size)) - (np.cumsum(counts) - counts)[ordered]
        records[place] = record[order]
        free += counts
    return SizeIndex(histogram, first, records)


__all__ = ["Items", "SizeIndex", "index_by_size"]
