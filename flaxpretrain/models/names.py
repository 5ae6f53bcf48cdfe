"""Names of parameters in Transformers' checkpoints: tables of rules, applied in both directions.

Numpy only. Each architecture file lists its names as a tuple of entries: `Rule` for what is a
parameter, `Tie`, `Rename`, `Prefix` and `Drop` for all else that a checkpoint may hold.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from flaxpretrain.errors import UserError

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Same:
    """The array as it is."""

    def theirs(self, shape: Shape, vocab_size: int) -> Shape:
        """Shape of Transformers' array for ours."""
        return shape

    def load(self, array: np.ndarray, shape: Shape) -> np.ndarray:
        """Our array of this shape from theirs."""
        return array

    def save(self, array: np.ndarray, vocab_size: int) -> np.ndarray:
        """Their array from ours."""
        return array


@dataclasses.dataclass(frozen=True)
class Flat:
    """A bias by heads, which Transformers keeps flat."""

    def theirs(self, shape: Shape, vocab_size: int) -> Shape:
        """One axis for all of ours."""
        return (math.prod(shape),)

    def load(self, array: np.ndarray, shape: Shape) -> np.ndarray:
        """Split into heads."""
        return array.reshape(shape)

    def save(self, array: np.ndarray, vocab_size: int) -> np.ndarray:
        """Joined."""
        return array.reshape(-1)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel [inputs..., outputs...], which PyTorch keeps as [outputs, inputs].

    inputs: how many leading axes of ours are inputs.
    transposed: False where Transformers, too, has the inputs first (its Conv1D).
    """

    inputs: int = 1
    transposed: bool = True

    def theirs(self, shape: Shape, vocab_size: int) -> Shape:
        """Two axes, outputs first if `transposed`."""
        inputs, outputs = math.prod(shape[: self.inputs]), math.prod(shape[self.inputs :])
        return (outputs, inputs) if self.transposed else (inputs, outputs)

    def load(self, array: np.ndarray, shape: Shape) -> np.ndarray:
        """With the inputs first, then split into heads."""
        return (array.T if self.transposed else array).reshape(shape)

    def save(self, array: np.ndarray, vocab_size: int) -> np.ndarray:
        """Joined, then with the outputs first if `transposed`."""
        joined = array.reshape(math.prod(array.shape[: self.inputs]), -1)
        return joined.T if self.transposed else joined


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A table with a row for each token; ours has rows of zeros beyond the vocabulary.

    transposed: ours has the vocabulary on the last axis.
    lying: theirs has an axis of size 1 before all others.
    """

    transposed: bool = False
    lying: bool = False

    def theirs(self, shape: Shape, vocab_size: int) -> Shape:
        """As many rows as the vocabulary has tokens."""
        rest = shape[:-1] if self.transposed else shape[1:]
        return (*((1,) if self.lying else ()), vocab_size, *rest)

    def load(self, array: np.ndarray, shape: Shape) -> np.ndarray:
        """Padded with rows of zeros."""
        array = array[0] if self.lying else array
        rows = (shape[-1] if self.transposed else shape[0]) - array.shape[0]
        padded = np.pad(array, ((0, rows), *((0, 0),) * (array.ndim - 1)))
        return padded.T if self.transposed else padded

    def save(self, array: np.ndarray, vocab_size: int) -> np.ndarray:
        """Cut to the vocabulary."""
        cut = (array.T if self.transposed else array)[:vocab_size]
        return cut[None] if self.lying else cut


