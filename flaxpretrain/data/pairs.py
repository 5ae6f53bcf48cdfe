"""Pairs of source and target that a corpus holds: plain sequence-to-sequence learning.

Such a corpus has two lines a document: the source, then its target.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from flaxpretrain.data.encoder_decoder import (
    EncoderDecoderFraming,
    Ends,
    Group,
    Noised,
    Task,
    texts_of,
)
from flaxpretrain.data.offsets import portions
from flaxpretrain.data.packing import Packing, pack
from flaxpretrain.data.randomness import Keys, Stream
from flaxpretrain.data.room import Room
from flaxpretrain.data.rows import Layout, RowPlan, epoch_keys, require_text
from flaxpretrain.data.size_index import Items, SizeIndex, index_by_size
from flaxpretrain.data.store import Split
from flaxpretrain.data.vocabulary import Vocabulary
from flaxpretrain.errors import UserError
from flaxpretrain.shapes import Batch, Int, Numpy


@dataclasses.dataclass(frozen=True)
class SourceTarget(Task):
    """The decoder says the target that the corpus gives for a source; nothing is noised.

    For the layout `SourceTargetPairs`.
    """

    def framing(
        self, vocabulary: Vocabulary, length: int, target_length: int | None, ends: Ends
    ) -> "PairFraming":
        """Targets have as many positions as sources unless told otherwise."""
        return PairFraming(
            vocabulary=vocabulary, length=length, target_length=target_length or length, ends=ends
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairFraming(EncoderDecoderFraming):
    """Source and target of each pair as they are."""

    def room(self) -> Room:
        """The longest source and target that fit."""
        sizes = np.zeros(1, np.int64)
        return Room(
            length=self.length + self.target_length,
            budget=self.length,
            sizes=sizes,
            tokens=sizes,
            pairs=(self.length - self.ends.count, self.target_length - self.ends.count),
        )

    def pieces_per_row(self, rows: Batch) -> Int[Numpy, " B"]:
        """One source for each pair of pieces."""
        return np.count_nonzero(rows["piece_lengths"][:, 0::2], axis=1)

    def groups(self, rows: Batch, keys: Keys) -> list[Group]:
        """All pairs alike."""
        pairs = np.arange(int(self.pieces_per_row(rows).sum()))
        source, target = (texts_of(rows, keys, 2 * pairs + side) for side in (0, 1))
        noised = Noised(source.ids, source.lengths, target.ids, target.lengths)
        return [Group(pairs, noised)]


@dataclasses.dataclass(frozen=True)
class SourceTargetPairs(Layout):
    """Pairs packed into rows, others together in each epoch; each attends to itself alone.

    packed: several pairs a row. cut: shortens sources and targets that do not fit, from their end,
    where by default that is an error.
    """

    packed: bool = True
    cut: bool = False

    def fill(self, split: Split, room: Room) -> "PairPlan":
        """Rows of one or more pairs.

        Raises:
            UserError: the split is empty or not of pairs, a pair is too long, or the objective is
                not about pairs.
        """
        require_text(split)
        if room.pairs is None:
            raise UserError(
                "data.layout SourceTargetPairs() is for the noise SourceTarget(); this objective "
                "makes its own targets: use Blocks() or Documents()"
            )
        text = self._checked(split, room.pairs)
        extra = room.budget - room.pairs[0]
        pairs = index_by_size(lambda: self._pairs(split, room), room.budget + 1, columns=4)
        packing = pack(pairs.histogram, room.budget, 0)
        return PairPlan(
            split=split,
            length=room.length,
            capacity=room.capacity,
            rows_per_epoch=packing.rows,
            real_tokens_per_epoch=text + 2 * extra * len(pairs),
            max_pieces=2 * packing.lengths.shape[1],
            packing=packing,
            items=pairs,
        )

    def _pairs(self, split: Split, room: Room) -> Items:
        """What each pair takes of a row, where its source and target begin, and their lengths."""
        most = room.pairs or (0, 0)
        extra = room.budget - most[0]
        for _, _, starts, lengths in _documents(split):
            lengths = np.minimum(lengths, np.array(most))
            source, target = (lengths + extra).T
            # Positions of the source: a pair takes of the side that it fills first.
            sizes = np.maximum(source, -(-target * room.budget // (room.length - room.budget)))
            if not self.packed:
                sizes = np.full_like(sizes, room.budget)
            yield sizes, np.concatenate([starts, lengths], axis=1)

    def _checked(self, split: Split, most: tuple[int, int]) -> int:
        """The tokens of all pairs, once they are cut."""
        wrong: list[str] = []
        others = longer = text = 0
        longest = np.zeros(2, np.int64)
        for first, lines, _, lengths in _documents(split):
            unlike = np.flatnonzero(lines != 2)
            if len(unlike) and not wrong:
                wrong.append(f"{first + unlike[0]} (from 0) has {lines[unlike[0]]}")
                others -= 1
            others += len(unlike)
            longer += np.count_nonzero(np.any(lengths > np.array(most), axis=1))
            longest = np.maximum(longest, lengths.max(axis=0))
            text += int(np.minimum(lengths, np.array(most)).sum())
        if wrong:
            raise UserError(
                f"split {split.name!r} of the dataset is not of pairs: its document {wrong[0]} "
                f"lines with text, where a source and a target make two, and so have {others} "
                "others"
            )
        if longer and not self.cut:
            raise UserError(
                f"{longer} of {split.documents} pairs of split {split.name!r} do not fit in "
                f"phase.length and objective.target_length, with sources of up to {longest[0]} and "
                f"targets of up to {longest[1]} tokens where {most[0]} and {most[1]} fit: use "
                "larger ones, or set data.layout.cut to shorten them"
            )
        return text


def _documents(
    split: Split,
) -> Iterator[tuple[int, Int[Numpy, " N"], Int[Numpy, "N 2"], Int[Numpy, "N 2"]]]:
    """Some documents at a time: the number of the first; of each, how many lines it has, where its
    first two begin, and their lengths."""
    documents, sentences = split.document_offsets, split.sentence_offsets
    for first, last in portions(documents, sentences):
        borders = np.asarray(documents[first : last + 1], np.int64)
        begin, end = sentences.searchsorted(borders[[0, -1]])
        offsets = np.asarray(sentences[begin : end + 1], np.int64)
        opening = offsets.searchsorted(borders)
        line = np.minimum(opening[:-1, None] + np.arange(3), len(offsets) - 1)
        yield first, np.diff(opening), offsets[line[:, :2]], np.diff(offsets[line], axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PairPlan(RowPlan):
    """Pieces alternate: a source, its target. The epoch says which pairs share a row."""

    packing: Packing
    items: SizeIndex
    """Where source and target of each pair begin in the stream, and their lengths."""

    @property
    def examples_per_epoch(self) -> int:
        """Pairs."""
        return len(self.items)

    def views(
        self, seed: int, epoch: Int[Numpy, " B"], index: Int[Numpy, " B"]
    ) -> tuple[Int[Numpy, "B G"], Int[Numpy, "B G"]]:
        """Two views for each pair; empty slots come last."""
        keys = epoch_keys(seed, epoch, Stream.PIECES)
        row, slot, _, pair = self.items.drawn(self.packing, index, keys)
        starts, lengths = np.zeros((2, len(index), self.max_pieces // 2, 2), np.int64)
        records = self.items.records[pair]
        starts[row, slot], lengths[row, slot] = records[:, :2], records[:, 2:]
        shape = (len(index), -1)
        return starts.reshape(shape), lengths.reshape(shape)


__all__ = ["PairFraming", "PairPlan", "SourceTarget", "SourceTargetPairs"]
