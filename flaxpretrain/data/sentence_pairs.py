"""Pairs of texts for next-sentence and sentence-order prediction: `[CLS] A [SEP] B [SEP]`.

Documents are cut once into texts of whole sentences, as google-research/bert cuts them; where a
text is divided into A and B, whether B follows A, and what stands there instead, is drawn anew in
every epoch. Several pairs share a row, each a segment of its own with its [CLS] and its label.

Three differences from the original. All pairs of a text take as many tokens, whatever B is, so
that rows are packed once (there, a random B also fills up short ends of documents, which tells it
from a true one by its length). A random B begins where enough of its document is left, and not at
any sentence: ends of documents would leave rows unfilled. And where B is random, the second part of
the text is left out of this epoch, and not moved to the next pair, so that every epoch has the same
number of rows.

Reference: create_instances_from_document and truncate_seq_pair of google-research/bert and
google-research/albert create_pretraining_data.py.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import numpy as np

from flaxpretrain.data.framing import ArraySpec, Framing, token_ids
from flaxpretrain.data.offsets import portions
from flaxpretrain.data.packing import Packing, pack
from flaxpretrain.data.randomness import (
    Keys,
    Stream,
    bits,
    fold,
    integers,
    permute,
    scaled,
    uniform,
    words,
)
from flaxpretrain.data.room import Room
from flaxpretrain.data.rows import Layout, RowPlan, epoch_keys, require_text
from flaxpretrain.data.size_index import Items, SizeIndex, index_by_size
from flaxpretrain.data.store import Split
from flaxpretrain.data.views import read_views
from flaxpretrain.errors import UserError
from flaxpretrain.shapes import Batch, Bool, Int, Numpy

NEGATIVES = ("random", "swapped")
LONE = ("random", "alone")
NEGATIVE_SHARE = 0.5

_SHORTEST = 2
_DOCUMENTS_DRAWN = 4
"""For a random text, until one is long enough: a shorter one would leave its row unfilled."""
_SAMPLE = 1 << 14
"""Rows by which the tokens of an epoch are estimated where random texts vary in length."""


@dataclasses.dataclass(frozen=True)
class SentencePairs(Layout):
    """Texts of whole sentences, divided in two; half of the pairs are negative (label 1).

    negatives: "random": B is a text of another document, from a random sentence on (BERT's next
        sentence prediction). "swapped": A and B change places (ALBERT's sentence order).
    lone: what becomes of a text of a single sentence. "random": B is a text of another document,
        label 1, as in BERT and ALBERT. "alone": `[CLS] A [SEP]` without a label, as in the Chinese
        variant (fengshen sop_utils, whose samples always have two sentences).
    short_share: of the documents, that are cut into texts of a random length instead of a row's.
    most: how many pairs may share a row.
    seed: of the cutting, which is the same in every epoch.
    """

    negatives: str = "random"
    lone: str = "random"
    short_share: float = 0.1
    most: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UserError on an unknown kind of negatives or impossible numbers."""
        for name, value, known in (
            ("negatives", self.negatives, NEGATIVES),
            ("lone", self.lone, LONE),
        ):
            if value not in known:
                raise UserError(f"data.layout.{name} must be {' or '.join(known)}; got {value!r}")
        if not 0 <= self.short_share <= 1 or self.most < 1:
            raise UserError(
                "data.layout.short_share must be in [0, 1] and data.layout.most positive; got "
                f"{self.short_share} and {self.most}"
            )

    def fill(self, split: Split, room: Room) -> "PairPlan":
        """Rows of one or more pairs.

        Raises:
            UserError: the split is empty or, for random negatives, a single document; or the row
                is too short for a pair.
        """
        require_text(split)
        room.require_pieces("SentencePairs()")
        if room.capacity < _SHORTEST:
            raise UserError(f"length {room.length} is too small for SentencePairs: use 5 or more")
        if split.documents < 2 and "random" in (self.negatives, self.lone):
            raise UserError(
                f"split {split.name!r} has one document, and SentencePairs takes random texts from "
                "another: build the dataset from more documents, or use "
                'SentencePairs(negatives="swapped", lone="alone")'
            )
        texts = index_by_size(lambda: self._texts(split, room), room.capacity + 1, columns=3)
        specials = room.sizes - np.arange(len(room.sizes))
        packing = pack(texts.histogram, room.budget, specials, most=self.most)
        plan = PairPlan(
            split=split,
            length=room.length,
            # Text and the [SEP] between A and B, framed by two more special tokens.
            capacity=room.capacity + 1,
            rows_per_epoch=packing.rows,
            real_tokens_per_epoch=int(texts.histogram @ room.tokens),
            max_pieces=2 * self.most,
            layout=self,
            packing=packing,
            items=texts,
        )
        return dataclasses.replace(plan, real_tokens_per_epoch=plan.estimated_tokens())

    def _texts(self, split: Split, room: Room) -> Items:
        """How many tokens the pairs of each text may have; its sentences [begin, end), document."""
        for first, last in portions(split.document_offsets, split.sentence_offsets):
            texts = _cut(split, (first, last), self, room.capacity)
            yield texts.size, np.stack([texts.begin, texts.end, texts.document], axis=1)

    def framing(self, framing: Framing) -> Framing:
        """Puts a [SEP] between A and B, and adds types and labels to the batch."""
        return PairedFraming(
            vocabulary=framing.vocabulary, length=framing.length, inner=framing, most=self.most
        )


class _Texts(NamedTuple):
    """Sentences [begin, end) of each text, its document, and how many tokens its pairs may have."""

    begin: Int[Numpy, " P"]
    end: Int[Numpy, " P"]
    document: Int[Numpy, " P"]
    size: Int[Numpy, " P"]


def _cut(split: Split, documents: tuple[int, int], layout: SentencePairs, capacity: int) -> _Texts:
    """Cuts documents after the sentence that brings a text to its document's target length.

    All documents side by side: the n-th text of each in one round.
    """
    borders = np.asarray(split.document_offsets[documents[0] : documents[1] + 1], np.int64)
    before, stop = split.sentence_offsets.searchsorted(borders[[0, -1]])
    offsets = np.asarray(split.sentence_offsets[before : stop + 1], np.int64)
    sentence = offsets.searchsorted(borders)
    number = np.arange(*documents)
    keys = fold(np.full(len(number), layout.seed & ((1 << 64) - 1), np.uint64), number)
    short = uniform(keys, Stream.SEGMENTS, 1)[:, 0] < layout.short_share
    drawn = _SHORTEST + integers(keys, Stream.SEGMENT_LENGTH, 1, capacity - _SHORTEST + 1)[:, 0]
    target = np.where(short, drawn, capacity)
    begin, last = sentence[:-1], sentence[1:]
    found = []
    while len(number):
        end = np.minimum(np.searchsorted(offsets, offsets[begin] + target), last)
        size = np.minimum(offsets[end] - offsets[begin], capacity)
        if layout.lone == "random":
            # Room for a text beside the single sentence.
            beside = np.where(offsets[end] - offsets[begin] < target, target, capacity)
            size = np.where(end - begin == 1, beside, size)
        found.append(_Texts(begin + before, end + before, number, size))
        left = end < last
        begin, last, number, target = end[left], last[left], number[left], target[left]
    texts = _Texts(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))
    order = np.argsort(texts.begin)
    return _Texts(*(array[order] for array in texts))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PairPlan(RowPlan):
    """The slots of a row are fixed by the packing; the epoch says which texts take them, and how.

    Views come in twos, A and then B. `capacity` counts the [SEP] of one pair.
    """

    layout: SentencePairs
    packing: Packing
    items: SizeIndex
    """Sentences [begin, end) of each text, and its document."""

    def views(
        self, seed: int, epoch: Int[Numpy, " B"], index: Int[Numpy, " B"]
    ) -> tuple[Int[Numpy, "B G"], Int[Numpy, "B G"]]:
        """A and B of each pair of a row; empty slots come last."""
        keys = epoch_keys(seed, epoch, Stream.PIECES)
        row, slot, size, text = self.items.drawn(self.packing, index, keys)
        keys = fold(epoch_keys(seed, epoch, Stream.PAIRS)[row], text)
        opening, after, document = self.items.records[text].T
        first, second = self._divided(_Texts(opening, after, document, size), keys)
        starts, lengths = np.zeros((2, len(index), self.max_pieces), np.int64)
        for place, (begin, end) in enumerate((first, second)):
            starts[row, 2 * slot + place] = begin
            lengths[row, 2 * slot + place] = end - begin
        return starts * (lengths > 0), lengths

    def read(
        self,
        starts: Int[Numpy, "B G"],
        piece_lengths: Int[Numpy, "B G"],
        *,
        word_starts: bool = True,
    ) -> dict[str, np.ndarray]:
        """Rows of pieces `A _ B`, with room for a token between the two.

        `piece_lengths` count that token; `second_lengths` int32 [B, G] are those of the Bs, and
        `pair_labels` int32 [B, G] are 0 where B follows A in its document.
        """
        first, second = piece_lengths[:, 0::2], piece_lengths[:, 1::2]
        pieces = first + second + (second > 0)
        begins = np.cumsum(pieces, axis=1) - pieces
        column = np.arange(self.capacity)
        inside = column < pieces.sum(axis=1)[:, None]
        row, slot = np.nonzero(second)
        inside[row, (begins + first)[row, slot]] = False
        found = read_views(
            self.split, starts.ravel(), piece_lengths.ravel(), word_starts=word_starts
        )
        rows = {}
        for name, flat in found.items():
            rows[name] = np.zeros(inside.shape, flat.dtype)
            rows[name][inside] = flat
        documents = self.split.document_offsets.searchsorted(starts, side="right")
        follows = (documents[:, 0::2] == documents[:, 1::2]) & (starts[:, 0::2] < starts[:, 1::2])
        return rows | {
            "piece_lengths": pieces.astype(np.int32),
            "second_lengths": second.astype(np.int32),
            "pair_labels": ((second > 0) & ~follows).astype(np.int32),
        }

    def estimated_tokens(self) -> int:
        """Positions of an epoch that are no padding; by a sample of rows where there are many."""
        count = min(self.rows_per_epoch, _SAMPLE)
        index = np.arange(count)
        keys = epoch_keys(0, np.zeros(1, np.int64), Stream.ORDER)
        lengths = self.views(0, index * 0, permute(index, self.rows_per_epoch, keys))[1]
        specials = 2 * np.count_nonzero(lengths[:, 0::2]) + np.count_nonzero(lengths[:, 1::2])
        return round((int(lengths.sum()) + specials) * self.rows_per_epoch / count)

    def _divided(self, texts: _Texts, keys: Keys) -> tuple["_Span", "_Span"]:
        """A and B of texts, in tokens of the stream."""
        offsets = self.split.sentence_offsets
        begin, end, document, size = texts
        draws = words(keys, Stream.PAIRS, 3 + _DOCUMENTS_DRAWN)
        sentences = end - begin
        border = begin + np.where(sentences > 1, 1 + scaled(draws[:, 0], sentences - 1), 1)
        a = _Span(offsets[begin], offsets[border])
        b = _Span(offsets[border], offsets[end])
        negative = (draws[:, 1] < NEGATIVE_SHARE * 2.0**32) & (sentences > 1)
        random = negative if self.layout.negatives == "random" else np.zeros_like(negative)
        if self.layout.lone == "random":
            random = random | (sentences == 1)
        if self.layout.negatives == "swapped":
            a, b = _choose(negative, b, a), _choose(negative, a, b)
        if random.any():
            wanted = (size - (a.end - a.begin))[random]
            other = self._elsewhere(document[random], wanted, draws[random, 2:])
            b = _Span(b.begin.copy(), b.end.copy())
            b.begin[random], b.end[random] = other
        return _truncated(a, b, size, keys)

    def _elsewhere(
        self, document: Int[Numpy, " N"], wanted: Int[Numpy, " N"], draws: np.ndarray
    ) -> "_Span":
        """Whole sentences of another document, enough of them wherever the document has enough.

        Of the documents drawn the first that is long enough, or else the longest; in it a random
        one of the sentences that have enough behind them.
        """
        offsets = self.split.sentence_offsets
        wanted = np.maximum(wanted, 1)
        others = scaled(draws[:, 1:], self.split.documents - 1)
        others += others >= document[:, None]
        borders = self.split.document_offsets[np.stack([others, others + 1])]
        lengths = borders[1] - borders[0]
        chosen = np.argmax(np.minimum(lengths, wanted[:, None]), axis=1)
        start, stop = borders[:, np.arange(len(document)), chosen]
        first, last = offsets.searchsorted(np.stack([start, stop]))
        fitting = offsets.searchsorted(np.maximum(stop - wanted, start), side="right") - first
        sentence = first + scaled(draws[:, 0], fitting)
        end = offsets.searchsorted(offsets[sentence] + wanted)
        return _Span(offsets[sentence], offsets[np.minimum(end, last)])


