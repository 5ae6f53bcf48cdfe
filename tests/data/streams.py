"""Small stores whose text can be recognised, and rows drawn as lines of characters."""

import numpy as np

from flaxpretrain.data.store import Split, open_dataset
from flaxpretrain.data.store_writer import write_dataset
from flaxpretrain.data.vocabulary import Vocabulary

VOCABULARY = Vocabulary(size=500, pad=0, unk=1, cls=2, sep=3, mask=4)

GLYPHS = "0123456789.<>_?"
DIGITS = Vocabulary(size=15, pad=10, cls=11, sep=12, mask=13, unk=14)
"""Text tokens are the digits; the special tokens are drawn as `.<>_?`."""


def drawn(ids) -> str:
    return "".join(GLYPHS[i] for i in ids)


def undrawn(text) -> np.ndarray:
    return np.array([GLYPHS.index(c) for c in text])


def recognisable(tokens: int, vocabulary: Vocabulary = VOCABULARY) -> np.ndarray:
    """Text in which neighbours differ and no special token stands."""
    regular = vocabulary.regular_ids()
    return regular[np.arange(tokens) * 7 % len(regular)]


def make_split(
    folder, document_lengths, vocabulary=VOCABULARY, shard_bytes=1 << 26, ids=None
) -> Split:
    """A split on disk of documents of these lengths, in tokens."""
    total = int(np.sum(document_lengths))
    ids = recognisable(total, vocabulary) if ids is None else np.asarray(ids)
    borders = np.cumsum(document_lengths)[:-1]
    documents = [[part.tolist()] for part in np.split(ids, borders)] if total else []
    opens = np.arange(vocabulary.size) % 3 > 0
    write_dataset(
        folder, vocabulary, {"train": documents}, word_starts=opens, shard_bytes=shard_bytes
    )
    return open_dataset(folder).split("train")


def chi_square(counts) -> float:
    """Standard deviations by which the chi-square of even counts exceeds its mean."""
    counts = np.asarray(counts, np.float64).ravel()
    expected, freedom = counts.mean(), counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))