@dataclasses.dataclass(frozen=True)
class Part:
    """One of `count` equal parts of an array along an axis; each part has a rule of that name.

    whole: how the part is kept there.
    """

    index: int
    count: int
    axis: int
    whole: Same | Flat | Kernel | Vocabulary

    def theirs(self, shape: Shape, vocab_size: int) -> Shape:
        """As of the part, but of all parts along the axis."""
        theirs = list(self.whole.theirs(shape, vocab_size))
        theirs[self.axis] *= self.count
        return tuple(theirs)

    def load(self, array: np.ndarray, shape: Shape) -> np.ndarray:
        """The part."""
        return self.whole.load(np.split(array, self.count, self.axis)[self.index], shape)

    def save(self, array: np.ndarray, vocab_size: int) -> np.ndarray:
        """The part alone; `to_state_dict` joins the parts."""
        return self.whole.save(array, vocab_size)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A parameter: Transformers' name, `{}` for the number of the layer, and our path.

    A rule whose path the network lacks is out of force.
    """

    name: str
    path: str
    transform: Same | Flat | Kernel | Vocabulary | Part = Same()  # noqa: RUF009


@dataclasses.dataclass(frozen=True)
class Tie:
    """A name that holds the same array as `source`; where a checkpoint has only one, it serves.

    In force where `source` names a parameter of the network and `name` does not.
    write: whether an export repeats the array, for readers that look for both names.
    """

    name: str
    source: str
    write: bool = False


@dataclasses.dataclass(frozen=True)
class Rename:
    """An older spelling: the regex and what takes its place."""

    pattern: str
    replacement: str


@dataclasses.dataclass(frozen=True)
class Prefix:
    """What all names of the bare network begin with, except in checkpoints without any head.

    always: an export keeps it all the same, for networks whose head has no parameters.
    """

    prefix: str
    always: bool = False


@dataclasses.dataclass(frozen=True)
class Drop:
    """The regex of names that carry nothing for us, and why."""

    pattern: str
    reason: str


Entry = Rule | Tie | Rename | Prefix | Drop


class Loaded(NamedTuple):
    """Parameters from a checkpoint, and what a reader should know of how they were matched."""

    params: dict[str, Any]
    notes: tuple[str, ...]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested dict with their paths, `a/b/c`."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of these paths."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _rules(entries: tuple[Entry, ...], paths: Mapping[str, Any]) -> list[Rule]:
    """The rules in force; each parameter must have exactly one."""
    rules = [e for e in entries if isinstance(e, Rule) and e.path in paths]
    claimed = sorted(rule.path for rule in rules)
    if claimed != sorted(paths):
        odd = sorted(set(paths) ^ set(claimed)) or claimed
        raise ValueError(f"each parameter needs exactly one naming rule; look at {odd}")
    return rules


def _ties(entries: tuple[Entry, ...], rules: list[Rule]) -> list[Tie]:
    names = {rule.name for rule in rules}
    ties = [e for e in entries if isinstance(e, Tie)]
    return [tie for tie in ties if tie.source in names and tie.name not in names]


def _modern(tensors: Mapping[str, Any], entries: tuple[Entry, ...]) -> tuple[dict, list[str]]:
    """Today's name of every tensor -> its name in the checkpoint; and notes on what changed."""
    names, notes = {name: name for name in tensors}, []
    for entry in entries:
        if isinstance(entry, Prefix) and not any(n.startswith(entry.prefix) for n in names):
            names = {entry.prefix + new: old for new, old in names.items()}
        if isinstance(entry, Rename):
            renamed = {re.sub(entry.pattern, entry.replacement, n): n for n in names}
            changed = sum(new != old for new, old in renamed.items())
            if len(renamed) < len(names):
                raise UserError(
                    f"checkpoint: tensors named by {entry.pattern!r} are there twice, also by "
                    f"their newer names {entry.replacement!r}; remove one of each pair"
                )
            names = {new: names[old] for new, old in renamed.items()}
            if changed:
                notes.append(f"renamed {changed}: {entry.pattern} -> {entry.replacement}")
    return names, notes


class _Reader:
    """Takes tensors out of a checkpoint by today's names and remembers what went wrong."""

    def __init__(self, tensors: Mapping[str, Any], entries: tuple[Entry, ...], vocab_size: int):
        self.tensors, self.vocab_size = tensors, vocab_size
        self.names, self.notes = _modern(tensors, entries)
        self.left = set(self.names)
        self.missing: dict[str, list[str]] = {}
        self.wrong: list[str] = []

    def array(self, name: str) -> np.ndarray:
        return np.asarray(self.tensors[self.names[name]])

    def parameter(self, rule: Rule, shape: Shape, ties: Mapping[str, str]) -> np.ndarray | None:
        """The parameter of this shape, or None where any part of it is missing or misshapen."""
        stacked = "{}" in rule.name
        own = shape[1:] if stacked else shape
        result, whole = np.empty(shape, np.float32), True
        for index in range(shape[0] if stacked else 1):
            name = rule.name.format(index)
            found = name if name in self.names else ties.get(name)
            if found is None:
                self.missing.setdefault(rule.path, []).append(name)
                whole = False
                continue
            self.left.discard(found)
            array, expected = self.array(found), rule.transform.theirs(own, self.vocab_size)
            if array.shape != expected:
                self.wrong.append(f"{found}: shape {array.shape}, expected {expected}")
                whole = False
                continue
            result[index if stacked else ...] = rule.transform.load(array, own)
        return result if whole else None

    def excuse(self, ties: list[Tie], entries: tuple[Entry, ...], roots: set[str]) -> None:
        """Takes from the left-over names all that the entries explain."""
        for tie in ties:
            if tie.name in self.left and tie.source in self.names:
                if not tie.write and not np.array_equal(
                    self.array(tie.name), self.array(tie.source)
                ):
                    self.wrong.append(
                        f"{tie.name}: differs from {tie.source}, to which the configuration ties "
                        "it (tie_word_embeddings)"
                    )
                self.left.discard(tie.name)
                self.notes.append(f"dropped {tie.name}: tied to {tie.source}")
        reasons = [(e.pattern, e.reason) for e in entries if isinstance(e, Drop)]
        reasons += [
            (re.escape(e.name).replace(r"\{\}", r"\d+"), "the configuration has no such head")
            for e in entries
            if isinstance(e, Rule) and e.path.split("/")[0] not in roots
        ]
        for name in sorted(self.left):
            for pattern, reason in reasons:
                if re.fullmatch(pattern, name):
                    self.left.discard(name)
                    self.notes.append(f"dropped {name}: {reason}")
                    break