class _Span(NamedTuple):
    """Tokens [begin, end) of the stream."""

    begin: Int[Numpy, " N"]
    end: Int[Numpy, " N"]


def _choose(condition: Bool[Numpy, " N"], one: _Span, other: _Span) -> _Span:
    return _Span(*(np.where(condition, x, y) for x, y in zip(one, other, strict=True)))


def _truncated(a: _Span, b: _Span, size: Int[Numpy, " N"], keys: Keys) -> tuple[_Span, _Span]:
    """Takes tokens from the longer of A and B, from its front or back by coin, until they fit."""
    first, second = a.end - a.begin, b.end - b.begin
    excess = np.maximum(first + second - size, 0)
    # The longer one alone until they are equal, then both in turn, B first.
    difference = first - second
    alone = np.minimum(excess, np.abs(difference))
    rest = excess - alone
    from_a = np.where(difference > 0, alone, 0) + rest // 2
    from_b = np.where(difference < 0, alone, 0) + (rest + 1) // 2
    cut = np.flatnonzero(excess)
    spans = []
    for stream, span, count in ((Stream.PAIR_CUT_A, a, from_a), (Stream.PAIR_CUT_B, b, from_b)):
        front = np.zeros_like(count)
        front[cut] = _coins(keys[cut], stream, count[cut])
        spans.append(_Span(span.begin + front, span.end - (count - front)))
    return spans[0], spans[1]


