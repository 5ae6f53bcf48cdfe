"""Rows are views of the stream of tokens: a layout says which views make which row.

A layout is a value of a recipe; its plan for one split and length says where every row's text
lies. Nothing is stored per epoch: a row's views are a pure function of (seed, epoch, index).
"""

import abc
import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from flaxpretrain.data.framing import Framing, framed_room
from flaxpretrain.data.offsets import AT_ONCE, portions
from flaxpretrain.data.packing import Packing, pack
from flaxpretrain.data.ragged import ranges
from flaxpretrain.data.randomness import Stream, fold, permute
from flaxpretrain.data.room import Room
from flaxpretrain.data.size_index import Items, SizeIndex, index_by_size
from flaxpretrain.data.store import Split
from flaxpretrain.data.views import read_views
from flaxpretrain.errors import UserError
from flaxpretrain.shapes import Bool, Int, Numpy


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RowPlan(abc.ABC):
    """The rows that a split gives at one length; the same number in every epoch.

    `length` counts the positions of a row, those of encoder and decoder together. `capacity` is the
    most text tokens a row holds (T). `real_tokens_per_epoch` counts the positions that are no
    padding, special tokens included; where noise varies it is a mean.
    """

    split: Split
    length: int
    capacity: int
    rows_per_epoch: int
    real_tokens_per_epoch: int
    max_pieces: int

    @property
    def examples_per_epoch(self) -> int:
        """Pieces of text, or pairs: what a mixture counts of a dataset."""
        return self.rows_per_epoch

    @property
    def padding_share(self) -> float:
        """Which part of all positions is padding."""
        return 1 - self.real_tokens_per_epoch / (self.rows_per_epoch * self.length)

    @abc.abstractmethod
    def views(
        self, seed: int, epoch: Int[Numpy, " B"], index: Int[Numpy, " B"]
    ) -> tuple[Int[Numpy, "B G"], Int[Numpy, "B G"]]:
        """Where the pieces of each row begin in the stream, and how long they are (0: no piece).

        `index` numbers the rows of an epoch in the plan's own order, from 0 to rows_per_epoch - 1.
        """

    def shuffled(
        self, seed: int, epoch: Int[Numpy, " B"], row: Int[Numpy, " B"]
    ) -> Int[Numpy, " B"]:
        """Which row of the plan comes as the `row`-th of an epoch: any of them."""
        return permute(row, self.rows_per_epoch, epoch_keys(seed, epoch, Stream.ORDER))

    def read_ahead(  # noqa: B027 - nothing to do where the text is at hand
        self, seed: int, epoch: Int[Numpy, " B"], row: Int[Numpy, " B"]
    ) -> None:
        """Told which rows of an epoch are wanted now; may start to read them and the next ones."""

    def parts(
        self, index: Int[Numpy, " B"]
    ) -> Iterator[tuple["RowPlan", Int[Numpy, " P"], Int[Numpy, " P"]]]:
        """The plans that hold rows of this one: which of `index`, and their own numbers there."""
        yield self, np.arange(len(index)), index

    def read(
        self,
        starts: Int[Numpy, "B G"],
        piece_lengths: Int[Numpy, "B G"],
        *,
        word_starts: bool = True,
    ) -> dict[str, np.ndarray]:
        """The text of views, pieces back to back: what `Framing.examples` takes.

        `ids` int32 and, if wanted, `word_starts` bool [B, T], zero beyond the text;
        `piece_lengths` int32 [B, G].
        """
        shape = (len(starts), self.capacity)
        text = piece_lengths.sum(axis=1)
        found = read_views(
            self.split, starts.ravel(), piece_lengths.ravel(), word_starts=word_starts
        )
        if (text == self.capacity).all():
            rows = {name: flat.reshape(shape) for name, flat in found.items()}
        else:
            inside = np.arange(self.capacity) < text[:, None]
            rows = {name: np.zeros(shape, flat.dtype) for name, flat in found.items()}
            for name, flat in found.items():
                rows[name][inside] = flat
        return rows | {"piece_lengths": piece_lengths.astype(np.int32)}

    def sentence_starts(
        self, starts: Int[Numpy, "B G"], piece_lengths: Int[Numpy, "B G"]
    ) -> Bool[Numpy, "B T"]:
        """Which tokens of the rows that `read` gives open a sentence."""
        offsets = self.split.sentence_offsets
        row, slot = np.nonzero(piece_lengths)
        begins, sizes = starts[row, slot], piece_lengths[row, slot].astype(np.int64)
        first = offsets.searchsorted(begins)
        counts = offsets.searchsorted(begins + sizes) - first
        before = np.cumsum(piece_lengths, axis=1, dtype=np.int64) - piece_lengths
        # Where a view's first token would stand in the flat rows if it were the stream's.
        shift = before[row, slot] + row * self.capacity - begins
        found = np.zeros(len(starts) * self.capacity, bool)
        found[offsets[ranges(first, counts)] + np.repeat(shift, counts)] = True
        return found.reshape(len(starts), self.capacity)

    def document_ends(
        self, starts: Int[Numpy, "B G"], piece_lengths: Int[Numpy, "B G"]
    ) -> Bool[Numpy, "B G"]:
        """Which pieces of the rows that `read` gives end with the last token of their document."""
        offsets = self.split.document_offsets
        ends = starts + piece_lengths
        after = np.minimum(offsets.searchsorted(ends), len(offsets) - 1)
        return (piece_lengths > 0) & (offsets[after] == ends)

    def rows(
        self, seed: int, epoch: Int[Numpy, " B"], index: Int[Numpy, " B"]
    ) -> dict[str, np.ndarray]:
        """The text of the rows `index`, as `read` gives it."""
        return self.read(*self.views(seed, epoch, index))


