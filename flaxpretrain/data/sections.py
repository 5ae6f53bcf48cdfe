"""Rows of a split that is read a section at a time: shuffled by sections, and within windows.

A section is some documents in a row, of about as many tokens as every other. In each epoch the
sections are put in another order, some consecutive ones of this order make a window, and the rows
of a window are shuffled among each other. So one window of text is in memory, and the next one is
read in the background. Which row comes when is a pure function of the seed and its number.
"""

import collections
import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from flaxpretrain.data.randomness import Stream, fold, permute
from flaxpretrain.data.room import Room
from flaxpretrain.data.rows import Layout, RowPlan, epoch_keys, require_text
from flaxpretrain.data.store import Shard, Split
from flaxpretrain.shapes import Int, Numpy, UInt

SECTIONS_PER_WINDOW = 16

READERS = 8
"""Sections that are read at the same time."""


class Text(NamedTuple):
    """The tokens of a section in memory."""

    ids: UInt[Numpy, " T"]
    words: UInt[Numpy, " W"]


class Section(Split):
    """Some documents of a split, as a split of their own, whose tokens a reader brings."""

    def __init__(self, reader: "SectionReader", number: int, first: int, last: int) -> None:
        """The documents `first` to `last` - 1."""
        whole = reader.split
        self.name, self.remote = whole.name, whole.remote
        self._whole, self._documents = whole, (first, last)
        self.documents = last - first
        self.first_token, end = np.asarray(whole.document_offsets[[first, last]]).tolist()
        self.tokens = end - self.first_token
        self.shards = (_SectionShard(reader, number, self.tokens),)

    @functools.cached_property
    def document_offsets(self) -> Int[Numpy, " D"]:
        """Where each document begins, and the end of the last; int64."""
        first, last = self._documents
        offsets = np.asarray(self._whole.document_offsets[first : last + 1], np.int64)
        return offsets - self.first_token

    @functools.cached_property
    def sentence_offsets(self) -> Int[Numpy, " S"]:
        """Where each sentence begins, and the end of the last; a document begins a sentence."""
        offsets = self._whole.sentence_offsets
        ends = [self.first_token, self.first_token + self.tokens]
        begin, end = offsets.searchsorted(np.array(ends))
        return np.asarray(offsets[begin : end + 1], np.int64) - self.first_token


