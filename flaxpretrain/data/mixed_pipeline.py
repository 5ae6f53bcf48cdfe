"""The batches of a mixture: rows of several datasets, each framed for its own task."""

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flaxpretrain.config import Phase
from flaxpretrain.data.framing import ArraySpec, Framing
from flaxpretrain.data.mixing import MixedData, Mixing, Stretch, Turns
from flaxpretrain.data.pipeline import Batches, RowsOf, RowStream, own_seed, resolve
from flaxpretrain.data.rows import RowPlan
from flaxpretrain.data.store import Split
from flaxpretrain.errors import UserError
from flaxpretrain.shapes import Int, Numpy


class MixedPlan(NamedTuple):
    """What the rows of all parts come to: an epoch has as many rows as all parts together."""

    rows_per_epoch: int
    real_tokens_per_epoch: int
    padding_share: float


def mixed_plan(mixing: Mixing, plans: Sequence[RowPlan]) -> MixedPlan:
    """The mean row of a mixture."""
    shares = mixing.shares(plans)
    rows = sum(plan.rows_per_epoch for plan in plans)
    tokens = sum(
        share * plan.real_tokens_per_epoch / plan.rows_per_epoch
        for share, plan in zip(shares.tolist(), plans, strict=True)
    )
    return MixedPlan(rows, round(rows * tokens), 1 - tokens / plans[0].length)


class _Run(NamedTuple):
    """Steps of one phase under one mixing."""

    first: int
    turns: Turns
    turn: int
    """Rows of this mixing and length before the first step."""
    before: Int[Numpy, " P"]
    """Rows of each part, of this length, before this mixing began."""
    seen: dict[int, Int[Numpy, " P"]]
    """Rows of each part before the first step, by length."""


