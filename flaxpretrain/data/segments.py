"""Examples of google-research/electra: whole sentences in two segments, and what is too long cut.

For runs that must see the rows of the original. It loses a part of the text (a sixth of it for
sentences in rows of 128) or pads, where the layouts of `rows` do neither. The store is the same:
the examples are planned from its sentence borders.

Reference: ExampleBuilder of build_pretraining_dataset.py, google-research/electra.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import numpy as np

from flaxpretrain.data.framing import ArraySpec, Framing, text_capacity, token_ids
from flaxpretrain.data.offsets import portions
from flaxpretrain.data.randomness import Keys, Stream, fold, integers, uniform
from flaxpretrain.data.room import Room
from flaxpretrain.data.rows import Layout, RowPlan, require_text
from flaxpretrain.data.scratch import ArrayWriter
from flaxpretrain.data.store import Dataset, Split
from flaxpretrain.data.views import read_views
from flaxpretrain.errors import UserError
from flaxpretrain.shapes import Batch, Bool, Int, Numpy

SHORTEST = 5
"""Tokens; the least length that the original draws for a short example."""

SINGLE_SHARE, SHORT_SHARE, OVERFLOW_SHARE = 0.1, 0.05, 0.5
_SINGLE_TARGET = 100_000


@dataclasses.dataclass(frozen=True)
class ElectraSegments(Layout):
    """Sentences of a document up to a target length, dealt to a first and a second segment.

    The examples are the same in every epoch, as those that the original writes once. They follow
    from `seed` and each document's number, where the original draws from an unseeded generator.
    """

    seed: int = 0

    def fill(self, split: Split, room: Room) -> "SegmentPlan":
        """Rows of one piece each, `A [SEP] B` or A alone, for a framing in [CLS] and [SEP].

        Raises:
            UserError: the split is empty, the length too small, or another kind of framing.
        """
        require_text(split)
        room.require_pieces("ElectraSegments()")
        length, specials_per_piece = room.length, room.length - room.capacity
        if specials_per_piece != SegmentPairs.specials_per_piece:
            raise UserError(
                "the layout ElectraSegments is for rows framed by [CLS] and [SEP]; this "
                f"objective's have {specials_per_piece} special tokens a piece: choose another "
                "layout"
            )
        if length < SHORTEST:
            raise UserError(f"length {length} is too small for ElectraSegments: use 5 or more")
        borders, starts, lengths = (ArrayWriter() for _ in range(3))
        borders.append(np.zeros(1, np.int64))
        views = rows = rows_of_two = kept = 0
        most = np.zeros(2, np.int64)
        for first, last in portions(split.document_offsets, split.sentence_offsets):
            found = _views(split, length, self.seed, first, last)
            borders.append(views + np.cumsum(found.counts))
            starts.append(found.starts)
            lengths.append(found.lengths)
            counts = found.counts.reshape(-1, 2)
            most = np.maximum(most, counts.max(axis=0, initial=0))
            views, rows = views + len(found.starts), rows + len(counts)
            rows_of_two += int(np.count_nonzero(counts[:, 1]))
            kept += int(found.lengths.sum())
        return SegmentPlan(
            split=split,
            length=length,
            capacity=text_capacity(length, specials_per_piece),
            rows_per_epoch=rows,
            real_tokens_per_epoch=kept + specials_per_piece * rows + rows_of_two,
            max_pieces=1,
            group_borders=borders.array(),
            view_starts=starts.array(),
            view_lengths=lengths.array(),
            most=(int(most[0]), int(most[1])),
            tokens_lost=split.tokens - kept,
            rows_of_two=rows_of_two,
        )

    def framing(self, framing: Framing) -> Framing:
        """Puts a [SEP] between the segments and adds `token_type_ids` to the batch."""
        return SegmentPairs(vocabulary=framing.vocabulary, length=framing.length, inner=framing)


def recorded_layout(dataset: Dataset) -> ElectraSegments | None:
    """The layout that `--compat` asked for when the dataset was built; None without it."""
    build = dataset.metadata["build"]
    return ElectraSegments(build["seed"]) if build.get("compat") == "electra" else None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SegmentPlan(RowPlan):
    """The views of each example's segments: group 2i is the first of row i, 2i + 1 the second."""

    group_borders: Int[Numpy, " S"]
    """Number of the first view of each group, and of the view after the last."""
    view_starts: Int[Numpy, " P"]
    view_lengths: Int[Numpy, " P"]
    most: tuple[int, int]
    """How many views a first and a second segment have at most."""
    tokens_lost: int
    rows_of_two: int

    def views(
        self, seed: int, epoch: Int[Numpy, " B"], index: Int[Numpy, " B"]
    ) -> tuple[Int[Numpy, "B G"], Int[Numpy, "B G"]]:
        """The views of the first segments, then those of the second ones."""
        borders = self.group_borders
        parts = []
        for segment, most in enumerate(self.most):
            group = 2 * index + segment
            view = borders[group][:, None] + np.arange(most)
            is_view = view < borders[group + 1][:, None]
            view = np.where(is_view, view, 0)
            parts.append((self.view_starts[view] * is_view, self.view_lengths[view] * is_view))
        starts, lengths = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        return starts, lengths

    def read(
        self,
        starts: Int[Numpy, "B G"],
        piece_lengths: Int[Numpy, "B G"],
        *,
        word_starts: bool = True,
    ) -> dict[str, np.ndarray]:
        """Rows of one piece, with room for a token between its segments.

        `second_lengths` int32 [B] says how many tokens the second segment has.
        """
        first = piece_lengths[:, : self.most[0]].sum(axis=1)
        second = piece_lengths[:, self.most[0] :].sum(axis=1)
        text = first + second
        column = np.arange(self.capacity)
        inside = column <= text[:, None]
        inside &= column != first[:, None]
        found = read_views(
            self.split, starts.ravel(), piece_lengths.ravel(), word_starts=word_starts
        )
        rows = {}
        for name, flat in found.items():
            rows[name] = np.zeros(inside.shape, flat.dtype)
            rows[name][inside] = flat
        pairs = np.flatnonzero(second)
        if word_starts:
            rows["word_starts"][pairs, first[pairs]] = True
        return rows | {
            "piece_lengths": (text + (second > 0))[:, None].astype(np.int32),
            "second_lengths": second.astype(np.int32),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentPairs(Framing):
    """Another framing's batch for `[CLS] A [SEP] B [SEP]`, with `token_type_ids` int32 [B, L].

    Types: 0 for the first segment, its [CLS] and [SEP], and for padding; 1 for the second segment
    and its [SEP].
    """

    inner: Framing

    specials_per_piece: ClassVar[int] = 2

    @property
    def reads_word_starts(self) -> bool:
        """As the other framing."""
        return self.inner.reads_word_starts

    def examples(self, rows: Batch, keys: Keys, step: int) -> dict[str, np.ndarray]:
        """The other framing's examples of `A [SEP] B`, and the types."""
        (sep,) = token_ids(self.vocabulary, "sep")
        piece = rows["piece_lengths"][:, 0].astype(np.int64)
        # A benchmark's rows have no segments.
        second = np.asarray(rows.get("second_lengths", piece * 0), np.int64)
        pairs = np.flatnonzero(second)
        ids = rows["ids"].copy()
        ids[pairs, (piece - second - 1)[pairs]] = sep
        batch = self.inner.examples({**rows, "ids": ids}, keys, step)
        # [CLS] and a [SEP] frame the piece; types change after the [SEP] within it.
        end = (piece + 2)[:, None]
        column = np.arange(self.length)
        types = (column >= end - second[:, None] - 1) & (column < end) & (second > 0)[:, None]
        return batch | {"token_type_ids": types.astype(np.int32)}

    def spec(self, batch_size: int) -> dict[str, ArraySpec]:
        """Shapes and dtypes of a batch."""
        row = ArraySpec((batch_size, self.length), np.dtype(np.int32))
        return self.inner.spec(batch_size) | {"token_type_ids": row}


class _Views(NamedTuple):
    """Views of consecutive groups, and how many each group has."""

    counts: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


class _Examples(NamedTuple):
    """Sentences [begins, ends) of each example, in order, and what was drawn for it."""

    begins: np.ndarray
    ends: np.ndarray
    first_targets: np.ndarray
    coins: np.ndarray


def _views(split: Split, length: int, seed: int, first: int, last: int) -> _Views:
    """The segments of the examples of documents `first` to `last` - 1."""
    documents = np.asarray(split.document_offsets[first : last + 1], np.int64)
    begin, end = split.sentence_offsets.searchsorted(documents[[0, -1]])
    offsets = np.asarray(split.sentence_offsets[begin : end + 1], np.int64)
    examples = _cut(offsets, documents, first, length, seed)
    is_first = _deal(offsets, examples)
    return _truncate(offsets, examples, is_first, length)


def _cut(
    offsets: np.ndarray, documents: np.ndarray, first_document: int, length: int, seed: int
) -> _Examples:
    """Cuts documents after the sentence that brings an example to its target length.

    All documents side by side: the n-th example of each in one round.
    """
    sentence = np.searchsorted(offsets, documents)
    begin, last = sentence[:-1], sentence[1:]
    root = np.full(len(begin), seed & ((1 << 64) - 1), np.uint64)
    document_keys = fold(root, first_document + np.arange(len(begin)))
    found = []
    number = 0
    while True:
        left = offsets[begin] < offsets[last]
        begin, last, document_keys = begin[left], last[left], document_keys[left]
        if not len(begin):
            break
        keys = fold(document_keys, number)
        single, coin, short = uniform(keys, Stream.SEGMENTS, 3).T
        drawn = SHORTEST + integers(keys, Stream.SEGMENT_LENGTH, 1, length - SHORTEST + 1)[:, 0]
        target = np.where(short < SHORT_SHARE, drawn, length)
        end = np.minimum(np.searchsorted(offsets, offsets[begin] + target), last)
        first_target = np.where(single < SINGLE_SHARE, _SINGLE_TARGET, (target - 3) // 2)
        found.append(_Examples(begin, end, first_target, coin < OVERFLOW_SHARE))
        begin = end
        number += 1
    examples = _Examples(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))
    order = np.argsort(examples.begins)
    return _Examples(*(array[order] for array in examples))


def _deal(offsets: np.ndarray, examples: _Examples) -> Bool[Numpy, " S"]:
    """Which sentences go to the first segment of their example.

    One does if that is empty, or stays below its target, or, on one coin, is the first to pass
    it. All examples side by side, from the one of the most sentences to that of the fewest.
    """
    sizes = np.diff(offsets)
    is_first = np.zeros(len(sizes), bool)
    counts = examples.ends - examples.begins
    order = np.argsort(-counts, kind="stable")
    begins, targets, coins = (
        examples.begins[order],
        examples.first_targets[order],
        examples.coins[order],
    )
    longer_than = len(counts) - np.cumsum(np.bincount(counts))
    a, b = np.zeros((2, len(counts)), np.int64)
    for ordinal, some in enumerate(longer_than[:-1].tolist()):
        sentence = begins[:some] + ordinal
        size, a_here, target = sizes[sentence], a[:some], targets[:some]
        joins = (a_here == 0) | (a_here + size < target)
        joins |= (b[:some] == 0) & (a_here < target) & coins[:some]
        is_first[sentence] = joins
        a[:some] += size * joins
        b[:some] += size * ~joins
    return is_first


def _truncate(
    offsets: np.ndarray, examples: _Examples, is_first: np.ndarray, length: int
) -> _Views:
    """The first segment cut to what a row holds, the second to what is left: views of the stream.

    The sentences of a segment need not be neighbours: a short one may still join the first segment
    when the second has begun.
    """
    counts = examples.ends - examples.begins
    example = np.repeat(np.arange(len(counts)), counts)
    sentence = (examples.begins - (np.cumsum(counts) - counts))[example] + np.arange(len(example))
    group = 2 * example + ~is_first[sentence]
    order = np.argsort(group, kind="stable")
    group, sentence = group[order], sentence[order]
    size = np.diff(offsets)[sentence]
    totals = np.bincount(group, size, 2 * len(counts)).astype(np.int64)
    room = np.empty_like(totals)
    room[0::2] = length - 2
    room[1::2] = np.maximum(length - 3 - np.minimum(totals[0::2], length - 2), 0)
    before = np.cumsum(size) - size
    group_starts = np.cumsum(totals) - totals
    kept = np.clip(room[group] - (before - group_starts[group]), 0, size)
    opens = np.ones(len(group), bool)
    opens[1:] = (np.diff(group) != 0) | (np.diff(sentence) != 1)
    view = np.flatnonzero(opens)
    lengths = np.add.reduceat(kept, view)
    some = lengths > 0
    starts, groups = offsets[sentence[view[some]]], group[view[some]]
    return _Views(np.bincount(groups, minlength=2 * len(counts)), starts, lengths[some])
