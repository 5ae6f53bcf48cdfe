"""Length buckets: batches of rows of one length each, all of as many tokens.

Each piece of text has a row to itself, of the shortest length that holds it; a batch of rows half
as long has twice as many. So there are as many shapes as lengths, each compiled once. Packing
(`Documents`, `SentencePairs`) pads less; buckets serve where a row must be one text.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np

from flaxpretrain.config import Phase
from flaxpretrain.data.framing import ArraySpec, Framing
from flaxpretrain.data.mixing import Turns
from flaxpretrain.data.pipeline import Batches, RowsOf, RowStream, own_seed, resolve
from flaxpretrain.data.room import Room
from flaxpretrain.data.rows import DocumentPlan, Layout, PaddedDocuments, RowPlan
from flaxpretrain.data.sentence_pairs import PairPlan, SentencePairs
from flaxpretrain.data.store import Split
from flaxpretrain.errors import UserError
from flaxpretrain.shapes import Bool, Float, Int, Numpy


@dataclasses.dataclass(frozen=True)
class LengthBuckets(Layout):
    """A piece a row, in rows of the shortest of some lengths that holds it.

    lengths: those below the phase's length, which is the last and the longest; each must divide it,
        so that batches of all lengths have equally many tokens.
    layout: what the pieces are: `PaddedDocuments()`, or `SentencePairs(most=1)`.

    Evaluations take every row at the phase's length.
    """

    lengths: tuple[int, ...]
    layout: Layout = PaddedDocuments()

    one_length: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Raises UserError where the lengths do not rise, or rows may hold several pieces."""
        rising = all(a < b for a, b in itertools.pairwise((0, *self.lengths)))
        if not self.lengths or not rising:
            raise UserError(
                "data.layout.lengths must be positive and ascending, (64, 128, 256), say; got "
                f"{self.lengths}"
            )
        layout = self.layout
        alone = isinstance(layout, PaddedDocuments) or (
            isinstance(layout, SentencePairs) and layout.most == 1
        )
        if not alone:
            raise UserError(
                "data.layout.layout of LengthBuckets must give each piece a row of its own: use "
                f"PaddedDocuments() or SentencePairs(most=1); got {layout}"
            )

    def fill(self, split: Split, room: Room) -> RowPlan:
        """Rows of one length, a piece each: what evaluations read."""
        return self.layout.fill(split, room)

    def framing(self, framing: Framing) -> Framing:
        """As the layout of the pieces."""
        return self.layout.framing(framing)

    def up_to(self, longest: int) -> tuple[int, ...]:
        """The lengths of the rows of a phase, ascending.

        Raises:
            UserError: one does not divide the longest.
        """
        lengths = (*(length for length in self.lengths if length < longest), longest)
        for length in lengths:
            if longest % length:
                raise UserError(
                    f"data.layout.lengths: {length} does not divide the phase's length {longest}, "
                    "so that batches would have other numbers of tokens: use "
                    f"{longest // 4} and {longest // 2}, say"
                )
        return lengths

    def plan_buckets(
        self, split: Split, framing_of: Callable[[int], Framing], longest: int
    ) -> "BucketedPlan":
        """The rows of a phase of `longest` tokens a row, in their buckets.

        Raises:
            UserError: the split is empty, a length is too small or does not divide the longest, or
                would have its turn too rarely.
        """
        room = self.framing(framing_of(longest)).room()
        whole = self.layout.fill(split, room)
        if not isinstance(whole, (DocumentPlan, PairPlan)):
            raise UserError(f"data.layout.layout {self.layout} has no rows to put into buckets")
        counts = whole.items.histogram
        # Where B of a pair is a random text, it may be shorter than its room.
        filled = whole.real_tokens_per_epoch / float(counts @ room.tokens)
        plans: dict[int, BucketPlan] = {}
        shorter = 0
        for length in self.up_to(longest):
            inside = (room.sizes > shorter) & (room.sizes <= length)
            shorter = length
            if not counts[inside].any():
                continue
            capacity = whole.capacity - (longest - length)
            plans[length] = BucketPlan(
                split=split,
                length=length,
                capacity=capacity,
                rows_per_epoch=int(counts[inside].sum()),
                real_tokens_per_epoch=round(float(counts[inside] @ room.tokens[inside]) * filled),
                max_pieces=whole.max_pieces,
                inner=dataclasses.replace(whole, length=length, capacity=capacity),
                # Rows of one piece come longest first.
                first=int(counts[room.sizes > length].sum()),
            )
        return BucketedPlan(longest, plans)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BucketPlan(RowPlan):
    """Consecutive rows of another plan, cut to a shorter length that holds them all."""

    inner: RowPlan
    first: int

    def views(
        self, seed: int, epoch: Int[Numpy, " B"], index: Int[Numpy, " B"]
    ) -> tuple[Int[Numpy, "B G"], Int[Numpy, "B G"]]:
        """Those of the other plan's rows."""
        return self.inner.views(seed, epoch, index + self.first)

    def read(
        self,
        starts: Int[Numpy, "B G"],
        piece_lengths: Int[Numpy, "B G"],
        *,
        word_starts: bool = True,
    ) -> dict[str, np.ndarray]:
        """As the other plan reads."""
        return self.inner.read(starts, piece_lengths, word_starts=word_starts)

    def sentence_starts(
        self, starts: Int[Numpy, "B G"], piece_lengths: Int[Numpy, "B G"]
    ) -> Bool[Numpy, "B T"]:
        """As the other plan finds them."""
        return self.inner.sentence_starts(starts, piece_lengths)


