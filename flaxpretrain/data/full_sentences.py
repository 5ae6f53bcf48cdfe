"""Rows of whole sentences that run on over documents, as RoBERTa has them.

Reference: FULL-SENTENCES, https://arxiv.org/abs/1907.11692, section 4.2; sample_break_mode complete
of fairseq/data/token_block_dataset.py.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from flaxpretrain.data.framing import ArraySpec, Framing, token_ids
from flaxpretrain.data.offsets import AT_ONCE
from flaxpretrain.data.randomness import Keys
from flaxpretrain.data.room import Room
from flaxpretrain.data.rows import Layout, RowPlan, require_text
from flaxpretrain.data.scratch import ArrayWriter
from flaxpretrain.data.store import Split
from flaxpretrain.data.views import read_views
from flaxpretrain.shapes import Batch, Int, Numpy


@dataclasses.dataclass(frozen=True)
class FullSentences(Layout):
    """As many whole sentences as a row holds, the next row from the next sentence on.

    A sentence longer than a row is cut; no text is lost. All of a row attends to all of it, over
    borders of documents.

    separate: puts a [SEP] where a document ends within a row.
    """

    separate: bool = True

    def fill(self, split: Split, room: Room) -> "SentencePlan":
        """Rows of one piece each."""
        require_text(split)
        room.require_pieces("FullSentences()")
        begins = _begins(split, room.capacity, self.separate)
        tokens = 0
        for first in range(0, len(begins) - 1, AT_ONCE):
            some = begins[first : first + AT_ONCE + 1]
            starts, ends = some[:-1], some[1:]
            inner = _documents_before(split, ends) - _documents_before(split, starts + 1)
            tokens += int(room.tokens[ends - starts + inner * self.separate].sum())
        return SentencePlan(
            split=split,
            length=room.length,
            capacity=room.capacity,
            rows_per_epoch=len(begins) - 1,
            real_tokens_per_epoch=tokens,
            max_pieces=1,
            begins=begins,
            separate=self.separate,
        )

    def framing(self, framing: Framing) -> Framing:
        """Puts the [SEP] of the vocabulary between documents."""
        if not self.separate:
            return framing
        return SeparatedFraming(vocabulary=framing.vocabulary, length=framing.length, inner=framing)


def _documents_before(split: Split, position: Int[Numpy, " N"]) -> Int[Numpy, " N"]:
    return split.document_offsets.searchsorted(position)


def _begins(split: Split, capacity: int, separate: bool) -> Int[Numpy, " R"]:
    """Where in the stream the rows begin, and the end of the last."""
    found = ArrayWriter()
    left = np.zeros(1, np.int64)
    for borders in _portions(split):
        # The row that the portion before this one left open goes on.
        borders = np.concatenate([left, _divided(np.append(left, borders), capacity)])
        ends = borders + _documents_before(split, borders) * separate
        starts = borders + _documents_before(split, borders + 1) * separate
        after = (np.searchsorted(ends, starts + capacity, side="right") - 1).tolist()
        here, last, rows = 0, len(borders) - 1, []
        while after[here] < last:
            rows.append(here)
            here = after[here]
        found.append(borders[rows])
        left = borders[here:]
    if left[0] < split.tokens:
        found.append(left[:1])
    found.append(np.array([split.tokens]))
    return found.array()


def _portions(split: Split) -> Iterator[np.ndarray]:
    """The ends of all sentences, some at a time, to bound memory."""
    for first in range(1, len(split.sentence_offsets), AT_ONCE):
        yield np.asarray(split.sentence_offsets[first : first + AT_ONCE], np.int64)


def _divided(borders: np.ndarray, capacity: int) -> np.ndarray:
    """All borders but the first, and more of them within what is longer than a row."""
    sizes = np.diff(borders)
    parts = -(-sizes // capacity)
    ordinal = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts) + 1
    begins = np.repeat(borders[:-1], parts)
    return np.minimum(begins + ordinal * capacity, np.repeat(borders[1:], parts))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SentencePlan(RowPlan):
    """Row i is the i-th run of sentences, in every epoch."""

    begins: Int[Numpy, " R"]
    separate: bool

    def views(
        self, seed: int, epoch: Int[Numpy, " B"], index: Int[Numpy, " B"]
    ) -> tuple[Int[Numpy, "B G"], Int[Numpy, "B G"]]:
        """One view a row."""
        starts = self.begins[index][:, None]
        return starts, self.begins[index + 1][:, None] - starts

    def read(
        self,
        starts: Int[Numpy, "B G"],
        piece_lengths: Int[Numpy, "B G"],
        *,
        word_starts: bool = True,
    ) -> dict[str, np.ndarray]:
        """The text; `separators` bool [B, T] marks where a token between documents has room."""
        if not self.separate:
            return super().read(starts, piece_lengths, word_starts=word_starts)
        start, length = starts[:, 0], piece_lengths[:, 0].astype(np.int64)
        first = _documents_before(self.split, start + 1)
        counts = np.where(length > 0, _documents_before(self.split, start + length) - first, 0)
        row = np.repeat(np.arange(len(start)), counts)
        ordinal = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        border = self.split.document_offsets[first[row] + ordinal]
        separators = np.zeros((len(start), self.capacity), bool)
        separators[row, border - start[row] + ordinal] = True
        inside = np.arange(self.capacity) < (length + counts)[:, None]
        inside &= ~separators
        found = read_views(self.split, start, length, word_starts=word_starts)
        rows: dict[str, np.ndarray] = {"separators": separators}
        for name, flat in found.items():
            rows[name] = np.zeros(inside.shape, flat.dtype)
            rows[name][inside] = flat
        return rows | {"piece_lengths": (length + counts)[:, None].astype(np.int32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeparatedFraming(Framing):
    """Another framing's batch, with the [SEP] of the vocabulary where the rows have room for it."""

    inner: Framing

    @property
    def reads_word_starts(self) -> bool:
        """As the other framing."""
        return self.inner.reads_word_starts

    def room(self) -> Room:
        """As the other framing's: a [SEP] takes the place of text."""
        return self.inner.room()

    def examples(self, rows: Batch, keys: Keys, step: int) -> dict[str, np.ndarray]:
        """The other framing's examples."""
        if "separators" in rows:
            (sep,) = token_ids(self.vocabulary, "sep")
            rows = {**rows, "ids": np.where(rows["separators"], np.int32(sep), rows["ids"])}
        return self.inner.examples(rows, keys, step)

    def spec(self, batch_size: int) -> dict[str, ArraySpec]:
        """As the other framing's."""
        return self.inner.spec(batch_size)


__all__ = ["FullSentences", "SentencePlan", "SeparatedFraming"]