class MixedPipeline(Batches):
    """Training batches of a mixture by the number of the step.

    A pure function of datasets, seeds, step and the weights up to it. Each part has its own order
    and noise, by its name, and its own count of rows; when weights change at a step, every part
    goes on where it stood.
    """

    def __init__(
        self,
        splits: Mapping[str, Split],
        data: MixedData,
        framing_of: Callable[[str, int], Framing],
        phases: tuple[Phase, ...],
        *,
        order_seed: int,
        noise_seed: int,
        history: Sequence[Stretch] = (),
    ) -> None:
        """Plans every part at every length.

        Args:
            splits: what to read of each part, by its name.
            data: how it is mixed.
            framing_of: name of a part and row length -> framing.
            phases: in steps, tokens or epochs.
            order_seed: of the order of rows and of which pieces share one.
            noise_seed: of all noise.
            history: how steps were mixed so far; nothing: as `data` says, all along.

        Raises:
            UserError: a split is empty, a length too small, or tasks make different arrays.
        """
        self.names = [part.name for part in data.parts]
        for part in data.parts:
            if not (part.layout or data.layout).one_length:
                raise UserError(
                    f"data.parts: {part.name} has rows of several lengths, and a batch of a "
                    "mixture has rows of one: use Documents() or SentencePairs(), which pack"
                )
        lengths = sorted({phase.length for phase in phases})
        self.streams = {
            part.name: RowStream.of(
                splits[part.name],
                part.layout or data.layout,
                lambda length, name=part.name: framing_of(name, length),
                lengths,
                order_seed=own_seed(order_seed, part.name),
                noise_seed=own_seed(noise_seed, part.name),
                duplication=data.duplication,
                window_tokens=data.window_tokens,
            )
            for part in data.parts
        }
        self._history = tuple(history) or ((0, data.mixing()),)
        newest = self._history[-1][1]
        super().__init__(resolve(phases, lambda length: mixed_plan(newest, self._plans(length))))
        for length in lengths:
            self._check_specs(length)
        self._runs = self._planned()
        self._firsts = [run.first for run in self._runs]

    def _plans(self, length: int) -> list[RowPlan]:
        return [stream.plans[length] for stream in self.streams.values()]

    def _check_specs(self, length: int) -> None:
        """All parts must fill the same arrays."""
        specs = {name: s.framings[length].spec(1) for name, s in self.streams.items()}
        first, wanted = next(iter(specs.items()))
        for name, spec in specs.items():
            if spec == wanted:
                continue
            array = next(n for n in {**wanted, **spec} if wanted.get(n) != spec.get(n))
            shapes = [s[array].shape[1:] if array in s else "no such array" for s in (wanted, spec)]
            raise UserError(
                f"data.parts: {first} and {name} do not go into one batch: their {array} have the "
                f"shapes {shapes[0]} and {shapes[1]}; set objective.target_length, or the "
                "masking's max_predictions, to the same in both"
            )

    def _planned(self) -> list[_Run]:
        """The stretches in which neither phase nor mixing changes."""
        shares = {
            (number, length): Turns(mixing.shares(self._plans(length)))
            for number, (_, mixing) in enumerate(self._history)
            for length in {phase.length for phase in self.phases}
        }
        borders = {first for first, _ in self._history} | {0, *self._ends[:-1]}
        starts = sorted(border for border in borders if border < max(self.steps, 1))
        nothing = np.zeros(len(self.names), np.int64)
        mixed_by: dict[int, tuple[int, int, np.ndarray]] = {}
        runs = []
        for first, last in zip(starts, [*starts[1:], self.steps], strict=True):
            phase = self.position(first).phase
            length = phase.length
            number = bisect.bisect_right([step for step, _ in self._history], first) - 1
            old, turn, before = mixed_by.get(length, (number, 0, nothing))
            if old != number:
                before, turn = before + shares[old, length].before(turn), 0
            mixed_by[length] = (number, turn, before)
            seen = {
                other: base + shares[n, other].before(t) for other, (n, t, base) in mixed_by.items()
            }
            runs.append(_Run(first, shares[number, length], turn, before, seen))
            mixed_by[length] = (number, turn + (last - first) * phase.batch_size, before)
        return runs

    def _run(self, step: int) -> tuple[_Run, int]:
        """The stretch of a step, and its first turn."""
        run = self._runs[bisect.bisect_right(self._firsts, step) - 1]
        return run, run.turn + (step - run.first) * self.position(step).phase.batch_size

    def epochs(self, step: int) -> dict[str, float]:
        """How often the rows of each part came before `step`, over all lengths."""
        last = min(step, self.steps - 1)
        run, turn = self._run(last)
        phase = self.position(last).phase
        turn += (step - last) * phase.batch_size
        seen = run.seen | {phase.length: run.before + run.turns.before(turn)}
        epochs = np.zeros(len(self.names))
        for length, rows in seen.items():
            epochs += rows / np.array([plan.rows_per_epoch for plan in self._plans(length)])
        return dict(zip(self.names, epochs.tolist(), strict=True))

    def epoch(self, step: int) -> float:
        """Rows before `step` over those of all parts together."""
        _, phase, cursor = self.position(step)
        return cursor / sum(plan.rows_per_epoch for plan in self._plans(phase.length))

    def shares(self, step: int) -> dict[str, float]:
        """The share of each part in the rows of a step."""
        counts = self._run(step)[0].turns.counts
        return dict(zip(self.names, (counts / counts.sum()).tolist(), strict=True))

    def notes(self, step: int) -> list[str]:
        """A line a part: its share of the rows at `step`, and its epochs by the end of the run."""
        ends = self.epochs(self.steps)
        plans = self._plans(self.position(step).phase.length)
        lines = []
        for (name, share), plan in zip(self.shares(step).items(), plans, strict=True):
            line = (
                f"{name}: {share:.1%} of the rows, {ends[name]:.2f} epochs of "
                f"{plan.rows_per_epoch:,} rows in {self.steps:,} steps"
            )
            lines.append(line + (", so its text is repeated" if ends[name] > 1 else ""))
        return lines

    def spec(self, step: int) -> dict[str, ArraySpec]:
        """Shapes and dtypes of the global batch of a step."""
        phase = self.position(step).phase
        stream = next(iter(self.streams.values()))
        return stream.framings[phase.length].spec(phase.batch_size)

    def batch(self, step: int, rows: RowsOf | None = None) -> dict[str, np.ndarray]:
        """The batch of a step, or the rows of it that `rows` picks.

        Raises:
            ValueError: no phase has this step.
            UserError: the batch size does not fit the number of hosts.
        """
        phase = self.position(step).phase
        run, turn = self._run(step)
        picked = range(phase.batch_size)[rows(phase.batch_size) if rows else slice(None)]
        part, number = run.turns.at(turn + np.array(picked, np.int64))
        number += run.before[part]
        batch: dict[str, np.ndarray] = {}
        for index, stream in enumerate(self.streams.values()):
            mine = np.flatnonzero(part == index)
            if not len(mine):
                continue
            for name, array in stream.take(phase.length, number[mine], step).items():
                if name not in batch:
                    batch[name] = np.empty((len(part), *array.shape[1:]), array.dtype)
                batch[name][mine] = array
        return batch


__all__ = ["MixedPipeline", "MixedPlan", "mixed_plan"]