class BucketedPlan:
    """The rows of a split in buckets, counted as rows of the longest length."""

    def __init__(self, longest: int, plans: dict[int, BucketPlan]) -> None:
        """`plans` by length, none of them empty.

        Raises:
            UserError: a bucket has so few rows that it would never have its turn.
        """
        self.longest, self.plans = longest, plans
        positions = np.array([plan.rows_per_epoch * n for n, plan in plans.items()], np.float64)
        self.shares: Float[Numpy, " P"] = positions / positions.sum()
        """Of the steps, by length."""
        self.positions = int(positions.sum())
        if self.shares.min() * Turns.CYCLE < 1:
            length = list(plans)[int(self.shares.argmin())]
            raise UserError(
                f"data.layout.lengths: only {plans[length].rows_per_epoch} texts want rows of "
                f"{length} tokens, which is less than one batch in {Turns.CYCLE:,}: "
                + (f"leave {length} out" if length < longest else "shorten the phase's length")
            )

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the longest length that have as many positions."""
        return -(-self.positions // self.longest)

    @property
    def real_tokens_per_epoch(self) -> int:
        """Positions that are no padding."""
        return sum(plan.real_tokens_per_epoch for plan in self.plans.values())

    @property
    def padding_share(self) -> float:
        """Which part of all positions is padding."""
        return 1 - self.real_tokens_per_epoch / self.positions

    def shaped(self, phase: Phase, length: int) -> Phase:
        """The phase with rows of `length`, as many as have the tokens of its own batch."""
        size = phase.batch_size * self.longest // length
        return dataclasses.replace(phase, length=length, batch_size=size)

    def notes(self) -> list[str]:
        """A line a bucket."""
        return [
            f"rows of {length}: {plan.rows_per_epoch:,}, {share:.1%} of the steps, "
            f"{plan.padding_share:.1%} padding"
            for (length, plan), share in zip(self.plans.items(), self.shares, strict=True)
        ]


class BucketPipeline(Batches):
    """Training batches in buckets, by the number of the step: a pure function, as `Pipeline`'s are.

    Lengths take turns, each as often as its rows ask for and evenly spread. Each has its own order,
    noise and count of rows, so that all rows of a bucket come once in each of its epochs.
    """

    def __init__(
        self,
        split: Split,
        layout: LengthBuckets,
        framing_of: Callable[[int], Framing],
        phases: tuple[Phase, ...],
        *,
        order_seed: int,
        noise_seed: int,
        duplication: int | None = None,
    ) -> None:
        """As `Pipeline`.

        Raises:
            UserError: the split is empty, or a length is too small or does not divide the longest.
        """
        self.plans = {
            longest: layout.plan_buckets(split, framing_of, longest)
            for longest in sorted({phase.length for phase in phases})
        }
        super().__init__(resolve(phases, self.plans.__getitem__))
        self._streams = {
            (longest, length): RowStream(
                {length: plan},
                {length: layout.framing(framing_of(length))},
                order_seed=own_seed(order_seed, str(length)),
                noise_seed=own_seed(noise_seed, str(length)),
                duplication=duplication,
            )
            for longest, plans in self.plans.items()
            for length, plan in plans.plans.items()
        }
        self._turns = {longest: Turns(plans.shares) for longest, plans in self.plans.items()}

    def _turn(self, step: int) -> tuple[Phase, int, Sequence[Phase]]:
        """The phase of a step, how many steps of its length came before, in which phases."""
        number, phase, _ = self.position(step)
        begun = step - (self._ends[number] - (phase.steps or 0))
        same = [p for p in self.phases[:number] if p.length == phase.length]
        return phase, sum(p.steps or 0 for p in same) + begun, same

    def shape(self, step: int) -> Phase:
        """The phase of a step with the length of its bucket and as many rows as that takes."""
        phase, turn, _ = self._turn(step)
        plan = self.plans[phase.length]
        bucket = int(self._turns[phase.length].at(np.array([turn]))[0][0])
        return plan.shaped(phase, list(plan.plans)[bucket])

    def _rows_before(self, step: int) -> tuple[Phase, int]:
        """The shape of a step, and how many rows of its bucket came before."""
        phase, turn, same = self._turn(step)
        shape, plan, turns = self.shape(step), self.plans[phase.length], self._turns[phase.length]
        bucket = list(plan.plans).index(shape.length)
        rows = begin = 0
        for stretch in (*same, phase):
            end = min(begin + (stretch.steps or 0), turn)
            count = int((turns.before(end) - turns.before(begin))[bucket])
            rows += count * plan.shaped(stretch, shape.length).batch_size
            begin = end
        return shape, rows

    def epoch(self, step: int) -> float:
        """Positions of the present length's rows that came before `step`, over an epoch's."""
        _, phase, cursor = self.position(step)
        return cursor * phase.length / self.plans[phase.length].positions

    def spec(self, step: int) -> dict[str, ArraySpec]:
        """Shapes and dtypes of the global batch of a step: those of its bucket."""
        shape = self.shape(step)
        stream = self._streams[self.position(step).phase.length, shape.length]
        return stream.framings[shape.length].spec(shape.batch_size)

    def batch(self, step: int, rows: RowsOf | None = None) -> dict[str, np.ndarray]:
        """The batch of a step, or the rows of it that `rows` picks.

        Raises:
            ValueError: no phase has this step.
            UserError: the batch size does not fit the number of hosts.
        """
        shape, before = self._rows_before(step)
        picked = range(shape.batch_size)[rows(shape.batch_size) if rows else slice(None)]
        stream = self._streams[self.position(step).phase.length, shape.length]
        return stream.take(shape.length, before + np.array(picked, np.int64), step)


__all__ = ["BucketPipeline", "BucketPlan", "BucketedPlan", "LengthBuckets"]