class Layout(abc.ABC):
    """How text becomes rows; a frozen value that recipes state."""

    one_length: ClassVar[bool] = True
    """Whether all rows of a phase have its length."""

    @abc.abstractmethod
    def fill(self, split: Split, room: Room) -> RowPlan:
        """The rows of a split, each as full as its room allows.

        Raises:
            UserError: the split is empty, or the layout does not make such rows.
        """

    def plan(self, split: Split, length: int, specials_per_piece: int) -> RowPlan:
        """The rows of `length` positions, each piece framed by `specials_per_piece` more tokens.

        Raises:
            UserError: the split is empty, or the length leaves no room for text.
        """
        return self.fill(split, framed_room(length, specials_per_piece))

    def framing(self, framing: Framing) -> Framing:
        """What frames these rows where the objective asks for `framing`: that one, as a rule."""
        return framing


def require_text(split: Split) -> None:
    """Raises UserError where a split is empty."""
    if split.tokens == 0:
        raise UserError(
            f"split {split.name!r} of the dataset is empty: build the dataset from more text, or "
            "keep a larger share of it for this split"
        )


@dataclasses.dataclass(frozen=True)
class Blocks(Layout):
    """All documents concatenated and cut every T tokens; rows cross document borders.

    The last row is short. Only that row has padding, unless rows are of several kinds.
    """

    def fill(self, split: Split, room: Room) -> RowPlan:
        """Rows of one piece each, or of what each kind of row asks for."""
        require_text(split)
        if room.pairs:
            room.require_pieces("Blocks()")
        if room.cycle:
            return cycle_plan(split, room)
        rows = -(-split.tokens // room.capacity)
        last = split.tokens - (rows - 1) * room.capacity
        return BlockPlan(
            split=split,
            length=room.length,
            capacity=room.capacity,
            rows_per_epoch=rows,
            real_tokens_per_epoch=int((rows - 1) * room.tokens[-1] + room.tokens[last]),
            max_pieces=1,
        )


@dataclasses.dataclass(frozen=True)
class WholeBlocks(Layout):
    """`Blocks` without the row at the end, if that is short: no padding, but its text is left out.

    Reference: group_texts, chapter 7 of the Hugging Face course, which drops the last chunk.
    """

    def fill(self, split: Split, room: Room) -> RowPlan:
        """Rows of one piece each.

        Raises:
            UserError: the split does not fill a row.
        """
        require_text(split)
        room.require_pieces("WholeBlocks()")
        rows = split.tokens // room.capacity
        if not rows:
            raise UserError(
                f"split {split.name!r} of the dataset has {split.tokens} tokens, which do not fill "
                f"a row of {room.capacity}: use Blocks(), which pads the last row, or shorter rows"
            )
        return BlockPlan(
            split=split,
            length=room.length,
            capacity=room.capacity,
            rows_per_epoch=rows,
            real_tokens_per_epoch=int(rows * room.tokens[-1]),
            max_pieces=1,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BlockPlan(RowPlan):
    """Row i is the i-th block of the stream, in every epoch."""

    def views(
        self, seed: int, epoch: Int[Numpy, " B"], index: Int[Numpy, " B"]
    ) -> tuple[Int[Numpy, "B G"], Int[Numpy, "B G"]]:
        """One view a row."""
        starts = index.astype(np.int64)[:, None] * self.capacity
        return starts, np.minimum(self.split.tokens - starts, self.capacity)


def cycle_plan(split: Split, room: Room) -> "CyclePlan":
    """Rows of several kinds in turn, each taking up the stream where the one before it ended."""
    lengths = np.array(room.cycle, np.int64)
    cycles = -(-split.tokens // int(lengths.sum()))
    return CyclePlan(
        split=split,
        length=room.length,
        capacity=room.capacity,
        rows_per_epoch=cycles * len(lengths),
        real_tokens_per_epoch=int(room.tokens.sum() * split.tokens / lengths.sum()),
        max_pieces=lengths.shape[1],
        piece_lengths=lengths,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CyclePlan(RowPlan):
    """Row i is of kind (i + shift) modulo their number; the shift is another one in each epoch.

    So a text is noised in another way in each epoch. The last rows may be short or empty.
    """

    piece_lengths: Int[Numpy, "R G"]
    """Of each kind of row."""

    def views(
        self, seed: int, epoch: Int[Numpy, " B"], index: Int[Numpy, " B"]
    ) -> tuple[Int[Numpy, "B G"], Int[Numpy, "B G"]]:
        """The pieces of a row, one after another in the stream."""
        kinds = len(self.piece_lengths)
        shift = (epoch_keys(seed, epoch, Stream.CYCLE) % np.uint64(kinds)).astype(np.int64)
        cycle, turn = np.divmod(index.astype(np.int64), kinds)
        size = self.piece_lengths.sum(axis=1)
        before = np.concatenate([[0], np.cumsum(np.tile(size, 2))])
        starts = cycle * size.sum() + before[turn + shift] - before[shift]
        lengths = self.piece_lengths[(turn + shift) % kinds]
        piece_starts = starts[:, None] + np.cumsum(lengths, axis=1) - lengths
        kept = np.clip(self.split.tokens - piece_starts, 0, lengths)
        return np.where(kept > 0, piece_starts, 0), kept


@dataclasses.dataclass(frozen=True)
class Documents(Layout):
    """Documents kept apart: each piece is its own segment, which attends to nothing else.

    A document longer than T tokens is cut into pieces of T and a remainder; nothing is lost.
    Pieces are packed into rows, other pieces together in each epoch.
    """

    def fill(self, split: Split, room: Room) -> "DocumentPlan":
        """Rows of one or more pieces."""
        room.require_pieces("Documents()")
        return document_plan(split, room)


@dataclasses.dataclass(frozen=True)
class PaddedDocuments(Layout):
    """Each piece of a document in a row of its own, padded: the longest pieces in the first rows.

    What packing saves, and what `LengthBuckets` puts into shorter rows.
    """

    def fill(self, split: Split, room: Room) -> "DocumentPlan":
        """Rows of one piece."""
        room.require_pieces("PaddedDocuments()")
        return document_plan(split, room, most=1)


def document_plan(split: Split, room: Room, most: int | None = None) -> "DocumentPlan":
    """Pieces of documents in rows that hold `most` of them at most, if that is given.

    Raises:
        UserError: the split is empty.
    """
    require_text(split)
    capacity = room.capacity
    pieces = index_by_size(lambda: _pieces(split, capacity), capacity + 1, columns=1)
    specials = room.sizes - np.arange(capacity + 1)
    packing = pack(pieces.histogram, room.budget, specials, most=most)
    return DocumentPlan(
        split=split,
        length=room.length,
        capacity=capacity,
        rows_per_epoch=packing.rows,
        real_tokens_per_epoch=int(pieces.histogram @ room.tokens),
        max_pieces=packing.lengths.shape[1],
        packing=packing,
        items=pieces,
    )


def _pieces(split: Split, capacity: int) -> Items:
    """The length of each piece of a document, and where it begins in the stream."""
    for first, last in portions(split.document_offsets):
        offsets = np.asarray(split.document_offsets[first : last + 1], np.int64)
        whole, rest = np.divmod(np.diff(offsets), capacity)
        some = np.flatnonzero(rest)
        yield rest[some], (offsets[some] + whole[some] * capacity)[:, None]
        # A single document may have any number of them.
        ends = np.cumsum(whole)
        for begin in range(0, int(ends[-1]), AT_ONCE):
            piece = np.arange(begin, min(begin + AT_ONCE, int(ends[-1])))
            document = ends.searchsorted(piece, side="right")
            ordinal = piece - (ends - whole)[document]
            starts = offsets[document] + ordinal * capacity
            yield np.full(len(piece), capacity), starts[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DocumentPlan(RowPlan):
    """The slots of a row are fixed by the packing; the epoch says which pieces take them."""

    packing: Packing
    items: SizeIndex
    """Where the pieces begin in the stream."""

    @property
    def examples_per_epoch(self) -> int:
        """Pieces of documents."""
        return len(self.items)

    def views(
        self, seed: int, epoch: Int[Numpy, " B"], index: Int[Numpy, " B"]
    ) -> tuple[Int[Numpy, "B G"], Int[Numpy, "B G"]]:
        """Up to G views a row; empty slots come last."""
        keys = epoch_keys(seed, epoch, Stream.PIECES)
        row, slot, size, piece = self.items.drawn(self.packing, index, keys)
        starts, lengths = np.zeros((2, len(index), self.max_pieces), np.int64)
        starts[row, slot], lengths[row, slot] = self.items.records[piece, 0], size
        return starts, lengths


def epoch_keys(seed: int, epoch: Int[Numpy, " B"], stream: Stream) -> np.ndarray:
    """One key for each epoch, the same for all its rows."""
    root = np.full(np.shape(epoch), seed & ((1 << 64) - 1), np.uint64)
    return fold(fold(root, epoch), int(stream))


__all__ = [
    "BlockPlan",
    "Blocks",
    "CyclePlan",
    "DocumentPlan",
    "Documents",
    "Layout",
    "PaddedDocuments",
    "RowPlan",
    "WholeBlocks",
    "cycle_plan",
    "document_plan",
    "epoch_keys",
    "require_text",
]
