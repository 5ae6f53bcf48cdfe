"""Runs of words as numbers, by which texts are compared; vectorised over a document."""

import re
import zlib

import numpy as np

from flaxpretrain.data.randomness import fold
from flaxpretrain.data.word_starts import UNSPACED_RANGES
from flaxpretrain.shapes import Numpy, UInt

_UNSPACED = "".join(f"{chr(first)}-{chr(last)}" for first, last in UNSPACED_RANGES)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def word_hashes(text: str) -> UInt[Numpy, " W"]:
    """A number for each word, whatever its case; in scripts without spaces, for each character.

    Punctuation and spaces are no words.
    """
    words = _WORD.findall(text.casefold())
    codes = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))
    return fold(codes, 0)


def shingles(words: UInt[Numpy, " W"], length: int) -> UInt[Numpy, " S"]:
    """A number for each run of `length` words, the same for the same run; sorted, each once.

    A text of fewer words is one run.
    """
    if not len(words):
        return words
    length = min(length, len(words))
    count = len(words) - length + 1
    runs = words[:count]
    for place in range(1, length):
        # Folded first: the order of the words counts.
        runs = fold(runs, place) ^ words[place : place + count]
    return np.unique(fold(runs, length))