def vocabulary_tensors(tensors: Mapping[str, Any], entries: tuple[Entry, ...]) -> dict[str, bool]:
    """The names in a checkpoint of tensors with a row for each token; true where they lie."""
    rules: dict[str, Vocabulary] = {
        entry.name: entry.transform
        for entry in entries
        if isinstance(entry, Rule) and isinstance(entry.transform, Vocabulary)
    }
    rules |= {
        entry.name: rules[entry.source]
        for entry in entries
        if isinstance(entry, Tie) and entry.source in rules
    }
    names, _ = _modern(tensors, entries)
    return {old: rules[new].lying for new, old in names.items() if new in rules}


def to_params(
    tensors: Mapping[str, Any],
    entries: tuple[Entry, ...],
    shapes: Mapping[str, Any],
    vocab_size: int,
    *,
    initial: Mapping[str, Any] | None = None,
) -> Loaded:
    """Our parameters, float32 numpy arrays, from the tensors of a Transformers checkpoint.

    `shapes` is the nested dict of the network's parameters (`Model.abstract()`). With `initial`
    parameters, a head that the checkpoint lacks altogether keeps those. Raises one UserError that
    lists every name left over, missing, or of another shape.
    """
    wanted = {path: tuple(leaf.shape) for path, leaf in flatten(shapes)}
    fresh = dict(flatten(initial or {}))
    rules = _rules(entries, wanted)
    ties = _ties(entries, rules)
    reader = _Reader(tensors, entries, vocab_size)
    stand_ins = {tie.source: tie.name for tie in ties if tie.name in reader.names}
    params = {rule.path: reader.parameter(rule, wanted[rule.path], stand_ins) for rule in rules}
    roots = {path.split("/")[0] for path in wanted}
    reader.excuse(ties, entries, roots)
    for root in sorted(roots):
        paths = [path for path in wanted if path.split("/")[0] == root]
        if fresh and all(path in reader.missing for path in paths):
            for path in paths:
                del reader.missing[path]
                params[path] = np.asarray(fresh[path])
            reader.notes.append(f"kept {root} as initialised: the checkpoint has none")
    problems = [f"missing: {n}" for names in reader.missing.values() for n in names]
    problems += [f"left over: {name}" for name in sorted(reader.left)] + reader.wrong
    if problems:
        raise UserError(
            f"checkpoint: {len(problems)} names do not fit the configuration: "
            + "; ".join(problems)
        )
    return Loaded(nest({path: params[path] for path in wanted}), tuple(reader.notes))


def to_state_dict(
    params: Mapping[str, Any], entries: tuple[Entry, ...], vocab_size: int
) -> dict[str, np.ndarray]:
    """Tensors by Transformers' names, contiguous, from our parameters."""
    flat = dict(flatten(params))
    rules = _rules(entries, flat)
    tensors: dict[str, np.ndarray] = {}
    parts: dict[str, list[tuple[int, int, np.ndarray]]] = {}
    for rule in rules:
        array = np.asarray(flat[rule.path])
        for index, own in enumerate(array) if "{}" in rule.name else [(0, array)]:
            saved, name = rule.transform.save(own, vocab_size), rule.name.format(index)
            if isinstance(rule.transform, Part):
                part = (rule.transform.index, rule.transform.axis, saved)
                parts.setdefault(name, []).append(part)
            else:
                tensors[name] = np.ascontiguousarray(saved)
    for name, found in parts.items():
        found.sort(key=lambda part: part[0])
        tensors[name] = np.concatenate([part[2] for part in found], axis=found[0][1])
    for tie in _ties(entries, rules):
        if tie.write:
            tensors[tie.name] = tensors[tie.source].copy()
    for entry in entries:
        if not isinstance(entry, Prefix) or entry.always:
            continue
        if all(name.startswith(entry.prefix) for name in tensors):
            tensors = {name.removeprefix(entry.prefix): t for name, t in tensors.items()}
    return tensors
