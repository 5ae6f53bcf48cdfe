"""The batch of a step: order, gather, frame, prefetch.

The global batch of step t is a pure function of (dataset, seeds, t), and the noise of a row of
(seed, epoch, row): never of the host, the thread or the clock. Resuming is an integer, and any
number of hosts trains on the same batches.
"""

import abc
import bisect
import dataclasses
import hashlib
import os
import queue
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from flaxpretrain.config import Phase
from flaxpretrain.data.framing import ArraySpec, Framing
from flaxpretrain.data.randomness import Stream, fold, permute, row_keys
from flaxpretrain.data.rows import Layout, RowPlan, epoch_keys
from flaxpretrain.data.sections import SectionReader, sectioned_plan
from flaxpretrain.data.store import Split
from flaxpretrain.errors import UserError
from flaxpretrain.shapes import Int, Numpy

_TOKENS_AT_A_TIME = 1 << 16
"""Tokens framed together: so many that numpy's calls cost little, so few that caches hold them."""

_DIGEST = "digest"

RowsOf = Callable[[int], slice]
"""Size of the global batch -> the rows of it that a host makes."""


@dataclasses.dataclass(frozen=True)
class Share:
    """The rows of host `index` of `count`: consecutive, equally many for each."""

    index: int
    count: int

    def __call__(self, batch_size: int) -> slice:
        """The rows of a global batch.

        Raises:
            UserError: the hosts cannot have equally many.
        """
        if batch_size % self.count:
            raise UserError(
                f"batch_size {batch_size} is not divisible by the number of hosts {self.count}: "
                f"use a multiple of {self.count}"
            )
        size = batch_size // self.count
        return slice(self.index * size, (self.index + 1) * size)


class Position(NamedTuple):
    """Where a step stands: its phase, and the rows of its length's plan that came before it."""

    number: int
    phase: Phase
    cursor: int


@runtime_checkable
class Epoch(Protocol):
    """What phases counted in tokens or epochs ask of a plan."""

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch."""
        ...

    @property
    def real_tokens_per_epoch(self) -> int:
        """Their positions that are no padding."""
        ...


def resolve(phases: tuple[Phase, ...], plan_of_length: Callable[[int], Epoch]) -> tuple[Phase, ...]:
    """Phases counted in steps; tokens (real ones, specials included) and epochs are rounded up."""
    resolved = []
    for phase in phases:
        if phase.steps is not None:
            resolved.append(phase)
            continue
        plan = plan_of_length(phase.length)
        if phase.tokens is not None:
            per_step = plan.real_tokens_per_epoch * phase.batch_size
            steps = -(-phase.tokens * plan.rows_per_epoch // per_step)
        else:
            rows = float(phase.epochs or 0) * plan.rows_per_epoch
            steps = int(-(-rows // phase.batch_size))
        resolved.append(dataclasses.replace(phase, steps=steps, tokens=None, epochs=None))
    return tuple(resolved)


class RowStream:
    """The rows of one split at some lengths, numbered over all epochs; each length has its plan."""

    def __init__(
        self,
        plans: Mapping[int, RowPlan],
        framings: Mapping[int, Framing],
        *,
        order_seed: int,
        noise_seed: int,
        duplication: int | None = None,
    ) -> None:
        """Plans and framings by length; `Pipeline` says what the others are.

        Raises:
            UserError: an impossible duplication.
        """
        if duplication is not None and duplication < 1:
            raise UserError(f"data.duplication must be positive or None; got {duplication}")
        self.plans, self.framings = plans, framings
        self.order_seed, self.noise_seed = order_seed, noise_seed
        self.duplication = duplication

    @classmethod
    def of(
        cls,
        split: Split,
        layout: Layout,
        framing_of: Callable[[int], Framing],
        lengths: Iterable[int],
        *,
        window_tokens: int | None = None,
        **options: Any,
    ) -> "RowStream":
        """Plans every length.

        Raises:
            UserError: the split is empty, or a length is too small.
        """
        framings = {length: layout.framing(framing_of(length)) for length in lengths}
        reader = SectionReader(split, window_tokens) if window_tokens is not None else None
        plans = {
            length: sectioned_plan(layout, reader, framing.room())
            if reader
            else layout.fill(split, framing.room())
            for length, framing in framings.items()
        }
        return cls(plans, framings, **options)

    def take(self, length: int, number: Int[Numpy, " B"], step: int) -> dict[str, np.ndarray]:
        """The batch of the rows with these numbers, in which an epoch follows the one before."""
        plan = self.plans[length]
        epoch, row = np.divmod(number, plan.rows_per_epoch)
        index = plan.shuffled(self.order_seed, epoch, row)
        plan.read_ahead(self.order_seed, epoch, row)
        if self.duplication is not None:
            epoch %= self.duplication
        keys = row_keys(self.noise_seed, epoch, index)
        batch: dict[str, np.ndarray] = {}
        for part, where, local in plan.parts(index):
            views = part.views(self.order_seed, epoch[where], local)
            made = _assemble(part, self.framings[length], *views, keys[where], step)
            if len(where) == len(index):
                return made
            for name, array in made.items():
                if name not in batch:
                    batch[name] = np.empty((len(index), *array.shape[1:]), array.dtype)
                batch[name][where] = array
        return batch


class Batches(abc.ABC):
    """Training batches by the number of the step."""

    def __init__(self, phases: tuple[Phase, ...]) -> None:
        """`phases` are counted in steps."""
        self.phases = phases
        self._ends = np.cumsum([phase.steps or 0 for phase in phases]).tolist()

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return self._ends[-1]

    def position(self, step: int) -> Position:
        """The phase of a step and its cursor, in closed form.

        Raises:
            ValueError: no phase has this step.
        """
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} is outside the {self.steps} steps of all phases")
        number = bisect.bisect_right(self._ends, step)
        phase = self.phases[number]
        cursor = sum(
            (earlier.steps or 0) * earlier.batch_size
            for earlier in self.phases[:number]
            if earlier.length == phase.length
        )
        begun = step - (self._ends[number] - (phase.steps or 0))
        return Position(number, phase, cursor + begun * phase.batch_size)

    def shape(self, step: int) -> Phase:
        """The rows of a step, their length and number: those of its phase, as a rule."""
        return self.position(step).phase

    @abc.abstractmethod
    def epoch(self, step: int) -> float:
        """Epochs of the present length's rows that came before `step`."""

    @abc.abstractmethod
    def spec(self, step: int) -> dict[str, ArraySpec]:
        """Shapes and dtypes of the global batch of a step."""

    @abc.abstractmethod
    def batch(self, step: int, rows: RowsOf | None = None) -> dict[str, np.ndarray]:
        """The batch of a step, or the rows of it that `rows` (a `Share`, say) picks.

        Raises:
            ValueError: no phase has this step.
            UserError: the batch size does not fit the number of hosts.
        """

    def iterate(
        self, start: int, stop: int, rows: RowsOf | None = None, ahead: int = 2
    ) -> Iterator[dict[str, np.ndarray]]:
        """The batches of steps `start` to `stop` - 1, made by a thread up to `ahead` in advance.

        What goes wrong in the thread is raised here. The thread ends with the iterator: when it is
        exhausted, closed, or forgotten.
        """
        return prefetch((self.batch(step, rows) for step in range(start, stop)), ahead)


