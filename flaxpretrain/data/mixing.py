"""Mixtures of datasets: which part of the rows each gives, and the datasets opened as one."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxpretrain.config import Data
from flaxpretrain.data.rows import RowPlan
from flaxpretrain.data.store import Dataset, open_dataset
from flaxpretrain.errors import UserError
from flaxpretrain.locations import Location, is_remote, joined, located
from flaxpretrain.shapes import Float, Int, Numpy

_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One dataset of a mixture.

    name: what figures and splits of it are called by, "wiki/validation", say.
    folder: of the dataset; a relative one is looked for in `data.folder` (--data-dir), if given.
    weight: its share of all rows, up to a common factor; None lets its size decide. 0 leaves it to
        the evaluations.
    scale: counts its examples so many times where its size decides.
    layout: of its rows; None is that of the mixture.
    objective: what frames its rows, where its task is another than the run's; it makes arrays of
        the same shapes. None is that of the run.
    """

    name: str
    folder: str
    weight: float | None = None
    scale: float = 1.0
    layout: Any = None
    objective: Any = None
    split: str = "train"

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UserError(f"data.parts: a name has letters, digits, _ and -; got {self.name!r}")
        if self.weight is not None and not 0 <= self.weight < math.inf:
            raise UserError(f"the weight of {self.name} must be 0 or more; got {self.weight}")
        if not 0 < self.scale < math.inf:
            raise UserError(f"the scale of {self.name} must be positive; got {self.scale}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedData(Data):
    """Several datasets, of one tokenizer, in every batch.

    Where parts have no weights, their rates are those of seqio: min(scale * examples, limit) ^ (1 /
    temperature). An example is a piece of text or a pair; rows that hold several count for so many.
    `limit`, `temperature`, weights and scales may change when a run is resumed: each dataset goes
    on where it stood.

    Reference: mixing_rate_num_examples of seqio/utils.py; T5, https://arxiv.org/abs/1910.10683,
    section 3.5.2, with limits of 2^16 to 2^21 and temperatures of 2 to 8.
    """

    parts: tuple[Part, ...]
    limit: int | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Raises UserError where the parts cannot be mixed."""
        super().__post_init__()
        names = [part.name for part in self.parts]
        weights = [part.weight for part in self.parts]
        if not names or len(set(names)) < len(names):
            raise UserError(f"data.parts needs one part or more, of different names; got {names}")
        if None in weights and set(weights) != {None}:
            raise UserError(
                "data.parts: give every part a weight or none (then their sizes decide); got "
                + ", ".join(f"{n} {w}" for n, w in zip(names, weights, strict=True))
            )
        if None not in weights and not sum(w or 0 for w in weights):
            raise UserError("data.parts: all weights are 0, so no part gives a row")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"data.limit is a number of examples, 1 or more; got {self.limit}")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"data.temperature must be positive; got {self.temperature}")

    @property
    def is_remote(self) -> bool:
        """Whether one of the datasets lies in a store that answers requests."""
        return any(map(is_remote, self.folders()))

    def folder_in(self, workdir: Path) -> Location:
        """That of the first part, whose tokenizer is that of all."""
        return self.folders()[0]

    def folders(self) -> list[Location]:
        """Of all parts."""
        base = located(self.folder) if self.folder is not None else Path()
        return [joined(base, part.folder) for part in self.parts]

    def part_of(self, split: str) -> Part | None:
        """The part that a split such as "wiki/validation" belongs to."""
        name = split.partition("/")[0]
        return next((part for part in self.parts if part.name == name), None)

    def mixing(self) -> "Mixing":
        """What may change when a run is resumed."""
        weights = [part.weight for part in self.parts if part.weight is not None]
        return Mixing(
            tuple(map(float, weights)) or None,
            tuple(float(part.scale) for part in self.parts),
            self.limit,
            float(self.temperature),
        )


class Mixing(NamedTuple):
    """What decides the share of each part, beside its size."""

    weights: tuple[float, ...] | None
    scales: tuple[float, ...]
    limit: int | None
    temperature: float

    def shares(self, plans: Sequence[RowPlan]) -> Float[Numpy, " P"]:
        """Which share of the rows each part gives; they sum to 1."""
        if self.weights is not None:
            shares = np.array(self.weights)
        else:
            examples = np.array([plan.examples_per_epoch for plan in plans], np.float64)
            rows = np.array([plan.rows_per_epoch for plan in plans], np.float64)
            # An example of a packed row takes only a part of it.
            shares = self.rates(examples) * rows / examples
        return shares / shares.sum()

    def rates(self, examples: Float[Numpy, " P"]) -> Float[Numpy, " P"]:
        """Examples-proportional rates: clipped first, then tempered."""
        clipped = np.minimum(np.array(self.scales) * examples, self.limit or np.inf)
        return clipped ** (1 / self.temperature)

    @staticmethod
    def parse(values: Sequence[Any]) -> "Mixing":
        """From what JSON makes of one."""
        weights, scales, limit, temperature = values
        return Mixing(tuple(weights) if weights else None, tuple(scales), limit, temperature)


Stretch = tuple[int, Mixing]
"""The first step that is mixed so, and how."""


def prolonged(history: Sequence[Stretch], mixing: Mixing, step: int) -> tuple[Stretch, ...]:
    """The history of a run that goes on from `step` with this mixing."""
    kept = tuple(stretch for stretch in history if stretch[0] < step)
    if not kept:
        return ((0, mixing),)
    return kept if kept[-1][1] == mixing else (*kept, (step, mixing))


class Turns:
    """Whose turn it is: rows in cycles in which each part has its share, evenly spread."""

    CYCLE = 1 << 16
    """Rows: shares are exact to one row of so many."""

    def __init__(self, shares: Float[Numpy, " P"]) -> None:
        """The parts whose share is not 0 take turns.

        Raises:
            UserError: a share is so small that the part would never have its turn.
        """
        wanted = shares * self.CYCLE
        counts = np.floor(wanted).astype(np.int64)
        largest = np.argsort(counts - wanted, kind="stable")
        counts[largest[: self.CYCLE - counts.sum()]] += 1
        if (counts[shares > 0] == 0).any():
            raise UserError(
                f"data.parts: a share of {shares[shares > 0].min():.2g} of the rows is below one "
                f"of {self.CYCLE:,}: raise its weight, or lower data.limit or raise "
                "data.temperature"
            )
        part = np.repeat(np.arange(len(shares)), counts)
        number = np.arange(self.CYCLE) - np.repeat(np.cumsum(counts) - counts, counts)
        order = np.lexsort((part, (number + 0.5) / counts[part]))
        self.counts, self._part, self._number = counts, part[order], number[order]

    def at(self, rows: Int[Numpy, " B"]) -> tuple[Int[Numpy, " B"], Int[Numpy, " B"]]:
        """The parts of rows counted from 0, and how many rows of the part came before each."""
        cycle, turn = np.divmod(rows, self.CYCLE)
        part = self._part[turn]
        return part, cycle * self.counts[part] + self._number[turn]

    def before(self, row: int) -> Int[Numpy, " P"]:
        """How many rows of each part come before a row."""
        cycle, turn = divmod(row, self.CYCLE)
        return cycle * self.counts + np.bincount(self._part[:turn], minlength=len(self.counts))


class MixedDataset(Dataset):
    """The datasets of a mixture: splits are called "part/split"."""

    def __init__(self, parts: Mapping[str, Dataset]) -> None:
        """Raises UserError where they were made with different tokenizers."""
        first = next(iter(parts.values()))
        for name, part in parts.items():
            if (part.fingerprint, part.vocabulary) != (first.fingerprint, first.vocabulary):
                raise UserError(
                    f"data.parts: {name} ({part.folder}) was made with another tokenizer than "
                    f"{next(iter(parts))} ({first.folder}): build both with the same one"
                )
        self.parts = dict(parts)
        self.files, self.fingerprint = first.files, first.fingerprint
        self.vocabulary, self.dtype = first.vocabulary, first.dtype
        self.metadata = mixed_metadata({name: part.metadata for name, part in parts.items()})
        self.splits = {
            f"{name}/{split}": part.splits[split]
            for name, part in parts.items()
            for split in part.splits
        }

    def verify(self) -> None:
        """As every part."""
        for part in self.parts.values():
            part.verify()


def open_mixed(data: MixedData) -> MixedDataset:
    """Opens all datasets of a mixture.

    Raises:
        UserError: one is missing or damaged, or has another tokenizer.
    """
    each = zip(data.parts, data.folders(), strict=True)
    return MixedDataset({part.name: open_dataset(folder) for part, folder in each})


class HeldOut(NamedTuple):
    """A split to evaluate on: what to call it, and how its rows are made where that is special."""

    label: str
    split: str
    layout: Any
    objective: Any


def held_out(data: Data, dataset: Dataset, split: str) -> list[HeldOut]:
    """The splits that `split` names: of a mixture, "validation" is that of every part that has one.

    Raises:
        UserError: there is none.
    """
    if not isinstance(data, MixedData):
        return [HeldOut("", split, data.layout, None)]
    wanted = [split] if "/" in split else [f"{part.name}/{split}" for part in data.parts]
    found = [name for name in wanted if name in dataset.splits] or [dataset.split(split).name]
    parts = {name: data.part_of(name) for name in found}
    return [
        HeldOut(
            name.partition("/")[0] if name != split else "",
            name,
            part.layout or data.layout,
            part.objective,
        )
        for name, part in parts.items()
        if part is not None
    ]


def mixed_metadata(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The content of `dataset.json` for several datasets as one."""
    every = list(parts.values())

    def said(name: str) -> list[str]:
        found = [metadata.get(name) for metadata in every]
        return [] if None in found else list(dict.fromkeys(map(str, found)))

    languages = said("language")
    authors = dict.fromkeys(m["attribution"] for m in every if m.get("attribution"))
    return {
        **every[0],
        "splits": {
            f"{name}/{split}": entry
            for name, metadata in parts.items()
            for split, entry in metadata["splits"].items()
        },
        "sources": [source for metadata in every for source in metadata["sources"]],
        # What one part does not say cannot be said of all.
        "licence": " AND ".join(said("licence")) or None,
        "attribution": "; ".join(authors) or None,
        "language": languages[0] if len(languages) == 1 else languages or None,
    }


__all__ = [
    "HeldOut",
    "MixedData",
    "MixedDataset",
    "Mixing",
    "Part",
    "Stretch",
    "Turns",
    "held_out",
    "mixed_metadata",
    "open_mixed",
    "prolonged",
]