class _SectionShard(Shard):
    """The one shard of a section; it keeps no text."""

    def __init__(self, reader: "SectionReader", number: int, tokens: int) -> None:
        super().__init__(0, tokens, lambda part: getattr(reader.text(number), part))

    @property
    def ids(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._opened("ids")

    @property
    def words(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._opened("words")


class SectionReader:
    """The sections of a split, and the text of those in use, read ahead in the background.

    Two windows of text are in memory at most: that in use, and the next.
    """

    def __init__(self, split: Split, window_tokens: int) -> None:
        """Raises UserError where the split is empty."""
        require_text(split)
        self.split = split
        size = max(window_tokens // SECTIONS_PER_WINDOW, 1)
        # A rest of less than half a section goes to the one before.
        marks = np.arange(0, max(split.tokens - size // 2, 1), size)
        begins = split.document_offsets.searchsorted(marks)
        borders = np.unique([*begins, split.documents]).tolist()
        self.sections = tuple(
            Section(self, number, first, last)
            for number, (first, last) in enumerate(itertools.pairwise(borders))
        )
        self._texts: collections.OrderedDict[int, Future[Text]] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(READERS)

    def ask(self, numbers: Iterable[int]) -> None:
        """Starts to read sections that are not there; forgets those not asked for the longest."""
        numbers = list(dict.fromkeys(numbers))
        with self._lock:
            for number in numbers:
                if number in self._texts:
                    self._texts.move_to_end(number)
                    continue
                future: Future[Text] = Future()
                self._texts[number] = future
                # A daemon: what it reads is wanted by nobody when the program ends.
                threading.Thread(target=self._work, args=(number, future), daemon=True).start()
            while len(self._texts) > max(2 * SECTIONS_PER_WINDOW, len(numbers)):
                self._texts.popitem(last=False)

    def text(self, number: int) -> Text:
        """The text of a section; waits until it is there.

        Raises:
            UserError: it could not be read.
        """
        with self._lock:
            future = self._texts.get(number)
        if future is None:
            self.ask([number])
            return self.text(number)
        try:
            return future.result()
        except BaseException:
            with self._lock:
                self._texts.pop(number, None)
            raise

    def _work(self, number: int, future: "Future[Text]") -> None:
        try:
            with self._free:
                future.set_result(self._read(self.sections[number]))
        except BaseException as error:
            future.set_exception(error)

    def _read(self, section: Section) -> Text:
        ids, opens = [], []
        begin, end = section.first_token, section.first_token + section.tokens
        for shard in self.split.shards:
            first, last = max(begin - shard.start, 0), min(end - shard.start, shard.tokens)
            if first < last:
                ids.append(shard.ids[first:last])
                octets = np.asarray(shard.words[first >> 3 : (last + 7) >> 3])
                bits = np.unpackbits(octets, bitorder="little")
                opens.append(bits[first & 7 :][: last - first])
        return Text(np.concatenate(ids), np.packbits(np.concatenate(opens), bitorder="little"))


class _Order(NamedTuple):
    """How the sections follow each other in one epoch, and where rows of them stand in it."""

    sections: np.ndarray
    ends: np.ndarray
    """Rows up to the end of each section of this order."""
    window_ends: np.ndarray
    """The same for windows."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SectionedPlan(RowPlan):
    """The rows of all sections, one section after another; each has its own plan."""

    reader: SectionReader
    layout: Layout
    room: Room
    first_rows: Int[Numpy, " S"]
    """Which row of the plan is the first of each section; at the end, how many there are."""
    examples: int

    @property
    def examples_per_epoch(self) -> int:
        """Those of all sections."""
        return self.examples

    def shuffled(
        self, seed: int, epoch: Int[Numpy, " B"], row: Int[Numpy, " B"]
    ) -> Int[Numpy, " B"]:
        """Which row of the plan comes as the `row`-th of an epoch: one of the present window."""
        found = np.empty_like(row)
        for number in np.unique(epoch).tolist():
            here = epoch == number
            order = self._order(seed, number)
            window = np.searchsorted(order.window_ends, row[here], side="right")
            begin = np.concatenate([[0], order.window_ends])[window]
            key = epoch_keys(seed, epoch[here], Stream.ORDER)
            size = order.window_ends[window] - begin
            place = begin + permute(row[here] - begin, size, fold(key, window))
            turn = np.searchsorted(order.ends, place, side="right")
            section = order.sections[turn]
            before = np.concatenate([[0], order.ends])[turn]
            found[here] = self.first_rows[section] + place - before
        return found

    def read_ahead(self, seed: int, epoch: Int[Numpy, " B"], row: Int[Numpy, " B"]) -> None:
        """Starts to read the window of these rows and the one that follows, or all they touch."""
        touched: list[tuple[int, int]] = []
        for number in np.unique(epoch).tolist():
            rows = row[epoch == number]
            window_ends = self._order(seed, number).window_ends
            ends = np.searchsorted(window_ends, [rows.min(), rows.max()], side="right")
            touched += [(number, window) for window in range(int(ends[0]), int(ends[1]) + 1)]
        if len(touched) == 1:
            number, window = touched[0]
            is_last = window + 1 == len(self._order(seed, number).window_ends)
            touched.append((number + 1, 0) if is_last else (number, window + 1))
        wanted: list[int] = []
        for number, window in touched:
            begin = window * SECTIONS_PER_WINDOW
            order = self._order(seed, number).sections
            wanted += order[begin : begin + SECTIONS_PER_WINDOW].tolist()
        self.reader.ask(wanted)

    def parts(
        self, index: Int[Numpy, " B"]
    ) -> Iterator[tuple[RowPlan, Int[Numpy, " P"], Int[Numpy, " P"]]]:
        """The plans of the sections that hold these rows."""
        section = np.searchsorted(self.first_rows, index, side="right") - 1
        for number in np.unique(section).tolist():
            where = np.flatnonzero(section == number)
            yield self._plan(number), where, index[where] - self.first_rows[number]

    def views(
        self, seed: int, epoch: Int[Numpy, " B"], index: Int[Numpy, " B"]
    ) -> tuple[Int[Numpy, "B G"], Int[Numpy, "B G"]]:
        """Not here: each of `parts` has views of its own section."""
        raise TypeError("the rows of a plan of sections are those of its parts()")

    @functools.cached_property
    def _order(self) -> Callable[[int, int], _Order]:
        return functools.lru_cache(maxsize=4)(self._make_order)

    @functools.cached_property
    def _plan(self) -> Callable[[int], RowPlan]:
        sections = self.reader.sections
        return functools.lru_cache(maxsize=2 * SECTIONS_PER_WINDOW)(
            lambda number: self.layout.fill(sections[number], self.room)
        )

    def _make_order(self, seed: int, epoch: int) -> _Order:
        counts = np.diff(self.first_rows)
        key = epoch_keys(seed, np.array([epoch]), Stream.SECTIONS)
        sections = permute(np.arange(len(counts)), len(counts), key)
        ends = np.cumsum(counts[sections])
        last = np.arange(SECTIONS_PER_WINDOW - 1, len(ends) - 1, SECTIONS_PER_WINDOW)
        return _Order(sections, ends, np.append(ends[last], ends[-1]))


def sectioned_plan(layout: Layout, reader: SectionReader, room: Room) -> SectionedPlan:
    """The rows that a layout makes of each section.

    Raises:
        UserError: the layout does not make such rows of a section.
    """
    plans = (layout.fill(section, room) for section in reader.sections)
    figures = [
        (p.rows_per_epoch, p.real_tokens_per_epoch, p.examples_per_epoch, p.max_pieces, p.capacity)
        for p in plans
    ]
    rows, tokens, examples, pieces, capacity = map(list, zip(*figures, strict=True))
    return SectionedPlan(
        split=reader.split,
        length=room.length,
        capacity=max(capacity),
        rows_per_epoch=sum(rows),
        real_tokens_per_epoch=sum(tokens),
        max_pieces=max(pieces),
        reader=reader,
        layout=layout,
        room=room,
        first_rows=np.cumsum([0, *rows]),
        examples=sum(examples),
    )


def plan_rows(
    layout: Layout, split: Split, room: Room, window_tokens: int | None = None
) -> RowPlan:
    """The rows of a split; with `window_tokens`, shuffled within windows of about so many.

    Raises:
        UserError: the split is empty, or the layout does not make such rows.
    """
    if window_tokens is None:
        return layout.fill(split, room)
    return sectioned_plan(layout, SectionReader(split, window_tokens), room)


__all__ = ["Section", "SectionReader", "SectionedPlan", "plan_rows", "sectioned_plan"]