def _coins(keys: Keys, stream: Stream, count: Int[Numpy, " N"]) -> Int[Numpy, " N"]:
    """How many of `count` coins fall heads."""
    if not len(count) or not count.any():
        return np.zeros_like(count)
    tossed = bits(keys, stream, -(-int(count.max()) // 64))
    left = np.clip(count[:, None] - 64 * np.arange(tossed.shape[1]), 0, 64)
    # A shift by 64 is undefined: those words are dropped by the second factor.
    kept = tossed >> (np.uint64(64) - np.maximum(left, 1).astype(np.uint64))
    return (np.bitwise_count(kept) * (left > 0)).sum(axis=1).astype(np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedFraming(Framing):
    """Another framing's batch for rows of `[CLS] A [SEP] B [SEP]`, with types and labels.

    Arrays beside the other framing's: `token_type_ids` int32 [B, L], 0 for A, its [CLS] and [SEP]
    and for padding, 1 for B and its [SEP]; `pair_positions` int32 [B, G], where each pair's [CLS]
    stands; `pair_labels` int32 [B, G], 0 where B follows A; `pair_weights` float32 [B, G], 0 for
    slots that hold no pair. G is `most`.
    """

    inner: Framing
    most: int

    specials_per_piece: ClassVar[int] = 3

    @property
    def reads_word_starts(self) -> bool:
        """As the other framing."""
        return self.inner.reads_word_starts

    def examples(self, rows: Batch, keys: Keys, step: int) -> dict[str, np.ndarray]:
        """The other framing's examples, types and labels."""
        if "second_lengths" not in rows:
            rows = _halved(rows)
        (sep,) = token_ids(self.vocabulary, "sep")
        pieces, second = (rows[n].astype(np.int64) for n in ("piece_lengths", "second_lengths"))
        begins = np.cumsum(pieces, axis=1) - pieces
        row, slot = np.nonzero(second)
        ids = rows["ids"].copy()
        ids[row, (begins + pieces - second - 1)[row, slot]] = sep
        batch = self.inner.examples({**rows, "ids": ids}, keys, step)

        # A [CLS] and a [SEP] frame each piece; types change after the [SEP] within it.
        firsts = begins + 2 * (np.cumsum(pieces > 0, axis=1) - (pieces > 0))
        ends = firsts + pieces + 2
        changes = np.zeros((len(ids), self.length + 1), np.int8)
        changes[row, (ends - second - 1)[row, slot]] = 1
        changes[row, ends[row, slot]] -= 1
        pairs = {
            "pair_positions": firsts * (pieces > 0),
            "pair_labels": rows["pair_labels"],
            "pair_weights": second > 0,
        }
        spec = self.spec(len(ids))
        room = self.most - pieces.shape[1]
        return {
            **batch,
            "token_type_ids": np.cumsum(changes[:, :-1], axis=1, dtype=np.int32),
            **{
                name: np.pad(array, ((0, 0), (0, room))).astype(spec[name].dtype)
                for name, array in pairs.items()
            },
        }

    def spec(self, batch_size: int) -> dict[str, ArraySpec]:
        """Shapes and dtypes of a batch."""
        row, slots = (batch_size, self.length), (batch_size, self.most)
        return {
            **self.inner.spec(batch_size),
            "token_type_ids": ArraySpec(row, np.dtype(np.int32)),
            "pair_positions": ArraySpec(slots, np.dtype(np.int32)),
            "pair_labels": ArraySpec(slots, np.dtype(np.int32)),
            "pair_weights": ArraySpec(slots, np.dtype(np.float32)),
        }


def _halved(rows: Batch) -> dict[str, np.ndarray]:
    """Pieces without a border between two texts, as benchmarks make them, divided in the middle."""
    pieces = np.asarray(rows["piece_lengths"])
    ids = np.pad(rows["ids"], ((0, 0), (0, pieces.shape[1])))
    return {
        **rows,
        "ids": ids,
        "word_starts": np.pad(rows["word_starts"], ((0, 0), (0, pieces.shape[1]))),
        "piece_lengths": pieces + (pieces > 1),
        "second_lengths": pieces // 2,
        "pair_labels": np.zeros_like(pieces),
    }


__all__ = ["PairPlan", "PairedFraming", "SentencePairs"]