class Pipeline(Batches):
    """Training batches of one split by the number of the step.

    Each row length has its own plan and its own count of rows, which goes on when a later phase
    has that length again. A batch may begin in one epoch and end in the next.
    """

    def __init__(
        self,
        split: Split,
        layout: Layout,
        framing_of: Callable[[int], Framing],
        phases: tuple[Phase, ...],
        *,
        order_seed: int,
        noise_seed: int,
        duplication: int | None = None,
        window_tokens: int | None = None,
    ) -> None:
        """Plans every length.

        Args:
            split: what to read.
            layout: how it becomes rows.
            framing_of: row length -> framing.
            phases: in steps, tokens or epochs.
            order_seed: of the order of rows and of which pieces share one.
            noise_seed: of all noise.
            duplication: None draws new noise in every epoch (dynamic masking); n repeats that of
                the first n epochs, packing included (static masking with n copies of the data).
            window_tokens: None shuffles all rows of an epoch among each other; n those of windows
                of about n tokens, which are read one after another.

        Raises:
            UserError: the split is empty, or a length is too small.
        """
        self._stream = RowStream.of(
            split,
            layout,
            framing_of,
            sorted({phase.length for phase in phases}),
            order_seed=order_seed,
            noise_seed=noise_seed,
            duplication=duplication,
            window_tokens=window_tokens,
        )
        super().__init__(resolve(phases, self.plans.__getitem__))

    @property
    def plans(self) -> Mapping[int, RowPlan]:
        """By length."""
        return self._stream.plans

    @property
    def framings(self) -> Mapping[int, Framing]:
        """By length."""
        return self._stream.framings

    def epoch(self, step: int) -> float:
        """Epochs of the present length's rows that came before `step`."""
        _, phase, cursor = self.position(step)
        return cursor / self.plans[phase.length].rows_per_epoch

    def spec(self, step: int) -> dict[str, ArraySpec]:
        """Shapes and dtypes of the global batch of a step."""
        phase = self.position(step).phase
        return self.framings[phase.length].spec(phase.batch_size)

    def batch(self, step: int, rows: RowsOf | None = None) -> dict[str, np.ndarray]:
        """The batch of a step, or the rows of it that `rows` (a `Share`, say) picks.

        Raises:
            ValueError: no phase has this step.
            UserError: the batch size does not fit the number of hosts.
        """
        _, phase, cursor = self.position(step)
        picked = range(phase.batch_size)[rows(phase.batch_size) if rows else slice(None)]
        return self._stream.take(phase.length, cursor + np.array(picked, np.int64), step)


