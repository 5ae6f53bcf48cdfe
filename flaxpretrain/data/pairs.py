"""Pairs of source and target that a corpus holds: plain sequence-to-sequence learning.

Such a corpus has two lines a document: the source, then its target.
"""

import dataclasses

import numpy as np

from flaxpretrain.data.encoder_decoder import (
    EncoderDecoderFraming,
    Ends,
    Group,
    Noised,
    Task,
    texts_of,
)
from flaxpretrain.data.packing import Packing, pack
from flaxpretrain.data.randomness import Keys, Stream, fold, permute
from flaxpretrain.data.room import Room
from flaxpretrain.data.rows import Layout, RowPlan, epoch_keys, require_text
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
        starts, lengths = self._pairs(split, room.pairs)
        extra = room.budget - room.pairs[0]
        source, target = (lengths + extra).T
        # What a pair takes of the side that it fills first, in positions of the source.
        sizes = np.maximum(source, -(-target * room.budget // (room.length - room.budget)))
        if not self.packed:
            sizes = np.full_like(sizes, room.budget)
        histogram = np.bincount(sizes, minlength=room.budget + 1)
        packing = pack(histogram, room.budget, 0)
        order = np.argsort(sizes, kind="stable")
        return PairPlan(
            split=split,
            length=room.length,
            capacity=room.capacity,
            rows_per_epoch=packing.rows,
            real_tokens_per_epoch=int(lengths.sum() + 2 * extra * len(lengths)),
            max_pieces=2 * packing.lengths.shape[1],
            packing=packing,
            pair_starts=starts[order],
            pair_lengths=lengths[order],
            histogram=histogram,
            first_of_size=np.cumsum(histogram) - histogram,
        )

    def _pairs(
        self, split: Split, most: tuple[int, int]
    ) -> tuple[Int[Numpy, "P 2"], Int[Numpy, "P 2"]]:
        """Where source and target of each document begin, and how long they are."""
        offsets = np.asarray(split.sentence_offsets, np.int64)
        first = np.searchsorted(offsets, split.document_offsets)
        counts = np.diff(first)
        wrong = np.flatnonzero(counts != 2)
        if len(wrong):
            raise UserError(
                f"split {split.name!r} of the dataset is not of pairs: its document {wrong[0]} "
                f"(from 0) has {counts[wrong[0]]} lines with text, where a source and a target "
                f"make two, and so have {len(wrong) - 1} others"
            )
        sentence = first[:-1, None] + np.arange(2)
        starts, lengths = offsets[sentence], offsets[sentence + 1] - offsets[sentence]
        longer = np.any(lengths > np.array(most), axis=1)
        if longer.any() and not self.cut:
            count, (source, target) = np.count_nonzero(longer), lengths.max(axis=0)
            raise UserError(
                f"{count} of {len(lengths)} pairs of split {split.name!r} do not "
                f"fit in phase.length and objective.target_length, with sources of up to {source} "
                f"and targets of up to {target} tokens where {most[0]} and {most[1]} fit: use "
                "larger ones, or set data.layout.cut to shorten them"
            )
        return starts, np.minimum(lengths, np.array(most))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PairPlan(RowPlan):
    """Pieces alternate: a source, its target. The epoch says which pairs share a row."""

    packing: Packing
    pair_starts: Int[Numpy, "P 2"]
    """Where source and target of each pair begin in the stream; pairs are ordered by size."""
    pair_lengths: Int[Numpy, "P 2"]
    histogram: Int[Numpy, " C"]
    first_of_size: Int[Numpy, " C"]

    @property
    def examples_per_epoch(self) -> int:
        """Pairs."""
        return len(self.pair_starts)

    def views(
        self, seed: int, epoch: Int[Numpy, " B"], index: Int[Numpy, " B"]
    ) -> tuple[Int[Numpy, "B G"], Int[Numpy, "B G"]]:
        """Two views for each pair; empty slots come last."""
        sizes, number = self.packing.slots(index)
        row, slot = np.nonzero(sizes)
        size = sizes[row, slot]
        keys = fold(epoch_keys(seed, epoch, Stream.PIECES)[row], size)
        pair = self.first_of_size[size] + permute(number[row, slot], self.histogram[size], keys)
        starts, lengths = np.zeros((2, *sizes.shape, 2), np.int64)
        starts[row, slot], lengths[row, slot] = self.pair_starts[pair], self.pair_lengths[pair]
        shape = (len(sizes), -1)
        return starts.reshape(shape), lengths.reshape(shape)


__all__ = ["PairFraming", "PairPlan", "SourceTarget", "SourceTargetPairs"]
