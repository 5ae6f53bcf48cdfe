"""Rows are views of the stream of tokens: a layout says which views make which row.

A layout is a value of a recipe; its plan for one split and length says where every row's text
lies. Nothing is stored per epoch: a row's views are a pure function of (seed, epoch, index).
"""

import abc
import dataclasses

import numpy as np

from flaxpretrain.data.framing import Framing, text_capacity
from flaxpretrain.data.packing import Packing, pack
from flaxpretrain.data.randomness import Stream, fold, permute
from flaxpretrain.data.store import Split
from flaxpretrain.data.views import read_views
from flaxpretrain.errors import UserError
from flaxpretrain.shapes import Int, Numpy


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RowPlan(abc.ABC):
    """The rows that a split gives at one length; the same number in every epoch.

    `capacity` is the most text tokens a row holds (T). `real_tokens_per_epoch` counts the
    positions that are no padding, special tokens included.
    """

    split: Split
    length: int
    capacity: int
    rows_per_epoch: int
    real_tokens_per_epoch: int
    max_pieces: int

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

    def rows(
        self, seed: int, epoch: Int[Numpy, " B"], index: Int[Numpy, " B"]
    ) -> dict[str, np.ndarray]:
        """The text of the rows `index`, as `read` gives it."""
        return self.read(*self.views(seed, epoch, index))


class Layout(abc.ABC):
    """How text becomes rows; a frozen value that recipes state."""

    @abc.abstractmethod
    def plan(self, split: Split, length: int, specials_per_piece: int) -> RowPlan:
        """The rows of `length` positions, each piece framed by `specials_per_piece` more tokens.

        Raises:
            UserError: the split is empty, or the length leaves no room for text.
        """

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


def _checked_capacity(split: Split, length: int, specials_per_piece: int) -> int:
    require_text(split)
    return text_capacity(length, specials_per_piece)


@dataclasses.dataclass(frozen=True)
class Blocks(Layout):
    """All documents concatenated and cut every T tokens; rows cross document borders.

    The last row is short. Only that row has padding.
    """

    def plan(self, split: Split, length: int, specials_per_piece: int) -> "BlockPlan":
        """Rows of one piece each."""
        capacity = _checked_capacity(split, length, specials_per_piece)
        rows = -(-split.tokens // capacity)
        return BlockPlan(
            split=split,
            length=length,
            capacity=capacity,
            rows_per_epoch=rows,
            real_tokens_per_epoch=split.tokens + specials_per_piece * rows,
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


@dataclasses.dataclass(frozen=True)
class Documents(Layout):
    """Documents kept apart: each piece is its own segment, which attends to nothing else.

    A document longer than T tokens is cut into pieces of T and a remainder; nothing is lost.
    Pieces are packed into rows, other pieces together in each epoch.
    """

    def plan(self, split: Split, length: int, specials_per_piece: int) -> "DocumentPlan":
        """Rows of one or more pieces."""
        capacity = _checked_capacity(split, length, specials_per_piece)
        offsets = np.asarray(split.document_offsets, np.int64)
        whole, rest = np.divmod(np.diff(offsets), capacity)
        ordinal = np.arange(whole.sum()) - np.repeat(np.cumsum(whole) - whole, whole)
        whole_starts = np.repeat(offsets[:-1], whole) + ordinal * capacity
        order = np.argsort(rest.astype(np.int32), kind="stable")
        order = order[rest[order] > 0]
        rest_starts = offsets[order] + whole[order] * capacity
        histogram = np.bincount(rest, minlength=capacity + 1)
        histogram[0], histogram[capacity] = 0, whole.sum()
        packing = pack(histogram, length, specials_per_piece)
        return DocumentPlan(
            split=split,
            length=length,
            capacity=capacity,
            rows_per_epoch=packing.rows,
            real_tokens_per_epoch=split.tokens + specials_per_piece * int(histogram.sum()),
            max_pieces=packing.lengths.shape[1],
            packing=packing,
            piece_starts=np.concatenate([rest_starts, whole_starts]),
            histogram=histogram,
            first_of_length=np.cumsum(histogram) - histogram,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DocumentPlan(RowPlan):
    """The slots of a row are fixed by the packing; the epoch says which pieces take them."""

    packing: Packing
    piece_starts: Int[Numpy, " P"]
    """Where the pieces begin in the stream, ordered by length."""
    histogram: Int[Numpy, " C"]
    """Number of pieces of each length."""
    first_of_length: Int[Numpy, " C"]
    """Where the pieces of each length begin in `piece_starts`."""

    def views(
        self, seed: int, epoch: Int[Numpy, " B"], index: Int[Numpy, " B"]
    ) -> tuple[Int[Numpy, "B G"], Int[Numpy, "B G"]]:
        """Up to G views a row; empty slots come last."""
        lengths, number = self.packing.slots(index)
        row, slot = np.nonzero(lengths)
        size = lengths[row, slot]
        keys = fold(epoch_keys(seed, epoch, Stream.PIECES)[row], size)
        piece = permute(number[row, slot], self.histogram[size], keys)
        starts = np.zeros_like(lengths)
        starts[row, slot] = self.piece_starts[self.first_of_length[size] + piece]
        return starts, lengths


def epoch_keys(seed: int, epoch: Int[Numpy, " B"], stream: Stream) -> np.ndarray:
    """One key for each epoch, the same for all its rows."""
    root = np.full(np.shape(epoch), seed & ((1 << 64) - 1), np.uint64)
    return fold(fold(root, epoch), int(stream))


__all__ = [
    "BlockPlan",
    "Blocks",
    "DocumentPlan",
    "Documents",
    "Layout",
    "RowPlan",
    "epoch_keys",
    "require_text",
]