def _assemble(
    plan: RowPlan,
    framing: Framing,
    starts: Int[Numpy, "B G"],
    piece_lengths: Int[Numpy, "B G"],
    keys: np.ndarray,
    step: int,
) -> dict[str, np.ndarray]:
    """Reads and frames views, a cacheful of rows at a time, into arrays of the framing's spec."""
    batch_size = len(starts)
    batch = {name: np.empty(*spec) for name, spec in framing.spec(batch_size).items()}
    chunk = max(1, _TOKENS_AT_A_TIME // framing.length)
    for begin in range(0, batch_size, chunk):
        part = slice(begin, begin + chunk)
        rows = plan.read(starts[part], piece_lengths[part], word_starts=framing.reads_word_starts)
        if framing.reads_sentence_starts:
            rows["sentence_starts"] = plan.sentence_starts(starts[part], piece_lengths[part])
        if framing.reads_document_ends:
            rows["document_ends"] = plan.document_ends(starts[part], piece_lengths[part])
        for name, array in framing.examples(rows, keys[part], step).items():
            batch[name][part] = array
    return batch


def evaluation_batches(
    split: Split,
    layout: Layout,
    framing: Framing,
    batch_size: int,
    seed: int,
    limit_rows: int | None = None,
    rows: RowsOf | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every row of a split once, in order, with noise fixed by `seed`, whatever the batch size.

    `limit_rows` keeps so many rows, picked at random by `seed`. The last batch is filled up with
    rows of length 0, which weigh zero. `rows` picks a host's share of each batch.

    Raises:
        UserError: the split is empty, the length too small, or the batch size impossible.
    """
    if batch_size < 1 or (limit_rows is not None and limit_rows < 1):
        raise UserError(
            f"batch_size and limit_rows must be positive; got {batch_size} and {limit_rows}"
        )
    framing = layout.framing(framing)
    plan = layout.fill(split, framing.room())
    index = np.arange(plan.rows_per_epoch)
    if limit_rows is not None and limit_rows < plan.rows_per_epoch:
        order = epoch_keys(seed, np.zeros(1, np.int64), Stream.ORDER)
        index = np.sort(permute(index[:limit_rows], plan.rows_per_epoch, order))
    picked = rows(batch_size) if rows else slice(None)
    return _evaluate(plan, framing, index, batch_size, picked, seed)


def _evaluate(
    plan: RowPlan, framing: Framing, index: np.ndarray, batch_size: int, picked: slice, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    for begin in range(0, len(index), batch_size):
        here = np.arange(begin, begin + batch_size)[picked]
        real = here < len(index)
        chosen = index[np.minimum(here, len(index) - 1)]
        epoch = np.zeros_like(chosen)
        starts, piece_lengths = plan.views(seed, epoch, chosen)
        piece_lengths = piece_lengths * real[:, None]
        # Step 0: evaluation knows no schedule of rates.
        yield _assemble(plan, framing, starts, piece_lengths, row_keys(seed, epoch, chosen), 0)


def own_seed(seed: int, name: str) -> int:
    """The seed of one of several streams: equal row numbers of two of them share no draws."""
    root = np.full(1, seed & ((1 << 64) - 1), np.uint64)
    return int(fold(root, zlib.crc32(name.encode()))[0])


class _Failure(NamedTuple):
    error: BaseException


def prefetch(
    batches: Iterator[Mapping[str, np.ndarray]], ahead: int
) -> Iterator[dict[str, np.ndarray]]:
    """Draws from an iterator in a thread that stays up to `ahead` items in advance."""
    if ahead < 1:
        raise ValueError(f"ahead must be at least 1; got {ahead}")
    done = object()
    ready: queue.SimpleQueue = queue.SimpleQueue()
    room = threading.Semaphore(ahead)
    stopped = threading.Event()

    def work() -> None:
        try:
            while True:
                room.acquire()
                if stopped.is_set():
                    return
                item = next(batches, done)
                ready.put(item)
                if item is done:
                    return
        except BaseException as error:
            ready.put(_Failure(error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not done:
            if isinstance(item, _Failure):
                raise item.error
            room.release()
            yield item
    finally:
        stopped.set()
        room.release()
        thread.join()


def digest(batch: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the names, dtypes, shapes and contents of a batch, in hexadecimal."""
    sha = hashlib.sha256()
    for name in sorted(batch):
        array = np.asarray(batch[name])
        sha.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def dump(batch: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes a batch and its digest as .npz, aside first, then renamed."""
    aside = path.with_name(path.name + ".tmp")
    arrays: dict[str, Any] = {_DIGEST: np.array(digest(batch)), **batch}
    with aside.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(aside, path)


def replay(path: Path) -> dict[str, np.ndarray]:
    """The batch that `dump` wrote.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; `dump` writes batches as .npz")
    try:
        # Opened here: numpy leaves a file open that it cannot make sense of.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            batch = {name: arrays[name] for name in arrays.files}
        written = str(batch.pop(_DIGEST))
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is no dumped batch, or damaged: {error}") from error
    if digest(batch) != written:
        raise UserError(f"{path} is damaged: its arrays do not match the digest written with them")
    return batch
