"""Keeps test sets out of a corpus: documents that share runs of words with them are dropped."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from flaxpretrain.data.shingles import shingles
from flaxpretrain.data.sources import Source
from flaxpretrain.errors import UserError
from flaxpretrain.shapes import Int, Numpy, UInt


@dataclasses.dataclass(frozen=True, eq=False)
class TestSets:
    """The runs of words of named test sets: 9 bytes for each."""

    __test__: ClassVar[bool] = False  # no test of pytest's

    names: tuple[str, ...]
    length: int
    runs: UInt[Numpy, " R"]
    """Sorted; each once."""
    owners: UInt[Numpy, " R"]
    """Which set each run is of; the first, where several have it."""
    short: Mapping[str, int]
    """Documents of each set with too few words for a run, which nothing is compared with."""

    def overlaps(self, words: UInt[Numpy, " W"]) -> Int[Numpy, " N"]:
        """How many runs of a document each test set has."""
        if len(words) < self.length or not len(self.runs):
            return np.zeros(len(self.names), np.int64)
        own = shingles(words, self.length)
        places = np.minimum(np.searchsorted(self.runs, own), len(self.runs) - 1)
        found = self.owners[places[self.runs[places] == own]]
        return np.bincount(found, minlength=len(self.names))


def collect(sources: Mapping[str, Source], length: int, words_of) -> TestSets:
    """Reads the test sets, each by its name; `words_of` gives the numbers of a text's words.

    Reference: runs of 13 words as in Brown et al. 2020, https://arxiv.org/abs/2005.14165,
    appendix C.

    Raises:
      UserError: a length below 1, or a set in which no document is so long.
    """
    if length < 1:
        raise UserError(f"runs of words that are compared have 1 word or more; got {length}")
    runs, owners, short = [], [], {}
    for number, (name, source) in enumerate(sources.items()):
        found, short[name] = [], 0
        for document in source.documents():
            words = words_of("\n".join(document.sentences))
            if len(words) < length:
                short[name] += 1
            else:
                found.append(shingles(words, length))
        if not found:
            raise UserError(
                f"test set {name}: none of {short[name]} documents has {length} words: lower "
                "--overlap-words"
            )
        unique = np.unique(np.concatenate(found))
        runs.append(unique)
        owners.append(np.full(len(unique), number, np.uint8))
    every, first = np.unique(np.concatenate(runs), return_index=True)
    return TestSets(tuple(sources), length, every, np.concatenate(owners)[first], short)
