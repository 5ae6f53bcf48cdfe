"""Duplicates: documents whose text, or nearly whose text, an earlier document has.

Time is linear in the corpus. Memory is too, for documents that are kept: 0.5 to 1 kB each with the
default of 128 hashes in 16 bands, and 25 to 50 bytes without near duplicates.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]

from flaxpretrain.data.randomness import fold
from flaxpretrain.data.shingles import shingles
from flaxpretrain.errors import UserError
from flaxpretrain.shapes import Int, Numpy, Shaped, UInt

_FREE = np.uint32(0xFFFFFFFF)
_CROWD = 8
"""Documents that a band's value may lead to: boilerplate does not make a corpus quadratic."""
_BLOCK = 1 << 10
"""Sketches that are stored together."""


def digest_of(text: str) -> int:
    """64 bits that texts have in common which differ by case and white space only."""
    plain = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "little")


@dataclasses.dataclass(frozen=True)
class MinHash:
    """How texts are compared: the share of runs of words that two have in common, estimated.

    Reference: Broder 1997, "On the resemblance and containment of documents"; bands as in Leskovec,
    Rajaraman and Ullman, Mining of Massive Datasets, section 3.4; low bits as in Li and König 2010,
    https://arxiv.org/abs/0908.2514. Runs of 5 words and 0.8: Lee et al. 2022,
    https://arxiv.org/abs/2107.06499, section 4.2.
    """

    threshold: float = 0.8
    """Documents that resemble an earlier one so much are dropped."""
    words: int = 5
    """Words in a run."""
    hashes: int = 128
    bands: int = 16
    """With 128 hashes, 16 bands find a resemblance of 0.8 with probability 0.95, of 0.9 always."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise UserError(f"a resemblance lies above 0 and up to 1; got {self.threshold}")
        if self.words < 1 or self.bands < 1 or self.hashes % self.bands:
            raise UserError(
                "runs have 1 word or more and the number of hashes is a multiple of the bands; got "
                f"{self.words} words, {self.hashes} hashes, {self.bands} bands"
            )

    def sketches(self, documents: Sequence[UInt[Numpy, " _"]]) -> UInt[Numpy, "D P"]:
        """Sketches of documents, given as numbers of their words: where equal, they agree."""
        runs = [shingles(words, self.words) for words in documents]
        offsets = np.cumsum([0, *map(len, runs)])
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(
            np.concatenate(runs), offsets.astype(np.uint64), self.hashes, self.seed
        )
        return np.array(matrix.to_rows(), np.uint32)

    def bands_of(self, sketches: UInt[Numpy, "D P"]) -> UInt[Numpy, "D B"]:
        """A number for each band of each sketch."""
        rows = self.hashes // self.bands
        parts = sketches.reshape(len(sketches), self.bands, rows).astype(np.uint64)
        keys = np.broadcast_to(np.arange(self.bands, dtype=np.uint64), parts.shape[:2])
        for row in range(rows):
            keys = fold(keys ^ parts[:, :, row], row)
        return keys


class Table:
    """Numbers of 64 bits and the documents they lead to: open addressing, 12 bytes a slot."""

    def __init__(self) -> None:
        self._keys = np.zeros(1 << 12, np.uint64)
        self._owners = np.full(1 << 12, _FREE)
        self._used = 0

    @property
    def bytes(self) -> int:
        """Memory it takes."""
        return self._keys.nbytes + self._owners.nbytes

    def find(self, keys: UInt[Numpy, " B"]) -> tuple[Int[Numpy, " C"], Int[Numpy, " B"]]:
        """Documents that any of the keys leads to, and how many each key leads to."""
        counts = np.zeros(len(keys), np.int64)
        found = []
        slots = self._slots(keys)
        left = np.arange(len(keys))
        while len(left):
            owners = self._owners[slots[left]]
            left, owners = left[owners != _FREE], owners[owners != _FREE]
            same = self._keys[slots[left]] == keys[left]
            found.append(owners[same])
            counts[left[same]] += 1
            slots[left] = (slots[left] + 1) & (len(self._keys) - 1)
        documents = np.unique(np.concatenate(found)) if found else np.zeros(0, np.uint32)
        return documents.astype(np.int64), counts

    def add(self, keys: UInt[Numpy, " B"], owners: UInt[Numpy, " B"]) -> None:
        """Lets each key lead to a document."""
        if 2 * (self._used + len(keys)) > len(self._keys):
            kept = self._owners != _FREE
            old = self._keys[kept], self._owners[kept]
            size = len(self._keys)
            while 2 * (self._used + len(keys)) > size:
                size *= 2
            self._keys, self._owners = np.zeros(size, np.uint64), np.full(size, _FREE)
            self._place(*old)
        self._place(keys, owners)
        self._used += len(keys)

    def _place(self, keys: np.ndarray, owners: np.ndarray) -> None:
        slots = self._slots(keys)
        left = np.arange(len(keys))
        while len(left):
            # Of several keys that come to one free slot, the last one written has it.
            free = left[self._owners[slots[left]] == _FREE]
            mine = np.full(len(keys), False)
            places, first = np.unique(slots[free], return_index=True)
            winners = free[first]
            self._keys[places], self._owners[places] = keys[winners], owners[winners]
            mine[winners] = True
            left = left[~mine[left]]
            slots[left] = (slots[left] + 1) & (len(self._keys) - 1)

    def _slots(self, keys: np.ndarray) -> np.ndarray:
        return (keys & np.uint64(len(self._keys) - 1)).astype(np.int64)


class ExactDuplicates:
    """Drops documents whose text, but for case and white space, came before."""

    name = "duplicate"

    def __init__(self) -> None:
        self._seen = Table()
        self._count = 0

    @property
    def bytes(self) -> int:
        """Memory of the documents that were kept."""
        return self._seen.bytes

    def seen(self, digest: np.uint64) -> bool:
        """Whether the text came before."""
        return bool(len(self._seen.find(np.array([digest], np.uint64))[0]))

    def keep(self, digests: UInt[Numpy, " D"]) -> None:
        """Remembers texts."""
        self._seen.add(digests, np.zeros(len(digests), np.uint32))


class NearDuplicates:
    """Drops documents that resemble one before."""

    name = "near-duplicate"

    def __init__(self, settings: MinHash = MinHash()) -> None:  # noqa: B008
        self.settings = settings
        self._table = Table()
        self._blocks: list[np.ndarray] = []
        self._count = 0

    @property
    def bytes(self) -> int:
        """Memory of the documents that were kept."""
        return self._table.bytes + sum(block.nbytes for block in self._blocks)

    def resembles(self, bands: UInt[Numpy, " B"], low: UInt[Numpy, " P"]) -> bool:
        """Whether a document, by its bands and the low bytes of its sketch, is like one before."""
        candidates, _ = self._table.find(bands)
        if not len(candidates):
            return False
        others = np.stack([self._blocks[i // _BLOCK][i % _BLOCK] for i in candidates])
        agree = (others == low).mean(1)
        # A byte agrees by chance once in 256 times.
        return bool(((agree - 1 / 256) / (1 - 1 / 256)).max() >= self.settings.threshold)

    def keep(self, bands: UInt[Numpy, "D B"], low: UInt[Numpy, "D P"]) -> None:
        """Remembers documents."""
        for one_bands, one_low in zip(bands, low, strict=True):
            place = self._count % _BLOCK
            if not place:
                self._blocks.append(np.zeros((_BLOCK, self.settings.hashes), np.uint8))
            self._blocks[-1][place] = one_low
            _, crowd = self._table.find(one_bands)
            room = one_bands[crowd < _CROWD]
            self._table.add(room, np.full(len(room), self._count, np.uint32))
            self._count += 1


@dataclasses.dataclass(frozen=True, eq=False)
class Prints:
    """What duplicates are found by, for each of several documents."""

    digests: UInt[Numpy, " D"]
    bands: UInt[Numpy, "D B"]
    low: UInt[Numpy, "D P"]
    """The low bytes of the sketches."""

    def __getitem__(self, chosen: Shaped[Numpy, " _"]) -> "Prints":
        return Prints(self.digests[chosen], self.bands[chosen], self.low[chosen])


class Duplicates:
    """Both kinds together, for documents that come in order."""

    def __init__(self, exact: bool, near: MinHash | None) -> None:
        self.exact = ExactDuplicates() if exact else None
        self.near = None if near is None else NearDuplicates(near)

    @property
    def bytes(self) -> int:
        """Memory of the documents that were kept."""
        return sum(part.bytes for part in (self.exact, self.near) if part is not None)

    def judge(self, prints: Prints) -> list[str | None]:
        """Why each document is dropped; those that are not are remembered."""
        verdicts: list[str | None] = []
        for number, digest in enumerate(prints.digests):
            one = prints[np.array([number])]
            verdict = None
            if self.exact is not None and self.exact.seen(digest):
                verdict = self.exact.name
            elif self.near is not None and self.near.resembles(one.bands[0], one.low[0]):
                verdict = self.near.name
            verdicts.append(verdict)
            if verdict is None:
                self.keep(one)
        return verdicts

    def keep(self, prints: Prints) -> None:
        """Remembers documents, without a question."""
        if self.exact is not None:
            self.exact.keep(prints.digests)
        if self.near is not None:
            self.near.keep(prints.bands, prints.low)


def prints_of(texts: Sequence[str], words: Sequence[np.ndarray], near: MinHash | None) -> Prints:
    """The prints of documents, by their text and the numbers of their words."""
    digests = np.array([digest_of(text) for text in texts], np.uint64)
    if near is None or not texts:
        bands, hashes = (0, 0) if near is None else (near.bands, near.hashes)
        none = np.zeros((len(texts), bands), np.uint64)
        return Prints(digests, none, np.zeros((len(texts), hashes), np.uint8))
    # A text without words resembles only its like.
    runs = [own if len(own) else digests[i : i + 1] for i, own in enumerate(words)]
    sketches = near.sketches(runs)
    return Prints(digests, near.bands_of(sketches), sketches.astype(np.uint8))
